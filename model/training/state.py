"""The state of a training run: networks, optimizers and schedules, saved after every epoch."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.network.build import Network
from vitserve.model.training.device import CPU
from vitserve.model.training.recipe import Recipe
from vitserve.model.training.start import Start


class ResumeError(ValueError):
    """The saved state is not of this training."""


@dataclass
class TrainingState:
    """Everything that changes during training, and all that a resumed run needs."""

    network: Network
    average: Network  # exponential moving average of the network
    optimizers: list[torch.optim.Optimizer]
    schedules: list[torch.optim.lr_scheduler.LRScheduler]
    generator: torch.Generator
    preprocessing: Preprocessing
    settings: Mapping[str, str]  # a run that is resumed must have the same
    epoch: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, torch.Tensor] | None = None  # the average of the best epoch, if the recipe has patience

    def record_epoch(self, loss: float, accuracy: float, patience: int) -> None:
        """Keeps the weights if they are the best so far."""
        if patience and accuracy > max((row["validation_accuracy"] for row in self.history), default=-1.0):
            self.best = {name: tensor.clone() for name, tensor in self.average.state_dict().items()}
        row = {"epoch": self.epoch, "loss": loss, "validation_accuracy": accuracy, "seconds": self.seconds}
        self.history.append(row)

    def is_finished(self, recipe: Recipe) -> bool:
        """After all epochs, or after so many without a better validation accuracy as the recipe allows."""
        accuracies = [row["validation_accuracy"] for row in self.history]
        since_best = len(accuracies) - 1 - accuracies.index(max(accuracies)) if accuracies else 0
        return self.epoch >= recipe.epochs or bool(recipe.patience and since_best >= recipe.patience)

    def save(self, path: Path) -> None:
        """Replaces the file atomically, so that an interrupted save leaves the previous state."""
        state = {
            "settings": dict(self.settings),
            "best": self.best,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "generator": self.generator.get_state(),
            "epoch": self.epoch,
            "seconds": self.seconds,
            "history": self.history,
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def restore(self, path: Path) -> None:
        """Raises ResumeError naming the settings that differ from those of the saved state."""
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        saved: dict[str, str] = state.get("settings", {})
        differences = [
            f"{name} was {saved.get(name, 'not recorded')} and is {value}"
            for name, value in self.settings.items()
            if saved.get(name) != value
        ]
        if differences:
            raise ResumeError(
                f"{path.parent} has a training with other settings: {'; '.join(differences)}."
                " Give the same settings to resume it, or another --output"
            )
        self.best = state["best"]
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.epoch, self.seconds, self.history = state["epoch"], state["seconds"], state["history"]


def initial_state(
    start: Start, recipe: Recipe, steps: int, device: torch.device = CPU, settings: Mapping[str, str] | None = None
) -> TrainingState:
    """A network and its optimizers, for a run of ``steps`` optimizer steps."""
    torch.manual_seed(recipe.seed)
    network = start.network().to(device)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    optimizers = _optimizers(network, recipe)
    warm_up_steps = recipe.warm_up_share * steps

    def rate_share(step: int) -> float:
        return min((step + 1) / warm_up_steps, (steps - step) / (steps - warm_up_steps))

    schedules: list[torch.optim.lr_scheduler.LRScheduler] = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, rate_share) for optimizer in optimizers
    ]
    generator = torch.Generator().manual_seed(recipe.seed)
    average = copy.deepcopy(network)
    return TrainingState(network, average, optimizers, schedules, generator, start.preprocessing, settings or {})


def _optimizers(network: Network, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer blocks, if the recipe has it, and AdamW for all other parameters."""
    matrices: dict[float, list[torch.nn.Parameter]] = {}  # by the share of the learning rate
    remaining: dict[float, list[torch.nn.Parameter]] = {}
    named = list(network.named_parameters())
    layers = 1 + max(_layer(name) for name, _ in named if not _follows_blocks(name))
    for name, parameter in named:
        if recipe.frozen and not name.startswith("head"):
            parameter.requires_grad = False
            continue
        layer = layers if _follows_blocks(name) else _layer(name)
        for_muon = recipe.optimizer == "muon" and name.startswith("blocks.") and parameter.ndim == 2
        share = recipe.layer_decay ** (layers - layer)
        (matrices if for_muon else remaining).setdefault(share, []).append(parameter)
    rate, decay = recipe.learning_rate, recipe.weight_decay

    def groups(by_share: dict[float, list[torch.nn.Parameter]]) -> list[dict[str, Any]]:
        return [{"params": parameters, "lr": rate * share} for share, parameters in by_share.items()]

    adamw = torch.optim.AdamW(groups(remaining), lr=rate, betas=(0.9, 0.99), weight_decay=decay)
    if not matrices:  # AdamW only, or a ResNet
        return [adamw]
    muon = torch.optim.Muon(groups(matrices), lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def _layer(name: str) -> int:
    """0 for the layers before the first block of a ViT or the first stage of a ResNet, then 1, 2, …"""
    match = re.match(r"(?:blocks|stages)\.(\d+)\.", name)
    return 1 + int(match[1]) if match else 0


def _follows_blocks(name: str) -> bool:
    return name.startswith(("norm.", "fc_norm.", "pre_logits.", "head"))


@torch.no_grad()
def update_average(average: Network, network: Network, step: int, decay: float) -> None:
    """Moves the average towards the network. The decay grows with the step, so that early weights are forgotten."""
    share = 1 - min(decay, step / (step + 9))
    pairs = list(zip(average.state_dict().values(), network.state_dict().values(), strict=True))
    floating = [(slow, fast) for slow, fast in pairs if slow.is_floating_point()]
    torch._foreach_lerp_([slow for slow, _ in floating], [fast for _, fast in floating], share)
    for slow, fast in pairs:
        if not slow.is_floating_point():
            slow.copy_(fast)
