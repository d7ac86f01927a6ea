"""Statements of the user about a checkpoint, in place of those that it lacks or that are wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.model.arrays import Activation
from vitserve.model.bundle.preprocess import Interpolation

Layout = Literal["nchw", "nhwc"]
OutputKind = Literal["logits", "probabilities"]
NetworkChoice = Literal["auto", "ours", "library"]


@dataclass(frozen=True)
class Overrides:
    """Empty or None: as in the checkpoint."""

    image_size: int | None = None  # pixels; position embeddings are interpolated to it
    labels: Sequence[str] | None = None
    architecture: str = ""  # timm's name of the network, for a state dict that does not have it
    model_args: Mapping[str, Any] = field(default_factory=dict)  # of timm.create_model, for the same
    preprocessor: str = ""  # a file or directory with the preprocessing, or torchvision:WEIGHTS
    weights: str = ""  # key or prefix of the weights to take from a file that holds several, or raw or averaged
    activation: Activation | None = None
    network: NetworkChoice = "auto"  # ours where it is known; only ours; or only the library's
    mean: tuple[float, ...] | None = None  # of pixels from 0 to 1, one for each channel
    std: tuple[float, ...] | None = None
    interpolation: Interpolation | None = None
    crop: float | None = None
    squash: bool | None = None
    layout: Layout | None = None  # of the input of an ONNX file
    outputs: OutputKind | None = None  # of an ONNX file
    prompts: tuple[str, ...] = ()  # texts with {} in place of a label, for CLIP and SigLIP
    merge: int = 0  # tokens that each block merges
    ignored_keys: tuple[str, ...] = ()  # of configurations; the user states that they do not affect the outputs


# Option → field.
OPTIONS = {
    "--image-size": "image_size",
    "--labels": "labels",
    "--architecture": "architecture",
    "--model-arg": "model_args",
    "--preprocessor": "preprocessor",
    "--weights": "weights",
    "--activation": "activation",
    "--network": "network",
    "--mean": "mean",
    "--std": "std",
    "--interpolation": "interpolation",
    "--crop": "crop",
    "--squash": "squash",
    "--layout": "layout",
    "--outputs": "outputs",
    "--prompt": "prompts",
    "--merge": "merge",
    "--ignore-key": "ignored_keys",
}
SourceKind = Literal[
    "random weights",
    "an ONNX file or an exported program",
    "weights of `vitserve train`",
    "another file of weights",
    "a directory",
]
_OF_ONNX = ("--layout", "--outputs")
_WITHOUT_EFFECT: dict[SourceKind, tuple[str, ...]] = {
    "random weights": tuple(name for name in OPTIONS if name != "--merge"),
    "an ONNX file or an exported program": (
        "--architecture",
        "--model-arg",
        "--weights",
        "--network",
        "--prompt",
        "--merge",
    ),
    "weights of `vitserve train`": ("--model-arg", "--weights", *_OF_ONNX, "--prompt"),
    "another file of weights": (*_OF_ONNX, "--prompt"),
    "a directory": _OF_ONNX,
}
_WITHOUT_CONFIGURATION = ("an ONNX file or an exported program", "weights of `vitserve train`")


def check_overrides(kind: SourceKind, overrides: Overrides) -> None:
    """Raises CheckpointError naming the options that have no effect on a source of this kind, and those that have."""
    default, rejected = Overrides(), _WITHOUT_EFFECT[kind]
    if kind in _WITHOUT_CONFIGURATION and not overrides.preprocessor:  # whose keys may be ignored
        rejected = (*rejected, "--ignore-key")
    stated = [name for name in rejected if getattr(overrides, OPTIONS[name]) != getattr(default, OPTIONS[name])]
    if stated:
        accepted = ", ".join(name for name in OPTIONS if name not in rejected) or "none"
        raise CheckpointError(f"no effect on {kind}: {', '.join(stated)}; the options for it are: {accepted}")


def channel_values(option: str, text: str) -> tuple[float, ...] | None:
    """0.485,0.456,0.406 → three numbers; None for an empty text. Raises CheckpointError."""
    if not text:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 3):
        raise CheckpointError(f"{option} {text!r} is not one number or three, separated by commas")
    return values


def model_arguments(texts: Iterable[str]) -> dict[str, Any]:
    """NAME=VALUE → {NAME: VALUE}, the values as in JSON, or as text. Raises CheckpointError for another form."""
    arguments = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise CheckpointError(f"--model-arg {text!r} is not of the form NAME=VALUE")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments
