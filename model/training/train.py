"""Trains a network on labeled images, on a CPU or a GPU, from scratch or from trained weights.

Muon for the matrices of the blocks and AdamW for the rest, a one-cycle schedule, mirrored and shifted images, mixup
until the last epochs, label smoothing, an exponential moving average of the weights, bf16 autocast.
A part of the training set is held out for validation. The test set is decoded and used once, after the last epoch.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from vitserve.model.bundle.preprocess import Decoder, Preprocessing
from vitserve.model.training.data import Labeled, decode, describe_faults, normalize
from vitserve.model.training.device import CPU, describe_device
from vitserve.model.training.epoch import train_epoch
from vitserve.model.training.recipe import Recipe
from vitserve.model.training.samples import DataSet, Sample
from vitserve.model.training.start import Start
from vitserve.model.training.state import TrainingState, initial_state


def train(
    start: Start, recipe: Recipe, data: DataSet, run: Path, device: torch.device = CPU, compiled: bool = False
) -> dict[str, Any]:
    """Trains in the directory ``run``, then tests once. Saves run/state.pt after every epoch; another call resumes it.

    ``compiled`` runs the network through torch.compile, which takes a minute and is faster on a GPU.

    Writes run/weights.safetensors, with configuration, labels and preprocessing in its metadata, and run/training.json,
    which it returns: recipe, history, seconds, machine, test accuracy and confusion table [true class][predicted
    class]. The weights are those of the last epoch, or of the best one if the recipe has patience.

    Raises ResumeError if ``run`` has a training with other settings, TrainingDataError, OSError.
    """
    run.mkdir(parents=True, exist_ok=True)
    decoder, faults = Decoder(start.preprocessing), list[str]()

    def decoded(samples: Sequence[Sample]) -> Labeled:
        result = decode(samples, decoder, run)
        faults.extend(result.faults)
        return result.images

    with _progress_bar() as progress:
        progress.console.print(data.description)
        training_set, validation_set = (decoded(part).placed(device) for part in (data.training, data.validation))
        steps_per_epoch = max(1, len(training_set) // recipe.batch_size)
        total = steps_per_epoch * recipe.epochs
        state = initial_state(start, recipe, total, device, _settings(start, recipe, data))
        if (run / "state.pt").exists():
            state.restore(run / "state.pt")
        forward = torch.compile(state.network) if compiled else state.network
        task = progress.add_task("training", total=total, completed=steps_per_epoch * state.epoch)
        while not state.is_finished(recipe):
            _run_epoch(state, forward, training_set, validation_set, recipe, lambda: progress.advance(task))
            state.save(run / "state.pt")
            progress.console.print(_summary(state))
        if state.best is not None:
            state.average.load_state_dict(state.best)
        round_to_half(state.average)  # test the weights as they are stored
        test_set = decoded(data.test)
        if faults:
            progress.console.print(describe_faults(faults))
    report = {
        "config": asdict(start.config),
        "preprocessing": asdict(start.preprocessing),
        "source": start.source,
        "labels": list(data.labels),
        "recipe": asdict(recipe),
        "history": state.history,
        "seconds": round(state.seconds),
        "machine": f"{describe_device(device)}, torch {torch.__version__}",
        "training_images": len(training_set),
        "validation_images": len(validation_set),
        "faults": faults,
        **_test(state.average.to(CPU), test_set, start.preprocessing),
    }
    _save(state.average, report, run)
    return report


def _settings(start: Start, recipe: Recipe, data: DataSet) -> dict[str, str]:
    """The settings that a resumed run must have in common with the interrupted one."""
    names = "\n".join(f"{sample.name}\t{sample.label}" for part in (data.training, data.validation) for sample in part)
    return {
        **{name: str(value) for part in (start.config, recipe) for name, value in asdict(part).items()},
        "source": start.source or "random weights",
        "labels": ", ".join(data.labels),
        "images": f"{data.description} ({hashlib.sha256(names.encode()).hexdigest()[:12]})",
    }


def _progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn())


def _test(network: nn.Module, test_set: Labeled, preprocessing: Preprocessing) -> dict[str, Any]:
    accuracy, confusion = evaluate(network, test_set, preprocessing)
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
    accuracy, _ = evaluate(state.average, validation_set, state.preprocessing)
    state.record_epoch(loss, accuracy, recipe.patience)


def _summary(state: TrainingState) -> str:
    last = state.history[-1]
    accuracy = f"validation accuracy {last['validation_accuracy']:.2%}"
    return f"epoch {state.epoch}: loss {last['loss']:.3f}, {accuracy}, {state.seconds:.0f} s"


def _save(network: nn.Module, report: dict[str, Any], run: Path) -> None:
    from safetensors.torch import save_file

    preprocessing = report["preprocessing"]
    metadata = {
        "config": json.dumps(report["config"]),
        "labels": json.dumps(report["labels"]),
        "preprocessing": json.dumps(preprocessing),
        "mean": json.dumps(preprocessing["mean"]),  # read by earlier versions
        "std": json.dumps(preprocessing["std"]),
    }
    weights = {name: half(tensor).contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, run / "weights.safetensors", metadata)
    (run / "training.json").write_text(json.dumps(report, indent=1))


@torch.inference_mode()
def evaluate(network: nn.Module, data: Labeled, preprocessing: Preprocessing) -> tuple[float, Tensor]:
    """Accuracy in float32, and the confusion table int64 [true class, predicted class]."""
    network.eval()
    device = next(network.parameters()).device
    batches = data.pixels.split(_batch_size(data))  # type: ignore[no-untyped-call]  # untyped in torch
    mean, std = preprocessing.mean, preprocessing.std
    logits = [network(normalize(pixels.to(device), mean, std))[0].cpu() for pixels in batches]
    predicted = torch.cat(logits)
    classes = predicted.shape[1]
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    ones = torch.ones(len(data), dtype=torch.int64)
    confusion.index_put_((data.classes.cpu(), predicted.argmax(1)), ones, accumulate=True)
    return float(confusion.diagonal().sum() / len(data)), confusion


def _batch_size(data: Labeled) -> int:
    """500 images of 32 pixels, and fewer larger ones, whose activations take more memory."""
    return max(1, min(500, 500 * 32 * 32 * 16 // data.pixels[0, 0].numel()))


def half(tensor: Tensor) -> Tensor:
    """float16 if the tensor is floating point."""
    return tensor.half() if tensor.is_floating_point() else tensor


def round_to_half(network: nn.Module) -> None:
    """Rounds the weights to float16 and keeps them as float32, as a half-precision checkpoint is loaded."""
    network.load_state_dict({name: half(tensor).to(tensor.dtype) for name, tensor in network.state_dict().items()})
