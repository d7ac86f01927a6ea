"""The network: shapes, names, and what a Vision Transformer must be indifferent to."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from tests.support.networks import TINY, network
from vitserve.model.config import VARIANTS, ViTConfig, variant, variant_of
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
    made, images = network(config), torch.randn(5, 3, 16, 16)
    with torch.inference_mode():
        together = made(images)
        alone = [made(image[None]) for image in images]
    for index, whole in enumerate(together):
        torch.testing.assert_close(whole, torch.cat([each[index] for each in alone]), rtol=1e-4, atol=1e-5)
    assert together[0].shape == (5, 7)
    assert together[1].shape == (5, config.embedding_width)


@pytest.mark.parametrize(
    ("attention", "window", "blocks", "near"),
    [
        ("axial", 0, 1, {(1, 0), (1, 1), (1, 2), (1, 3)}),
        ("axial", 0, 2, {(y, x) for y in range(4) for x in range(4)}),
        ("local", 3, 1, {(y, x) for y in range(3) for x in range(1, 4)}),
        ("local", 1, 1, {(1, 2)}),
    ],
)
def test_a_patch_sees_what_is_within_its_reach_and_the_class_token_sees_all(
    attention: str, window: int, blocks: int, near: set[tuple[int, int]]
) -> None:
    """By what moves when one patch of the image changes; the class token is cut off, since through it everything reaches everything in two blocks."""
    config = replace(TINY, image_size=32, depth=blocks, attention=attention, window=window)
    made, without = network(config), network(replace(config, class_token=False, pool="mean"))
    for module, prefix in ((made, 1), (without, 0)):
        seen: list[dict[str, torch.Tensor]] = [{}, {}]
        image = torch.randn(1, 3, 32, 32)
        changed = image.clone()
        changed[..., 8:16, 16:24] += 1.0
        with torch.inference_mode():
            module(image, seen[0])
            module(changed, seen[1])
        last = f"block{blocks - 1:02}"
        moved = (seen[0][last] != seen[1][last]).any(dim=-1)[0]
        if prefix:
            assert moved[0], "the class token attends to all"
        else:
            assert {divmod(int(index), 4) for index in moved.nonzero()} == near


def test_without_positions_the_order_of_patches_does_not_matter() -> None:
    made, image = (
        network(replace(TINY, pool="mean", class_token=False, norm_after_pool=True)),
        torch.randn(1, 3, 16, 16),
    )
    swapped = torch.cat([image[..., 8:], image[..., :8]], dim=-1)
    with torch.inference_mode():
        assert not torch.allclose(made(image)[0], made(swapped)[0], atol=1e-4)
        made.pos_embed.zero_()
        torch.testing.assert_close(made(image)[0], made(swapped)[0], rtol=1e-4, atol=1e-5)


def test_the_mean_of_patches_needs_no_class_token() -> None:
    names = network(OPTIONS["mean"]).state_dict().keys()
    assert "cls_token" not in names
    assert "fc_norm.weight" in names
    assert "norm.weight" not in names


def test_named_intermediates_are_returned_when_asked_for() -> None:
    seen: dict[str, torch.Tensor] = {}
    network(TINY)(torch.zeros(2, 3, 16, 16), seen)
    assert list(seen) == ["tokens", "block00", "block01", "norm"]
    assert all(each.shape == (2, TINY.tokens, TINY.width) for each in seen.values())


@pytest.mark.parametrize(
    ("name", "millions"), [("Ti/16", 5.7), ("S/16", 22.1), ("B/16", 86.6), ("L/16", 304.3), ("H/14", 632.0)]
)
def test_variants_have_the_sizes_of_the_papers(name: str, millions: float) -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in ViT(variant(name)).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_sizes_that_do_not_divide_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"image size 224 .* patch size 15"):
        variant("B/16", patch_size=15)
    with pytest.raises(ValueError, match=r"width 768 .* 7 heads"):
        variant("B/16", heads=7)
    with pytest.raises(ValueError, match=r"patch size 8 .* reduction 16"):
        replace(TINY, stem=(1, 1, 1, 1, 1))
    for change, message in (
        ({"class_token": False}, "pool is 'token', but there is no class token"),
        ({"distillation_head": True}, "needs a distillation token"),
        ({"stem": (8, 16), "resnet": (1,)}, "exclude one another"),
        ({"attention": "local", "window": 2}, "wants an odd window"),
        ({"norm_after_pool": True}, "is of the mean"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TINY, **change)
    with pytest.raises(ValueError, match="no variant 'B/17'"):
        variant("B/17")


def test_a_configuration_finds_its_own_name() -> None:
    assert all(variant_of(config) == name for name, config in VARIANTS.items())
    assert variant_of(variant("B/16", classes=3)) == "B/16"
    assert variant_of(TINY) == "custom"


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_timms_state_dict_loads_strictly_and_gives_its_logits(pool: str, timm: ModuleType) -> None:
    tokens = {"global_pool": "token"} if pool == "token" else {"global_pool": "avg", "class_token": False}
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5, **tokens
    ).eval()
    without = {"class_token": False, "norm_after_pool": True} if pool == "mean" else {}
    ours = ViT(variant("Ti/16", image_size=32, patch_size=8, depth=2, classes=5, pool=pool, **without)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images)[0], theirs(images), rtol=1e-4, atol=1e-5)
