"""The accuracy that token merging loses: the same weights with different numbers of merged tokens, in float32.

    python -m benchmarks.models.merging_accuracy CHECKPOINT ARCHIVE [--merge 0 4 8 12 16]

CHECKPOINT is a source of `vitserve export`, and ARCHIVE an archive for `vitserve train`, whose test images are used.
Prints, for each number, the tokens of the blocks, the accuracy, and the images that get the same class as without
merging.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from vitserve.export.checkpoint.load import load_checkpoint
from vitserve.model.bundle.preprocess import Decoder
from vitserve.model.config import ViTConfig
from vitserve.model.training.data import decode, normalize
from vitserve.model.training.samples import read_data_set

_BATCH = 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("archive", type=Path)
    parser.add_argument("--merge", type=int, nargs="+", default=[0, 4, 8, 12, 16])
    parser.add_argument("--images", type=int, default=10_000)
    options = parser.parse_args()
    samples = read_data_set(options.archive, 0, 1.0, 0).test[: options.images]
    decoder = Decoder(load_checkpoint(options.checkpoint).preprocessing)
    images = decode(samples, decoder, options.archive.parent).images
    original: torch.Tensor | None = None
    sys.stdout.write("| R | tokens per block | accuracy | same class as R = 0 |\n|---|---|---|---|\n")
    for merge in sorted({0, *options.merge}):
        checkpoint = load_checkpoint(options.checkpoint, merge=merge)
        config, preprocessing = checkpoint.network.config, checkpoint.preprocessing
        assert isinstance(config, ViTConfig)
        with torch.inference_mode():
            batches = images.pixels.split(_BATCH)  # type: ignore[no-untyped-call]  # untyped in torch
            logits = [checkpoint.network(normalize(part, preprocessing.mean, preprocessing.std))[0] for part in batches]
        predicted = torch.cat(logits).argmax(1)
        original = predicted if original is None else original
        accuracy, same = (float((predicted == other).float().mean()) for other in (images.classes, original))
        tokens = ", ".join(map(str, config.tokens_of_blocks))
        sys.stdout.write(f"| {merge} | {tokens} | {accuracy:.2%} | {same:.2%} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
