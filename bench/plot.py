"""Pictures of measurements. matplotlib is optional: imported by those who were asked for a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vitserve.bench.report import EngineRow, ServiceRow


class Bar(NamedTuple):
    label: str
    value: float
    least: float
    most: float
    note: str = ""


def require() -> Any:
    """matplotlib's Figure. Raises ImportError, with what to install, where it is not: before anything is measured."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a picture needs matplotlib, which is not installed: pip install 'vitserve[bench]'"
        ) from error
    return Figure


def draw_service(rows: Sequence[ServiceRow], path: Path) -> None:
    """Latency against answers a second: a line for each kind of loop and percentile, a point for each load."""
    figure = require()(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="answered requests/s", ylabel="ms", yscale="log")
    for loop in ("closed", "open"):
        its = [row for row in rows if row.loop == loop]
        for name, style in (("p50", "-"), ("p90", "--"), ("p99", ":")):
            points = [
                (row.answered_per_second, getattr(row, f"{name}_ms"), row)
                for row in its
                if getattr(row, f"{name}_ms") is not None
            ]
            if points:
                axes.plot(
                    [each[0] for each in points],
                    [each[1] for each in points],
                    style,
                    marker="o",
                    label=f"{name}, {loop} loop",
                )
            for rate, latency, row in points:
                label = f"{row.connections}" if loop == "closed" else f"{row.planned_per_second:g}/s"
                axes.annotate(label, (rate, latency), textcoords="offset points", xytext=(4, 4), fontsize=7)
    _finish(figure, axes, path)


def draw_engines(rows: Sequence[EngineRow], path: Path) -> None:
    """Images a second at each batch size: a line for each engine and precision, between the slowest and the fastest round."""
    figure = require()(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="batch size", ylabel="images/s", xscale="log")
    lines: dict[str, list[EngineRow]] = {}
    for row in rows:
        lines.setdefault(f"{row.engine} {row.precision}, {row.streams} × {row.threads}", []).append(row)
    for label, its in lines.items():
        sizes = [row.batch_size for row in its]
        axes.plot(sizes, [row.images_per_second for row in its], marker="o", label=label)
        axes.fill_between(
            sizes, [row.least_per_second for row in its], [row.most_per_second for row in its], alpha=0.15
        )
    axes.set_xticks(
        sorted({row.batch_size for row in rows}), [str(size) for size in sorted({row.batch_size for row in rows})]
    )
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    _finish(figure, axes, path)


def draw_bars(groups: Mapping[str, Sequence[Bar]], unit: str, path: Path) -> None:
    """A panel for each group, its bars side by side, with what the rounds were between."""
    figure = require()(figsize=(9, 0.6 + sum(0.6 + 0.28 * len(bars) for bars in groups.values())), layout="constrained")
    panels = figure.subplots(len(groups), squeeze=False, height_ratios=[1 + len(bars) for bars in groups.values()])[
        :, 0
    ]
    for axes, (title, bars) in zip(panels, groups.items(), strict=True):
        values = [bar.value for bar in bars]
        spread = [[bar.value - bar.least for bar in bars], [bar.most - bar.value for bar in bars]]
        drawn = axes.barh(
            [bar.label for bar in bars],
            values,
            xerr=spread,
            color=["#2b6cb0" if "vitserve" in bar.label else "#a0aec0" for bar in bars],
        )
        axes.bar_label(drawn, [f" {_short(value)}" for value in values], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(f"{title}, {unit}", fontsize=9, loc="left")
        axes.margins(x=0.12)
        axes.tick_params(labelsize=8)
    figure.savefig(path)


def draw_waterfall(steps: Sequence[Bar], unit: str, path: Path) -> None:
    """Each step begins where the one before it ended."""
    figure = require()(figsize=(1 + 1.5 * len(steps), 4.5), layout="constrained")
    axes = figure.add_subplot(ylabel=unit)
    before = 0.0
    for place, step in enumerate(steps):
        gain = step.value - before
        axes.bar(place, gain, bottom=before, color="#718096" if place == 0 else "#2f855a" if gain >= 0 else "#c53030")
        axes.errorbar(
            place, step.value, [[step.value - step.least], [step.most - step.value]], color="black", capsize=3
        )
        axes.annotate(
            f"{_short(step.value)}\n{step.note}".strip(),
            (place, max(before, step.most)),
            textcoords="offset points",
            xytext=(0, 5),
            ha="center",
            fontsize=8,
        )
        before = step.value
    axes.set_xticks(range(len(steps)), [textwrap.fill(step.label, 18) for step in steps], fontsize=8)
    axes.margins(y=0.15)
    figure.savefig(path)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
