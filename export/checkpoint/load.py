"""Reads a checkpoint: recognizes its layout and builds the network with its weights, labels and preprocessing.

The source is one of locate.py's. Files may be:

    DIRECTORY             config.json and weights, written by transformers or timm
    FILE.safetensors      written by `vitserve train`
    FILE.npz              in the layout of Google's release
    FILE                  a state dict of torchvision or, with the architecture's name, of timm
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vitserve.export.checkpoint.configuration import Configuration, read_json
from vitserve.export.checkpoint.directory import preprocessor_of, read_directory
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.files import CONFIG, PREPROCESSOR
from vitserve.export.checkpoint.formats import google, huggingface, image_processor, timm, torchvision, trained
from vitserve.export.checkpoint.formats.source import Source
from vitserve.export.checkpoint.labels import checked_labels, default_labels, numbered_labels
from vitserve.export.checkpoint.locate import check_source, fetch_snapshot, split_scheme
from vitserve.export.checkpoint.overrides import Overrides
from vitserve.export.checkpoint.position_embeddings import GREATEST_IMAGE_SIZE, at_image_size
from vitserve.export.checkpoint.selection import find_network
from vitserve.export.checkpoint.state_dict import Tensors, build_network, read_tensors
from vitserve.model.arrays import Activation
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ResNetConfig, any_variant
from vitserve.model.network.build import Network, network_of

_TORCHVISION = "torchvision:"
_MARKS = (google.MARK, torchvision.MARK, timm.MARK, timm.BIT_MARK)


@dataclass(frozen=True)
class Checkpoint:
    network: Network  # float32, in evaluation mode
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    activation: Activation = "softmax"  # from logits to probabilities
    notes: tuple[str, ...] = ()  # decisions that the user should know of


def load_checkpoint(source: str | Path, overrides: Overrides | None = None, /, **fields: Any) -> Checkpoint:
    """Reads the checkpoint. ``fields`` are those of Overrides, for a call without an instance.

    Raises CheckpointError naming each tensor that is missing, unexpected or of another shape, and each key that is not
    known; ValueError if the image size is not a multiple of the patch size.
    """
    overrides = replace(overrides or Overrides(), **fields)
    check_source(str(source))
    scheme, name = split_scheme(str(source))
    if scheme == "random":
        return random_checkpoint(name)
    preprocessing = _stated_preprocessing(overrides)
    snapshot = fetch_snapshot(str(source))
    path = Path(source) if snapshot is None else snapshot.path
    read = read_directory(path, overrides, preprocessing) if path.is_dir() else _read_file(path, overrides)
    return _checkpoint(read, overrides, preprocessing)


def random_checkpoint(name: str, seed: int = 0) -> Checkpoint:
    """The named variant with random weights, for measuring speed. Raises ValueError for an unknown name."""
    config = any_variant(name)
    torch.manual_seed(seed)
    network = network_of(config).eval()
    torch.nn.init.trunc_normal_(network.head.weight, std=0.02)
    return Checkpoint(network, numbered_labels(config.classes), Preprocessing(config.image_size))


def _checkpoint(source: Source, overrides: Overrides, preprocessing: Preprocessing | None) -> Checkpoint:
    config, weights, preprocessing = source.config, source.weights, preprocessing or source.preprocessing
    side = overrides.image_size or preprocessing.image_size
    if side > GREATEST_IMAGE_SIZE:
        raise CheckpointError(f"unsupported image size {side}: at most {GREATEST_IMAGE_SIZE} pixels")
    if isinstance(config, ResNetConfig):
        config = replace(config, image_size=side)
    else:
        config, weights = at_image_size(config, weights, side, source.interpolation)
    network = build_network(config, weights)
    labels = source.labels or default_labels(config.classes)
    if overrides.labels is not None:
        labels = checked_labels(overrides.labels, config.classes, "--labels")
    activation = _activation(source.activation, overrides.activation, config.classes)
    return Checkpoint(network, labels, replace(preprocessing, image_size=side), activation, source.notes)


def _activation(of_checkpoint: Activation | None, stated: Activation | None, classes: int) -> Activation:
    """One logit is one class, which applies or not: its softmax would always be 1."""
    if classes == 1 and stated == "softmax":
        raise CheckpointError("the model has one logit, whose softmax is always 1: --activation must be sigmoid")
    return stated or ("sigmoid" if classes == 1 else of_checkpoint or "softmax")


def _stated_preprocessing(overrides: Overrides) -> Preprocessing | None:
    """That of --preprocessor: a file or directory in the format of transformers, or torchvision:WEIGHTS."""
    stated = overrides.preprocessor
    if not stated:
        return None
    if stated.startswith(_TORCHVISION):
        return torchvision.preprocessing_of(stated.removeprefix(_TORCHVISION))
    path = Path(stated)
    keys = preprocessor_of(path) if path.is_dir() else Configuration(str(path), read_json(path))
    if "architecture" in keys or "pretrained_cfg" in keys:
        raise CheckpointError(f"{path} is a configuration of timm; --preprocessor takes transformers' {PREPROCESSOR}")
    beside = (path if path.is_dir() else path.parent) / CONFIG
    model = str(read_json(beside).get("model_type")) if beside.exists() else "vit"
    return image_processor.preprocessing(keys, model, overrides.ignored_keys)[0]


def _read_file(path: Path, overrides: Overrides) -> Source:
    if path.suffix == ".safetensors" and not overrides.architecture:
        of_training = trained.read(path)
        if of_training is not None:
            return of_training
    file = read_tensors(path)
    tensors = find_network(file.groups, _MARKS, overrides.weights, path)
    if timm.MARK in tensors or timm.BIT_MARK in tensors:
        return _read_timm(tensors, path, file.architecture, overrides)
    if (overrides.architecture or overrides.model_args) and (google.MARK in tensors or torchvision.MARK in tensors):
        raise CheckpointError(f"--architecture and --model-arg are for networks of timm; {path} is of another library")
    if google.MARK in tensors:
        return google.read(tensors)
    if torchvision.MARK in tensors:
        return torchvision.read(tensors, path)
    hint = f". It is in a directory with {CONFIG}: export the directory" if path.with_name(CONFIG).exists() else ""
    if not hint and any(name.endswith(huggingface.MARK) for name in tensors.names("")):
        hint = f". It is a state dict of transformers: export a directory that also has {CONFIG} and {PREPROCESSOR}"
    raise CheckpointError(
        f"unrecognized checkpoint layout: {path}; supported are Google's, torchvision's, timm's and"
        f" `vitserve train`'s{hint}"
    )


def _read_timm(tensors: Tensors, path: Path, recorded: str, overrides: Overrides) -> Source:
    """A state dict. ``recorded`` is the architecture that the training script saved, if it did."""
    architecture = overrides.architecture or recorded
    if not architecture:
        raise CheckpointError(
            f"{path} is a state dict in timm's layout; name its architecture"
            " (--architecture vit_base_patch16_224), or export the directory that save_for_hf writes"
        )
    if recorded and not overrides.architecture:
        tensors.notes.append(f"the architecture is {recorded}, as the file records it")
    pretrained = {} if overrides.preprocessor else _pretrained_cfg(architecture)
    pretrained.pop("num_classes", None)  # of the published weights
    keys = {"architecture": architecture, "pretrained_cfg": pretrained}
    config = Configuration("timm's table", keys, null_is_default=True)
    source = timm.read(tensors, config, overrides.model_args, overrides.ignored_keys, None)
    size = source.config.image_size
    if isinstance(source.config, ResNetConfig) or size == source.preprocessing.image_size or overrides.preprocessor:
        return source
    note = (
        f"the position embeddings are for {size} pixels, so images are resized to {size} pixels"
        f" ({architecture}: {source.preprocessing.image_size})"
    )
    return replace(source, preprocessing=replace(source.preprocessing, image_size=size), notes=(*source.notes, note))


def _pretrained_cfg(architecture: str) -> dict[str, Any]:
    """timm's table of preprocessing, which a bare state dict does not contain."""
    try:
        from timm import get_pretrained_cfg
    except (ImportError, RuntimeError) as error:
        raise CheckpointError(
            f"timm is required to determine the preprocessing of {architecture}: pip install timm,"
            " or give --preprocessor, or export the directory that save_for_hf writes"
        ) from error
    pretrained = get_pretrained_cfg(architecture)
    if pretrained is None:
        raise CheckpointError(f"timm has no architecture {architecture!r}")
    settings: dict[str, Any] = pretrained.to_dict()  # type: ignore[no-untyped-call]  # untyped in timm
    return settings
