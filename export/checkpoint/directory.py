"""A directory with config.json and weights, as transformers and timm write it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from vitserve.export.checkpoint.configuration import Configuration, read_json, shards_of
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.files import CONFIG, INDEX, PICKLED_INDEX, PREPROCESSOR, PROCESSOR, WEIGHTS
from vitserve.export.checkpoint.formats import huggingface, huggingface_names, image_processor, timm
from vitserve.export.checkpoint.formats.source import Source
from vitserve.export.checkpoint.overrides import Overrides
from vitserve.export.checkpoint.selection import Groups, find_network
from vitserve.export.checkpoint.state_dict import read_tensors
from vitserve.model.bundle.preprocess import Preprocessing

_OTHER_FRAMEWORKS = {".h5", ".msgpack", ".onnx", ".tflite", ".keras", ".ot"}


def read_directory(directory: Path, overrides: Overrides, preprocessing: Preprocessing | None) -> Source:
    """``preprocessing`` replaces the directory's own. Raises CheckpointError."""
    keys = read_json(_existing(directory / CONFIG))
    if overrides.architecture:
        raise CheckpointError(f"{directory} has its own configuration; --architecture is for a state dict of timm")
    if "architecture" in keys and keys.get("model_type") not in huggingface.KINDS:
        return _read_timm(directory, Configuration(CONFIG, keys, null_is_default=True), overrides)
    if overrides.model_args:
        raise CheckpointError(f"--model-arg is for networks of timm; {directory} is one of transformers")
    return _read_transformers(directory, Configuration(CONFIG, keys), overrides, preprocessing)


def _read_timm(directory: Path, config: Configuration, overrides: Overrides) -> Source:
    activation = None
    if config.take("model_type") == "timm_wrapper":  # saved by transformers
        activation = huggingface.activation_of(config)
        config.ignore(*huggingface_names.WITHOUT_EFFECT)
        config.require(huggingface_names.ONLY)
    tensors = find_network(_groups(directory), (timm.MARK, timm.BIT_MARK), overrides.weights, directory)
    return timm.read(tensors, config, overrides.model_args, overrides.ignored_keys, activation)


def _read_transformers(
    directory: Path, config: Configuration, overrides: Overrides, preprocessing: Preprocessing | None
) -> Source:
    kind, ignored, notes = huggingface.kind_of(config), overrides.ignored_keys, list[str]()
    if preprocessing is None:
        preprocessing, notes = image_processor.preprocessing(preprocessor_of(directory), kind, ignored)
    groups = _groups(directory)
    mark = f"{kind}.{huggingface.MARK}"
    if not any(name.endswith(mark) for group in groups.values() for name in group):  # a base model's have no prefix
        mark = huggingface.MARK
    tensors = find_network(groups, (mark,), overrides.weights, directory)
    tensors.notes += notes
    return huggingface.read(tensors, config, kind, preprocessing, ignored)


def _existing(path: Path) -> Path:
    """Raises CheckpointError if there is no such file."""
    if path.exists():
        return path
    below = sorted(each.parent.name for each in path.parent.glob(f"*/{path.name}"))
    hint = f"; these directories in it have one: {', '.join(below[:5])}" if below else _hint(path.parent)
    raise CheckpointError(f"{path.parent} has no {path.name}{hint}")


def _hint(directory: Path) -> str:
    """What a directory is that lacks the files of a checkpoint."""
    if (directory / "bundle.json").exists():
        return "; it is a bundle already"
    if (directory / "adapter_config.json").exists():
        return (
            "; it is an adapter: merge it into its base model first (merge_and_unload() of peft), and save the result"
        )
    others = sorted(path.name for path in directory.iterdir() if path.suffix in _OTHER_FRAMEWORKS)
    return f"; those of other frameworks are not read: {', '.join(others[:3])}" if others else ""


def preprocessor_of(directory: Path) -> Configuration:
    """transformers reads image_processor in processor_config.json first, if it exists. Raises CheckpointError."""
    if (directory / PROCESSOR).exists():
        nested = Configuration(PROCESSOR, read_json(directory / PROCESSOR))
        if "image_processor" in nested:
            return nested.section("image_processor")
    if not (directory / PREPROCESSOR).exists():
        raise CheckpointError(
            f"{directory} has no {PREPROCESSOR}, which says how images are prepared: transformers' Trainer writes it"
            " only if it gets the processor. If the model was fine-tuned, give the file of its base model:"
            " --preprocessor FILE of `vitserve export`"
        )
    return Configuration(PREPROCESSOR, read_json(directory / PREPROCESSOR))


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
