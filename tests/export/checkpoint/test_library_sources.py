"""Which networks of timm and transformers are exported as the library computes them, and which are rejected."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import SMALL_TIMM, assert_same_logits, save_with_timm
from tests.support.library_networks import SMALL
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.library.image_processing import read_processor
from vitserve.export.checkpoint.library.network import LibraryNetwork
from vitserve.export.checkpoint.load import load_checkpoint
from vitserve.model.bundle.preprocess import Preprocessing

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

SWIN = SMALL["Swin of transformers"]
SWIN_TIMM = SMALL["Swin of timm"]


def changed(directory: Path, name: str = "config.json", **changes: Any) -> None:
    settings = json.loads((directory / name).read_text()) | changes
    (directory / name).write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip2"}, "it is a NaFlex network"),
        ({"model_type": "imagegpt"}, "it reads sequences of color clusters"),
        ({"model_type": "bert"}, "has no image classifier for model_type 'bert'"),
        (
            {"model_type": "mine", "auto_map": {"AutoModel": "x.Y"}},
            "code of the checkpoint .auto_map in config.json., which is never executed",
        ),
        ({"quantization_config": {"load_in_8bit": True}}, "quantized weights are not supported"),
        ({"depths": [10**6]}, "depths in config.json is .*, but the weights have"),
        ({"depths": [2]}, "missing tensors of SwinForImageClassification"),
        ({"embed_dim": 24}, "as SwinForImageClassification|tensors of another shape"),
    ],
)
def test_networks_of_transformers_that_cannot_be_exported_are_explained(
    changes: dict[str, Any], message: str, timm: ModuleType, transformers: ModuleType, tmp_path: Path
) -> None:
    SWIN.save(timm, transformers, tmp_path)
    changed(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "no_such_net"}, "timm has no architecture 'no_such_net'"),
        ({"model_args": {"depths": [10**6, 2]}}, "depths in model_args is .*, but the weights have"),
        ({"model_args": {"no_such_argument": 1}}, "timm cannot create swin_tiny_patch4_window7_224 with"),
        ({"model_args": SWIN_TIMM.arguments | {"num_classes": 0}}, "the weights do not fit the library's network"),
        ({"model_args": SWIN_TIMM.arguments | {"num_classes": 7}}, "the weights do not fit the library's network"),
    ],
)
def test_networks_of_timm_that_cannot_be_exported_are_explained(
    changes: dict[str, Any], message: str, timm: ModuleType, transformers: ModuleType, tmp_path: Path
) -> None:
    SWIN_TIMM.save(timm, transformers, tmp_path)
    changed(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_a_state_dict_with_a_prefix_is_read(timm: ModuleType, transformers: ModuleType, tmp_path: Path) -> None:
    source = SWIN_TIMM.save(timm, transformers, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    checkpoint = load_checkpoint(tmp_path)
    assert "the weights are those under 'module'" in checkpoint.notes
    assert_same_logits(checkpoint, source)


def test_damaged_weights_are_named(timm: ModuleType, transformers: ModuleType, tmp_path: Path) -> None:
    SWIN_TIMM.save(timm, transformers, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["head.fc.bias"][0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"the weights are damaged: head\.fc\.bias"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("arguments", [{"global_pool": "max"}, {"global_pool": "map"}, {"norm_layer": "rmsnorm"}])
def test_arguments_that_our_network_lacks_are_obeyed_by_timms(
    arguments: dict[str, Any], timm: ModuleType, tmp_path: Path
) -> None:
    small = SMALL_TIMM | {"num_heads": 12, "depth": 1} | arguments
    source = save_with_timm(timm, tmp_path, "vit_base_patch16_224", small)
    checkpoint = load_checkpoint(tmp_path)
    assert isinstance(checkpoint.network, LibraryNetwork)
    assert "the network is exported as its library computes it" in checkpoint.notes[-1]
    assert_same_logits(checkpoint, source)


PROCESSORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ConvNextImageProcessor": ({"size": {"shortest_edge": 224}}, {"image_size": 224, "crop": 0.875, "squash": False}),
    "LevitImageProcessor": ({}, {"image_size": 224, "crop": 224 / 256, "squash": False}),
    "SiglipImageProcessor": ({"size": {"height": 32, "width": 48}}, {"image_size": 32, "width": 48, "squash": True}),
    "PvtImageProcessor": ({}, {"image_size": 224, "squash": True}),
    "EfficientNetImageProcessor": ({}, {"image_size": 346, "squash": True}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_image_processors_are_found_by_running_them(name: str, transformers: ModuleType, tmp_path: Path) -> None:
    settings, expected = PROCESSORS[name]
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_processor_type": name} | settings))
    found = read_processor(path).preprocessing
    assert {field: getattr(found, field) for field in expected} == pytest.approx(expected)


def test_a_processor_that_reverses_the_channels_is_recognized(transformers: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    keys = {"image_processor_type": "MobileViTImageProcessor", "size": {"shortest_edge": 288}}
    path.write_text(json.dumps(keys))
    processor = read_processor(path)
    assert processor.reversed_channels
    assert isinstance(processor.preprocessing, Preprocessing)
    assert processor.preprocessing.image_size == 256


def test_a_processor_that_does_something_else_is_rejected(transformers: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_processor_type": "TextNetImageProcessor"}))
    with pytest.raises(CheckpointError, match="from images of different sizes, and the service's images all have one"):
        read_processor(path)
