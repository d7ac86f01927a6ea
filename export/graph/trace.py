"""Traces a network to the reference graph: uint8 pixels in, float32 logits and embedding out, ONNX opset 23."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn

OPSET = 23  # the first opset with Attention as one operator; TensorRT's parser and ONNX Runtime both support it


def trace(network: nn.Module, image_size: int, path: Path) -> None:
    """Writes the graph to ``path`` and its weights to ``path``.data. The batch is the only dynamic axis.

    ``network`` is a ReferenceNetwork or an OptimizedNetwork.
    """
    example = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
    batch = torch.export.Dim("n", min=1, max=1024)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation notices of the exporter about its own code
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
    # The metadata is a stack trace per node: three quarters of the file, and dependent on the source directory.
    ClearMetadataAndDocStringPass()(program.model)
    # External weights are memory-mapped when an engine opens the graph, and other graphs can share them.
    program.save(path, external_data=True)
