"""Changes a network's image size by interpolating its position embeddings to the new grid."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.model.config import ViTConfig


def square_side(patches: int) -> int:
    """Patches per side. Raises CheckpointError if the grid is not square."""
    side = math.isqrt(patches)
    if side * side != patches:
        raise CheckpointError(
            f"{patches} positions do not form a square grid; the nearest squares are {side**2} and {(side + 1) ** 2}"
        )
    return side


def at_image_size(
    config: ViTConfig, weights: dict[str, Tensor], image_size: int
) -> tuple[ViTConfig, dict[str, Tensor]]:
    """The configuration and weights at another image size.

    Interpolates as timm does: bicubic with antialiasing. The embeddings of prefix tokens do not change.
    Raises ValueError if the image size is not a multiple of the patch size.
    """
    resized = replace(config, image_size=image_size)
    if resized.grid == config.grid:
        return resized, weights
    positions = weights["pos_embed"]
    prefix = positions.shape[1] - config.grid**2
    square = positions[:, prefix:].reshape(1, config.grid, config.grid, config.width).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(resized.grid, resized.grid), mode="bicubic", antialias=True)
    patches = square.permute(0, 2, 3, 1).reshape(1, -1, config.width)
    return resized, weights | {"pos_embed": torch.cat([positions[:, :prefix], patches], dim=1)}
