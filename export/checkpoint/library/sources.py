"""Checkpoints whose network is exported as its library computes it: any classifier of timm or transformers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitserve.export.checkpoint.configuration import Configuration
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.formats import huggingface, timm_preprocessing
from vitserve.export.checkpoint.formats.source import Source
from vitserve.export.checkpoint.labels import timm_labels
from vitserve.export.checkpoint.library import timm_network, transformers_network
from vitserve.export.checkpoint.library.image_processing import read_processor
from vitserve.export.checkpoint.library.owner import Owner, Reversed, check_repeats
from vitserve.export.checkpoint.overrides import Overrides
from vitserve.export.checkpoint.selection import Groups, find_network
from vitserve.model.arrays import Activation
from vitserve.model.bundle.preprocess import Preprocessing


def of_timm(groups: Groups, keys: Mapping[str, Any], overrides: Overrides, path: Path) -> Source:
    """``keys`` is config.json. Raises CheckpointError."""
    config = Configuration("config.json", copy.deepcopy(dict(keys)), null_is_default=True)
    name = config.text("architecture").partition(".")[0]
    pretrained = config.section("pretrained_cfg") if "pretrained_cfg" in config else config
    raw = dict(keys.get("pretrained_cfg") or keys)
    stated = config.section("model_args").rest() | dict(overrides.model_args)
    classes = config.take("num_classes")
    original = pretrained.take("num_classes")
    arguments = {key: value for key, value in stated.items() if value is not None}
    arguments.setdefault("num_classes", next((number for number in (classes, original) if number is not None), 1000))
    pool = config.take("global_pool")
    if isinstance(pool, str) and "model_args" not in keys:
        arguments["global_pool"] = pool  # of older versions, which did not write model_args; otherwise only information
    check_repeats(arguments, _count(groups), "model_args")
    skeleton = timm_network.skeleton(name, arguments, raw)
    expected = skeleton.state_dict()
    tensors = find_network(groups, _mark(expected), overrides.weights, path)
    named = tensors.copy()
    number = _classes(skeleton)
    preprocessing = timm_preprocessing.preprocessing_of(pretrained, arguments)
    labels = timm_labels(config, pretrained, number, tensors.notes) if number else ()
    notes = timm_preprocessing.reject_unknown(config, pretrained, overrides.ignored_keys)

    def build(size: tuple[int, int]) -> nn.Module:
        return timm_network.create(name, arguments, raw, named, size)

    owner = Owner("timm", build)
    timm_network.check(name, arguments, raw, named)
    activation: Activation | None = None if number else "none"
    return Source(
        None,
        {},
        preprocessing,
        labels,
        activation,
        notes=(*tensors.notes, *notes),
        owner=owner,
        architecture=name,
        classes=number,
    )


def of_transformers(
    groups: Groups, keys: Mapping[str, Any], overrides: Overrides, preprocessing: Preprocessing | None, path: Path
) -> Source:
    """``keys`` is config.json, and ``preprocessing`` replaces that of the directory. Raises CheckpointError."""
    settings = transformers_network.without_code(keys)
    check_repeats(settings, _count(groups), "config.json")
    transformers_network.check_supported(str(settings.get("model_type")))
    config = transformers_network.configuration(settings)
    classifies = not transformers_network.is_base_model(settings)
    network_class = transformers_network.network_class(config, settings)
    flipped = False
    if preprocessing is None:
        processor = read_processor(path)
        preprocessing, flipped = processor.preprocessing, processor.reversed_channels
    with torch.device("meta"):
        expected = network_class(config).state_dict()
    try:
        tensors = find_network(groups, _mark(expected), overrides.weights, path)
    except CheckpointError as error:
        if classifies:
            raise
        note = f"architectures in config.json is {network_class.__name__}, which has no classifier"
        raise CheckpointError(f"{error} ({note})") from error
    named = tensors.copy()
    classes = 0
    labels: tuple[str, ...] | None = ()
    activation: Activation | None = "none"
    if classifies:
        classes = int(config.num_labels)
        labels, activation = huggingface.labels_and_activation(Configuration("config.json", settings), classes)

    def build(size: tuple[int, int]) -> nn.Module:
        network = transformers_network.create(settings, named, size)
        return Reversed(network) if flipped else network

    size = preprocessing.shape[:2]
    first = build(size)  # raises for tensors that do not fit
    owner = Owner("transformers", lambda wanted: first if wanted == size else build(wanted))
    return Source(
        None,
        {},
        preprocessing,
        labels,
        activation,
        notes=tuple(tensors.notes),
        owner=owner,
        architecture=network_class.__name__,
        classes=classes,
    )


def _count(groups: Groups) -> int:
    return sum(len(named) for named in groups.values())


def _mark(expected: Mapping[str, Any]) -> tuple[str, ...]:
    """A tensor's name that is not also the end of another one's, so that it shows the prefix."""
    names = (name for name in expected if not any(longer.endswith(f".{name}") for longer in expected))
    return (next(names),)


def _classes(skeleton: nn.Module) -> int:
    """0 for a network without classifier."""
    number: Any = getattr(skeleton, "num_classes", 0)
    return number if isinstance(number, int) and number > 0 else 0
