"""A .pt2 file of torch.export.save() as the source of a bundle.

torch writes the program as an ONNX graph, which is then read as an ONNX file (onnx_file/load.py): the layout of its
input, a fixed batch that becomes any batch, logits or probabilities. The reference is the program itself.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.export import ExportedProgram

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.overrides import Overrides
from vitserve.export.golden_images import textures
from vitserve.export.onnx_file.load import OnnxCheckpoint, load_onnx
from vitserve.export.onnx_file.model import OnnxModel
from vitserve.export.program_file.archive import read_program
from vitserve.model.arrays import Outputs, Pixels

_OPSET = 23
_BATCH = 16
_EQUAL = 1e-4  # relative to the largest output, between the program and its ONNX graph
_COMPARED = 3  # images


class Program:
    """The program in torch, in float32."""

    def __init__(self, path: Path, exported: ExportedProgram) -> None:
        self.path, self.exported = path, exported
        self._module = exported.module(check_guards=False)  # guards would be Python of the file

    def run(self, images: npt.NDArray[Any], output: int) -> npt.NDArray[np.float32]:
        """Raises CheckpointError."""
        try:
            with torch.inference_mode():
                result = self._module(torch.from_numpy(images))
        except Exception as error:  # whatever its operators raise
            raise CheckpointError(f"torch cannot run {self.path}: {error}") from error
        flat, _ = torch.utils._pytree.tree_flatten(result)
        values: npt.NDArray[np.float32] = flat[output].float().numpy()
        return values


@dataclass(frozen=True)
class ProgramModel(OnnxModel):
    program: Program
    output: int  # the position of the output that has the classes
    directory: tempfile.TemporaryDirectory[str]  # of the ONNX graph; deleted with this object

    @property
    def architecture(self) -> str:
        return self.program.path.stem

    @property
    def reference(self) -> str:
        return f"{self.program.path.name} in torch {torch.__version__}"

    def run(self, pixels: Pixels) -> Outputs:
        """If the graph ends with a softmax or sigmoid, the logits are those of the graph, which was compared."""
        outputs = super().run(pixels)
        if self.head.cut != self.head.output:
            return outputs
        logits = self.head.logits_of(self._program_output(pixels))
        return Outputs(logits, logits if self.head.embedding is None else outputs.embedding)

    def write_graph(self, path: Path) -> None:
        """Raises CheckpointError if the graph does not compute a batch like its images one by one."""
        with _named(self.program.path, self.path):
            super().write_graph(path)

    def check(self) -> None:
        """Raises CheckpointError if the ONNX graph does not compute what the program computes."""
        pixels = textures(self.preprocessing.shape, _COMPARED)
        expected, actual = self._program_output(pixels), self.file.run(pixels, self.head.output)
        scale = max(float(np.abs(expected).max()), 1e-12)
        if actual.shape != expected.shape or not np.abs(actual - expected).max() <= _EQUAL * scale:
            raise CheckpointError(f"the ONNX graph that torch makes of {self.program.path} computes something else")

    def _program_output(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        size = self.file.batch or _BATCH
        parts = []
        for start in range(0, len(pixels), size):
            part = pixels[start : start + size]
            padding = np.repeat(part[:1], size - len(part) if self.file.batch else 0, axis=0)
            images = self.file.input_of(np.concatenate([part, padding]))
            parts.append(self.program.run(images, self.output)[: len(part)])
        return np.concatenate(parts)


@dataclass(frozen=True)
class ProgramCheckpoint(OnnxCheckpoint):
    program: Program | None = None
    output: int = 0
    directory: tempfile.TemporaryDirectory[str] | None = None

    def source_model(self, progress: Callable[[str], None]) -> ProgramModel:
        assert self.program is not None
        assert self.directory is not None
        model = ProgramModel(
            self.path,
            self.preprocessing,
            self.reference,
            self.head,
            self.config,
            self.program,
            self.output,
            self.directory,
        )
        model.check()
        return model


def load_program(path: Path, overrides: Overrides) -> ProgramCheckpoint:
    """Raises CheckpointError naming what is wrong with the file, and what is supported."""
    exported = read_program(path)
    directory = tempfile.TemporaryDirectory()
    graph = Path(directory.name) / f"{path.stem}.onnx"
    outputs = _write_graph(path, exported, graph)
    with _named(path, graph):
        read = load_onnx(graph, overrides)
    values = {field.name: getattr(read, field.name) for field in fields(read)}
    return ProgramCheckpoint(
        **values, program=Program(path, exported), output=outputs.index(read.head.output), directory=directory
    )


@contextmanager
def _named(path: Path, graph: Path) -> Iterator[None]:
    """Errors about the ONNX graph name the program."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(graph), str(path))) from error


def _write_graph(path: Path, exported: ExportedProgram, graph: Path) -> list[str]:
    """Returns the names of the outputs. Raises CheckpointError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = torch.onnx.export(exported, (), graph, dynamo=True, opset_version=_OPSET, verbose=False)
    except Exception as error:  # the exporter has no common base class for what it cannot express
        cause = error.__cause__ or error
        reason = next((line for line in str(cause).splitlines() if line.strip()), repr(cause))
        raise CheckpointError(f"torch cannot write {path} as an ONNX graph: {reason}") from error
    assert written is not None
    return [value.name or "" for value in written.model.graph.outputs]
