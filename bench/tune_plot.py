"""The picture of `vitserve tune`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitserve.bench.tune import Measurement


def draw(measurements: Sequence[Measurement], path: Path) -> None:
    """Throughput against the latency of a batch, a line for each setting, a point for each batch size. Raises ImportError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a picture needs matplotlib, which is not installed: pip install 'vitserve[bench]'"
        ) from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="ms for a batch, p50", ylabel="images/s", xscale="log")
    lines: dict[str, list[Measurement]] = {}
    for each in measurements:
        lines.setdefault(f"{each.engine} {each.precision}, {each.streams} × {each.threads}", []).append(each)
    for label, its in lines.items():
        axes.plot(
            [1000 * each.p50_seconds for each in its], [each.images_per_second for each in its], marker="o", label=label
        )
        for each in its:
            axes.annotate(
                str(each.batch_size),
                (1000 * each.p50_seconds, each.images_per_second),
                textcoords="offset points",
                xytext=(4, 4),
                fontsize=7,
            )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
