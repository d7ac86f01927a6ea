"""Token merging: the algorithm of the paper, and the properties that it preserves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.checkpoints import randomized
from vitserve.model.config import ViTConfig, variant
from vitserve.model.network.token_merging import merge_tokens, merged_tokens
from vitserve.model.network.vit import ViT

CONFIG = ViTConfig(image_size=32, patch_size=4, width=48, depth=4, heads=3, mlp_width=96, classes=5)
POOLS: dict[str, dict[str, Any]] = {
    "class token": {},
    "mean": {"pool": "mean", "class_token": False, "norm_after_pool": True},
    "both, with registers": {"pool": "token+mean", "registers": 3},
    "distilled": {"distillation_token": True, "distillation_head": True},
}


def by_hand(x: Tensor, sizes: Tensor, keys: Tensor, prefix: int, merge: int) -> list[tuple[float, list[float]]]:
    """One image. The patches after merging, each as its size and values, in any order."""
    tokens = [(float(size), row * float(size)) for row, size in zip(x, sizes[:, 0], strict=True)]
    patches = list(range(prefix, len(x)))
    sources, targets = patches[::2], patches[1::2]
    best: list[tuple[float, int, int]] = []
    for source in sources:
        cosines = [float(torch.cosine_similarity(keys[source], keys[target], dim=0)) for target in targets]
        best.append((max(cosines), source, targets[int(np.argmax(cosines))]))
    groups = {target: [target] for target in targets}
    for number, (_, source, target) in enumerate(sorted(best, reverse=True)):
        if number < merge:
            groups[target].append(source)
        else:
            groups[source] = [source]
    result = []
    for members in groups.values():
        size = sum(tokens[member][0] for member in members)
        total = torch.stack([tokens[member][1] for member in members]).sum(0) / size
        result.append((size, total.tolist()))
    return sorted(result)


@settings(max_examples=40, deadline=None)
@given(
    patches=st.integers(2, 25),
    prefix=st.integers(0, 3),
    merge=st.integers(0, 15),
    largest=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_tokens_are_merged_as_in_the_paper(patches: int, prefix: int, merge: int, largest: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = prefix + patches
    x, keys = (torch.randn(2, tokens, 6, generator=generator) for _ in range(2))
    sizes = torch.randint(1, largest + 1, (2, tokens, 1), generator=generator).float()
    sizes[:, :prefix] = 1
    merged, counts = merge_tokens(x, sizes, keys, prefix, merge)
    assert merged.shape[1] == counts.shape[1] == merged_tokens(tokens, prefix, merge)
    assert torch.equal(merged[:, :prefix], x[:, :prefix])
    for number in range(2):
        expected = by_hand(x[number], sizes[number], keys[number], prefix, min(merge, patches // 2))
        actual = sorted(
            (float(size), row.tolist())
            for size, row in zip(counts[number, prefix:, 0], merged[number, prefix:], strict=True)
        )
        for (size, row), (expected_size, expected_row) in zip(actual, expected, strict=True):
            assert size == expected_size
            assert row == pytest.approx(expected_row, abs=1e-4)


def network_of(config: ViTConfig) -> ViT:
    torch.manual_seed(0)
    network = ViT(config)
    randomized(network)
    return network.eval()


@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS.keys())
@torch.inference_mode()
def test_each_block_has_the_stated_number_of_tokens(options: dict[str, Any]) -> None:
    config = replace(CONFIG, merge=10, **options)
    seen: dict[str, Tensor] = {}
    logits, _ = network_of(config)(torch.rand(2, 3, 32, 32), seen)
    assert logits.shape == (2, 5)
    assert torch.isfinite(logits).all()
    inputs = [seen["tokens"], *(seen[f"block{index:02}"] for index in range(config.depth - 1))]
    assert [tokens.shape[1] for tokens in inputs] == config.tokens_of_blocks
    assert config.tokens_of_blocks[1] == config.tokens - 10


@pytest.mark.parametrize("options", POOLS.values(), ids=POOLS.keys())
@torch.inference_mode()
def test_equal_patches_are_merged_without_a_difference(options: dict[str, Any]) -> None:
    """Each patch is there twice, and a merged one gets the attention of both."""
    config = replace(CONFIG, depth=2, **options)
    original = network_of(config)
    original.pos_embed.zero_()
    merging = ViT(replace(config, merge=config.grid**2 // 2)).eval()
    merging.load_state_dict(original.state_dict())
    images = torch.rand(2, 3, 32, 16).repeat_interleave(1, dim=3)
    pairs = images.reshape(2, 3, 32, 4, 4).repeat_interleave(2, dim=3).reshape(2, 3, 32, 32)
    seen: dict[str, Tensor] = {}
    for actual, expected in zip(merging(pairs, seen), original(pairs), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert seen["block00"].shape[1] == config.prefix + config.grid**2 // 2


@torch.inference_mode()
def test_more_merging_changes_the_logits_more() -> None:
    original, images = network_of(CONFIG), torch.rand(4, 3, 32, 32)
    expected, _ = original(images)
    differences = []
    for merge in (1, 8, 16):
        network = ViT(replace(CONFIG, merge=merge)).eval()
        network.load_state_dict(original.state_dict())
        differences.append(float((network(images)[0] - expected).abs().mean()))
    assert 0 < differences[0] < differences[1] < differences[2]


def test_impossible_merging_is_rejected() -> None:
    with pytest.raises(ValueError, match="merge is -1; it must be 0 or more"):
        replace(CONFIG, merge=-1)
    with pytest.raises(ValueError, match="merge is 8; it must be 0 or more, and 0 with 'axial' attention"):
        variant("compact-axial/4", merge=8)
    assert replace(CONFIG, merge=1000).tokens_of_blocks == [65, 33, 17, 9]
