"""Position embeddings at another image size equal those of each library's own function."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from vitserve.export.checkpoint.position_embeddings import (
    GOOGLE,
    TIMM,
    TORCHVISION,
    TRANSFORMERS,
    TRANSFORMERS_REGISTERS,
    Interpolation,
    at_image_size,
)
from vitserve.model.config import ViTConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # of the other libraries

PATCH, WIDTH = 2, 8
# From and to, in patches per side: tiny ones, 224 → 384 and back with patches of 16, 518 → 224 with patches of 14, and
# sizes that are not multiples of each other.
GRIDS = [(4, 2), (4, 3), (4, 9), (14, 24), (24, 14), (37, 16), (7, 31), (16, 64)]
TOLERANCE = 1e-6  # relative to the largest value
KINDS = {
    "vit": ("ViT", TRANSFORMERS, 1),
    "deit": ("DeiT", TRANSFORMERS, 2),
    "dinov2": ("Dinov2", TRANSFORMERS, 1),
    "dinov2_with_registers": ("Dinov2WithRegisters", TRANSFORMERS_REGISTERS, 1),
}

pytest_grids = pytest.mark.parametrize(("old", "new"), GRIDS, ids=[f"{old} to {new}" for old, new in GRIDS])


def positions(grid: int, prefix: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(1, prefix + grid**2, WIDTH)


def assert_ours_equals(theirs: Tensor, before: Tensor, old: int, new: int, interpolation: Interpolation) -> None:
    config = ViTConfig(image_size=old * PATCH, patch_size=PATCH, width=WIDTH, depth=1, heads=2, mlp_width=8, classes=2)
    _, weights = at_image_size(config, {"pos_embed": before}, new * PATCH, interpolation)
    assert weights["pos_embed"].shape == theirs.shape
    assert float((weights["pos_embed"] - theirs).abs().max() / theirs.abs().max()) <= TOLERANCE


@pytest_grids
@pytest.mark.parametrize("kind", KINDS)
def test_transformers(kind: str, old: int, new: int, transformers: ModuleType) -> None:
    name, interpolation, prefix = KINDS[kind]
    module = import_module(f"transformers.models.{kind}.modeling_{kind}")
    config = getattr(transformers, f"{name}Config")(hidden_size=WIDTH, image_size=old * PATCH, patch_size=PATCH)
    embeddings: Any = getattr(module, f"{name}Embeddings")(config).eval()
    before = positions(old, prefix)
    embeddings.position_embeddings.data = before
    tokens = torch.zeros(1, 1 + new**2, WIDTH)  # for its length alone
    with torch.no_grad():
        theirs = embeddings.interpolate_pos_encoding(tokens, new * PATCH, new * PATCH)
    assert_ours_equals(theirs, before, old, new, interpolation)


@pytest_grids
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_timm(prefix: int, old: int, new: int, timm: ModuleType) -> None:
    resample: Callable[..., Tensor] = import_module("timm.layers").resample_abs_pos_embed
    before = positions(old, prefix)
    theirs = resample(before, new_size=[new, new], num_prefix_tokens=prefix)
    assert_ours_equals(theirs, before, old, new, TIMM)


@pytest_grids
def test_torchvision(old: int, new: int, timm: ModuleType) -> None:
    module = import_module("torchvision.models.vision_transformer")
    before = positions(old, 1)
    state = {"encoder.pos_embedding": before.clone()}
    theirs = module.interpolate_embeddings(new * PATCH, PATCH, state)["encoder.pos_embedding"]
    assert_ours_equals(theirs, before, old, new, TORCHVISION)


@pytest_grids
def test_google(old: int, new: int) -> None:
    """vit_jax/checkpoint.py (github.com/google-research/vision_transformer) calls this function of scipy."""
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed")
    before = positions(old, 1)
    square = before[0, 1:].reshape(old, old, WIDTH).numpy()
    zoomed = torch.from_numpy(ndimage.zoom(square, (new / old, new / old, 1), order=1)).reshape(1, -1, WIDTH)
    assert_ours_equals(torch.cat([before[:, :1], zoomed], dim=1), before, old, new, GOOGLE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_functions_of_the_libraries_differ(kind: str) -> None:
    """With the interpolation of another library, the comparisons above would fail."""
    config = ViTConfig(image_size=28, patch_size=PATCH, width=WIDTH, depth=1, heads=2, mlp_width=8, classes=2)
    own = KINDS[kind][1]
    results = [
        at_image_size(config, {"pos_embed": positions(14, 1)}, 16, each)[1]["pos_embed"]
        for each in (own, *(other for other in (TIMM, TRANSFORMERS, TORCHVISION, GOOGLE) if other != own))
    ]
    for other in results[1:]:
        assert float((results[0] - other).abs().max()) > 0.01
