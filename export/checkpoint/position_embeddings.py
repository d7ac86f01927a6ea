"""Changes a network's image size by interpolating its position embeddings to the new grid, as its library does."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.model.config import ViTConfig

GREATEST_IMAGE_SIZE = 4096  # pixels; attention over more patches would take hundreds of gigabytes


@dataclass(frozen=True)
class Interpolation:
    """A library's interpolation, in the terms of torch.nn.functional.interpolate."""

    mode: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = False
    align_corners: bool = False
    dtype: torch.dtype = torch.float32  # in which it computes coordinates and values


TIMM = Interpolation(antialias=True)  # timm.layers.resample_abs_pos_embed
TRANSFORMERS = Interpolation()  # interpolate_pos_encoding of ViT, DeiT and DINOv2
TRANSFORMERS_REGISTERS = Interpolation(antialias=True)  # of DINOv2 with registers
TORCHVISION = Interpolation(align_corners=True)  # torchvision.models.vision_transformer.interpolate_embeddings
# scipy.ndimage.zoom(order=1) in vit_jax/checkpoint.py
GOOGLE = Interpolation("bilinear", align_corners=True, dtype=torch.float64)


def square_side(patches: int) -> int:
    """Patches per side. Raises CheckpointError if the grid is not square."""
    side = math.isqrt(max(patches, 0))
    if side * side != patches or not patches:
        raise CheckpointError(
            f"{patches} positions do not form a square grid; the nearest squares are {side**2} and {(side + 1) ** 2}"
        )
    return side


def at_image_size(
    config: ViTConfig, weights: dict[str, Tensor], image_size: int, interpolation: Interpolation
) -> tuple[ViTConfig, dict[str, Tensor]]:
    """The configuration and weights at another image size. The embeddings of prefix tokens do not change.

    Raises ValueError if the image size is not a multiple of the patch size.
    """
    resized = replace(config, image_size=image_size)
    positions = weights.get("pos_embed")
    if resized.grid == config.grid or positions is None or positions.ndim != 3:  # build_network() reports the latter
        return resized, weights
    _, length, width = positions.shape
    prefix = length - config.grid**2
    square = positions[:, prefix:].reshape(1, config.grid, config.grid, width).permute(0, 3, 1, 2)
    square = F.interpolate(
        square.to(interpolation.dtype),
        size=(resized.grid, resized.grid),
        mode=interpolation.mode,
        antialias=interpolation.antialias,
        align_corners=interpolation.align_corners,
    )
    patches = square.to(positions.dtype).permute(0, 2, 3, 1).reshape(1, -1, width)
    return resized, weights | {"pos_embed": torch.cat([positions[:, :prefix], patches], dim=1)}
