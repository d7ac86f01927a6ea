"""The SourceModel of an ONNX file."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.overrides import Layout
from vitserve.export.golden_images import textures
from vitserve.export.graph.initializers import add_initializer
from vitserve.export.graph.normalization import scale_and_shift
from vitserve.export.graph.passes import optimize_verified, save_graph
from vitserve.export.onnx_file.batch import make_dynamic
from vitserve.export.onnx_file.bf16 import round_to_bf16
from vitserve.export.onnx_file.outputs import Head, add_outputs
from vitserve.model.arrays import Outputs, Pixels
from vitserve.model.bundle.parity import compare
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import LibraryConfig

_EQUAL = 1e-5  # relative to the largest logit, between the file and the graph with another batch
_BATCH = 16


@dataclass(frozen=True)
class Reference:
    """The file in ONNX Runtime, in float32 and without optimizations."""

    path: Path
    input_name: str
    dtype: ir.DataType
    layout: Layout
    batch: int | None  # fixed by the file; None for any
    preprocessing: Preprocessing

    @cached_property
    def session(self) -> Any:
        return _session(self.path)

    def run(self, pixels: Pixels, output: str) -> npt.NDArray[np.float32]:
        """One output for pixels, uint8 [n, H, W, C]. Raises CheckpointError if the file cannot run."""
        size = self.batch or _BATCH
        parts = []
        try:
            for start in range(0, len(pixels), size):
                part = pixels[start : start + size]
                padding = size - len(part) if self.batch else 0
                padded = np.concatenate([part, np.repeat(part[:1], padding, axis=0)])
                (result,) = self.session.run([output], {self.input_name: self.input_of(padded)})
                parts.append(np.asarray(result, np.float32)[: len(part)])
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise CheckpointError(f"ONNX Runtime cannot run {self.path}: {error}") from error
        return np.concatenate(parts)

    def input_of(self, pixels: Pixels) -> npt.NDArray[Any]:
        """Normalized, in the layout and type of the input."""
        if self.dtype == ir.DataType.UINT8:
            images: npt.NDArray[Any] = pixels
        else:
            scale, shift = scale_and_shift(self.preprocessing)
            images = (pixels.astype(np.float32) * scale + shift).astype(self.dtype.numpy())
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2)) if self.layout == "nchw" else images


@dataclass(frozen=True)
class OnnxModel:
    path: Path
    preprocessing: Preprocessing
    file: Reference
    head: Head
    config: LibraryConfig

    @property
    def architecture(self) -> str:
        return self.config.architecture

    @property
    def reference(self) -> str:
        import onnxruntime

        return f"{self.path.name} in onnxruntime {onnxruntime.__version__}"

    def run(self, pixels: Pixels) -> Outputs:
        logits = self.head.logits_of(self._extended.run(pixels, self.head.cut))
        if self.head.embedding is None:
            return Outputs(logits, logits)
        return Outputs(logits, self._extended.run(pixels, self.head.embedding))

    def run_unmerged(self, pixels: Pixels) -> None:
        return None

    def run_bf16(self, pixels: Pixels) -> Outputs:
        graph = self._temporary / "bf16.onnx"
        self.write_graph(graph)
        model = ir.load(graph)
        round_to_bf16(model.graph)
        save_graph(model, graph)
        return _run(_session(graph), pixels)

    def write_graph(self, path: Path) -> None:
        """Raises CheckpointError if the graph does not compute a batch like its images one by one."""
        model = ir.load(self.path)
        if self.file.batch is not None:
            make_dynamic(model, self.file.batch, self.file.input_name)
        _add_pixels(model, self.file)
        add_outputs(model, self.head)
        for value in [*model.graph.inputs, *model.graph.outputs]:
            value.doc_string = None
        ClearMetadataAndDocStringPass()(model)
        RemoveUnusedNodesPass()(model)
        save_graph(model, path)
        self._check_batch(path)
        optimize_verified(path, self._is_equal)

    def _is_equal(self, graph: Path) -> bool:
        pixels = textures(self.preprocessing.shape, 2)
        return compare(_run(_session(graph), pixels), self.run(pixels)).failure("fp32") is None

    @cached_property
    def _extended(self) -> Reference:
        """The file with the logits and the embedding as outputs, which it may have as intermediate results only."""
        model = ir.load(self.path)
        values = {value.name: value for node in model.graph for value in node.outputs}
        for name in {self.head.cut, self.head.embedding or self.head.cut}:
            if values[name] not in model.graph.outputs:
                model.graph.outputs.append(values[name])
        path = self._temporary / "extended.onnx"
        save_graph(model, path)
        return replace(self.file, path=path)

    @cached_property
    def _temporary(self) -> Path:
        """Deleted with this object."""
        path = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)
        return path

    def _check_batch(self, path: Path) -> None:
        pixels = textures(self.preprocessing.shape, 3)
        expected = self.run(pixels).logits
        fixed = f"{self.path} has a fixed batch of {self.file.batch}, and cannot be made to take any batch"
        try:
            actual = _run(_session(path), pixels).logits
        except Exception as error:
            raise CheckpointError(f"{fixed if self.file.batch else self.path}: {error}") from error
        scale = max(float(np.abs(expected).max()), 1e-12)
        if actual.shape != expected.shape or not np.abs(actual - expected).max() <= _EQUAL * scale:
            reason = "a batch of 3 images has other outputs than the images one by one"
            raise CheckpointError(f"{fixed}: {reason}" if self.file.batch else f"{self.path}: {reason}")


def _add_pixels(model: ir.Model, file: Reference) -> None:
    """Puts normalization and layout before the graph's own input, which is then no input any more."""
    graph = model.graph
    image = next(value for value in graph.inputs if value.name == file.input_name)
    height, width, channels = file.preprocessing.shape
    pixels = ir.Value(
        name="pixels", type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape(["n", height, width, channels])
    )
    nodes, last = list[ir.Node](), pixels
    if file.dtype != ir.DataType.UINT8:
        scale, shift = scale_and_shift(file.preprocessing)
        cast = ir.node("Cast", [last], {"to": ir.DataType.FLOAT.value}, name="pixels_cast")
        mul = ir.node("Mul", [cast.outputs[0], add_initializer(graph, "pixels_scale", scale)], name="pixels_mul")
        add = ir.node("Add", [mul.outputs[0], add_initializer(graph, "pixels_shift", shift)], name="pixels_add")
        nodes, last = [cast, mul, add], add.outputs[0]
    if file.dtype == ir.DataType.FLOAT16:
        half = ir.node("Cast", [last], {"to": ir.DataType.FLOAT16.value}, name="pixels_half")
        nodes, last = [*nodes, half], half.outputs[0]
    if file.layout == "nchw":
        transpose = ir.node("Transpose", [last], {"perm": [0, 3, 1, 2]}, name="pixels_transpose")
        nodes, last = [*nodes, transpose], transpose.outputs[0]
    for user, index in tuple(image.uses()):
        user.replace_input_with(index, last)
    graph.inputs[:] = [pixels]
    graph.insert_before(graph[0], nodes)


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(session: Any, pixels: Pixels) -> Outputs:
    logits, embedding = session.run(["logits", "embedding"], {"pixels": pixels})
    return Outputs(logits, embedding)
