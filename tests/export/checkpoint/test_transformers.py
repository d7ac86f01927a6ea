"""Checkpoints that transformers writes with random weights have the same logits here, in torch and as served."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import SMALL_TRANSFORMERS, SQUASH, assert_same_logits, logits_of, save_with_transformers
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.load import load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

NETWORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT": ("ViTConfig", "ViTForImageClassification", {"intermediate_size": 96}),
    "ViT without bias, tanh GELU": (
        "ViTConfig",
        "ViTForImageClassification",
        {"intermediate_size": 96, "qkv_bias": False, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "DeiT": ("DeiTConfig", "DeiTForImageClassification", {"intermediate_size": 96}),
    "DeiT with teacher": ("DeiTConfig", "DeiTForImageClassificationWithTeacher", {"intermediate_size": 96}),
    "DINOv2": ("Dinov2Config", "Dinov2ForImageClassification", {}),
    "DINOv2 with registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification", {}),
    "DINOv2 with SwiGLU": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersForImageClassification",
        {"use_swiglu_ffn": True},
    ),
}
FULL_SIZE: list[tuple[str, str, dict[str, Any]]] = [
    ("ViTConfig", "ViTForImageClassification", {}),
    ("DeiTConfig", "DeiTForImageClassificationWithTeacher", {}),
    (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersForImageClassification",
        {"hidden_size": 384, "num_attention_heads": 6, "patch_size": 14},
    ),
]


@pytest.mark.parametrize(("config", "network", "arguments"), NETWORKS.values(), ids=NETWORKS.keys())
def test_a_transformers_directory_has_the_same_logits(
    config: str, network: str, arguments: dict[str, Any], transformers: ModuleType, tmp_path: Path
) -> None:
    source = save_with_transformers(transformers, tmp_path, config, network, SMALL_TRANSFORMERS | arguments)
    checkpoint = load_checkpoint(tmp_path)
    assert_same_logits(checkpoint, logits_of(source), tmp_path if network.startswith("Dinov2With") else None)
    assert (checkpoint.preprocessing.mean, checkpoint.preprocessing.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.mark.slow
@pytest.mark.parametrize(("config", "network", "arguments"), FULL_SIZE)
def test_a_full_size_transformers_directory_has_the_same_logits(
    config: str, network: str, arguments: dict[str, Any], transformers: ModuleType, tmp_path: Path
) -> None:
    preprocessor = SQUASH | {"size": {"height": 224, "width": 224}}
    full = {"num_labels": 1000, "image_size": 224} | arguments
    source = save_with_transformers(transformers, tmp_path, config, network, full, preprocessor)
    assert_same_logits(load_checkpoint(tmp_path), logits_of(source), tmp_path)


def save_vit(transformers: ModuleType, directory: Path, **arguments: Any) -> None:
    complete = SMALL_TRANSFORMERS | {"intermediate_size": 96} | arguments
    save_with_transformers(transformers, directory, "ViTConfig", "ViTForImageClassification", complete)


def test_labels_come_from_the_config_or_the_argument(transformers: ModuleType, tmp_path: Path) -> None:
    save_vit(transformers, tmp_path, id2label=dict(enumerate("abcde")))
    assert load_checkpoint(tmp_path).labels == tuple("abcde")
    assert load_checkpoint(tmp_path, labels=list("vwxyz")).labels == tuple("vwxyz")
    with pytest.raises(CheckpointError, match="--labels has 4 labels; the model has 5 classes"):
        load_checkpoint(tmp_path, labels=list("vwxy"))


def test_the_preprocessors_image_size_is_used(transformers: ModuleType, tmp_path: Path) -> None:
    """DINOv2's classifiers have 518 in the config and 224 in the preprocessor; transformers interpolates too."""
    arguments = SMALL_TRANSFORMERS | {"image_size": 64}
    source = save_with_transformers(
        transformers, tmp_path, "Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification", arguments
    )
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.network.config.image_size == 32
    assert_same_logits(checkpoint, logits_of(source))


def test_a_missing_tensor_is_rejected_and_an_unexpected_one_is_noted(transformers: ModuleType, tmp_path: Path) -> None:
    save_vit(transformers, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    incomplete = {name: tensor for name, tensor in weights.items() if name != "vit.layernorm.bias"}
    save_file(incomplete, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing tensor: vit.layernorm.bias"):
        load_checkpoint(tmp_path)
    save_file(weights | {"vit.pooler.dense.bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    (note,) = load_checkpoint(tmp_path).notes
    assert note.startswith("ignored tensors: vit.pooler.dense.bias: ")


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("unsupported size 64 × 32 .*: only square", {"size": {"height": 32, "width": 64}}),
        ("without a center crop", {"size": {"shortest_edge": 32}}),
        ("crop_size 40 .* is resized to 32", {"do_center_crop": True, "crop_size": 40}),
        ("unsupported resample 5", {"resample": 5}),
        ("image_mean .* must be one number or three, not .0.5, null, 0.5.", {"image_mean": [0.5, None, 0.5]}),
        ("image_std .* must not be zero", {"image_std": 0}),
        ("size .* must be a positive integer, or two equal ones, not 0", {"size": 0}),
    ],
)
def test_unsupported_preprocessing_is_rejected(
    message: str, change: dict[str, Any], transformers: ModuleType, tmp_path: Path
) -> None:
    arguments = SMALL_TRANSFORMERS | {"intermediate_size": 96}
    save_with_transformers(transformers, tmp_path, "ViTConfig", "ViTForImageClassification", arguments, SQUASH | change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)
