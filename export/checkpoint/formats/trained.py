"""The file that `vitserve train` writes: safetensors with configuration, labels and normalization in its metadata."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pydantic
from safetensors import SafetensorError, safe_open

from vitserve.export.checkpoint.configuration import Configuration
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.formats.source import Source
from vitserve.export.checkpoint.labels import labels_of
from vitserve.export.checkpoint.state_dict import Tensors, read_tensors
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ResNetConfig, ViTConfig

_KEYS = {"config", "labels", "mean", "std"}


def read(path: Path) -> Source | None:
    """None for any other file. Raises CheckpointError."""
    metadata = _metadata(path)
    if not metadata.keys() >= _KEYS:
        return None
    try:
        fields = {key: json.loads(metadata[key]) for key in _KEYS}
        config = _config(fields["config"])
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the metadata of {path} is not that of `vitserve train`: {error}") from error
    labels = labels_of(fields["labels"], config.classes, f"the metadata of {path}")
    tensors = Tensors(read_tensors(path).groups[""])
    return Source(config, tensors.take_all(), _preprocessing(path, metadata, fields, config), labels)


def _preprocessing(
    path: Path, metadata: dict[str, str], fields: dict[str, Any], config: ViTConfig | ResNetConfig
) -> Preprocessing:
    """Files of earlier versions have mean and std only."""
    of_file = f"the metadata of {path}"
    try:
        stated = json.loads(metadata.get("preprocessing", "{}"))
        keys = stated | {name: Configuration(of_file, fields).numbers(name, None) for name in ("mean", "std")}
        default = asdict(Preprocessing(config.image_size))
        if unknown := sorted(keys.keys() - default.keys()):
            raise ValueError(f"unknown preprocessing: {', '.join(unknown)}")
        return pydantic.TypeAdapter(Preprocessing).validate_python(default | keys)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{of_file} is not that of `vitserve train`: {error}") from error


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):  # read_tensors() reports it
        return {}


def _config(fields: dict[str, Any]) -> ViTConfig | ResNetConfig:
    if "blocks" in fields:
        return ResNetConfig(**fields | {"blocks": tuple(fields["blocks"])})
    stages = {name: tuple(fields[name]) if fields.get(name) else None for name in ("stem", "resnet")}
    return ViTConfig(**fields | stages)
