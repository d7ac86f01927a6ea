"""The shapes of a bundle's graph, read without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir


class GraphShapes(NamedTuple):
    image: tuple[int, ...]  # H, W, C
    classes: int
    width: int  # of the embedding


def shapes_of(graph: Path) -> GraphShapes:
    loaded = ir.load(graph).graph
    pixels, (logits, embedding) = loaded.inputs[0], loaded.outputs
    image, classes, width = (_without_batch(value) for value in (pixels, logits, embedding))
    return GraphShapes(image, classes[0], width[0])


def _without_batch(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(size) for size in list(value.shape)[1:])  # type: ignore[arg-type]  # only the batch is symbolic
