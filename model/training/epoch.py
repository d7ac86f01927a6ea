"""One epoch of training: prepare each batch, compute the loss, update the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.training.augment import augment, cutmix, mixup, recolor, warp
from vitserve.model.training.data import Labeled, normalize
from vitserve.model.training.recipe import Recipe
from vitserve.model.training.state import TrainingState, update_average


def train_epoch(
    state: TrainingState,
    forward: Callable[[Tensor], Any],
    training_set: Labeled,
    recipe: Recipe,
    advance: Callable[[], None],
) -> float:
    """One pass over the training set in a new random order; returns the mean loss.

    ``forward`` is the network or its compiled form. ``advance`` is called after every step.
    """
    state.network.train()
    device = next(state.network.parameters()).device
    order = torch.randperm(len(training_set), generator=state.generator).to(training_set.pixels.device)
    size = min(recipe.batch_size, len(order))
    whole_batches = order[: len(order) // size * size]
    batches = whole_batches.split(size)  # type: ignore[no-untyped-call]  # untyped in torch
    losses = []
    for index, indices in enumerate(batches):
        step = state.epoch * len(batches) + index
        mix = step < recipe.mixup_share * recipe.epochs * len(batches)
        losses.append(train_step(state, forward, training_set.take(indices).to(device), recipe, mix))
        update_average(state.average, state.network, step, recipe.ema_decay)
        advance()
    return float(torch.stack(losses).mean())


def train_step(
    state: TrainingState, forward: Callable[[Tensor], Any], batch: Labeled, recipe: Recipe, mix: bool
) -> Tensor:
    """Returns the loss on its device: copying it to the CPU would make the GPU wait."""
    classes, preprocessing = state.network.config.classes, state.preprocessing
    images, targets = prepare_batch(batch, classes, preprocessing, recipe, mix, state.generator)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.bf16):
        logits, _ = forward(images)
    loss = F.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing)
    for optimizer in state.optimizers:
        optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
    for optimizer, schedule in zip(state.optimizers, state.schedules, strict=True):
        optimizer.step()
        schedule.step()
    return loss.detach()


def prepare_batch(
    batch: Labeled,
    classes: int,
    preprocessing: Preprocessing,
    recipe: Recipe,
    mix: bool,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Augmented images float32 [n, 3, side, side] and targets float32 [n, classes]."""
    images = normalize(batch.pixels, preprocessing.mean, preprocessing.std)
    images = augment(images, round(recipe.shift * images.shape[-1]), generator)
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
