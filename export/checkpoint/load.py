"""Reads a checkpoint: recognizes its layout and builds the network with its weights, labels and preprocessing.

The source is one of locate.py's. Files may be:

    DIRECTORY             config.json and weights, written by transformers or timm
    FILE.safetensors      written by `vitserve train`
    FILE.npz              in the layout of Google's release
    FILE                  a state dict of torchvision or, with the architecture's name, of timm
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vitserve.export.checkpoint.configuration import Configuration
from vitserve.export.checkpoint.directory import read_directory, with_fallback
from vitserve.export.checkpoint.errors import CheckpointError, OptionNeededError
from vitserve.export.checkpoint.files import CONFIG, PREPROCESSOR
from vitserve.export.checkpoint.formats import google, huggingface, timm, torchvision, trained
from vitserve.export.checkpoint.formats.preprocessor import named_processor, stated_preprocessing, with_options
from vitserve.export.checkpoint.formats.source import Source
from vitserve.export.checkpoint.labels import checked_labels, default_labels, numbered_labels
from vitserve.export.checkpoint.library import sources, timm_network
from vitserve.export.checkpoint.library.network import LibraryNetwork
from vitserve.export.checkpoint.library.owner import LibraryMissingError, Owner
from vitserve.export.checkpoint.locate import check_source, fetch_snapshot, split_scheme
from vitserve.export.checkpoint.overrides import NetworkChoice, Overrides, check_overrides
from vitserve.export.checkpoint.position_embeddings import GREATEST_IMAGE_SIZE, at_image_size
from vitserve.export.checkpoint.selection import find_network
from vitserve.export.checkpoint.state_dict import Tensors, build_network, read_tensors
from vitserve.export.checkpoint.torch_file import TorchFile
from vitserve.export.torch_model import TorchModel, merging, torch_model
from vitserve.model.arrays import Activation
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ResNetConfig, ViTConfig, any_variant, variant_of
from vitserve.model.network.build import Network, network_of
from vitserve.model.network.vit import ViT

_MARKS = (google.MARK, torchvision.MARK, timm.MARK, timm.BIT_MARK)


@dataclass(frozen=True)
class Checkpoint:
    network: Network | LibraryNetwork  # float32, in evaluation mode
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    activation: Activation = "softmax"  # from logits to probabilities
    notes: tuple[str, ...] = ()  # decisions that the user should know of
    owner: Owner | None = None  # builds the network of the library that the checkpoint is from
    architecture: str = ""  # default: the name of our variant
    choice: NetworkChoice = "auto"
    processor: Path | None = None  # the configuration of transformers' image processor, if the checkpoint has one

    @property
    def classes(self) -> int:
        return self.network.config.classes

    def source_model(self, progress: Callable[[str], None]) -> TorchModel:
        architecture = self.architecture or variant_of(self.network.config)
        return torch_model(self.network, self.preprocessing, architecture, self.owner, progress, self.choice)


def load_checkpoint(source: str | Path, overrides: Overrides | None = None, /, **fields: Any) -> Checkpoint:
    """Reads the checkpoint. ``fields`` are those of Overrides, for a call without an instance.

    Raises CheckpointError naming each tensor that is missing, unexpected or of another shape, and each key that is not
    known; ValueError if the image size is not a multiple of the patch size.
    """
    overrides = replace(overrides or Overrides(), **fields)
    check_source(str(source))
    scheme, name = split_scheme(str(source))
    if scheme == "random":
        check_overrides("random weights", overrides)
        return _merging(random_checkpoint(name), overrides.merge)
    preprocessing = stated_preprocessing(overrides)
    snapshot = fetch_snapshot(str(source))
    path = Path(source) if snapshot is None else snapshot.path
    read = read_directory(path, overrides, preprocessing) if path.is_dir() else _read_file(path, overrides)
    checkpoint = replace(_checkpoint(read, overrides, preprocessing), processor=named_processor(path, overrides))
    return _merging(checkpoint, overrides.merge)


def random_checkpoint(name: str, seed: int = 0) -> Checkpoint:
    """The named variant with random weights, for measuring speed. Raises ValueError for an unknown name."""
    config = any_variant(name)
    torch.manual_seed(seed)
    network = network_of(config).eval()
    torch.nn.init.trunc_normal_(network.head.weight, std=0.02)
    return Checkpoint(network, numbered_labels(config.classes), Preprocessing(config.image_size))


def _checkpoint(source: Source, overrides: Overrides, preprocessing: Preprocessing | None) -> Checkpoint:
    preprocessing = with_options(preprocessing or source.preprocessing, overrides)
    if overrides.image_size:
        preprocessing = replace(preprocessing, image_size=overrides.image_size, width=None)
    if max(preprocessing.shape) > GREATEST_IMAGE_SIZE:
        raise CheckpointError(
            f"unsupported image size {max(preprocessing.shape)}: at most {GREATEST_IMAGE_SIZE} pixels"
        )
    network = _network(source, preprocessing)
    classes, owner = network.config.classes, source.owner
    labels = source.labels or default_labels(classes)
    if overrides.labels is not None:
        labels = checked_labels(overrides.labels, classes, "--labels")
    activation = _activation(source.activation, overrides.activation, classes)
    notes, choice = source.notes, overrides.network
    return Checkpoint(network, labels, preprocessing, activation, notes, owner, source.architecture, choice)


def _merging(checkpoint: Checkpoint, merge: int) -> Checkpoint:
    """Raises CheckpointError or ValueError for a network that cannot merge tokens."""
    if not merge:
        return checkpoint
    if not isinstance(checkpoint.network, ViT):
        architecture = checkpoint.architecture or variant_of(checkpoint.network.config)
        raise CheckpointError(f"--merge needs a ViT that vitserve has a network for; this is {architecture}")
    return replace(checkpoint, network=merging(checkpoint.network, merge))


def _network(source: Source, preprocessing: Preprocessing) -> Network | LibraryNetwork:
    config, weights, side = source.config, source.weights, preprocessing.image_size
    if config is None:
        assert source.owner is not None
        logits = source.owner.build(preprocessing.shape[:2])
        about = source.owner.name, source.architecture, preprocessing.shape
        return LibraryNetwork(logits, *about, classifies=source.activation != "none")
    if isinstance(config, ResNetConfig):
        config = replace(config, image_size=side)
    else:
        config, weights = at_image_size(config, weights, side, source.interpolation)
    return build_network(config, weights)


def _activation(of_checkpoint: Activation | None, stated: Activation | None, classes: int) -> Activation:
    """One logit is one class, which applies or not: its softmax would always be 1."""
    if of_checkpoint == "none":
        if stated:
            raise CheckpointError("the model has no classifier, so --activation has no effect")
        return "none"
    if classes == 1 and stated == "softmax":
        raise CheckpointError("the model has one logit, whose softmax is always 1: --activation must be sigmoid")
    return stated or ("sigmoid" if classes == 1 else of_checkpoint or "softmax")


def _read_file(path: Path, overrides: Overrides) -> Source:
    if path.suffix == ".safetensors" and not overrides.architecture:
        of_training = trained.read(path)
        if of_training is not None:
            check_overrides("weights of `vitserve train`", overrides)
            return of_training
    check_overrides("another file of weights", overrides)
    file = read_tensors(path)
    architecture = overrides.architecture or file.architecture
    if architecture:
        return with_fallback(
            lambda: _read_known_file(file, path, overrides),
            lambda: _read_library_file(file, path, architecture, overrides),
            timm.is_known(architecture),
            overrides.network,
        )
    return _read_known_file(file, path, overrides)


def _read_library_file(file: TorchFile, path: Path, architecture: str, overrides: Overrides) -> Source:
    """A state dict of any network of timm."""
    pretrained = _pretrained_cfg(architecture)
    head = pretrained.get("classifier")
    weights = f"{head[0] if isinstance(head, list | tuple) else head}.weight"
    classes = [len(named[name]) for named in file.groups.values() for name in named if name.endswith(weights)]
    keys = {"architecture": architecture, "num_classes": classes[0] if classes else None, "pretrained_cfg": pretrained}
    return sources.of_timm(file.groups, keys, overrides, path)


def _read_known_file(file: TorchFile, path: Path, overrides: Overrides) -> Source:
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
        raise OptionNeededError(
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
    if not isinstance(source.config, ViTConfig):
        return source
    size = source.config.image_size
    if size == source.preprocessing.image_size or overrides.preprocessor:
        return source
    note = (
        f"the position embeddings are for {size} pixels, so images are resized to {size} pixels"
        f" ({architecture}: {source.preprocessing.image_size})"
    )
    return replace(source, preprocessing=replace(source.preprocessing, image_size=size), notes=(*source.notes, note))


def _pretrained_cfg(architecture: str) -> dict[str, Any]:
    """timm's table of preprocessing, which a bare state dict does not contain."""
    try:
        pretrained = timm_network.imported().get_pretrained_cfg(architecture)
    except LibraryMissingError as error:
        raise CheckpointError(
            f"timm is required to determine the preprocessing of {architecture}: pip install timm,"
            " or give --preprocessor, or export the directory that save_for_hf writes"
        ) from error
    if pretrained is None:
        raise CheckpointError(f"timm has no architecture {architecture!r}")
    settings: dict[str, Any] = pretrained.to_dict()
    return settings
