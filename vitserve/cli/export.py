"""``vitserve export``: a checkpoint becomes a bundle."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vitserve.cli.console import one_line_errors, print_artifacts


class Precision(StrEnum):
    """Precisions besides fp32, which every bundle has."""

    bf16 = "bf16"
    int8 = "int8"
    fp8 = "fp8"


def export(
    source: Annotated[
        str,
        typer.Argument(
            help="Directory or file of a checkpoint, hf:owner/name[@revision], timm:NAME, or random:VARIANT. "
            "See docs/models.md."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the bundle to write.")],
    name: Annotated[str, typer.Option(help="Model name reported to clients. Default: taken from the source.")] = "",
    version: Annotated[
        str, typer.Option(help="Model version reported to clients. Default: the first digits of the graph's sha256.")
    ] = "",
    image_size: Annotated[
        int, typer.Option(help="Image size in pixels; position embeddings are resized to it. 0 keeps the checkpoint's.")
    ] = 0,
    labels: Annotated[
        Path | None, typer.Option(help="Text file with one label a line. Default: the checkpoint's labels.")
    ] = None,
    architecture: Annotated[
        str, typer.Option(help="timm's name of the network, for a state dict that does not name it.")
    ] = "",
    precision: Annotated[
        list[Precision] | None,
        typer.Option(help="Precision that the bundle must have besides fp32. Repeatable. Default: bf16."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Directory of images, or a training archive (.npz), to calibrate int8 and to evaluate precisions with."
        ),
    ] = None,
    calibration_images: Annotated[int, typer.Option(min=1, help="Number of images to calibrate with.")] = 300,
    evaluation_images: Annotated[int, typer.Option(min=1, help="Number of other images to evaluate with.")] = 1000,
    max_loss: Annotated[
        float,
        typer.Option(
            help="Accuracy in percentage points that bf16 and int8 may lose. Without labels, half of the predictions "
            "that change count as lost."
        ),
    ] = 0.5,
) -> None:
    """Export a checkpoint to a bundle.

    An engine's artifact is accepted only if its outputs are equal to the checkpoint's network within the tolerance.
    """
    from rich.console import Console

    console = Console(stderr=True)
    with one_line_errors("export"), console.status("exporting") as status:
        from vitserve.export.build_bundle import build_bundle
        from vitserve.export.checkpoint.load import load_checkpoint
        from vitserve.model.bundle.evaluation import read_images

        def progress(step: str) -> None:
            status.update(step)
            console.print(f"[dim]{step}[/dim]")

        checkpoint = load_checkpoint(
            source,
            image_size=image_size or None,
            labels=labels.read_text(encoding="utf-8").splitlines() if labels else None,
            architecture=architecture,
        )
        calibration = evaluation = None
        if images is not None:
            progress(f"reading images from {images}")
            calibration, evaluation = read_images(
                images, checkpoint.preprocessing, checkpoint.labels, calibration_images, evaluation_images
            )
        bundle = build_bundle(
            checkpoint,
            output,
            name=name or _name_of(source),
            version=version or None,
            training=_training_record(source),
            precisions=[choice.value for choice in precision] if precision else None,
            calibration_images=calibration,
            evaluation_images=evaluation,
            max_loss=max_loss,
            progress=progress,
        )
    print_artifacts(bundle)
    typer.echo(f"{bundle.manifest.name} {bundle.manifest.version} → {output}")


def _training_record(source: str) -> dict[str, Any] | None:
    """What `vitserve train` wrote beside the weights."""
    path = Path(source).with_name("training.json")
    record: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return record


def _name_of(source: str) -> str:
    """The source itself where it is no path; else the name of the directory, or of the file without its suffix."""
    path = Path(source)
    if not path.exists():
        return source
    if path.is_dir():
        return path.resolve().name
    return path.resolve().parent.name if path.name == "weights.safetensors" else path.stem
