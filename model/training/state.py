"""The state of a training run: networks, optimizers and schedules, saved after every epoch."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitserve.model.config import ResNetConfig, ViTConfig
from vitserve.model.network.build import Network, network_of
from vitserve.model.training.device import CPU
from vitserve.model.training.recipe import Recipe


@dataclass
class TrainingState:
    """Everything that changes during training, and all that a resumed run needs."""

    network: Network
    average: Network  # exponential moving average of the network
    optimizers: list[torch.optim.Optimizer]
    schedules: list[torch.optim.lr_scheduler.LRScheduler]
    generator: torch.Generator
    epoch: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Replaces the file atomically, so that an interrupted save leaves the previous state."""
        state = {
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
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.epoch, self.seconds, self.history = state["epoch"], state["seconds"], state["history"]


def initial_state(
    config: ViTConfig | ResNetConfig, recipe: Recipe, steps: int, device: torch.device = CPU
) -> TrainingState:
    """A new network and its optimizers, for a run of ``steps`` optimizer steps."""
    torch.manual_seed(recipe.seed)
    network = network_of(config).to(device)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    optimizers = _optimizers(network, recipe)
    warm_up_steps = recipe.warm_up_share * steps

    def rate_share(step: int) -> float:
        return min((step + 1) / warm_up_steps, (steps - step) / (steps - warm_up_steps))

    schedules: list[torch.optim.lr_scheduler.LRScheduler] = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, rate_share) for optimizer in optimizers
    ]
    generator = torch.Generator().manual_seed(recipe.seed)
    return TrainingState(network, copy.deepcopy(network), optimizers, schedules, generator)


def _optimizers(network: Network, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer blocks, if the recipe has it, and AdamW for all other parameters."""
    matrices: list[torch.nn.Parameter] = []
    remaining: list[torch.nn.Parameter] = []
    for name, parameter in network.named_parameters():
        for_muon = recipe.optimizer == "muon" and name.startswith("blocks.") and parameter.ndim == 2
        (matrices if for_muon else remaining).append(parameter)
    rate, decay = recipe.learning_rate, recipe.weight_decay
    adamw = torch.optim.AdamW(remaining, lr=rate, betas=(0.9, 0.99), weight_decay=decay)
    if not matrices:  # AdamW only, or a ResNet
        return [adamw]
    return [torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"), adamw]


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
