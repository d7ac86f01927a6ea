"""Every patch size is exported: the name of a variant never depends on whether its image size fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.networks import TINY, checkpoint
from vitserve.export.build_bundle import build_bundle
from vitserve.model.config import VARIANTS, variant_of


@pytest.mark.parametrize("patch_size", [2, 7, 14, 15, 16, 32])
def test_a_network_of_any_patch_size_has_a_name(patch_size: int) -> None:
    assert variant_of(replace(TINY, patch_size=patch_size, image_size=patch_size * 3)) == "custom"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_has_its_name_at_any_image_size(name: str) -> None:
    known = VARIANTS[name]
    assert variant_of(replace(known, image_size=known.patch_size * 5, classes=3)) == name


@pytest.mark.parametrize("patch_size", [14, *(pytest.param(size, marks=pytest.mark.slow) for size in (7, 16, 32))])
def test_every_patch_size_is_exported(patch_size: int, tmp_path: Path) -> None:
    config = replace(TINY, patch_size=patch_size, image_size=patch_size * 2, depth=1)
    bundle = build_bundle(checkpoint(config), tmp_path / "bundle", name="patch", precisions=["fp32"])
    assert bundle.manifest.config == config
    assert {artifact.engine for artifact in bundle.manifest.artifacts} == {"openvino", "onnxruntime"}
