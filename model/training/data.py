"""Labeled images for training: reads an archive of encoded images and augments batches of pixels."""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Labeled:
    """Pixels uint8 [n, 3, side, side] and the class of each, int64 [n]."""

    pixels: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def take(self, indices: Tensor) -> Labeled:
        return Labeled(self.pixels[indices], self.classes[indices])

    def to(self, device: torch.device) -> Labeled:
        return Labeled(self.pixels.to(device), self.classes.to(device))


class ImageArchive:
    """An .npz archive of encoded images.

    Its arrays, for the splits "train" and "test": {split}_jpeg, concatenated files, uint8; {split}_offsets [n + 1];
    {split}_labels [n]; and classes, the labels of the classes.
    """

    def __init__(self, path: Path) -> None:
        self._arrays = np.load(path, allow_pickle=False)
        self.labels: list[str] = [str(name) for name in self._arrays["classes"]]

    def split(self, name: str) -> Labeled:
        """Decodes the split "train" or "test"."""
        encoded, offsets = self._arrays[f"{name}_jpeg"], self._arrays[f"{name}_offsets"]
        images = [
            np.asarray(Image.open(io.BytesIO(encoded[start:end].tobytes())).convert("RGB"))
            for start, end in itertools.pairwise(offsets)
        ]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        return Labeled(pixels, torch.from_numpy(self._arrays[f"{name}_labels"].astype(np.int64)))


def normalize(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [n, 3, H, W] → float32, (pixels / 255 - mean) / std per channel, channels last."""
    shift = torch.tensor(mean, device=pixels.device).view(1, 3, 1, 1)
    scale = torch.tensor(std, device=pixels.device).view(1, 3, 1, 1)
    return ((pixels.float() / 255 - shift) / scale).contiguous(memory_format=torch.channels_last)


# All random numbers come from a CPU generator, so that a run gives the same ones on every device.


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
