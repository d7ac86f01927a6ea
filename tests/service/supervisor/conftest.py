"""Bundles that the tests with real processes serve."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from tests.support.load import expectations
from tests.support.networks import checkpoint
from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.load import Checkpoint
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ViTConfig
from vitserve.model.network.vit import ViT

OTHER = ViTConfig(image_size=24, patch_size=8, width=48, depth=1, heads=3, mlp_width=64, classes=11)
SLOW = ViTConfig(image_size=448, patch_size=16, width=256, depth=4, heads=4, mlp_width=1024, classes=7)


@pytest.fixture(autouse=True)
def linux() -> None:
    if sys.platform != "linux":
        pytest.skip("looks at processes in /proc")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of another image size and number of classes."""
    return build_bundle(checkpoint(OTHER, seed=1), tmp_path_factory.mktemp("bundles") / "other", name="other")


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Takes tens of milliseconds per image, so that a test can act while a batch runs."""
    torch.manual_seed(0)
    labels = tuple(f"class {index}" for index in range(SLOW.classes))
    source = Checkpoint(ViT(SLOW).eval(), labels, Preprocessing(SLOW.image_size))
    return build_bundle(source, tmp_path_factory.mktemp("bundles") / "slow", name="slow", precisions=[])


@pytest.fixture(scope="session")
def expected(bundle: Bundle, other: Bundle) -> dict[tuple[str, str], np.ndarray]:
    return expectations(bundle, other)
