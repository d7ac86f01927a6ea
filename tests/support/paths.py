"""The files that tests read."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Optional data; tests that need it are skipped if it is missing.
PHOTOS = Path(os.environ.get("TEST_PHOTOS", ROOT / "tests" / "photos"))  # a directory of JPEGs
CIFAR10 = Path(os.environ.get("TEST_CIFAR10", ROOT / "data" / "cifar10_jpeg.npz"))  # as for `vitserve train`
