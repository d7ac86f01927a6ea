"""Every kind of plot is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitserve.bench import plot
from vitserve.bench.report import EngineRow
from vitserve.bench.tune import Measurement


def test_every_plot_is_an_svg(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    bars = [plot.Bar("vitserve", 2.0, 1.5, 2.5), plot.Bar("plain", 1.0, 1.0, 1.0)]
    plot.draw_bars({"8 connections": bars, "batch 8": bars[:1]}, "images/s", tmp_path / "bars.svg")
    plot.draw_waterfall(bars, "images/s", tmp_path / "waterfall.svg")
    rows = [EngineRow("openvino", "fp32", 1, 2, size, 10.0 * size, 9.0, 99.0, 1.0, None) for size in (1, 4)]
    plot.draw_engines(rows, tmp_path / "engines.svg")
    measurements = [Measurement("openvino", "fp32", 1, 2, size, 10.0 * size, 0.1 * size) for size in (1, 4)]
    plot.draw_tuning(measurements, tmp_path / "tuning.svg")
    for name in ("bars", "waterfall", "engines", "tuning"):
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
