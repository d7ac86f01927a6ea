"""Images per second of the engines alone, per batch size, taking turns in one run.

python -m bench.engine --bundle service/default_bundle
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from model.bundle import open_bundle
from service.engines.engine import Engine
from service.engines.open import EngineOptions, open_one


def rate(engine: Engine, pixels: np.ndarray, seconds: float) -> float:
    """Images per second over at least this long."""
    engine.run(0, pixels)
    began, runs = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < seconds:
        engine.run(0, pixels)
        runs += 1
    return runs * len(pixels) / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path(__file__).parent.parent / "service" / "default_bundle")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    side = bundle.manifest.preprocessing.image_size
    engines = {}
    for artefact in bundle.manifest.artefacts:
        chosen = EngineOptions(max_batch=max(options.sizes))
        engines[f"{artefact.engine} {artefact.precision}"] = open_one(artefact.engine, artefact.precision, bundle.path / artefact.path, chosen)
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.rounds):
        for name, engine in engines.items():
            for size in options.sizes:
                pixels = np.random.default_rng(size).integers(0, 256, (size, side, side, 3), np.uint8)
                rates.setdefault((name, size), []).append(rate(engine, pixels, options.seconds))
    table = Table(title=f"{bundle.manifest.name}: images/s, median of {options.rounds}")
    table.add_column("engine")
    for size in options.sizes:
        table.add_column(f"batch {size}", justify="right")
    for name in engines:
        table.add_row(name, *(f"{statistics.median(rates[name, size]):.1f}" for size in options.sizes))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
