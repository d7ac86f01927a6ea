"""Labeled images in memory, or in a file that is mapped into it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitserve.model.bundle.preprocess import Decoder, ImageError
from vitserve.model.training.samples import Sample, TrainingDataError

MAPPED_BYTES = 2**30  # pixels of more than this many bytes are in a file, so that the memory need not hold them
_LISTED = 3  # files named in a message


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

    def placed(self, device: torch.device) -> Labeled:
        """On the device if they take at most a quarter of its free memory, otherwise where they are."""
        if device.type == "cuda" and self.pixels.nbytes > torch.cuda.mem_get_info(device)[0] // 4:
            return self
        return self.to(device)


@dataclass(frozen=True)
class Decoded:
    images: Labeled
    faults: tuple[str, ...]  # of the files that could not be decoded: name and reason


def decode(samples: Sequence[Sample], decoder: Decoder, directory: Path) -> Decoded:
    """Decodes the images on all cores, as the service decodes them. Those that cannot be decoded are skipped.

    Many pixels are stored in ``directory``, in a file that has no name and disappears with the process.
    Raises TrainingDataError if no image can be decoded.
    """
    height, width, channels = decoder.preprocessing.shape
    pixels = _allocate((len(samples), channels, height, width), directory)

    def one(number: int) -> str:
        try:
            image = decoder.decode(samples[number].read())
        except (ImageError, OSError) as error:
            return f"{samples[number].name}: {getattr(error, 'strerror', None) or error}"
        pixels[number] = torch.from_numpy(image.copy()).permute(2, 0, 1)
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = list(pool.map(one, range(len(samples))))
    classes = torch.tensor([sample.label for sample in samples])
    reasons = tuple(fault for fault in faults if fault)
    if len(reasons) == len(samples):
        raise TrainingDataError(f"none of {len(samples)} images can be decoded: {_listed(reasons)}")
    if not reasons:
        return Decoded(Labeled(pixels, classes), ())
    kept = [number for number, fault in enumerate(faults) if not fault]
    for place, number in enumerate(kept):
        pixels[place] = pixels[number]
    return Decoded(Labeled(pixels[: len(kept)], classes[kept]), reasons)


def describe_faults(faults: Sequence[str]) -> str:
    return f"{len(faults)} images cannot be decoded and are skipped: {_listed(faults)}"


def _listed(faults: Sequence[str]) -> str:
    more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
    return "; ".join(faults[:_LISTED]) + more


def _allocate(shape: tuple[int, ...], directory: Path) -> Tensor:
    size = torch.Size(shape).numel()
    if size <= MAPPED_BYTES:
        return torch.empty(shape, dtype=torch.uint8)
    with tempfile.NamedTemporaryFile(dir=directory) as file:  # the mapping outlives the name
        return torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8).view(shape)


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [n, 3, H, W] → float32, (pixels / 255 - mean) / std per channel, channels last."""
    shift = torch.tensor(mean, device=pixels.device).view(1, 3, 1, 1)
    scale = torch.tensor(std, device=pixels.device).view(1, 3, 1, 1)
    return ((pixels.float() / 255 - shift) / scale).contiguous(memory_format=torch.channels_last)
