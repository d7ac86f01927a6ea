"""The command line: one sub-command per stage. Each imports its stage only when it is asked for, so that --help is quick."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from service.settings import Settings, SettingsError

__version__ = "0.1.0"

app = typer.Typer(help="Put a trained Vision Transformer into production.", no_args_is_help=True, add_completion=False)


def _fail(error: Exception) -> typer.Exit:
    typer.secho(f"vitserve: {error}", fg="red", err=True)
    return typer.Exit(2)


def _serve(source: str, **values: Any) -> None:
    """Serve a model over HTTP: a bundle, or a SOURCE as `vitserve export` takes it, exported into the cache first. Without either, the one that comes along."""
    from service.supervisor import serve

    try:
        if source and values["bundle"]:
            raise SettingsError(f"both a source, {source}, and a bundle, {values['bundle']}, were named to be served")
        if source:
            values["bundle"] = _exported(source)
        status = serve(Settings(**values))
    except (ValueError, RuntimeError, OSError) as error:
        raise _fail(error) from error
    raise typer.Exit(status)


def _exported(source: str) -> str:
    """The folder of the source's bundle; a bundle stands for itself."""
    if (Path(source) / "bundle.json").exists():
        return source
    from export.cache import cached_bundle

    return str(cached_bundle(source, __version__, lambda step: typer.echo(step, err=True)))


def _settings_as_options() -> inspect.Signature:
    """One option per setting, --like-this, with VITSERVE_LIKE_THIS as its environment variable."""
    hints = get_type_hints(Settings)
    argument = typer.Argument(help="FILE or FOLDER of a checkpoint or bundle, hf:owner/name[@revision], timm:NAME; see docs/models.md.")
    parameters = [inspect.Parameter("source", inspect.Parameter.POSITIONAL_OR_KEYWORD, default="", annotation=Annotated[str, argument])]
    for each in dataclasses.fields(Settings):
        option = typer.Option(help=each.metadata["help"], envvar=f"VITSERVE_{each.name.upper()}")
        parameters.append(inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=Annotated[hints[each.name], option]))
    return inspect.Signature(parameters)


_serve.__signature__ = _settings_as_options()  # type: ignore[attr-defined]  # typer reads it
_serve.__annotations__ = {parameter.name: parameter.annotation for parameter in _settings_as_options().parameters.values()}
app.command("serve")(_serve)


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="FILE or FOLDER of a checkpoint, hf:owner/name[@revision], timm:NAME, or random:VARIANT; see docs/models.md.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle to write.")],
    name: Annotated[str, typer.Option(help="The model's name, as clients will see it; the source's own unless told.")] = "",
    version: Annotated[str, typer.Option(help="The model's version; the first digits of the graph's sha256 unless told.")] = "",
    image_size: Annotated[int, typer.Option(help="Pixels; positions are interpolated to it. 0 keeps the checkpoint's.")] = 0,
    labels: Annotated[Path | None, typer.Option(help="File of one label a line, in place of the checkpoint's.")] = None,
    architecture: Annotated[str, typer.Option(help="timm's name of the network, for a bare state dict of timm's.")] = "",
) -> None:
    """Export a checkpoint to a bundle, proving every engine equal to its source before it is accepted."""
    from rich.console import Console

    from export.build import ExportError, build_bundle
    from export.checkpoint import load_checkpoint

    console = Console(stderr=True)
    record = Path(source).with_name("training.json")
    try:
        checkpoint = load_checkpoint(
            source, image_size=image_size or None, labels=labels.read_text(encoding="utf-8").splitlines() if labels else None, architecture=architecture
        )
        with console.status("exporting") as status:

            def progress(step: str) -> None:
                status.update(step)
                console.print(f"[dim]{step}[/dim]")

            bundle = build_bundle(
                checkpoint,
                output,
                name=name or _name_of(source),
                version=version or None,
                training=json.loads(record.read_text()) if record.exists() else None,
                progress=progress,
            )
    except (ValueError, OSError, ExportError) as error:
        raise _fail(error) from error
    for artefact in bundle.manifest.artefacts:
        typer.echo(
            f"{artefact.engine} {artefact.precision}: logits differ by {artefact.parity.logits:.1e} of their range, "
            f"probabilities by {artefact.parity.probability:.1e}, top-1 agreement {artefact.parity.top1_agreement:.1%}"
        )
    typer.echo(f"{bundle.manifest.name} {bundle.manifest.version} → {output}")


def _name_of(source: str) -> str:
    """A file's folder or its own name where the folder says nothing; everything else as it was called."""
    path = Path(source)
    if not path.exists():
        return source
    return path.resolve().name if path.is_dir() else path.resolve().parent.name if path.name == "weights.safetensors" else path.stem


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="An .npz of encoded images: {train,test}_{jpeg,offsets,labels} and classes.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; a run already there goes on where it stopped.")],
    variant: Annotated[str, typer.Option(help="The network, a name from model/config.py.")] = "compact-hybrid/4",
    epochs: Annotated[int, typer.Option(help="Passes over the training set; the schedule is stretched over them.")] = 6,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights, the order, and the augmentation.")] = 0,
    share: Annotated[float, typer.Option(min=0.001, max=1, help="Of the training set, what is trained on; a smaller share is a part of a greater one.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 192,
) -> None:
    """Train a compact ViT on labelled images, on a CPU."""
    from model.config import any_variant
    from model.train import Recipe, train

    try:
        report = train(any_variant(variant), Recipe(epochs=epochs, seed=seed, share=share, batch_size=batch_size), data, output)
    except (ValueError, OSError) as error:
        raise _fail(error) from error
    typer.echo(f"test accuracy {report['test_accuracy']:.2%} after {report['seconds']} s → {output / 'weights.safetensors'}")


if __name__ == "__main__":
    app()
