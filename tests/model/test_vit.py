"""The network: shapes, parameter names, and the symmetries of a Vision Transformer."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support.networks import TINY, network
from vitserve.model.config import VARIANTS, AttentionKind, Pool, ViTConfig, variant, variant_of
from vitserve.model.network.vit import ViT

OPTIONS = {
    "token": TINY,
    "mean": replace(TINY, pool="mean", class_token=False, norm_after_pool=True),
    "representation": replace(TINY, representation_width=20),
    "hybrid": replace(TINY, stem=(8, 16, 24)),
    "axial": replace(TINY, attention="axial"),
    "local": replace(TINY, attention="local", window=1),
    "registers": replace(TINY, registers=3, prefix_positions=False, layer_scale=True, swiglu=True),
    "distillation": replace(TINY, distillation_token=True, distillation_head=True, qk_norm=True, qkv_bias=False),
    "both": replace(TINY, pool="token+mean", pre_norm=True, activation="quick_gelu"),
}


@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_batch_of_n_equals_n_batches_of_one(config: ViTConfig) -> None:
    vit, images = network(config), torch.randn(5, 3, 16, 16)
    with torch.inference_mode():
        batch = vit(images)
        singles = [vit(image[None]) for image in images]
    for index, output in enumerate(batch):
        torch.testing.assert_close(output, torch.cat([single[index] for single in singles]), rtol=1e-4, atol=1e-5)
    assert batch[0].shape == (5, 7)
    assert batch[1].shape == (5, config.embedding_width)


@pytest.mark.parametrize(
    ("attention", "window", "blocks", "near"),
    [
        ("axial", 0, 1, {(1, 0), (1, 1), (1, 2), (1, 3)}),
        ("axial", 0, 2, {(y, x) for y in range(4) for x in range(4)}),
        ("local", 3, 1, {(y, x) for y in range(3) for x in range(1, 4)}),
        ("local", 1, 1, {(1, 2)}),
    ],
)
def test_a_changed_patch_affects_only_the_tokens_in_reach(
    attention: AttentionKind, window: int, blocks: int, near: set[tuple[int, int]]
) -> None:
    """Patches are compared without a class token, which would carry the change to all of them within two blocks."""
    config = replace(TINY, image_size=32, depth=blocks, attention=attention, window=window)
    with_token, without_token = network(config), network(replace(config, class_token=False, pool="mean"))
    for module in (with_token, without_token):
        seen: list[dict[str, torch.Tensor]] = [{}, {}]
        image = torch.randn(1, 3, 32, 32)
        changed = image.clone()
        changed[..., 8:16, 16:24] += 1.0
        with torch.inference_mode():
            module(image, seen[0])
            module(changed, seen[1])
        last = f"block{blocks - 1:02}"
        affected = (seen[0][last] != seen[1][last]).any(dim=-1)[0]
        if module is with_token:
            assert affected[0], "the class token attends to all patches"
        else:
            assert {divmod(int(index), 4) for index in affected.nonzero()} == near


def test_without_positions_the_order_of_patches_does_not_matter() -> None:
    vit = network(replace(TINY, pool="mean", class_token=False, norm_after_pool=True))
    image = torch.randn(1, 3, 16, 16)
    swapped = torch.cat([image[..., 8:], image[..., :8]], dim=-1)
    with torch.inference_mode():
        assert not torch.allclose(vit(image)[0], vit(swapped)[0], atol=1e-4)
        vit.pos_embed.zero_()
        torch.testing.assert_close(vit(image)[0], vit(swapped)[0], rtol=1e-4, atol=1e-5)


def test_the_mean_of_patches_needs_no_class_token() -> None:
    names = network(OPTIONS["mean"]).state_dict().keys()
    assert "cls_token" not in names
    assert "fc_norm.weight" in names
    assert "norm.weight" not in names


def test_intermediates_are_returned_by_name() -> None:
    seen: dict[str, torch.Tensor] = {}
    network(TINY)(torch.zeros(2, 3, 16, 16), seen)
    assert list(seen) == ["tokens", "block00", "block01", "norm"]
    assert all(tokens.shape == (2, TINY.tokens, TINY.width) for tokens in seen.values())


@pytest.mark.parametrize(
    ("name", "millions"), [("Ti/16", 5.7), ("S/16", 22.1), ("B/16", 86.6), ("L/16", 304.3), ("H/14", 632.0)]
)
def test_variants_have_the_papers_parameter_counts(name: str, millions: float) -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in ViT(variant(name)).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_conflicting_sizes_and_options_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"image size 224 .* patch size 15"):
        variant("B/16", patch_size=15)
    with pytest.raises(ValueError, match=r"width 768 .* 7 heads"):
        variant("B/16", heads=7)
    with pytest.raises(ValueError, match=r"patch size 8 .* reduction 16"):
        replace(TINY, stem=(1, 1, 1, 1, 1))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"class_token": False}, "pool is 'token', but there is no class token"),
        ({"distillation_head": True}, "needs a distillation token"),
        ({"stem": (8, 16), "resnet": (1,)}, "stem and resnet cannot be combined"),
        ({"attention": "local", "window": 2}, "local attention requires an odd window"),
        ({"norm_after_pool": True}, "requires pool 'mean'"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            replace(TINY, **change)
    with pytest.raises(ValueError, match="unknown variant 'B/17'"):
        variant("B/17")


def test_the_variant_of_a_configuration_is_found() -> None:
    assert all(variant_of(config) == name for name, config in VARIANTS.items())
    assert variant_of(variant("B/16", classes=3)) == "B/16"
    assert variant_of(TINY) == "custom"


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_a_timm_state_dict_loads_and_has_the_same_logits(pool: Pool, timm: ModuleType) -> None:
    small = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 5}
    options = {"global_pool": "token"} if pool == "token" else {"global_pool": "avg", "class_token": False}
    theirs = timm.create_model("vit_tiny_patch16_224", **small, **options).eval()
    config = variant("Ti/16", image_size=32, patch_size=8, depth=2, classes=5)
    if pool == "mean":
        config = replace(config, pool="mean", class_token=False, norm_after_pool=True)
    ours = ViT(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images)[0], theirs(images), rtol=1e-4, atol=1e-5)
