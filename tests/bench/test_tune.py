"""`vitserve tune` measures, stores the fastest setting, and `vitserve serve` uses it."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from tests.support.server import start_server
from vitserve.bench.tune import Measurement, choose, sizes, splits
from vitserve.cli.main import app
from vitserve.model.bundle.bundle import MANIFEST, Bundle, sha256
from vitserve.service.engine_worker.tuning_cache import TuningResult, save_tuning_result


def test_tuning_result_is_stored_and_used(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ["tune", str(bundle.path), "--max-batch", "2", "--seconds", "0.02"]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    (stored,) = (tmp_path / "vitserve" / "tuned").iterdir()
    choice = json.loads(stored.read_text())
    assert f"fastest: {choice['engine']} in {choice['precision']}, {choice['streams']} ×" in result.output
    save_tuning_result(sha256(bundle.path / MANIFEST), TuningResult("onnxruntime", "fp32", 1, 1, 1.0))
    running = start_server("--bundle", str(bundle.path))
    assert httpx.get(f"{running.url}/v1/model").json()["serving"]["engine"] == "onnxruntime"
    assert running.stop() == 0
    stored.write_text("{")
    running = start_server("--bundle", str(bundle.path))
    assert "ignoring invalid tuning result" in "".join(running.log)
    assert running.stop() == 0


def test_choice_is_the_fastest_and_among_equals_the_simplest() -> None:
    def measured(engine: str, streams: int, rate: float, size: int = 1) -> Measurement:
        return Measurement(engine, "fp32", streams, 4 // streams, size, rate, 0.1)

    near = choose(
        [
            measured("openvino", 1, 99),
            measured("openvino", 4, 100),
            measured("onnxruntime", 2, 99.5),
            measured("torch", 1, 50),
        ]
    )
    assert (near.engine, near.streams) == ("openvino", 1)
    far = choose([measured("openvino", 1, 50, 1), measured("openvino", 1, 80, 8), measured("onnxruntime", 2, 100, 8)])
    assert (far.engine, far.streams, far.images_per_second) == ("onnxruntime", 2, 100)
    with pytest.raises(ValueError, match="nothing to choose"):
        choose([])
    assert (splits(1), splits(6), splits(8)) == ([1], [1, 2, 6], [1, 2, 4, 8])
    assert (sizes(1), sizes(6), sizes(8)) == ([1], [1, 2, 4, 6], [1, 2, 4, 8])
