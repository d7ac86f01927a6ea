"""An ONNX file of an image classifier as the source of a bundle. Needs neither torch nor the library that wrote it.

    image input, float NCHW or NHWC  →  uint8 pixels, normalized in the graph
    fixed batch                      →  any batch (batch.py)
    logits or probabilities          →  logits, and the embedding before the last layer (outputs.py)

The reference is the file itself in ONNX Runtime, without optimizations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from vitserve.export.checkpoint.errors import CheckpointError, OptionNeededError
from vitserve.export.checkpoint.files import fault_of
from vitserve.export.checkpoint.formats.preprocessor import stated_preprocessing, with_options
from vitserve.export.checkpoint.labels import checked_labels, default_labels
from vitserve.export.checkpoint.overrides import Layout, Overrides, check_overrides
from vitserve.export.golden_images import textures
from vitserve.export.onnx_file.model import OnnxModel, Reference
from vitserve.export.onnx_file.outputs import Head, find_head
from vitserve.model.arrays import Activation
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import LibraryConfig

LEAST_OPSET, GREATEST_OPSET = 7, 25  # of the operators that ONNX Runtime and OpenVINO both run
GREATEST_IR = 13
_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "pkg.onnxscript.torch_lib", "pkg.onnxscript.torch_lib.common"}
_KINDS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.UINT8)
_CHANNELS = (1, 3)


@dataclass(frozen=True)
class OnnxCheckpoint:
    path: Path
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    activation: Activation
    notes: tuple[str, ...]
    reference: Reference
    head: Head
    config: LibraryConfig
    processor: Path | None = None  # not compared: that needs torch

    @property
    def classes(self) -> int:
        return self.config.classes

    def source_model(self, progress: Callable[[str], None]) -> OnnxModel:
        return OnnxModel(self.path, self.preprocessing, self.reference, self.head, self.config)


def load_onnx(path: Path, overrides: Overrides) -> OnnxCheckpoint:
    """Raises CheckpointError naming the fault of the file, and the supported values."""
    check_overrides("an ONNX file or an exported program", overrides)
    model = _read(path)
    value = _image_input(model, path)
    shape = [dim if isinstance(dim, int) else None for dim in value.shape or ()]
    layout, channels = _layout(value, shape, overrides.layout, path)
    preprocessing = _preprocessing(value, shape, layout, channels, overrides, path)
    reference = Reference(path, value.name or "", value.dtype or ir.DataType.FLOAT, layout, shape[0], preprocessing)
    pixels = textures(preprocessing.shape, 4)
    head = find_head(model, lambda output: reference.run(pixels, output), overrides.outputs)
    classes = reference.run(pixels[:1], head.output).reshape(1, -1).shape[1]
    labels = default_labels(classes) if overrides.labels is None else overrides.labels
    if head.from_probabilities and overrides.activation:  # its inverse makes the logits
        head = replace(head, activation=overrides.activation)
    activation = overrides.activation or head.activation or ("sigmoid" if classes == 1 else "softmax")
    if classes == 1 and activation == "softmax":
        raise CheckpointError("the model has one logit, whose softmax is always 1: --activation must be sigmoid")
    height, width, _ = preprocessing.shape
    name = model.graph.name or path.stem
    config = LibraryConfig("onnx", name, height, width, channels, classes, classes)
    notes = (f"the input {value.name} is {layout.upper()} of {width} × {height} pixels", *head.notes)
    return OnnxCheckpoint(
        path,
        checked_labels(labels, classes, "--labels"),
        preprocessing,
        activation,
        notes,
        reference,
        head,
        config,
    )


def _read(path: Path) -> ir.Model:
    fault = fault_of(path)
    if fault is not None and not fault.startswith("is an ONNX model"):
        raise CheckpointError(f"{path} {fault}")
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise several kinds for files that are no models
        raise CheckpointError(f"{path} is not an ONNX model, or it is damaged: {error}") from error
    opset = model.opset_imports.get("", 0)
    if not LEAST_OPSET <= opset <= GREATEST_OPSET:
        raise CheckpointError(f"{path} has opset {opset}; supported are {LEAST_OPSET} to {GREATEST_OPSET}")
    if model.ir_version > GREATEST_IR:
        raise CheckpointError(f"{path} has IR version {model.ir_version}; supported are versions up to {GREATEST_IR}")
    domains = sorted(
        {node.domain for node in model.graph if node.domain not in _DOMAINS and not _is_function(model, node)}
    )
    if domains:
        raise CheckpointError(
            f"{path} has operators of the domain {', '.join(domains)}, which only its own runtime has"
        )
    for tensor in _tensors(model):
        _check_external(path, tensor)
    return model


def _is_function(model: ir.Model, node: ir.Node) -> bool:
    return node.op_identifier() in model.functions


def _tensors(model: ir.Model) -> Iterator[Any]:
    """Of the initializers and attributes of all graphs and functions."""
    for graph in [*model.graphs(), *model.functions.values()]:
        yield from (value.const_value for value in getattr(graph, "initializers", {}).values())
        for attribute in (attribute for node in graph for attribute in node.attributes.values()):
            if attribute.type == ir.AttributeType.TENSOR:
                yield attribute.value
            elif attribute.type == ir.AttributeType.TENSORS:
                yield from attribute.value


def _check_external(path: Path, tensor: Any) -> None:
    """Raises CheckpointError for weights outside of the file's directory, also by a symbolic link, or missing ones."""
    if not isinstance(tensor, ir.ExternalTensor):
        return
    location, directory = Path(tensor.location), path.resolve().parent
    if not (path.parent / location).resolve().is_relative_to(directory) or ".." in location.parts:
        raise CheckpointError(f"{path} has weights outside of its directory: {tensor.location}")
    try:
        tensor.numpy()
    except Exception as error:
        raise CheckpointError(f"{path} has external weights that cannot be read: {location}: {error}") from error


def _image_input(model: ir.Model, path: Path) -> ir.Value:
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    described = ", ".join(f"{value.name} {value.dtype} {list(value.shape or ())}" for value in inputs)
    images = [value for value in inputs if value.shape is not None and len(value.shape) == 4]
    if len(inputs) != 1 or len(images) != 1:
        raise CheckpointError(f"{path} must have one input, an image with four axes; it has {described or 'none'}")
    if images[0].dtype not in _KINDS:
        raise CheckpointError(f"the input of {path} is {described}; supported are float32, float16 and uint8")
    return images[0]


def _layout(value: ir.Value, shape: list[int | None], stated: Layout | None, path: Path) -> tuple[Layout, int]:
    """The layout, and the number of channels. The names of dynamic axes count too, such as num_channels."""
    names = [str(dim.value) if isinstance(dim, ir.SymbolicDim) else "" for dim in value.shape or ()]
    fits: dict[Layout, int] = {}
    for layout, axis in (("nchw", 1), ("nhwc", 3)):
        size = shape[axis]
        if size in _CHANNELS or (size is None and "chan" in names[axis]):
            fits[layout] = 3 if size is None else size  # type: ignore[index]  # the literals of Layout
    if stated is not None:
        size = shape[1 if stated == "nchw" else 3]
        if size not in (None, *_CHANNELS):
            raise CheckpointError(f"--layout {stated}: the input of {path} is {value.shape}, which has {size} channels")
        return stated, size or 3
    if len(fits) != 1:
        raise OptionNeededError(
            f"the input of {path} is {value.shape}, which does not show whether its layout is NCHW or NHWC: --layout"
        )
    return next(iter(fits.items()))


def _preprocessing(
    value: ir.Value, shape: list[int | None], layout: Layout, channels: int, overrides: Overrides, path: Path
) -> Preprocessing:
    stated = stated_preprocessing(overrides)
    raw = value.dtype == ir.DataType.UINT8
    if stated is None and overrides.mean is None and overrides.std is None and not raw:
        raise OptionNeededError(
            f"{path} does not say how images are prepared: give --preprocessor, a file or directory of transformers or"
            " timm, or --mean and --std of pixels from 0 to 1 (with --interpolation, --crop and --squash)"
        )
    axes = (2, 3) if layout == "nchw" else (1, 2)
    height, width = (shape[axis] for axis in axes)
    size = overrides.image_size or (stated.image_size if stated else None)
    height, width = height or size, width or (stated.shape[1] if stated and not overrides.image_size else size)
    if height is None or width is None:
        raise OptionNeededError(f"the input of {path} is {value.shape}; its image size must be stated: --image-size")
    fixed = [side for axis, side in zip(axes, (height, width), strict=True) if shape[axis] is not None]
    if overrides.image_size and any(side != overrides.image_size for side in fixed):
        raise CheckpointError(f"--image-size {overrides.image_size}: the input of {path} is fixed to {value.shape}")
    base = stated or Preprocessing(height, mean=(0.0,) * channels, std=(1.0,) * channels)
    if raw:  # the graph normalizes, and gets pixels from 0 to 255
        base = replace(base, mean=(0.0,) * channels, std=(1 / 255,) * channels)
    if stated and stated.shape[:2] != (height, width):
        raise CheckpointError(
            f"the preprocessing makes {stated.shape[1]} × {stated.shape[0]} pixels, but the input of {path} is"
            f" {width} × {height}"
        )
    base = with_options(_sized(base, height, width), _repeated(overrides, channels))
    if base.channels != channels:
        raise CheckpointError(f"the preprocessing has {base.channels} channels; the input of {path} has {channels}")
    return base


def _sized(base: Preprocessing, height: int, width: int) -> Preprocessing:
    return replace(base, image_size=height, width=None if width == height else width)


def _repeated(overrides: Overrides, channels: int) -> Overrides:
    """One value of --mean or --std stands for all channels. Without one of them, the other's default applies."""
    values: dict[str, Any] = {"mean": overrides.mean, "std": overrides.std}
    if overrides.mean is not None or overrides.std is not None:
        defaults = {"mean": (0.0,), "std": (1.0,)}
        values = {name: value or defaults[name] for name, value in values.items()}
        values = {name: value * channels if len(value) == 1 else value for name, value in values.items()}
        if not np.all(values["std"]):
            raise CheckpointError("--std must not be zero")
    return replace(overrides, **values)
