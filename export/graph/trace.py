"""Traces a network to the reference graph: uint8 pixels in, float32 logits and embedding out, ONNX opset 23."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from vitserve.model.bundle.preprocess import Preprocessing

OPSET = 23  # the first with Attention as one operator; what TensorRT's parser and ONNX Runtime both read as such


class Servable(nn.Module):
    """A network with its normalization in HTTP worker: uint8 [n, H, W, 3] → float32 logits [n, classes], embedding [n, width]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        # (pixels / 255 - mean) / std as one multiplication and one addition
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        images = pixels.float() * self.scale + self.shift
        outputs: tuple[Tensor, Tensor] = self.network(images.permute(0, 3, 1, 2))
        return outputs


def trace(network: nn.Module, image_size: int, path: Path) -> None:
    """Writes the graph of a Servable or Lean to ``path`` and its weights beside it, in ``path``.data; the batch is its only dynamic axis."""
    example = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
    batch = torch.export.Dim("n", min=1, max=1024)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecation notices; they concern nothing of ours
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: batch},),
            input_names=["pixels"],
            output_names=["logits", "embedding"],
            verbose=False,
        )
    assert program is not None
    ClearMetadataAndDocStringPass()(
        program.model
    )  # where in the source each node comes from: three quarters of the file, and another wherever that lies
    program.save(
        path, external_data=True
    )  # mapped instead of parsed when an engine opens it, and shared by the graphs of other dialects
