"""Augmentation of batches of images, normalized float32 [n, 3, side, side].

All random numbers come from a CPU generator, so that a run gives the same ones on every device.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def augment(images: Tensor, shift_pixels: int, generator: torch.Generator) -> Tensor:
    """Mirrors each image with probability 1/2 and shifts it by up to ``shift_pixels``, with reflection padding."""
    n, _, side, _ = images.shape
    padded = F.pad(images, [shift_pixels] * 4, mode="reflect")
    top, left = (torch.randint(2 * shift_pixels + 1, (n, 1), generator=generator) for _ in range(2))
    rows = top + torch.arange(side)  # [n, side]
    columns = left + torch.arange(side)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    image, rows, columns = (index.to(images.device) for index in (torch.arange(n), rows, columns))
    shifted = padded.permute(0, 2, 3, 1)[image[:, None, None], rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2)  # channels last


def warp(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Rotates each image by up to ``strength`` radians, and stretches and shears it by up to that share of its side."""
    turn, shear, wide, high = ((2 * torch.rand(len(images), generator=generator) - 1) * strength for _ in range(4))
    cosine, sine = torch.cos(turn), torch.sin(turn)
    rows = (torch.stack([cosine * (1 + wide), shear - sine], 1), torch.stack([sine, cosine * (1 + high)], 1))
    matrices = torch.cat([torch.stack(rows, 1), torch.zeros(len(images), 2, 1)], 2).to(images.device)  # [n, 2, 3]
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False).contiguous(
        memory_format=torch.channels_last
    )


def recolor(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Changes brightness, contrast and saturation of each normalized image by up to ``strength``."""
    brightness, contrast, saturation = (
        ((2 * torch.rand(len(images), 1, 1, 1, generator=generator) - 1) * strength).to(images.device) for _ in range(3)
    )
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * (1 + saturation)
    center = images.mean((1, 2, 3), keepdim=True)
    return center + (images - center) * (1 + contrast) + brightness


def mixup(images: Tensor, targets: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blends images and targets with others of the batch, in a share from Beta(alpha, alpha) (arXiv:1710.09412)."""
    share, partners = _beta(alpha, generator), torch.randperm(len(images), generator=generator).to(images.device)
    return torch.lerp(images[partners], images, share), torch.lerp(targets[partners], targets, share)


def cutmix(images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pastes a rectangle of another image of the batch into each image and blends the targets by area.

    The rectangle is the same for the whole batch, and its area is uniformly distributed (arXiv:1905.04899).
    """
    side = images.shape[-1]
    share, partners = _beta(1.0, generator), torch.randperm(len(images), generator=generator).to(images.device)
    half = side * (1 - share) ** 0.5 / 2
    center = torch.randint(side, (2,), generator=generator).tolist()
    (top, bottom), (left, right) = ((max(round(at - half), 0), min(round(at + half), side)) for at in center)
    images = images.clone()
    images[:, :, top:bottom, left:right] = images[partners, :, top:bottom, left:right]
    return images, torch.lerp(targets, targets[partners], (bottom - top) * (right - left) / side**2)


def _beta(alpha: float, generator: torch.Generator) -> float:
    seed = int(torch.randint(2**31, (1,), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))
