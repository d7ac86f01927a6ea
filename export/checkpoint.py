"""Reads a checkpoint: vitserve's own safetensors file, with its shape, labels and preprocessing in the metadata. Imported by export/build.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from model.config import ViTConfig, variant
from model.preprocess import Preprocessing
from model.vit import ViT


class CheckpointError(ValueError):
    """The file is not a checkpoint that can be exported."""


@dataclass(frozen=True)
class Checkpoint:
    network: ViT  # float32, in evaluation mode
    labels: tuple[str, ...]
    preprocessing: Preprocessing


def load_checkpoint(path: Path) -> Checkpoint:
    """Raises CheckpointError, naming each tensor that is missing, unexpected or misshapen."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: _single(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    missing = {"config", "labels", "mean", "std"} - metadata.keys()
    if missing:
        raise CheckpointError(f"{path} has no {', '.join(sorted(missing))} in its metadata; it was not written by `vitserve train`")
    fields = json.loads(metadata["config"])
    config = ViTConfig(**fields | {"stem": tuple(fields["stem"]) if fields["stem"] else None})
    network = ViT(config)
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit its own configuration: {error}") from error
    preprocessing = Preprocessing(config.image_size, mean=tuple(json.loads(metadata["mean"])), std=tuple(json.loads(metadata["std"])))
    return Checkpoint(network.eval(), tuple(json.loads(metadata["labels"])), preprocessing)


def random_checkpoint(name: str, seed: int = 0) -> Checkpoint:
    """The named variant with random weights: nothing to learn from it but how fast it runs. Raises ValueError for an unknown name."""
    config = variant(name)
    torch.manual_seed(seed)
    network = ViT(config).eval()
    torch.nn.init.trunc_normal_(network.head.weight, std=0.02)
    return Checkpoint(network, tuple(f"class {index}" for index in range(config.classes)), Preprocessing(config.image_size))


def _single(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
