"""``vitserve train``: a network for the classes of a directory, from scratch or from trained weights."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vitserve.cli.console import one_line_errors


def train(
    data: Annotated[
        Path,
        typer.Argument(
            help="Directory with a directory of images for each class, or with such directories in train/, val/ and "
            "test/; or an archive (.npz) of encoded images: {train,test}_{jpeg,offsets,labels} and classes."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the run. An existing run is resumed.")],
    source: Annotated[
        str,
        typer.Option(
            "--from", help="Fine-tune this checkpoint: any source of `vitserve export` that is a plain ViT or BiT."
        ),
    ] = "",
    variant: Annotated[
        str | None,
        typer.Option(help="Name of the network, from model/config.py. Default: compact-hybrid/4.", show_default=False),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pixels, side of the input. Position embeddings of --from are interpolated. Default: the network's.",
            show_default=False,
        ),
    ] = None,
    freeze: Annotated[bool, typer.Option("--freeze", help="Train only the head.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto, which takes a GPU if torch finds one.")] = "auto",
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Passes over the training set. Default: 6 on a CPU, 100 on a GPU.", show_default=False
        ),
    ] = None,
    patience: Annotated[
        int,
        typer.Option(
            min=0,
            help="End after so many epochs without a better validation accuracy, and keep the best weights. 0: all "
            "epochs.",
        ),
    ] = 0,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            min=1e-8,
            help="Greatest learning rate. Default: 0.002 on a CPU, 0.003 on a GPU; half of it with --from, a quarter "
            "for 12 or more blocks.",
            show_default=False,
        ),
    ] = None,
    layer_decay: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1,
            help="Learning rate of a block ÷ that of the next one. Default: 1, and 0.75 with --from for 12 or more "
            "blocks.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split, the initial weights, and the augmentation.")] = 0,
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
    """Train a network on labeled images, from scratch or from a checkpoint.

    Images may have any size, and there may be any number of classes. Writes weights.safetensors for `vitserve export`,
    training.json, a model card, and the curves as a plot if matplotlib is installed.
    """
    with one_line_errors("train"):
        from dataclasses import replace

        from vitserve.model.training.device import select_device
        from vitserve.model.training.recipe import LONG, QUICK, fine_tuning
        from vitserve.model.training.report import draw_curves, write_card
        from vitserve.model.training.samples import read_data_set
        from vitserve.model.training.start import from_scratch
        from vitserve.model.training.train import train as run

        if source and variant is not None:
            raise ValueError("--variant has no effect with --from: the network is that of the checkpoint")
        if freeze and not source:
            raise ValueError("--freeze needs --from: without trained weights, the other layers must learn too")
        place = select_device(device)
        recipe = LONG if place.type == "cuda" else QUICK
        data_set = read_data_set(data, recipe.validation_images, share, seed)
        if source:
            from vitserve.export.fine_tuning import start_from

            start = start_from(source, data_set.labels, image_size)
            recipe = fine_tuning(recipe, start.config)
        else:
            start = from_scratch(variant or "compact-hybrid/4", len(data_set.labels), image_size)
        stated: dict[str, Any] = {
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "layer_decay": layer_decay,
            "seed": seed,
            "share": share,
            "patience": patience,
            "frozen": freeze,
        }
        recipe = replace(recipe, **{name: value for name, value in stated.items() if value is not None})
        report = run(start, recipe, data_set, output, place, compiled)
        write_card(report, shlex.join(["vitserve", *sys.argv[1:]]), output / "MODEL_CARD.md")
        try:
            draw_curves(report, output / "curves.svg")
        except ImportError:
            typer.echo("no curves.svg: matplotlib is not installed (pip install 'vitserve[bench]')", err=True)
    weights = output / "weights.safetensors"
    typer.echo(f"test accuracy {report['test_accuracy']:.2%} after {report['seconds']} s → {weights}")
