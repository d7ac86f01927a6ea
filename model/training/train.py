"""Trains a ViT on an archive of labeled images, on a CPU's budget or a GPU's.

Both recipes: Muon for the matrices of the blocks and AdamW for the rest, a one-cycle schedule, mirrored and shifted
images, mixup until the last epochs, label smoothing, an exponential moving average of the weights, bf16 autocast.
QUICK is for two CPU cores. Where they do not multiply bf16, torch's Muon costs as much as all else (it works in bf16,
emulated), so AdamW takes its place unless asked otherwise. LONG is for a GPU: many more epochs, and images that are also
warped, recolored and cut into each other, because a network that sees each of them hundreds of times would learn them by heart.
A part of the training set is held out for validation; the test set is read once, after the last epoch.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from vitserve.model.config import ResNetConfig, ViTConfig
from vitserve.model.network.build import Network, network_of
from vitserve.model.training.data import ImageArchive, Labeled, augment, cutmix, mixup, normalize, recolor, warp

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Recipe:
    epochs: int = 6
    batch_size: int = 192
    learning_rate: float = 2e-3  # at the top of the cycle; Muon's is scaled to match AdamW's update
    warm_up_share: float = 0.2  # of all steps, in which the rate rises; then it falls linearly to zero
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    mixup_alpha: float = 0.2
    cutmix_share: float = 0.0  # of the steps that mix, those that cut and do not blend
    mixup_share: float = 0.75  # of all steps, those that mix; the last ones see images as they are
    shift_pixels: int = 3
    warp: float = 0.0  # radians, and share of a side
    recolor: float = 0.0
    ema_decay: float = 0.997
    validation_images: int = 2500  # held out of the training set
    seed: int = 0
    share: float = 1.0  # of the training set that is trained on, chosen by the seed
    bf16: bool = field(default_factory=torch.cpu._is_avx512_bf16_supported)
    optimizer: Literal["muon", "adamw"] = field(
        default_factory=lambda: "muon" if torch.cpu._is_avx512_bf16_supported() else "adamw"
    )
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


QUICK = Recipe()
LONG = Recipe(
    epochs=100,
    batch_size=512,
    learning_rate=3e-3,
    warm_up_share=0.1,
    mixup_alpha=0.4,
    cutmix_share=0.5,
    mixup_share=0.95,
    shift_pixels=4,
    warp=0.15,
    recolor=0.3,
    ema_decay=0.999,
    bf16=True,
    optimizer="muon",
)


def device_called(name: str) -> torch.device:
    """cpu, cuda, or auto for a GPU where torch sees one. Raises ValueError for another name, and where there is no GPU."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"there is no device {name!r}; known: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass
class Training:
    """Everything that changes while training, and so all that a resumed run needs."""

    network: Network
    average: Network
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


def train(
    config: ViTConfig | ResNetConfig,
    recipe: Recipe,
    archive_path: Path,
    run: Path,
    device: torch.device = CPU,
    compiled: bool = False,
) -> dict[str, Any]:
    """Trains into the directory ``run`` (state.pt after every epoch, from which a second call goes on), then tests once.

    ``compiled`` has torch.compile make the network's kernels first, which takes a minute and pays on a GPU.

    Writes run/weights.safetensors, with the configuration and labels in its metadata, and run/training.json, which it returns:
    recipe, history, seconds, machine, test accuracy and confusion table [true class][predicted class].
    """
    from safetensors.torch import save_file

    archive = ImageArchive(archive_path)
    if len(archive.labels) != config.classes:
        raise ValueError(f"the archive has {len(archive.labels)} classes; the variant has {config.classes}")
    training_set, validation_set = (part.to(device) for part in hold_out(archive.split("train"), recipe))
    steps = len(training_set) // recipe.batch_size * recipe.epochs
    state = begin(config, recipe, steps, device)
    run.mkdir(parents=True, exist_ok=True)
    if (run / "state.pt").exists():
        state.restore(torch.load(run / "state.pt", weights_only=True, map_location="cpu"))
    forward = torch.compile(state.network) if compiled else state.network
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps, completed=steps // recipe.epochs * state.epoch)
        while state.epoch < recipe.epochs:
            began = time.monotonic()
            loss = one_epoch(state, forward, training_set, recipe, lambda: progress.advance(task))
            state.epoch += 1
            state.seconds += time.monotonic() - began
            accuracy, _ = evaluate(state.average, validation_set, recipe)
            state.history.append(
                {"epoch": state.epoch, "loss": loss, "validation_accuracy": accuracy, "seconds": state.seconds}
            )
            save_atomically(state.state(), run / "state.pt")
            progress.console.print(
                f"epoch {state.epoch}: loss {loss:.3f}, validation {accuracy:.2%}, {state.seconds:.0f} s"
            )
    round_to_half(state.average)  # what is tested is what is stored
    test_set = archive.split("test")
    accuracy, confusion = evaluate(state.average.to(CPU), test_set, recipe)
    report: dict[str, Any] = {
        "config": asdict(config),
        "labels": archive.labels,
        "recipe": asdict(recipe),
        "history": state.history,
        "seconds": round(state.seconds),
        "machine": f"{_named(device)}, torch {torch.__version__}",
        "training_images": len(training_set),
        "test_images": len(test_set),
        "test_accuracy": accuracy,
        "confusion": confusion.tolist(),
    }
    metadata = {key: json.dumps(report[key]) for key in ("config", "labels")} | {
        "mean": json.dumps(recipe.mean),
        "std": json.dumps(recipe.std),
    }
    weights = {name: half(tensor).contiguous() for name, tensor in state.average.state_dict().items()}
    save_file(weights, run / "weights.safetensors", metadata)
    (run / "training.json").write_text(json.dumps(report, indent=1))
    return report


def _named(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    )


def hold_out(everything: Labeled, recipe: Recipe) -> tuple[Labeled, Labeled]:
    """Splits the training set, by the recipe's seed, into what is trained on (a smaller share of it is a part of a greater one) and what validates."""
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(recipe.seed))
    kept = order[recipe.validation_images :]
    return everything.take(kept[: round(len(kept) * recipe.share)]), everything.take(order[: recipe.validation_images])


def begin(config: ViTConfig | ResNetConfig, recipe: Recipe, steps: int, device: torch.device = CPU) -> Training:
    torch.manual_seed(recipe.seed)
    network = network_of(config).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs miss this form
    of_muon = {
        name
        for name, p in network.named_parameters()
        if recipe.optimizer == "muon" and name.startswith("blocks.") and p.ndim == 2
    }
    matrices = [p for name, p in network.named_parameters() if name in of_muon]
    others = [p for name, p in network.named_parameters() if name not in of_muon]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)
    ]
    if matrices:  # a ResNet has none
        muon = torch.optim.Muon(
            matrices, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.insert(0, muon)
    top = recipe.warm_up_share * steps

    def share_of_rate(step: int) -> float:
        return min((step + 1) / top, (steps - step) / (steps - top))

    schedules: list[torch.optim.lr_scheduler.LRScheduler] = [
        torch.optim.lr_scheduler.LambdaLR(each, share_of_rate) for each in optimizers
    ]

    return Training(network, copy.deepcopy(network), optimizers, schedules, torch.Generator().manual_seed(recipe.seed))


@torch.no_grad()
def follow(average: Network, network: Network, step: int, decay: float) -> None:
    """The decay rises to its final value, so that the average forgets the first steps, when weights move fastest."""
    share = 1 - min(decay, step / (step + 9))
    pairs = list(zip(average.state_dict().values(), network.state_dict().values(), strict=True))
    moving = [(slow, quick) for slow, quick in pairs if slow.is_floating_point()]
    torch._foreach_lerp_([slow for slow, _ in moving], [quick for _, quick in moving], share)
    for slow, quick in pairs:
        if not slow.is_floating_point():
            slow.copy_(quick)


def one_epoch(
    state: Training,
    forward: Callable[[Tensor], Any],
    training_set: Labeled,
    recipe: Recipe,
    advance: Callable[[], None],
) -> float:
    """One pass over the training set in a fresh order; returns the mean loss. ``forward`` is the network, or what was compiled of it."""
    state.network.train()
    order = torch.randperm(len(training_set), generator=state.generator).to(training_set.pixels.device)
    batches = order[: len(order) // recipe.batch_size * recipe.batch_size].split(recipe.batch_size)  # type: ignore[no-untyped-call]  # as torch has it
    losses = []
    for index, indices in enumerate(batches):
        step = state.epoch * len(batches) + index
        mix = step < recipe.mixup_share * recipe.epochs * len(batches)
        losses.append(one_step(state, forward, training_set.take(indices), recipe, mix))
        follow(state.average, state.network, step, recipe.ema_decay)
        advance()
    return float(torch.stack(losses).mean())


def one_step(state: Training, forward: Callable[[Tensor], Any], batch: Labeled, recipe: Recipe, mix: bool) -> Tensor:
    """Returns the loss where it was computed: to wait for it would leave a GPU idle."""
    images, targets = prepare(batch, state.network.config.classes, recipe, mix, state.generator)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.bf16):
        logits, _ = forward(images)
    loss = F.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing)
    for optimizer in state.optimizers:
        optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    for optimizer, schedule in zip(state.optimizers, state.schedules, strict=True):
        optimizer.step()
        schedule.step()
    return loss.detach()


def prepare(
    batch: Labeled, classes: int, recipe: Recipe, mix: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What the network is shown of a batch: float32 [n, 3, side, side], and targets float32 [n, classes]."""
    images = augment(normalize(batch.pixels, recipe.mean, recipe.std), recipe.shift_pixels, generator)
    if recipe.warp:
        images = warp(images, recipe.warp, generator)
    if recipe.recolor:
        images = recolor(images, recipe.recolor, generator)
    targets = F.one_hot(batch.classes, classes).float()
    if not mix:
        return images, targets
    if recipe.cutmix_share and float(torch.rand(1, generator=generator)) < recipe.cutmix_share:
        return cutmix(images, targets, generator)
    return mixup(images, targets, recipe.mixup_alpha, generator)


@torch.inference_mode()
def evaluate(network: nn.Module, data: Labeled, recipe: Recipe) -> tuple[float, Tensor]:
    """Accuracy in float32, and the confusion table int64 [true class, predicted class]."""
    network.eval()
    predicted = [network(normalize(pixels, recipe.mean, recipe.std))[0].argmax(1) for pixels in data.pixels.split(500)]  # type: ignore[no-untyped-call]
    classes = int(data.classes.max()) + 1
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    confusion.index_put_(
        (data.classes.cpu(), torch.cat(predicted).cpu()), torch.ones(len(data), dtype=torch.int64), accumulate=True
    )
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
