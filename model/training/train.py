"""Trains a ViT on an archive of labeled images, on a CPU or a GPU.

Muon for the matrices of the blocks and AdamW for the rest, a one-cycle schedule, mirrored and shifted images, mixup
until the last epochs, label smoothing, an exponential moving average of the weights, bf16 autocast.
A part of the training set is held out for validation. The test set is read once, after the last epoch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from vitserve.model.config import ResNetConfig, ViTConfig
from vitserve.model.training.data import ImageArchive, Labeled, normalize
from vitserve.model.training.device import CPU, describe_device
from vitserve.model.training.epoch import train_epoch
from vitserve.model.training.recipe import Recipe
from vitserve.model.training.state import TrainingState, initial_state


def train(
    config: ViTConfig | ResNetConfig,
    recipe: Recipe,
    archive_path: Path,
    run: Path,
    device: torch.device = CPU,
    compiled: bool = False,
) -> dict[str, Any]:
    """Trains in the directory ``run``, then tests once. Saves run/state.pt after every epoch; another call resumes it.

    ``compiled`` runs the network through torch.compile, which takes a minute and is faster on a GPU.

    Writes run/weights.safetensors, with configuration and labels in its metadata, and run/training.json, which it
    returns: recipe, history, seconds, machine, test accuracy and confusion table [true class][predicted class].

    Raises ValueError if the archive and the configuration differ in the number of classes, OSError.
    """
    archive = ImageArchive(archive_path)
    if len(archive.labels) != config.classes:
        raise ValueError(f"the archive has {len(archive.labels)} classes; the variant has {config.classes}")
    training_set, validation_set = (part.to(device) for part in hold_out(archive.split("train"), recipe))
    steps_per_epoch = len(training_set) // recipe.batch_size
    state = initial_state(config, recipe, steps_per_epoch * recipe.epochs, device)
    run.mkdir(parents=True, exist_ok=True)
    if (run / "state.pt").exists():
        state.restore(run / "state.pt")
    forward = torch.compile(state.network) if compiled else state.network
    with _progress_bar() as progress:
        total, completed = steps_per_epoch * recipe.epochs, steps_per_epoch * state.epoch
        task = progress.add_task("training", total=total, completed=completed)
        while state.epoch < recipe.epochs:
            _run_epoch(state, forward, training_set, validation_set, recipe, lambda: progress.advance(task))
            state.save(run / "state.pt")
            progress.console.print(_summary(state))
    round_to_half(state.average)  # test the weights as they are stored
    report = {
        "config": asdict(config),
        "labels": archive.labels,
        "recipe": asdict(recipe),
        "history": state.history,
        "seconds": round(state.seconds),
        "machine": f"{describe_device(device)}, torch {torch.__version__}",
        "training_images": len(training_set),
        **_test(state.average.to(CPU), archive.split("test"), recipe),
    }
    _save(state.average, report, recipe, run)
    return report


def _progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn())


def _test(network: nn.Module, test_set: Labeled, recipe: Recipe) -> dict[str, Any]:
    accuracy, confusion = evaluate(network, test_set, recipe)
    return {"test_images": len(test_set), "test_accuracy": accuracy, "confusion": confusion.tolist()}


def _run_epoch(
    state: TrainingState,
    forward: Callable[[Tensor], Any],
    training_set: Labeled,
    validation_set: Labeled,
    recipe: Recipe,
    advance: Callable[[], None],
) -> None:
    began = time.monotonic()
    loss = train_epoch(state, forward, training_set, recipe, advance)
    state.epoch += 1
    state.seconds += time.monotonic() - began
    accuracy, _ = evaluate(state.average, validation_set, recipe)
    state.history.append(
        {"epoch": state.epoch, "loss": loss, "validation_accuracy": accuracy, "seconds": state.seconds}
    )


def _summary(state: TrainingState) -> str:
    last = state.history[-1]
    accuracy = f"validation accuracy {last['validation_accuracy']:.2%}"
    return f"epoch {state.epoch}: loss {last['loss']:.3f}, {accuracy}, {state.seconds:.0f} s"


def _save(network: nn.Module, report: dict[str, Any], recipe: Recipe, run: Path) -> None:
    from safetensors.torch import save_file

    metadata = {
        "config": json.dumps(report["config"]),
        "labels": json.dumps(report["labels"]),
        "mean": json.dumps(recipe.mean),
        "std": json.dumps(recipe.std),
    }
    weights = {name: half(tensor).contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, run / "weights.safetensors", metadata)
    (run / "training.json").write_text(json.dumps(report, indent=1))


def hold_out(data: Labeled, recipe: Recipe) -> tuple[Labeled, Labeled]:
    """Splits the training set by the recipe's seed into training and validation images.

    The images of a smaller share are among those of a larger one.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(recipe.seed))
    validation, training = order[: recipe.validation_images], order[recipe.validation_images :]
    return data.take(training[: round(len(training) * recipe.share)]), data.take(validation)


@torch.inference_mode()
def evaluate(network: nn.Module, data: Labeled, recipe: Recipe) -> tuple[float, Tensor]:
    """Accuracy in float32, and the confusion table int64 [true class, predicted class]."""
    network.eval()
    batches = data.pixels.split(500)  # type: ignore[no-untyped-call]  # untyped in torch
    predicted = [network(normalize(pixels, recipe.mean, recipe.std))[0].argmax(1) for pixels in batches]
    classes = int(data.classes.max()) + 1
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    ones = torch.ones(len(data), dtype=torch.int64)
    confusion.index_put_((data.classes.cpu(), torch.cat(predicted).cpu()), ones, accumulate=True)
    return float(confusion.diagonal().sum() / len(data)), confusion


def half(tensor: Tensor) -> Tensor:
    """float16 if the tensor is floating point."""
    return tensor.half() if tensor.is_floating_point() else tensor


def round_to_half(network: nn.Module) -> None:
    """Rounds the weights to float16 and keeps them as float32, as a half-precision checkpoint is loaded."""
    network.load_state_dict({name: half(tensor).to(tensor.dtype) for name, tensor in network.state_dict().items()})
