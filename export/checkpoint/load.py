"""Reads a checkpoint: recognizes its layout and builds the network with its weights, labels and preprocessing.

The source is one of locate.py's. Files may be:

    DIRECTORY             config.json and weights, written by transformers or timm
    FILE.safetensors      written by `vitserve train`
    FILE.npz              in the layout of Google's release
    FILE                  a state dict of torchvision or, with the architecture's name, of timm
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.formats import google, huggingface, timm, torchvision
from vitserve.export.checkpoint.formats.source import Source
from vitserve.export.checkpoint.locate import check_source, fetch_snapshot, split_scheme
from vitserve.export.checkpoint.position_embeddings import at_image_size
from vitserve.export.checkpoint.state_dict import Tensors, fill, read_tensors
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ResNetConfig, ViTConfig, any_variant
from vitserve.model.network.build import Network, network_of

IMAGENET_LABELS = Path(__file__).parent / "imagenet_labels.txt"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that exists is read


@dataclass(frozen=True)
class Checkpoint:
    network: Network  # float32, in evaluation mode
    labels: tuple[str, ...]
    preprocessing: Preprocessing


def load_checkpoint(
    source: str | Path, *, image_size: int | None = None, labels: Sequence[str] | None = None, architecture: str = ""
) -> Checkpoint:
    """Reads the checkpoint, at another image size if one is given.

    ``labels`` replace the checkpoint's own. ``architecture`` is timm's name of the network, for a bare state dict.

    Raises CheckpointError, naming each tensor that is missing, unexpected or of another shape;
    ValueError if the image size is not a multiple of the patch size.
    """
    check_source(str(source))
    scheme, name = split_scheme(str(source))
    if scheme == "random":
        return random_checkpoint(name)
    snapshot = fetch_snapshot(str(source))
    path = Path(source) if snapshot is None else snapshot.path
    read = _read_directory(path) if path.is_dir() else _read_file(path, architecture)
    return _checkpoint(read, image_size, labels)


def random_checkpoint(name: str, seed: int = 0) -> Checkpoint:
    """The named variant with random weights, for measuring speed. Raises ValueError for an unknown name."""
    config = any_variant(name)
    torch.manual_seed(seed)
    network = network_of(config).eval()
    torch.nn.init.trunc_normal_(network.head.weight, std=0.02)
    return Checkpoint(network, _numbered_labels(config.classes), Preprocessing(config.image_size))


def _checkpoint(source: Source, image_size: int | None, labels: Sequence[str] | None) -> Checkpoint:
    config, weights, preprocessing = source.config, source.weights, source.preprocessing
    side = image_size or preprocessing.image_size
    if isinstance(config, ResNetConfig):
        config = replace(config, image_size=side)
    else:
        config, weights = at_image_size(config, weights, side)
    network = network_of(config)
    fill(network, weights)
    return Checkpoint(network.eval(), _labels(source, labels), replace(preprocessing, image_size=side))


def _labels(source: Source, replacement: Sequence[str] | None) -> tuple[str, ...]:
    classes = source.config.classes
    if replacement is not None:
        if len(replacement) != classes:
            raise CheckpointError(f"the model has {classes} classes, but {len(replacement)} labels were given")
        return tuple(replacement)
    if source.labels is not None:
        return source.labels
    if classes == 1000:
        return tuple(IMAGENET_LABELS.read_text(encoding="utf-8").splitlines())
    return _numbered_labels(classes)


def _numbered_labels(classes: int) -> tuple[str, ...]:
    return tuple(f"class {index}" for index in range(classes))


def _read_directory(directory: Path) -> Source:
    config = _json(directory / "config.json")
    tensors = Tensors(_directory_tensors(directory))
    if "architecture" not in config:
        return huggingface.read(tensors, config, _json(directory / "preprocessor_config.json"))
    heads = config.get("model_args", {}).get("num_heads")
    pretrained = config.get("pretrained_cfg", config)
    return timm.read(tensors, config["architecture"], pretrained, config.get("global_pool"), heads)


def _directory_tensors(directory: Path) -> dict[str, torch.Tensor]:
    for name in _WEIGHTS:
        if (directory / name).exists():
            return read_tensors(directory / name)
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        raise CheckpointError(f"{directory} has no weights: none of {', '.join(_WEIGHTS)}, {index.name}")
    named: dict[str, torch.Tensor] = {}
    for shard in sorted(set(_json(index).get("weight_map", {}).values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names a file outside its directory: {shard!r}")
        named |= read_tensors(directory / shard)
    return named


def _read_file(path: Path, architecture: str) -> Source:
    if path.suffix == ".safetensors" and not architecture:
        trained = _read_trained(path)
        if trained is not None:
            return trained
    tensors = Tensors(read_tensors(path))
    if google.MARK in tensors:
        return google.read(tensors)
    if torchvision.MARK in tensors:
        return torchvision.read(tensors)
    if timm.MARK in tensors or timm.BIT_MARK in tensors:
        if not architecture:
            raise CheckpointError(
                f"{path} is a state dict in timm's layout; name its architecture"
                " (--architecture vit_base_patch16_224), or export the directory that save_for_hf writes"
            )
        return timm.read(tensors, architecture, _pretrained_cfg(architecture))
    raise CheckpointError(
        f"unrecognized checkpoint layout: {path}; supported are Google's, torchvision's, timm's and `vitserve train`'s"
    )


def _pretrained_cfg(architecture: str) -> dict[str, Any]:
    """timm's table of preprocessing, which a bare state dict does not contain."""
    try:
        from timm import get_pretrained_cfg
    except (ImportError, RuntimeError) as error:
        raise CheckpointError(
            f"timm is required to determine the preprocessing of {architecture}: pip install timm,"
            " or export the directory that save_for_hf writes"
        ) from error
    pretrained = get_pretrained_cfg(architecture)
    if pretrained is None:
        raise CheckpointError(f"timm has no architecture {architecture!r}")
    settings: dict[str, Any] = pretrained.to_dict()  # type: ignore[no-untyped-call]  # untyped in timm
    return settings


def _read_trained(path: Path) -> Source | None:
    """A file that `vitserve train` wrote, with config, labels and normalization in its metadata; None for any other."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if not {"config", "labels", "mean", "std"} <= metadata.keys():
        return None
    config = _trained_config(json.loads(metadata["config"]))
    mean, std = (tuple(json.loads(metadata[name])) for name in ("mean", "std"))
    preprocessing = Preprocessing(config.image_size, mean=mean, std=std)
    return Source(config, read_tensors(path), preprocessing, tuple(json.loads(metadata["labels"])))


def _trained_config(fields: dict[str, Any]) -> ViTConfig | ResNetConfig:
    if "blocks" in fields:
        return ResNetConfig(**fields | {"blocks": tuple(fields["blocks"])})
    stages = {name: tuple(fields[name]) if fields.get(name) else None for name in ("stem", "resnet")}
    return ViTConfig(**fields | stages)


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return loaded
