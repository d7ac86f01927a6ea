"""Exports a network with torch.onnx.export and no optimizations. The peers of benchmarks.compare serve this graph.

python -m benchmarks.plain_graph random:B/16 plain.onnx
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from vitserve.export.checkpoint.load import load_checkpoint

OPSET = 18  # the default of torch.onnx.export
INPUT, OUTPUT = "pixels", "logits"


class _LogitsOnly(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)[0]
        return logits


def write_plain_graph(network: nn.Module, image_size: int, path: Path) -> None:
    """Writes a graph from normalized float32 images [n, 3, H, W] to float32 logits [n, classes]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within the exporter
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            _LogitsOnly(network).eval(),
            (torch.zeros(2, 3, image_size, image_size),),
            path,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("n", min=1, max=256)},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            external_data=False,
            verbose=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="checkpoint, in any form that `vitserve export` accepts")
    parser.add_argument("path", type=Path)
    options = parser.parse_args()
    checkpoint = load_checkpoint(options.source)
    write_plain_graph(checkpoint.network, checkpoint.preprocessing.image_size, options.path)


if __name__ == "__main__":
    main()
