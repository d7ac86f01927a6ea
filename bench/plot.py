"""Plots of measurements. Needs matplotlib, which is optional and imported only when a plot is drawn."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vitserve.bench.report import EngineRow, ServiceRow

if TYPE_CHECKING:
    from vitserve.bench.tune import Measurement

BLUE, GRAY, DARK_GRAY, GREEN, RED = "#2b6cb0", "#a0aec0", "#718096", "#2f855a", "#c53030"


class Bar(NamedTuple):
    label: str
    value: float
    minimum: float
    maximum: float
    note: str = ""


def load_figure_class() -> Any:
    """Returns matplotlib's Figure. Raises ImportError, with the command that installs it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib, which is not installed: pip install 'vitserve[bench]'") from error
    return Figure


def draw_service(rows: Sequence[ServiceRow], path: Path) -> None:
    """Latency against throughput: one line for each loop and percentile, one point for each load."""
    figure = load_figure_class()(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="successful requests/s", ylabel="latency (ms)", yscale="log")
    for loop in ("closed", "open"):
        for name, style in (("p50", "-"), ("p90", "--"), ("p99", ":")):
            known = [row for row in rows if row.loop == loop and getattr(row, f"{name}_ms") is not None]
            if not known:
                continue
            points = [(row.throughput_per_second, getattr(row, f"{name}_ms")) for row in known]
            axes.plot(*zip(*points, strict=True), style, marker="o", label=f"{name}, {loop} loop")
            loads = [f"{row.connections}" if loop == "closed" else f"{row.planned_per_second:g}/s" for row in known]
            _label_points(axes, zip(loads, points, strict=True))
    _finish(figure, axes, path)


def draw_engines(rows: Sequence[EngineRow], path: Path) -> None:
    """Throughput against batch size: one line for each engine and precision. The band spans the rounds."""
    figure = load_figure_class()(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="batch size", ylabel="images/s", xscale="log")
    lines: dict[str, list[EngineRow]] = {}
    for row in rows:
        lines.setdefault(_setting(row), []).append(row)
    for label, line in lines.items():
        sizes = [row.batch_size for row in line]
        axes.plot(sizes, [row.images_per_second for row in line], marker="o", label=label)
        minima, maxima = ([row.min_images_per_second for row in line], [row.max_images_per_second for row in line])
        axes.fill_between(sizes, minima, maxima, alpha=0.15)
    ticks = sorted({row.batch_size for row in rows})
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    _finish(figure, axes, path)


def draw_tuning(measurements: Sequence[Measurement], path: Path) -> None:
    """Throughput against batch latency: one line for each setting, one point for each batch size."""
    figure = load_figure_class()(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="p50 latency of a batch (ms)", ylabel="images/s", xscale="log")
    lines: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        lines.setdefault(_setting(measurement), []).append(measurement)
    for label, line in lines.items():
        points = [(1000 * measurement.p50_seconds, measurement.images_per_second) for measurement in line]
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
        _label_points(axes, zip([str(measurement.batch_size) for measurement in line], points, strict=True))
    axes.set_ylim(bottom=0)
    _finish(figure, axes, path)


def draw_bars(groups: Mapping[str, Sequence[Bar]], unit: str, path: Path) -> None:
    """One panel of horizontal bars for each group. The error bars span the rounds."""
    height = 0.6 + sum(0.6 + 0.28 * len(bars) for bars in groups.values())
    figure = load_figure_class()(figsize=(9, height), layout="constrained")
    ratios = [1 + len(bars) for bars in groups.values()]
    panels = figure.subplots(len(groups), squeeze=False, height_ratios=ratios)[:, 0]
    for axes, (title, bars) in zip(panels, groups.items(), strict=True):
        values = [bar.value for bar in bars]
        spread = [[bar.value - bar.minimum for bar in bars], [bar.maximum - bar.value for bar in bars]]
        colors = [BLUE if "vitserve" in bar.label else GRAY for bar in bars]
        drawn = axes.barh([bar.label for bar in bars], values, xerr=spread, color=colors)
        axes.bar_label(drawn, [f" {_short(value)}" for value in values], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(f"{title}, {unit}", fontsize=9, loc="left")
        axes.margins(x=0.12)
        axes.tick_params(labelsize=8)
    figure.savefig(path)


def draw_waterfall(steps: Sequence[Bar], unit: str, path: Path) -> None:
    """One vertical bar for each step. It starts where the bar of the previous step ends."""
    figure = load_figure_class()(figsize=(1 + 1.5 * len(steps), 4.5), layout="constrained")
    axes = figure.add_subplot(ylabel=unit)
    before = 0.0
    for place, step in enumerate(steps):
        gain = step.value - before
        axes.bar(place, gain, bottom=before, color=DARK_GRAY if place == 0 else GREEN if gain >= 0 else RED)
        spread = [[step.value - step.minimum], [step.maximum - step.value]]
        axes.errorbar(place, step.value, spread, color="black", capsize=3)
        axes.annotate(
            f"{_short(step.value)}\n{step.note}".strip(),
            (place, max(before, step.maximum)),
            textcoords="offset points",
            xytext=(0, 5),
            ha="center",
            fontsize=8,
        )
        before = step.value
    axes.set_xticks(range(len(steps)), [textwrap.fill(step.label, 18) for step in steps], fontsize=8)
    axes.margins(y=0.15)
    figure.savefig(path)


def _setting(row: EngineRow | Measurement) -> str:
    return f"{row.engine} {row.precision}, {row.streams} × {row.threads}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _label_points(axes: Any, points: Iterable[tuple[str, tuple[float, float]]]) -> None:
    for label, point in points:
        axes.annotate(label, point, textcoords="offset points", xytext=(4, 4), fontsize=7)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
