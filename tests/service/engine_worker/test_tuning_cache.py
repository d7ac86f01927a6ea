"""A result of `vitserve tune` that cannot be right is ignored with a warning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vitserve.service import machine
from vitserve.service.engine_worker.tuning_cache import TuningResult, load_tuning_result, path_of, save_tuning_result

VALID = TuningResult("openvino", "fp32", 1, 1, 100.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_saved_result_is_loaded_and_only_this_user_may_write_it() -> None:
    path = save_tuning_result("0" * 64, VALID)
    assert load_tuning_result("0" * 64) == VALID
    assert path.parent.stat().st_mode & 0o777 == path.parent.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "changed",
    [
        {"streams": -1},
        {"streams": 0},
        {"streams": "two"},
        {"streams": 1_000_000},
        {"streams": 1.0},
        {"streams": True},
        {"streams": None},
        {"threads": 0},
        {"threads": machine.cores() + 1},
        {"threads": "1"},
        {"engine": "tpu"},
        {"engine": ["openvino"]},
        {"precision": "int4"},
        {"images_per_second": "fast"},
        {"images_per_second": 0},
        {"images_per_second": float("nan")},
        {"unknown": 1},
    ],
    ids=str,
)
def test_an_invalid_value_is_ignored_with_a_warning(changed: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    path_of("0" * 64).write_text(json.dumps(vars(VALID) | changed))
    assert load_tuning_result("0" * 64) is None
    assert "ignoring invalid tuning result" in caplog.text
    assert next(iter(changed)) in caplog.text


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "1", "[" * 100_000, "\x00", '{"engine": "openvino"}'], ids=repr
)
def test_other_text_is_ignored_with_a_warning(text: str, caplog: pytest.LogCaptureFixture) -> None:
    path_of("0" * 64).write_text(text)
    assert load_tuning_result("0" * 64) is None
    assert "ignoring invalid tuning result" in caplog.text
