"""Traces a network to the reference graph: uint8 pixels in, float32 logits and embedding out, ONNX opset 23."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn

OUTPUTS = ("logits", "embedding")
OPSET = 23  # the first opset with Attention as one operator; TensorRT's parser and ONNX Runtime both support it


def trace(network: nn.Module, shape: int | tuple[int, int, int], path: Path) -> None:
    """Writes the graph to ``path`` and its weights to ``path``.data. The batch is the only dynamic axis.

    ``network`` is a ReferenceNetwork or an OptimizedNetwork. ``shape``: height, width and channels of its pixels; one
    number stands for a square with three channels.
    """
    height, width, channels = (shape, shape, 3) if isinstance(shape, int) else shape
    example = torch.zeros(2, height, width, channels, dtype=torch.uint8)
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
            output_names=list(OUTPUTS),
            verbose=False,
        )
    assert program is not None
    _rename_others(program.model.graph)
    # The metadata is a stack trace per node: three quarters of the file, and dependent on the source directory.
    ClearMetadataAndDocStringPass()(program.model)
    # External weights are memory-mapped when an engine opens the graph, and other graphs can share them.
    program.save(path, external_data=True)


def _rename_others(graph: ir.Graph) -> None:
    """Weights and intermediate results are named after modules, which may have the name of an output."""
    intermediate = [value for node in graph for value in node.outputs if not value.is_graph_output()]
    for value in [*graph.initializers.values(), *intermediate]:
        if value.name in OUTPUTS:
            value.name = f"{value.name}_module"
