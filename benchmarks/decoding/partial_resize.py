"""Resizing only the part that the crop keeps: the difference of the pixels, and the time that it saves.

    python -m benchmarks.decoding.partial_resize PHOTOS [--rounds 5]

PHOTOS is a directory of JPEGs, which are decoded at full scale in both modes. Prints, for each preprocessing, the share
of the values that differ, the largest difference, the largest difference of the logits of ViT-B/16 with random weights
relative to the largest logit, and images/s on one thread: median of the rounds, one mode after the other in each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vitserve.model.bundle.preprocess import DecodeMode, Decoder, Preprocessing
from vitserve.model.config import ViTConfig, variant
from vitserve.model.network.build import network_of

_GAP = 1e9  # no JPEG is decoded at a reduced scale
_CASES = (
    Preprocessing(224, 0.875, "bicubic"),
    Preprocessing(224, 0.9, "bicubic"),
    Preprocessing(224, 1.0, "bicubic"),
    Preprocessing(224, 0.875, "bilinear"),
    Preprocessing(384, 1.0, "bicubic"),
)


def decoder(preprocessing: Preprocessing, mode: DecodeMode) -> Decoder:
    return Decoder(preprocessing, mode=mode, draft_gap=_GAP)


def rate(decoding: Decoder, images: Sequence[bytes]) -> float:
    began = time.perf_counter()
    for image in images:
        decoding.decode(image)
    return len(images) / (time.perf_counter() - began)


def logits_difference(config: ViTConfig, exact: np.ndarray, fast: np.ndarray, preprocessing: Preprocessing) -> float:
    torch.manual_seed(0)
    network = network_of(config).eval()
    torch.nn.init.trunc_normal_(network.head.weight, std=0.02)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    outputs = []
    with torch.inference_mode():
        for pixels in (exact, fast):
            scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
            outputs.append(network((scaled - mean) / std)[0])
    return float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())


def row(preprocessing: Preprocessing, images: Sequence[bytes], rounds: int) -> str:
    modes: tuple[DecodeMode, ...] = ("exact", "fast")
    decoders = [decoder(preprocessing, mode) for mode in modes]
    exact, fast = (np.stack([each.decode(image) for image in images]) for each in decoders)
    distance = np.abs(exact.astype(int) - fast)
    rates = [[rate(each, images) for each in decoders] for _ in range(rounds)]
    ratio = statistics.median(after / before for before, after in rates)
    logits = logits_difference(variant("B/16", image_size=preprocessing.image_size), exact, fast, preprocessing)
    speeds = " | ".join(f"{statistics.median(column):.0f}" for column in zip(*rates, strict=True))
    name = f"{preprocessing.image_size}, crop {preprocessing.crop:g}, {preprocessing.interpolation}"
    values = f"{100 * (distance > 0).mean():.2f}% | {distance.max()} | {logits:.1e}"
    return f"| {name} | {values} | {speeds} | {ratio:.2f} × |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    images = [path.read_bytes() for path in sorted(options.photos.glob("*.jpg"))]
    torch.set_num_threads(1)
    sys.stdout.write("| preprocessing | values that differ | largest | logits | images/s, exact | fast | ratio |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|\n")
    for preprocessing in _CASES:
        sys.stdout.write(row(preprocessing, images, options.rounds))


if __name__ == "__main__":
    main()
