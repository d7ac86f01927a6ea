"""The command line: one command per file. A command imports its stage when it runs, so ``--help`` is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from vitserve import __version__
from vitserve.cli import bench, export, head, image, inspect, predict, serve, train, tune, verify

# Without rich markup: it would swallow brackets in help texts, such as those of vitserve[export].
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

app.command("serve")(serve.serve)
app.command("export")(export.export)
app.command("predict")(predict.predict)
app.command("inspect")(inspect.inspect)
app.command("tune")(tune.tune)
app.command("bench")(bench.bench)
app.command("image")(image.image)
app.command("verify")(verify.verify)
app.command("train")(train.train)
app.add_typer(head.app, name="head", help="Further classifiers on the embeddings of a bundle.")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vitserve {__version__}")
        raise typer.Exit


@app.callback()
def vitserve(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Put a trained Vision Transformer into production."""
