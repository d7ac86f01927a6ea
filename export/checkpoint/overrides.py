"""What the user states about a checkpoint, where the checkpoint does not state it or states something else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.model.arrays import Activation


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
    ignored_keys: tuple[str, ...] = ()  # of configurations; the user states that they do not affect the outputs


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
