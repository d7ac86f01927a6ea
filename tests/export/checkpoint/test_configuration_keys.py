"""A key that is changed from its default changes the logits as in its library, or is rejected by name.

The keys come from the classes of transformers and timm themselves, so a key that they add is tested too.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.checkpoints import logits_of_image, randomized, relative_difference
from tests.support.configuration_keys import (
    timm_arguments,
    timm_pretrained_keys,
    transformers_model_keys,
    transformers_processor_keys,
)
from tests.support.images import random_image
from vitserve.export.checkpoint.load import load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # of both libraries

TOLERANCE = 1e-4
IMAGE = random_image(90, 60, seed=3)
TINY: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "id2label": {0: "a", 1: "b", 2: "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
}
MODELS = {
    "ViT": ("ViTConfig", "ViTForImageClassification", {"intermediate_size": 36}),
    "DeiT": ("DeiTConfig", "DeiTForImageClassification", {"intermediate_size": 36}),
    "DeiT with teacher": ("DeiTConfig", "DeiTForImageClassificationWithTeacher", {"intermediate_size": 36}),
    "DINOv2": ("Dinov2Config", "Dinov2ForImageClassification", {"mlp_ratio": 2}),
    "DINOv2 with registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification", {}),
}
PROCESSORS = ("ViTImageProcessor", "DeiTImageProcessor", "BitImageProcessor", "CLIPImageProcessor")
TIMM: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}

# Two are slow: DeiT differs from DeiT with a teacher in the head only, and DINOv2 from DINOv2 with registers in these.
KINDS = [pytest.param(kind, marks=pytest.mark.slow if kind in ("DeiT", "DINOv2") else ()) for kind in MODELS]

Library = Callable[[], np.ndarray]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


def fault(key: str, directory: Path, library: Library) -> str | None:
    """What is wrong: other logits than the library's, or a rejection that does not name the key."""
    try:
        expected = library()
    except Exception:  # the library does not accept the value, so nothing is expected
        expected = None
    try:
        actual = logits_of_image(load_checkpoint(directory, network="ours"), IMAGE)
    except ValueError as error:
        # Sizes are rejected because the tensors do not fit, or because the image is not square.
        named = any(text in str(error) for text in (key, "do not fit", "are not those of", "only square images"))
        return None if named or expected is None else f"rejected without its name: {error}"
    if expected is None:
        return None
    difference = relative_difference(actual, expected)
    return None if difference <= TOLERANCE else f"logits differ by {difference:.1e}"


def written(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def assert_no_faults(faults: dict[str, str | None], least: int) -> None:
    assert len(faults) >= least
    wrong = {change: fault for change, fault in faults.items() if fault}
    assert not wrong, json.dumps(wrong, indent=1)


def transformers_network(transformers: ModuleType, directory: Path) -> nn.Module:
    """In float32, which is also what vitserve's reference network computes in."""
    transformers.utils.logging.disable_progress_bar()
    network: nn.Module = transformers.AutoModelForImageClassification.from_pretrained(directory, dtype=torch.float32)
    return network.eval()


def transformers_logits(transformers: ModuleType, directory: Path, network: nn.Module | None = None) -> np.ndarray:
    """Of the classifier and the processor that transformers loads."""
    processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    network = network or transformers_network(transformers, directory)
    with torch.inference_mode():
        pixels = processor(IMAGE, return_tensors="pt")["pixel_values"]
        logits: np.ndarray = network(pixels)[0][0].float().numpy()
    return logits


def save_transformers(transformers: ModuleType, directory: Path, kind: str, change: dict[str, Any]) -> None:
    """A network that is created with the changed configuration, and its processor."""
    torch.manual_seed(0)
    config, network, arguments = MODELS[kind]
    created = getattr(transformers, network)(getattr(transformers, config)(**TINY | arguments | change))
    randomized(created).save_pretrained(directory)  # type: ignore[operator]  # a method of transformers
    size = {"height": 32, "width": 32}
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": size})
    )


@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_a_saved_transformers_model(kind: str, transformers: ModuleType, directory: Path) -> None:
    """The key of config.json is changed after saving. The tensors stay, as with a wrong or edited configuration."""
    save_transformers(transformers, directory, kind, {})
    original = (directory / "config.json").read_text()
    faults = {}
    for key, value in transformers_model_keys(getattr(transformers, MODELS[kind][0])):
        (directory / "config.json").write_text(original)
        written(directory / "config.json", {key: value})
        faults[f"{key}={value}"] = fault(key, directory, lambda: transformers_logits(transformers, directory))
    assert_no_faults(faults, 40)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_a_new_transformers_model(kind: str, transformers: ModuleType, directory: Path) -> None:
    """The network is created with the changed key, so that its tensors fit."""
    faults = {}
    for key, value in transformers_model_keys(getattr(transformers, MODELS[kind][0])):
        shutil.rmtree(directory, ignore_errors=True)
        try:
            save_transformers(transformers, directory, kind, {key: value})
        except Exception:  # the library does not create such a network
            continue
        faults[f"{key}={value}"] = fault(key, directory, lambda: transformers_logits(transformers, directory))
    assert_no_faults(faults, 25)


def test_activations_of_transformers(transformers: ModuleType, directory: Path) -> None:
    faults = {}
    for name in transformers.activations.ACT2CLS:
        try:
            save_transformers(transformers, directory, "ViT", {"hidden_act": name})
        except Exception:
            continue
        faults[name] = fault("hidden_act", directory, lambda: transformers_logits(transformers, directory))
    assert_no_faults(faults, 20)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_keys_of_transformers_processors(processor: str, transformers: ModuleType, directory: Path) -> None:
    """With DINOv2, whose position embeddings are interpolated to every image size."""
    save_transformers(transformers, directory, "DINOv2", {})
    network, kind = transformers_network(transformers, directory), getattr(transformers, f"{processor}Pil")
    faults = {}
    for steps in (
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
        {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
    ):
        keys = {"image_processor_type": processor, **steps}
        changes = list(transformers_processor_keys(transformers, kind))
        for key, value in [*changes, *((key, None) for key in dict(changes))]:
            (directory / "preprocessor_config.json").write_text(json.dumps(keys | {key: value}))
            name = f"{steps} {key}={value}"
            faults[name] = fault(key, directory, lambda: transformers_logits(transformers, directory, network))
    assert_no_faults(faults, 80)


@pytest.mark.parametrize("place", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    "named", [{}, {"image_processor_type": "BitImageProcessorFast"}, {"feature_extractor_type": "ViTFeatureExtractor"}]
)
def test_defaults_of_absent_keys_are_those_of_the_processor(
    named: dict[str, str], place: str, transformers: ModuleType, directory: Path
) -> None:
    for kind in ("ViT", "DeiT", "DINOv2"):
        save_transformers(transformers, directory, kind, {"image_size": 224, "patch_size": 56})
        (directory / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
        content = named if place.startswith("pre") else {"image_processor": named}
        (directory / place).write_text(json.dumps(content))
        assert fault("size", directory, lambda: transformers_logits(transformers, directory)) is None, kind
        (directory / place).unlink()


def timm_logits(timm: ModuleType, directory: Path) -> np.ndarray:
    network = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=network), is_training=False)
    with torch.inference_mode():
        logits: np.ndarray = network(transform(IMAGE)[None])[0].numpy()
    return logits


def save_timm(timm: ModuleType, directory: Path, change: dict[str, Any]) -> None:
    from timm.models import save_for_hf

    torch.manual_seed(0)
    overlay = {"input_size": (3, 32, 32), "num_classes": 3}
    network = timm.create_model("vit_base_patch16_224", **TIMM | change, pretrained_cfg_overlay=overlay)
    save_for_hf(randomized(network), str(directory), safe_serialization=True)


def test_keys_of_a_saved_timm_model(timm: ModuleType, directory: Path) -> None:
    """At the root, in pretrained_cfg, and in model_args, changed after saving."""
    save_timm(timm, directory, {})
    original = json.loads((directory / "config.json").read_text())
    at_root = [
        ("global_pool", "avg"),
        ("num_classes", 5),
        ("num_features", 7),
        ("architecture", "vit_tiny_patch16_224"),
    ]
    at_root += [("architecture", "deit3_base_patch16_224"), ("architecture", "vit_base_patch16_clip_224"), ("key", 1)]
    places = {
        "": at_root,
        "pretrained_cfg": list(timm_pretrained_keys(timm)),
        "model_args": list(timm_arguments(timm)),
    }
    faults = {}
    for place, (key, value) in itertools.chain.from_iterable(
        ((place, change) for change in changes) for place, changes in places.items()
    ):
        changed = {place: original[place] | {key: value}} if place else {key: value}
        (directory / "config.json").write_text(json.dumps(original | changed))
        faults[f"{place} {key}={value}"] = fault(key, directory, lambda: timm_logits(timm, directory))
    assert_no_faults(faults, 90)


def test_keys_of_a_new_timm_model(timm: ModuleType, directory: Path) -> None:
    """The network is created with the changed argument, so that its tensors fit."""
    from timm.layers import create_act

    arguments = list(timm_arguments(timm)) + [("act_layer", name) for name in create_act._ACT_LAYER_DEFAULT]
    faults = {}
    for key, value in arguments:
        shutil.rmtree(directory, ignore_errors=True)
        try:
            save_timm(timm, directory, {key: value})
        except Exception:  # the library does not create such a network
            continue
        faults[f"{key}={value}"] = fault(key, directory, lambda: timm_logits(timm, directory))
    assert_no_faults(faults, 40)
