"""Finds out whose checkpoint it is, and makes the network of it: with its labels and preprocessing, at another image size if asked.


random:VARIANT            a variant with random weights              hf:owner/name[@revision]  a model on the hub
FILE.safetensors          written by `vitserve train`                timm:NAME                 likewise, of timm's own there
FOLDER                    config.json and weights, of transformers or timm
FILE                      .npz of Google's, or a state dict of torchvision's or (with its architecture named) timm's
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from vitserve.export.checkpoint.formats import google, huggingface, timm, torchvision
from vitserve.export.checkpoint.formats.source import Source
from vitserve.export.checkpoint.position_embeddings import at_image_size
from vitserve.export.checkpoint.state_dict import CheckpointError, Tensors, fill, read_tensors
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ResNetConfig, ViTConfig, any_variant
from vitserve.model.network.build import Network, network_of

if TYPE_CHECKING:
    from vitserve.export.checkpoint.hub import Located

IMAGENET_LABELS = Path(__file__).parent / "imagenet_labels.txt"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in a directory, the first that is there


@dataclass(frozen=True)
class Checkpoint:
    network: Network  # float32, in evaluation mode
    labels: tuple[str, ...]
    preprocessing: Preprocessing


def load_checkpoint(
    source: str | Path, *, image_size: int | None = None, labels: Sequence[str] | None = None, architecture: str = ""
) -> Checkpoint:
    """``labels`` take the place of the checkpoint's; ``architecture`` is timm's name for a bare state dict.

    Raises CheckpointError, naming each tensor that is missing, unexpected or misshapen; ValueError for sizes that do not divide.
    """
    kind, _, name = str(source).partition(":")
    if kind == "random" and name:
        return random_checkpoint(name)
    located = fetched(str(source))
    path = Path(source) if located is None else located.path
    return _made(_from_directory(path) if path.is_dir() else _from_file(path, architecture), image_size, labels)


def random_checkpoint(name: str, seed: int = 0) -> Checkpoint:
    """The named variant with random weights: nothing to learn from it but how fast it runs. Raises ValueError for an unknown name."""
    config = any_variant(name)
    torch.manual_seed(seed)
    network = network_of(config).eval()
    torch.nn.init.trunc_normal_(network.head.weight, std=0.02)
    return Checkpoint(
        network, tuple(f"class {index}" for index in range(config.classes)), Preprocessing(config.image_size)
    )


def _made(source: Source, image_size: int | None, labels: Sequence[str] | None) -> Checkpoint:
    config, weights, preprocessing = source.config, source.weights, source.preprocessing
    wanted = image_size or preprocessing.image_size
    if isinstance(config, ResNetConfig):
        config = replace(config, image_size=wanted)
    else:
        config, weights = at_image_size(config, weights, wanted)
    network = network_of(config)
    fill(network, weights)
    return Checkpoint(network.eval(), _labels(source, labels), replace(preprocessing, image_size=wanted))


def _labels(source: Source, given: Sequence[str] | None) -> tuple[str, ...]:
    classes = source.config.classes
    if given is not None:
        if len(given) != classes:
            raise CheckpointError(f"{len(given)} labels were given; the head has {classes} classes")
        return tuple(given)
    if source.labels is not None:
        return source.labels
    if classes == 1000:
        return tuple(IMAGENET_LABELS.read_text(encoding="utf-8").splitlines())
    return tuple(f"class {index}" for index in range(classes))


def fetched(source: str) -> Located | None:
    """A model on the hub, downloaded; None where the source is not there. Raises CheckpointError."""
    kind, _, name = source.partition(":")
    if kind not in ("hf", "timm") or not name:
        return None
    from vitserve.export.checkpoint.hub import HubError, fetch  # only who asks for it needs huggingface_hub

    try:
        return fetch(name if kind == "hf" else f"timm/{name}")
    except HubError as error:
        raise CheckpointError(str(error)) from error


def _from_directory(directory: Path) -> Source:
    config = _json(directory / "config.json")
    found = [directory / name for name in _WEIGHTS if (directory / name).exists()]
    index = directory / "model.safetensors.index.json"
    if not found and index.exists():
        named: dict[str, torch.Tensor] = {}
        for shard in sorted(set(_json(index).get("weight_map", {}).values())):
            if Path(shard).name != shard:
                raise CheckpointError(f"{index} names a file outside its directory: {shard!r}")
            named |= read_tensors(directory / shard)
    elif found:
        named = read_tensors(found[0])
    else:
        raise CheckpointError(f"{directory} holds no weights; looked for {', '.join(_WEIGHTS)}")
    if "architecture" in config:
        arguments = config.get("model_args", {})
        return timm.read(
            Tensors(named),
            config["architecture"],
            config.get("pretrained_cfg", config),
            config.get("global_pool"),
            arguments.get("num_heads"),
        )
    return huggingface.read(Tensors(named), config, _json(directory / "preprocessor_config.json"))


def _from_file(path: Path, architecture: str) -> Source:
    if path.suffix == ".safetensors" and not architecture:
        ours = _own(path)
        if ours is not None:
            return ours
    tensors = Tensors(read_tensors(path))
    if google.MARK in tensors:
        return google.read(tensors)
    if torchvision.MARK in tensors:
        return torchvision.read(tensors)
    if timm.MARK in tensors or timm.BIT_MARK in tensors:
        if not architecture:
            raise CheckpointError(
                f"{path} has timm's names; say which architecture it is (--architecture vit_base_patch16_224), or export its directory"
            )
        return timm.read(tensors, architecture, _pretrained_cfg(architecture))
    raise CheckpointError(
        f"{path} is nobody's whose names are known: not Google's, torchvision's, timm's, nor written by `vitserve train`"
    )


def _pretrained_cfg(architecture: str) -> dict[str, Any]:
    """timm's, who alone knows how the images of a bare state dict are to be prepared."""
    try:
        from timm import get_pretrained_cfg
    except (ImportError, RuntimeError) as error:
        raise CheckpointError(
            f"how {architecture} wants its images only timm knows, and it is not installed; export the directory of save_for_hf"
        ) from error
    found = get_pretrained_cfg(architecture)
    if found is None:
        raise CheckpointError(f"timm knows no architecture {architecture!r}")
    settings: dict[str, Any] = found.to_dict()  # type: ignore[no-untyped-call]  # as timm has it
    return settings


def _own(path: Path) -> Source | None:
    """What `vitserve train` wrote, with shape, labels and normalization in its metadata; None where it did not write this."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if not {"config", "labels", "mean", "std"} <= metadata.keys():
        return None
    fields = json.loads(metadata["config"])
    config: ViTConfig | ResNetConfig
    if "blocks" in fields:
        config = ResNetConfig(**fields | {"blocks": tuple(fields["blocks"])})
    else:
        config = ViTConfig(
            **fields | {name: tuple(fields[name]) if fields.get(name) else None for name in ("stem", "resnet")}
        )
    mean, std = (tuple(json.loads(metadata[name])) for name in ("mean", "std"))
    return Source(
        config,
        read_tensors(path),
        Preprocessing(config.image_size, mean=mean, std=std),
        tuple(json.loads(metadata["labels"])),
    )


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
