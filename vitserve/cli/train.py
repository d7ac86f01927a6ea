"""``vitserve train``: a compact ViT, trained from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitserve.cli.console import one_line_errors


def train(
    data: Annotated[
        Path, typer.Argument(help="Archive (.npz) of encoded images: {train,test}_{jpeg,offsets,labels} and classes.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the run. An existing run is resumed.")],
    variant: Annotated[str, typer.Option(help="Name of the network, from model/config.py.")] = "compact-hybrid/4",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto, which takes a GPU if torch finds one.")] = "auto",
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Passes over the training set. Default: 6 on a CPU, 100 on a GPU.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights, the order, and the augmentation.")] = 0,
    share: Annotated[
        float,
        typer.Option(
            min=0.001, max=1, help="Share of the training set to use. A smaller share is part of a larger one."
        ),
    ] = 1.0,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images per step. Default: 192 on a CPU, 512 on a GPU.", show_default=False),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the network with torch.compile first. Pays on a GPU.")
    ] = False,
) -> None:
    """Train a compact ViT on labeled images.

    Takes less than an hour on two CPU cores. On a GPU it trains for more epochs.
    """
    with one_line_errors("train"):
        from dataclasses import replace

        from vitserve.model.config import any_variant
        from vitserve.model.training.device import select_device
        from vitserve.model.training.recipe import LONG, QUICK
        from vitserve.model.training.train import train as run

        place = select_device(device)
        recipe = LONG if place.type == "cuda" else QUICK
        recipe = replace(
            recipe, epochs=epochs or recipe.epochs, seed=seed, share=share, batch_size=batch_size or recipe.batch_size
        )
        report = run(any_variant(variant), recipe, data, output, place, compiled)
    weights = output / "weights.safetensors"
    typer.echo(f"test accuracy {report['test_accuracy']:.2%} after {report['seconds']} s → {weights}")
