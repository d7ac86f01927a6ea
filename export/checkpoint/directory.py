"""A directory with config.json and weights, as transformers and timm write it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vitserve.export.checkpoint.configuration import Configuration, read_json, shards_of
from vitserve.export.checkpoint.errors import CheckpointError, UnsupportedError
from vitserve.export.checkpoint.files import CONFIG, INDEX, PICKLED_INDEX, WEIGHTS
from vitserve.export.checkpoint.formats import huggingface, huggingface_names, image_processor, timm
from vitserve.export.checkpoint.formats.preprocessor import preprocessor_of
from vitserve.export.checkpoint.formats.source import Source
from vitserve.export.checkpoint.library import sources, transformers_network, zero_shot
from vitserve.export.checkpoint.overrides import NetworkChoice, Overrides, check_overrides
from vitserve.export.checkpoint.selection import Groups, find_network
from vitserve.export.checkpoint.state_dict import read_tensors
from vitserve.model.bundle.preprocess import Preprocessing

_OTHER_FRAMEWORKS = {".h5", ".msgpack", ".onnx", ".tflite", ".keras", ".ot"}


def read_directory(directory: Path, overrides: Overrides, preprocessing: Preprocessing | None) -> Source:
    """``preprocessing`` replaces the directory's own. Raises CheckpointError."""
    check_overrides("a directory", overrides)
    keys = read_json(_existing(directory / CONFIG))
    if overrides.architecture:
        raise CheckpointError(f"{directory} has its own configuration; --architecture is for a state dict of timm")
    if "architecture" in keys and keys.get("num_classes") == 0:  # without classifier
        return sources.of_timm(_groups(directory), keys, overrides, directory)
    if "architecture" in keys and keys.get("model_type") not in huggingface.KINDS:
        return with_fallback(
            lambda: _read_timm(directory, keys, overrides),
            lambda: sources.of_timm(_groups(directory), keys, overrides, directory),
            timm.is_known(str(keys["architecture"])),
            overrides.network,
        )
    if overrides.model_args:
        raise CheckpointError(f"--model-arg is for networks of timm; {directory} is one of transformers")
    if not Configuration(CONFIG, keys).text("model_type", ""):
        huggingface.kind_of(Configuration(CONFIG, keys))  # raises the error that names the supported ones
    if preprocessing is None:
        preprocessor_of(directory)  # raises an error that names the missing file
    if zero_shot.is_zero_shot(keys):
        return zero_shot.of_towers(_groups(directory), keys, overrides, preprocessing, directory)
    if overrides.prompts:
        raise CheckpointError(f"--prompt is for the towers of CLIP and SigLIP; {directory} is a classifier")
    if transformers_network.is_base_model(keys):
        return sources.of_transformers(_groups(directory), keys, overrides, preprocessing, directory)
    return with_fallback(
        lambda: _read_transformers(directory, keys, overrides, preprocessing),
        lambda: sources.of_transformers(_groups(directory), keys, overrides, preprocessing, directory),
        keys.get("model_type") in huggingface.KINDS,
        overrides.network,
    )


def with_fallback(
    read_ours: Callable[[], Source], library: Callable[[], Source], known: bool, choice: NetworkChoice
) -> Source:
    """The source read as one of our networks, or, if it has parts that they lack, as the library's own network.

    Raises CheckpointError: of a known network the one that names its fault, else that of the library.
    """
    if choice == "library" or (choice == "auto" and not known):
        return library()
    try:
        return read_ours()
    except UnsupportedError as error:
        if choice == "ours":
            raise
        try:
            source = library()
        except CheckpointError:
            raise error from None
        note = f"the network is exported as its library computes it, without our optimizations: {error}"
        return replace(source, notes=(*source.notes, note))


def _read_timm(directory: Path, keys: dict[str, Any], overrides: Overrides) -> Source:
    activation, config = None, Configuration(CONFIG, copy.deepcopy(keys), null_is_default=True)
    if config.take("model_type") == "timm_wrapper":  # saved by transformers
        activation = huggingface.activation_of(config)
        config.ignore(*huggingface_names.WITHOUT_EFFECT)
        config.require(huggingface_names.ONLY)
    tensors = find_network(_groups(directory), (timm.MARK, timm.BIT_MARK), overrides.weights, directory)
    return timm.read(tensors, config, overrides.model_args, overrides.ignored_keys, activation)


def _read_transformers(
    directory: Path, keys: dict[str, Any], overrides: Overrides, preprocessing: Preprocessing | None
) -> Source:
    config = Configuration(CONFIG, copy.deepcopy(keys))
    kind, ignored, notes = huggingface.kind_of(config), overrides.ignored_keys, list[str]()
    if preprocessing is None:
        preprocessing, notes = image_processor.preprocessing(preprocessor_of(directory), kind, ignored)
    groups = _groups(directory)
    mark = f"{kind}.{huggingface.MARK}"
    if not any(name.endswith(mark) for group in groups.values() for name in group):  # a base model's have no prefix
        mark = huggingface.MARK
    tensors = find_network(groups, (mark,), overrides.weights, directory)
    tensors.notes += notes
    return huggingface.read(tensors, config, keys, preprocessing, ignored)


def _existing(path: Path) -> Path:
    """Raises CheckpointError if there is no such file."""
    if path.exists():
        return path
    below = sorted(config.parent.name for config in path.parent.glob(f"*/{path.name}"))
    hint = f"; these directories in it have one: {', '.join(below[:5])}" if below else _hint(path.parent)
    raise CheckpointError(f"{path.parent} has no {path.name}{hint}")


def _hint(directory: Path) -> str:
    """The kind of a directory that lacks the files of a checkpoint."""
    if (directory / "bundle.json").exists():
        return "; it is a bundle already"
    if (directory / "adapter_config.json").exists():
        return (
            "; it is an adapter: merge it into its base model first (merge_and_unload() of peft), and save the result"
        )
    files = sorted(path.name for path in directory.iterdir() if path.suffix in _OTHER_FRAMEWORKS)
    return f"; those of other frameworks are not read: {', '.join(files[:3])}" if files else ""


def _groups(directory: Path) -> Groups:
    for name in WEIGHTS:
        if (directory / name).exists():
            sharded = name in (INDEX, PICKLED_INDEX)
            return _sharded(directory, name) if sharded else read_tensors(directory / name).groups
    raise CheckpointError(f"{directory} has no weights: none of {', '.join(WEIGHTS)}{_hint(directory)}")


def _sharded(directory: Path, index: str) -> Groups:
    named: dict[str, Tensor] = {}
    for shard in shards_of(directory / index):
        if not (directory / shard).exists():
            raise CheckpointError(f"{directory / index} names {shard}, which does not exist")
        for group in read_tensors(directory / shard).groups.values():
            named |= group
    return {"": named}
