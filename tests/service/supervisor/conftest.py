"""Bundles that the tests with real processes serve."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from tests.support.load import expectations
from tests.support.networks import checkpoint
from vitserve.export.build_bundle import build_bundle
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.config import ViTConfig

OTHER = ViTConfig(image_size=24, patch_size=8, width=48, depth=1, heads=3, mlp_width=64, classes=11)


@pytest.fixture(autouse=True)
def linux() -> None:
    if sys.platform != "linux":
        pytest.skip("looks at processes in /proc")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of another image size and number of classes."""
    return build_bundle(checkpoint(OTHER, seed=1), tmp_path_factory.mktemp("bundles") / "other", name="other")


@pytest.fixture(scope="session")
def slow(slow_bundle: Bundle) -> Bundle:
    return slow_bundle


@pytest.fixture(scope="session")
def expected(bundle: Bundle, other: Bundle) -> dict[tuple[str, str], np.ndarray]:
    return expectations(bundle, other)
