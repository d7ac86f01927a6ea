"""Labelled images for training: reading an archive of encoded images, and augmenting batches of pixels. Imported by train.py."""

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
class Labelled:
    """Pixels uint8 [n, 3, side, side] and the class of each, int64 [n]."""

    pixels: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def take(self, indices: Tensor) -> Labelled:
        return Labelled(self.pixels[indices], self.classes[indices])


class ImageArchive:
    """An .npz with arrays {split}_jpeg (encoded images end to end, uint8), {split}_offsets [n + 1], {split}_labels [n], and classes (names)."""

    def __init__(self, path: Path) -> None:
        self._arrays = np.load(path, allow_pickle=False)
        self.labels: list[str] = [str(name) for name in self._arrays["classes"]]

    def split(self, name: str) -> Labelled:
        """Decodes one split, "train" or "test"."""
        encoded, offsets = self._arrays[f"{name}_jpeg"], self._arrays[f"{name}_offsets"]
        images = [np.asarray(Image.open(io.BytesIO(encoded[a:b].tobytes())).convert("RGB")) for a, b in itertools.pairwise(offsets)]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        return Labelled(pixels, torch.from_numpy(self._arrays[f"{name}_labels"].astype(np.int64)))


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [n, 3, H, W] → float32, (pixels / 255 - mean) / std per channel, in the memory order that convolutions like best."""
    shift = torch.tensor(mean).view(1, 3, 1, 1)
    scale = torch.tensor(std).view(1, 3, 1, 1)
    return ((pixels.float() / 255 - shift) / scale).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, shift_pixels: int, generator: torch.Generator) -> Tensor:
    """Each image mirrored with probability one half and moved by up to shift_pixels each way, what comes in reflected. Keeps the shape."""
    n, _, side, _ = images.shape
    padded = F.pad(images, [shift_pixels] * 4, mode="reflect")
    top, left = (torch.randint(2 * shift_pixels + 1, (n, 1), generator=generator) for _ in range(2))
    rows = top + torch.arange(side)  # [n, side]
    columns = left + torch.arange(side)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    moved = padded.permute(0, 2, 3, 1)[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]  # [n, side, side, 3]
    return moved.permute(0, 3, 1, 2)  # already channels-last


def mixup(images: Tensor, targets: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blends each image and its target with another of the batch, one Beta(alpha, alpha) share a batch (arXiv:1710.09412)."""
    seed = int(torch.randint(2**31, (1,), generator=generator))
    share = float(np.random.default_rng(seed).beta(alpha, alpha))
    other = torch.randperm(len(images), generator=generator)
    return torch.lerp(images[other], images, share), torch.lerp(targets[other], targets, share)
