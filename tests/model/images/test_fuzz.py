"""Random damage to real images: nothing is raised but ImageError, and memory stays below the estimates."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.mutation import mutate, seeds
from tests.support.paths import ROOT
from vitserve.model.bundle.preprocess import Decoder, ImageError, Preprocessing

MAX_PIXELS = 500_000
SLACK_BYTES = 8 * 2**20


def mutations(count: int) -> list[bytes]:
    images = seeds()
    return [mutate(random.Random(number).choice(images), random.Random(number)) for number in range(count)]


@pytest.mark.parametrize("count", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_damage_raises_nothing_but_image_errors(count: int) -> None:
    decoder = Decoder(Preprocessing(32), MAX_PIXELS)
    outcomes: Counter[str] = Counter()
    for number, image in enumerate(mutations(count)):
        try:
            pixels = decoder.decode(image)
        except ImageError as error:
            outcomes[type(error).__name__] += 1
        except Exception as error:
            raise AssertionError(f"mutation {number} raised {error!r}") from error
        else:
            assert pixels.shape == (32, 32, 3)
            outcomes["decoded"] += 1
    assert outcomes["decoded"] > count // 20
    assert outcomes["DamagedImageError"] > count // 5


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of the memory is read from /proc")
@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_damage_takes_no_more_memory_than_estimated(count: int, tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(count)]
    for file, image in zip(files, mutations(count), strict=True):
        file.write_bytes(image)
    command = [sys.executable, "-m", "tests.support.peak_memory", str(MAX_PIXELS), *map(str, files)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    results = json.loads(ran.stdout)
    assert len(results) == count
    assert not [
        (number, result) for number, result in enumerate(results) if result["peak"] > result["estimate"] + SLACK_BYTES
    ]
    assert ran.stderr == ""
