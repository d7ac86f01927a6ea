"""``vitserve head``: further classifiers on the embeddings of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitserve.cli.console import one_line_errors

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

BundlePath = Annotated[Path, typer.Argument(help="Directory of a bundle.")]
Name = Annotated[str, typer.Argument(help="Name of the head, for the option `head` of requests.")]


@app.command()
def add(
    bundle: BundlePath,
    name: Name,
    weights: Annotated[
        Path,
        typer.Argument(
            help="File (.safetensors or .npz) with the weight [classes, width] and the bias of a linear layer, or "
            "scikit-learn's coef_ and intercept_."
        ),
    ],
    labels: Annotated[
        Path, typer.Option(help="Text file with one label a line, or a .json file with a list of labels.")
    ],
    activation: Annotated[str, typer.Option(help="softmax, or sigmoid for labels that do not exclude each other.")] = (
        "softmax"
    ),
) -> None:
    """Add a linear layer that was trained on the embeddings.

    A running service serves it within a second.
    """
    with one_line_errors("export"):
        from vitserve.export.checkpoint.labels import read_label_file
        from vitserve.export.heads.weights import read_layer
        from vitserve.model.bundle.bundle import open_bundle
        from vitserve.model.bundle.head import Head, HeadError, backbone_of, check_fits, write_head

        opened = open_bundle(bundle)
        if activation not in ("softmax", "sigmoid"):
            raise HeadError(f"activation is {activation!r}; it must be softmax or sigmoid")
        backbone = backbone_of(opened.manifest.files)
        head = Head(name, read_label_file(labels), *read_layer(weights), backbone, activation)  # type: ignore[arg-type]
        check_fits(head, backbone, opened.golden().reference.embedding.shape[1])
        typer.echo(f"{write_head(bundle, head)}: version {head.version}, classes: {len(head.labels)}")


@app.command()
def fit(
    bundle: BundlePath,
    name: Name,
    images: Annotated[Path, typer.Argument(help="Directory with a directory of images for each class.")],
    held_out: Annotated[float, typer.Option(help="Share of the images that measures the accuracy.")] = 0.2,
    engine: Annotated[str, typer.Option(help="As for `vitserve serve`.")] = "auto",
    precision: Annotated[str, typer.Option(help="As for `vitserve serve`.")] = "auto",
) -> None:
    """Fit a head on images: logistic regression on their embeddings.

    The accuracy is that of a head that was fitted without the held-out images. The head that is written was fitted on
    all images. A running service serves it within a second.
    """
    with one_line_errors("heads"):
        from vitserve.export.heads.fit import BATCH, fit_head
        from vitserve.model.bundle.bundle import open_bundle
        from vitserve.model.bundle.head import write_head
        from vitserve.service import machine
        from vitserve.service.engines.engine import EngineOptions

        options = EngineOptions(engine, precision, max_batch=BATCH, plan_dir=str(machine.plan_dir()))

        def note(text: str) -> None:
            typer.echo(text, err=True)

        fitted = fit_head(open_bundle(bundle), name, images, options, held_out, note)
        path, head = write_head(bundle, fitted.head), fitted.head
        typer.echo(f"{path}: version {head.version}, classes: {len(head.labels)}, images: {fitted.images}")
        typer.echo(f"accuracy on {fitted.held_out} held-out images: {100 * (head.accuracy or 0):.1f}%")


@app.command("list")
def list_heads(bundle: BundlePath) -> None:
    """List the heads of a bundle."""
    with one_line_errors():
        from vitserve.model.bundle.bundle import open_bundle
        from vitserve.model.bundle.head import HeadError, backbone_of, check_fits, head_files, read_head

        opened = open_bundle(bundle)
        width = opened.golden().reference.embedding.shape[1]
        for path in head_files(bundle).values():
            try:
                head = read_head(path)
                check_fits(head, backbone_of(opened.manifest.files), width)
            except HeadError as error:
                typer.echo(f"not served: {error}")
                continue
            accuracy = "" if head.accuracy is None else f", accuracy {100 * head.accuracy:.1f}%"
            typer.echo(f"{head.name}: version {head.version}, {', '.join(head.labels[:10])}{accuracy}")


@app.command()
def remove(bundle: BundlePath, name: Name) -> None:
    """Remove a head. A running service stops to serve it within a second."""
    with one_line_errors():
        from vitserve.model.bundle.head import HeadError, head_files

        path = head_files(bundle).get(name)
        if path is None:
            raise HeadError(f"{bundle} has no head {name!r}; it has: {', '.join(head_files(bundle)) or 'none'}")
        path.unlink()
