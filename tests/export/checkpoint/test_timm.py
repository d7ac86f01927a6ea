"""Checkpoints that timm writes with random weights have the same logits here, in torch and as served."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import SMALL_TIMM, assert_same_logits, randomized, save_with_timm
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.formats import timm as timm_format
from vitserve.export.checkpoint.formats import timm_architecture
from vitserve.export.checkpoint.load import load_checkpoint
from vitserve.export.checkpoint.overrides import model_arguments
from vitserve.export.checkpoint.state_dict import Tensors

pytestmark = pytest.mark.filterwarnings("ignore")  # timm's own

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_base_patch16_224", SMALL_TIMM | {"num_heads": 12}),
    "mean, norm before it": ("vit_base_patch16_gap_224", SMALL_TIMM | {"num_heads": 12}),
    "mean, norm after it": ("vit_base_patch16_224", SMALL_TIMM | {"num_heads": 12, "global_pool": "avg"}),
    "positions of patches only, layer scale": ("deit3_small_patch16_224", SMALL_TIMM | {"num_heads": 6}),
    "distillation token": ("deit_tiny_distilled_patch16_224", SMALL_TIMM | {"num_heads": 3}),
    "registers": ("vit_base_patch14_reg4_dinov2", SMALL_TIMM | {"num_heads": 12}),
    "SwiGLU": ("vit_giant_patch14_reg4_dinov2", SMALL_TIMM | {"num_heads": 24}),
    "norm before the blocks, quick GELU": ("vit_base_patch16_clip_quickgelu_224", SMALL_TIMM | {"num_heads": 12}),
    "no bias of q, k, v": ("vit_base_patch16_224_miil", SMALL_TIMM | {"num_heads": 12}),
    "norms of q and k": ("vit_base_patch16_224", SMALL_TIMM | {"num_heads": 12, "qk_norm": True}),
    "hybrid": (
        "vit_small_r26_s32_224",
        {"img_size": 64, "embed_dim": 96, "depth": 2, "num_heads": 6, "num_classes": 5},
    ),
    "ResNet": ("resnetv2_50x1_bit", {"num_classes": 5}),
}
# The graphs of the other architectures are compared at full size, and in test_export.py.
SERVED = {"registers", "SwiGLU", "norm before the blocks, quick GELU", "norms of q and k"}
FULL_SIZE = [
    "vit_base_patch16_224",
    "vit_small_patch32_384",
    "vit_base_patch16_gap_224",
    "deit3_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit_base_distilled_patch16_224",
    "vit_base_r50_s16_224",
    "resnetv2_50x1_bit",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch14_reg4_dinov2",
    "vit_large_patch16_384",
    "vit_huge_patch14_224",
]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_timm_directory_has_the_same_logits(kind: str, timm: ModuleType, tmp_path: Path) -> None:
    architecture, arguments = ARCHITECTURES[kind]
    source = save_with_timm(timm, tmp_path, architecture, arguments)
    assert_same_logits(load_checkpoint(tmp_path), source, tmp_path if kind in SERVED else None)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FULL_SIZE)
def test_a_full_size_timm_directory_has_the_same_logits(architecture: str, timm: ModuleType, tmp_path: Path) -> None:
    source = save_with_timm(timm, tmp_path, architecture, {})
    checkpoint = load_checkpoint(tmp_path)
    assert_same_logits(checkpoint, source, tmp_path)
    assert len(checkpoint.labels) == 1000
    assert checkpoint.labels[0] == "tench"


@pytest.mark.slow
def test_accepted_architectures_have_timms_configuration(timm: ModuleType) -> None:
    """What only the architecture's name shows: heads, epsilon, activation, pooling and the kind of block.

    What the tensors show too is compared with the name, and must be equal.
    """
    accepted = 0
    for name in timm.list_models(["vit_*", "deit*"]):
        with torch.device("meta"):
            theirs = timm.create_model(name, num_classes=10)
        tensors = Tensors(theirs.state_dict())
        try:
            architecture = timm_architecture.named(name)
        except CheckpointError:
            continue
        accepted += 1
        ours = timm_format.vit_config(tensors, architecture, 10)
        assert not tensors.notes, name
        block = theirs.blocks[0]
        kinds = (type(block).__name__, type(block.attn).__name__, type(block.norm1).__name__)
        assert kinds == ("Block", "Attention", "LayerNorm"), name
        assert (block.attn.num_heads, block.norm1.eps) == (ours.heads, ours.norm_epsilon), name
        activations = {"gelu": "GELU(approximate='none')", "quick_gelu": "QuickGELU()"}
        assert str(block.mlp.act) == ("SiLU()" if ours.swiglu else activations[ours.activation]), name
        assert theirs.global_pool == {"token": "token", "mean": "avg"}[ours.pool], name
        assert not ours.prefix or theirs.no_embed_class is not ours.prefix_positions, name
    assert accepted > 75


def test_a_timm_state_dict_requires_its_architecture(timm: ModuleType, tmp_path: Path) -> None:
    source = randomized(timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=1000))
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        with pytest.raises(CheckpointError, match=r"is a state dict in timm's layout; name its architecture"):
            load_checkpoint(tmp_path / name)
        checkpoint = load_checkpoint(tmp_path / name, architecture="vit_tiny_patch16_224")
        assert_same_logits(checkpoint, source)
        assert (checkpoint.preprocessing.crop, checkpoint.preprocessing.mean) == (0.9, (0.5, 0.5, 0.5))


def test_a_timm_state_dict_requires_timm_itself(
    timm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=10)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    monkeypatch.setitem(sys.modules, "timm", None)
    message = "timm is required to determine the preprocessing of vit_tiny_patch16_224: pip install timm"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "weights.pth", architecture="vit_tiny_patch16_224")


@pytest.mark.parametrize(
    "architecture",
    ["vit_base_patch16_rpn_224", "vit_base_patch16_siglip_gap_224", "eva_large_patch14_196", "vit_wide_patch16_224"],
)
def test_an_unknown_architecture_is_rejected(architecture: str, timm: ModuleType, tmp_path: Path) -> None:
    """It might compute something else with the same tensors."""
    save_with_timm(timm, tmp_path, "vit_base_patch16_224", SMALL_TIMM | {"num_heads": 12})
    settings = json.loads((tmp_path / "config.json").read_text()) | {"architecture": architecture}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=f"unsupported architecture '{architecture}': "):
        load_checkpoint(tmp_path)


# (created with, read as, what the message names)
MISNAMED = [
    ("vit_tiny_patch16_224", {}, "vit_small_patch16_224", "width is 192 instead of 384"),
    ("vit_small_patch16_224", {}, "vit_base_patch16_224", "width is 384 instead of 768"),
    ("vit_base_patch16_224", {}, "vit_large_patch16_224", "width is 768 instead of 1024"),
    ("vit_xsmall_patch16_clip_224", {}, "vit_tiny_patch16_224", "width is 256 instead of 192"),
    ("vit_tiny_patch16_224", {}, "vit_xsmall_patch16_clip_224", "pre_norm is False instead of True"),
    ("vit_base_patch16_224", {}, "vit_base_patch16_clip_224", "pre_norm is False instead of True"),
    ("vit_base_patch16_clip_224", {}, "vit_base_patch16_224", "pre_norm is True instead of False"),
    ("vit_base_patch16_224", {}, "deit3_base_patch16_224", "prefix_positions is True instead of False"),
    ("vit_base_patch16_224", {}, "vit_base_patch14_dinov2", "layer_scale is False instead of True"),
    ("vit_base_patch16_224", {}, "vit_base_patch16_gap_224", "class_token is True instead of False"),
    ("vit_base_patch16_224", {}, "vit_base_patch16_224_miil", "qkv_bias is True instead of False"),
    ("deit_tiny_distilled_patch16_224", {}, "deit_tiny_patch16_224", "distillation_token is True instead of False"),
    ("vit_base_patch16_224", {"embed_dim": 96, "qk_norm": True}, "vit_base_patch16_224", "qk_norm is True instead"),
    (
        "vit_base_patch16_224",
        {"embed_dim": 96, "global_pool": "avg"},
        "vit_base_patch16_224",
        "norm_after_pool is True",
    ),
]


@pytest.mark.parametrize(("created", "arguments", "name", "difference"), MISNAMED)
def test_a_name_that_does_not_fit_the_tensors_is_rejected(
    created: str, arguments: dict[str, Any], name: str, difference: str, timm: ModuleType, tmp_path: Path
) -> None:
    """Heads, epsilon, activation, and preprocessing would be those of another network."""
    small = {"depth": 1, "num_classes": 5, "mlp_ratio": 0.25, "img_size": 64}
    torch.save(timm.create_model(created, **small | arguments).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=rf"the tensors are not those of {name}: .*{difference}"):
        load_checkpoint(tmp_path / "weights.pth", architecture=name)


@pytest.mark.parametrize(
    "arguments", [{"qk_norm": True}, {"global_pool": "avg"}, {"act_layer": "relu"}, {"num_heads": 4}, {"reg_tokens": 2}]
)
def test_arguments_of_a_state_dict_can_be_given(arguments: dict[str, Any], timm: ModuleType, tmp_path: Path) -> None:
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}
    source = randomized(timm.create_model("vit_tiny_patch16_224", **sizes | arguments))
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    checkpoint = load_checkpoint(tmp_path / "weights.pth", architecture="vit_tiny_patch16_224", model_args=arguments)
    assert_same_logits(checkpoint, source)
    assert any("width is 48 instead of 192" in note for note in checkpoint.notes)
    heads = "heads are taken from the name (otherwise: --model-arg num_heads=N)"
    assert any(heads in note for note in checkpoint.notes) is ("num_heads" not in arguments)


def test_arguments_on_the_command_line_are_json_or_text() -> None:
    assert model_arguments(["num_heads=4", "act_layer=relu", "qk_norm=true", "img_size=[24, 24]", "x=a=b"]) == {
        "num_heads": 4,
        "act_layer": "relu",
        "qk_norm": True,
        "img_size": [24, 24],
        "x": "a=b",
    }
    for wrong in ("num_heads", "=4"):
        with pytest.raises(CheckpointError, match=f"--model-arg '{wrong}' is not of the form NAME=VALUE"):
            model_arguments([wrong])


def test_an_image_size_that_does_not_fit_is_rejected(timm: ModuleType, tmp_path: Path) -> None:
    save_with_timm(timm, tmp_path, "vit_base_patch16_224", SMALL_TIMM | {"num_heads": 12})
    with pytest.raises(ValueError, match="image size 30 is not a multiple of patch size 8"):
        load_checkpoint(tmp_path, image_size=30)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["pretrained_cfg"]["input_size"] = [3, 32, 64]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"unsupported input_size 64 × 32 .*: only square images"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"missing: blocks.0.attn.proj.bias \[96\]"),
        ("unexpected", r"unexpected: attn_pool.latent \[1, 1, 96\]"),
        ("misshapen", r"wrong shape: norm.weight is \[95\], expected \[96\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: str, message: str, timm: ModuleType, tmp_path: Path) -> None:
    save_with_timm(timm, tmp_path, "vit_base_patch16_224", SMALL_TIMM | {"num_heads": 12})
    weights = load_file(tmp_path / "model.safetensors")
    if change == "missing":
        del weights["blocks.0.attn.proj.bias"]
    elif change == "unexpected":
        weights["attn_pool.latent"] = torch.zeros(1, 1, 96)
    else:
        weights["norm.weight"] = torch.zeros(95)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)
