"""The plot of all results: bars for closed loops, and goodput against offered load."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.http.overload import Overload
from benchmarks.http.results import Groups, Results, Row
from benchmarks.http.tables import of_kind
from benchmarks.http.throughput import Throughput
from vitserve.bench import plot

_PANEL_INCHES = 2.6
_BAR_SCENARIOS = ("throughput", "decode")
_STYLES = {"kept": "-", "new": "--"}


def draw(found: Results, path: Path) -> None:
    groups = found.groups()
    bars = {key: rows for key, rows in groups.items() if key[0] in _BAR_SCENARIOS}
    curves = _curves(groups)
    heights = [0.6 + sum(0.5 + 0.25 * len(rows) for rows in bars.values()), _PANEL_INCHES if curves else 0.0]
    figure = plot.load_figure_class()(figsize=(9, sum(heights)), layout="constrained")
    parts = figure.subfigures(2, 1, height_ratios=[max(height, 0.01) for height in heights])
    if bars:
        _draw_bars(parts[0], bars, found.titles)
    if curves:
        _draw_curves(parts[1], curves, found.titles)
    figure.savefig(path)


def _draw_bars(figure: Any, groups: Groups, titles: dict[str, str]) -> None:
    panels = figure.subplots(len(groups), squeeze=False, height_ratios=[1 + len(rows) for rows in groups.values()])
    for axes, ((_, load), by_server) in zip(panels[:, 0], groups.items(), strict=True):
        rates = {titles[name]: _rates(rows) for name, rows in by_server.items()}
        middle = [statistics.median(each) for each in rates.values()]
        below = [value - min(each) for value, each in zip(middle, rates.values(), strict=True)]
        above = [max(each) - value for value, each in zip(middle, rates.values(), strict=True)]
        colors = [plot.BLUE if title.startswith("vitserve") else plot.GRAY for title in rates]
        drawn = axes.barh(list(rates), middle, xerr=[below, above], color=colors)
        axes.bar_label(drawn, [f" {value:,.0f}" for value in middle], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(f"{load}, images/s", fontsize=9, loc="left")
        axes.margins(x=0.12)
        axes.tick_params(labelsize=8)


def _rates(rows: Sequence[Row]) -> list[float]:
    return [each.per_second for each in of_kind([row.measured for row in rows], Throughput)]


Curves = dict[str, dict[tuple[str, str], list[tuple[float, float]]]]  # by images, then by server and arrivals


def _curves(groups: Groups) -> Curves:
    """Points of offered load ÷ capacity and goodput in percent of the capacity. Each is the median of the rounds."""
    curves: Curves = {}
    for (scenario, load), by_server in groups.items():
        if scenario != "overload":
            continue
        images, arrivals, multiple = load.split(", ")
        for server, rows in by_server.items():
            turns = of_kind([row.measured for row in rows], Overload)
            goodput = 100 * statistics.median(turn.goodput_share for turn in turns)
            points = curves.setdefault(images, {}).setdefault((server, arrivals), [])
            points.append((float(multiple.split()[0]), goodput))
    return curves


def _draw_curves(figure: Any, curves: Curves, titles: dict[str, str]) -> None:
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axes, (images, lines) in zip(panels, curves.items(), strict=True):
        for (server, arrivals), points in lines.items():
            color = plot.BLUE if server == "new" else plot.GRAY
            label = f"{titles[server]}, {arrivals} connections"
            axes.plot(*zip(*sorted(points), strict=True), _STYLES[arrivals], color=color, marker="o", ms=3, label=label)
        axes.set_title(f"overload, {images}", fontsize=9, loc="left")
        axes.set_xlabel("offered load ÷ capacity", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.set_ylim(0, 110)
    panels[0].set_ylabel("goodput, % of capacity", fontsize=8)
    panels[0].legend(fontsize=7)
