"""Where the tests find files."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
PHOTOS = Path(os.environ.get("TEST_PHOTOS", ROOT / "tests" / "photos"))  # real JPEGs, for tests that want them
CIFAR10 = Path(
    os.environ.get("TEST_CIFAR10", ROOT / "data" / "cifar10_jpeg.npz")
)  # the data that the default model was trained on
