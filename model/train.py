"""Trains a ViT on an archive of labelled images, on a CPU's budget. Imported by vitserve.py's `train` alone.

The recipe: Muon for the matrices of the blocks and AdamW for the rest, a one-cycle schedule, mirrored and shifted
images, mixup until the last epochs, label smoothing, an exponential moving average of the weights, bf16 autocast
where the CPU multiplies bf16. Where it does not, torch's Muon costs as much as all else (it works in bf16, emulated),
so AdamW takes its place unless asked otherwise.
A part of the training set is held out for validation; the test set is read once, after the last epoch.
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from model.config import ResNetConfig, ViTConfig
from model.data import ImageArchive, Labelled, augment, mixup, normalise
from model.network import Network, network_of


@dataclass(frozen=True)
class Recipe:
    epochs: int = 6
    batch_size: int = 192
    learning_rate: float = 2e-3  # at the top of the cycle; Muon's is scaled to match AdamW's update
    warm_up_share: float = 0.2  # of all steps, in which the rate rises; then it falls linearly to zero
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    mixup_alpha: float = 0.2
    mixup_share: float = 0.75  # of all steps; the last ones see images as they are
    shift_pixels: int = 3
    ema_decay: float = 0.997
    validation_images: int = 2500  # held out of the training set
    seed: int = 0
    share: float = 1.0  # of the training set that is trained on, chosen by the seed
    bf16: bool = field(default_factory=torch.cpu._is_avx512_bf16_supported)
    optimizer: Literal["muon", "adamw"] = field(default_factory=lambda: "muon" if torch.cpu._is_avx512_bf16_supported() else "adamw")
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


@dataclass
class Training:
    """Everything that changes while training, and so all that a resumed run needs."""

    network: Network
    average: torch.optim.swa_utils.AveragedModel
    optimizers: list[torch.optim.Optimizer]
    schedules: list[torch.optim.lr_scheduler.LRScheduler]
    generator: torch.Generator
    epoch: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [each.state_dict() for each in self.optimizers],
            "schedules": [each.state_dict() for each in self.schedules],
            "generator": self.generator.get_state(),
            "epoch": self.epoch,
            "seconds": self.seconds,
            "history": self.history,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        for each, saved in zip(self.optimizers, state["optimizers"], strict=True):
            each.load_state_dict(saved)
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.epoch, self.seconds, self.history = state["epoch"], state["seconds"], state["history"]


def train(config: ViTConfig | ResNetConfig, recipe: Recipe, archive_path: Path, run: Path) -> dict[str, Any]:
    """Trains into the folder ``run`` (state.pt after every epoch, from which a second call goes on), then tests once.

    Writes run/weights.safetensors, with the configuration and labels in its metadata, and run/training.json, which it returns:
    recipe, history, seconds, machine, test accuracy and confusion table [true class][predicted class].
    """
    from safetensors.torch import save_file

    archive = ImageArchive(archive_path)
    if len(archive.labels) != config.classes:
        raise ValueError(f"the archive has {len(archive.labels)} classes; the variant has {config.classes}")
    training_set, validation_set = hold_out(archive.split("train"), recipe)
    steps = len(training_set) // recipe.batch_size * recipe.epochs
    state = begin(config, recipe, steps)
    run.mkdir(parents=True, exist_ok=True)
    if (run / "state.pt").exists():
        state.restore(torch.load(run / "state.pt", weights_only=True))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps, completed=steps // recipe.epochs * state.epoch)
        while state.epoch < recipe.epochs:
            began = time.monotonic()
            loss = one_epoch(state, training_set, recipe, lambda: progress.advance(task))
            state.epoch += 1
            state.seconds += time.monotonic() - began
            accuracy, _ = evaluate(state.average, validation_set, recipe)
            state.history.append({"epoch": state.epoch, "loss": loss, "validation_accuracy": accuracy, "seconds": state.seconds})
            save_atomically(state.state(), run / "state.pt")
            progress.console.print(f"epoch {state.epoch}: loss {loss:.3f}, validation {accuracy:.2%}, {state.seconds:.0f} s")
    round_to_half(state.average.module)  # what is tested is what is stored
    test_set = archive.split("test")
    accuracy, confusion = evaluate(state.average, test_set, recipe)
    report: dict[str, Any] = {
        "config": asdict(config),
        "labels": archive.labels,
        "recipe": asdict(recipe),
        "history": state.history,
        "seconds": round(state.seconds),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}",
        "training_images": len(training_set),
        "test_images": len(test_set),
        "test_accuracy": accuracy,
        "confusion": confusion.tolist(),
    }
    metadata = {key: json.dumps(report[key]) for key in ("config", "labels")} | {"mean": json.dumps(recipe.mean), "std": json.dumps(recipe.std)}
    weights = {name: half(tensor).contiguous() for name, tensor in state.average.module.state_dict().items()}
    save_file(weights, run / "weights.safetensors", metadata)
    (run / "training.json").write_text(json.dumps(report, indent=1))
    return report


def hold_out(everything: Labelled, recipe: Recipe) -> tuple[Labelled, Labelled]:
    """Splits the training set, by the recipe's seed, into what is trained on (a smaller share of it is a part of a greater one) and what validates."""
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(recipe.seed))
    kept = order[recipe.validation_images :]
    return everything.take(kept[: round(len(kept) * recipe.share)]), everything.take(order[: recipe.validation_images])


def begin(config: ViTConfig | ResNetConfig, recipe: Recipe, steps: int) -> Training:
    torch.manual_seed(recipe.seed)
    network = network_of(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs miss this form
    of_muon = {name for name, p in network.named_parameters() if recipe.optimizer == "muon" and name.startswith("blocks.") and p.ndim == 2}
    matrices = [p for name, p in network.named_parameters() if name in of_muon]
    others = [p for name, p in network.named_parameters() if name not in of_muon]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)]
    if matrices:  # a ResNet has none
        muon = torch.optim.Muon(matrices, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.insert(0, muon)
    top = recipe.warm_up_share * steps

    def share_of_rate(step: int) -> float:
        return min((step + 1) / top, (steps - step) / (steps - top))

    schedules: list[torch.optim.lr_scheduler.LRScheduler] = [torch.optim.lr_scheduler.LambdaLR(each, share_of_rate) for each in optimizers]

    def averaging(averaged: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
        """The decay rises to its final value, so that the average forgets the first steps, when weights move fastest."""
        n = int(updates)
        decay = min(recipe.ema_decay, (1 + n) / (10 + n))
        return averaged.lerp(current, 1 - decay) if averaged.is_floating_point() else current

    average = torch.optim.swa_utils.AveragedModel(network, avg_fn=averaging, use_buffers=True)
    return Training(network, average, optimizers, schedules, torch.Generator().manual_seed(recipe.seed))


def one_epoch(state: Training, training_set: Labelled, recipe: Recipe, advance: Any) -> float:
    """One pass over the training set in a fresh order; returns the mean loss."""
    state.network.train()
    order = torch.randperm(len(training_set), generator=state.generator)
    batches = order[: len(order) // recipe.batch_size * recipe.batch_size].split(recipe.batch_size)  # type: ignore[no-untyped-call]  # as torch has it
    losses = []
    for index, indices in enumerate(batches):
        done = (state.epoch + index / len(batches)) / recipe.epochs
        losses.append(one_step(state, training_set.take(indices), recipe, mix=done < recipe.mixup_share))
        advance()
    return sum(losses) / len(losses)


def one_step(state: Training, batch: Labelled, recipe: Recipe, mix: bool) -> float:
    images = augment(normalise(batch.pixels, recipe.mean, recipe.std), recipe.shift_pixels, state.generator)
    classes = state.network.config.classes
    targets = F.one_hot(batch.classes, classes).float()
    if mix:
        images, targets = mixup(images, targets, recipe.mixup_alpha, state.generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
        logits, _ = state.network(images)
    loss = F.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing)
    for optimizer in state.optimizers:
        optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    for optimizer, schedule in zip(state.optimizers, state.schedules, strict=True):
        optimizer.step()
        schedule.step()
    state.average.update_parameters(state.network)
    return float(loss.detach())


@torch.inference_mode()
def evaluate(network: nn.Module, data: Labelled, recipe: Recipe) -> tuple[float, Tensor]:
    """Accuracy in float32, and the confusion table int64 [true class, predicted class]."""
    network.eval()
    predicted = [network(normalise(pixels, recipe.mean, recipe.std))[0].argmax(1) for pixels in data.pixels.split(500)]  # type: ignore[no-untyped-call]
    classes = int(data.classes.max()) + 1
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    confusion.index_put_((data.classes, torch.cat(predicted)), torch.ones_like(data.classes), accumulate=True)
    return float(confusion.diagonal().sum() / len(data)), confusion


def half(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor


def round_to_half(network: nn.Module) -> None:
    """Rounds every weight to the nearest float16, kept as float32: what a checkpoint in half precision loads as."""
    network.load_state_dict({name: half(tensor).to(tensor.dtype) for name, tensor in network.state_dict().items()})


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """A run that is killed while it saves goes on from the state before."""
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
