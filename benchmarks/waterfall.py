"""Measures the gain of each step from the plain graph to int8, without a server.

    python -m benchmarks.waterfall --source random:B/16 --bundle BUNDLE

Each step adds one change to the previous step. The last four steps are artifacts of the bundle; without --bundle, one
is exported first. If the bundle has no int8 artifact, an int8 model is calibrated with --images or with generated
textures, whatever its accuracy. All steps are measured in every round, and the gain is the median of the rounds'
ratios, so that a drift in the machine's speed cancels out.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks import document_sections
from benchmarks.compare import plain_subject
from benchmarks.comparison import machine_line
from benchmarks.document_sections import command_line
from benchmarks.plain_graph import write_plain_graph
from vitserve.bench import plot, report
from vitserve.bench.engine import Results, Subject, measure_in_rounds, subject
from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.load import Checkpoint, load_checkpoint
from vitserve.export.golden_images import make_golden
from vitserve.export.graph.onnxruntime_attention import write_onnxruntime_graph
from vitserve.export.graph.optimize import fuse_attention
from vitserve.export.graph.reference import ReferenceNetwork
from vitserve.export.graph.trace import trace
from vitserve.export.quantize import int8
from vitserve.model.arrays import Pixels, Precision
from vitserve.model.bundle.bundle import GRAPH, Bundle, open_bundle
from vitserve.model.bundle.evaluation import read_images
from vitserve.model.network.vit import ViT
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import EngineOptions, EngineUnavailableError

PLAIN, FUSED_ATTENTION = "plain graph, ONNX Runtime", "fused attention (MultiHeadAttention)"
STEPS: dict[str, tuple[str, Precision]] = {  # artifacts of the bundle: engine and precision
    "last block for the class token alone": ("onnxruntime", "fp32"),
    "OpenVINO fp32": ("openvino", "fp32"),
    "OpenVINO bf16": ("openvino", "bf16"),
    "OpenVINO int8": ("openvino", "int8"),
}


@dataclass(frozen=True)
class Step:
    step: str
    batch_size: int
    images_per_second: float  # median of the rounds
    min_images_per_second: float
    max_images_per_second: float
    gain: float | None  # relative to the previous step, median of the rounds' ratios; None for the first step
    min_gain: float | None
    max_gain: float | None
    total_gain: float  # relative to the first step


def calibration_images(checkpoint: Checkpoint, images: Path | None) -> Pixels:
    if images is not None:
        return read_images(images, checkpoint.preprocessing, checkpoint.labels, 300, 1)[0].pixels
    network = ReferenceNetwork(checkpoint.network, checkpoint.preprocessing).eval()
    parts = [make_golden(network, checkpoint.preprocessing.image_size, seed=seed).pixels for seed in (1, 2)]
    pixels: Pixels = np.concatenate(parts)
    return pixels


def write_fused_graph(checkpoint: Checkpoint, directory: Path) -> Path:
    network = copy.deepcopy(checkpoint.network)
    if not isinstance(network, ViT):
        raise ValueError("the source is not a Vision Transformer")
    fuse_attention(network)
    reference = ReferenceNetwork(network, checkpoint.preprocessing).eval()
    trace(reference, checkpoint.preprocessing.image_size, directory / "fused.onnx")
    write_onnxruntime_graph(directory / "fused.onnx", directory / "fused_onnxruntime.onnx")
    return directory / "fused_onnxruntime.onnx"


def write_int8_graph(checkpoint: Checkpoint, bundle: Bundle, images: Path | None, directory: Path) -> Path:
    model = int8.quantize(bundle.path / GRAPH, calibration_images(checkpoint, images), smooth=True)
    int8.save(model, directory / "int8.xml")
    return directory / "int8.xml"


def open_steps(
    checkpoint: Checkpoint,
    bundle: Bundle,
    images: Path | None,
    directory: Path,
    options: EngineOptions,
    skipped: dict[str, str],
) -> dict[str, Subject]:
    """By name, in order. A step that cannot run here is added to ``skipped`` with the reason."""
    write_plain_graph(checkpoint.network, checkpoint.preprocessing.image_size, directory / "plain.onnx")
    fused = write_fused_graph(checkpoint, directory)
    opened = {
        PLAIN: plain_subject(directory / "plain.onnx"),
        FUSED_ATTENTION: subject(construct_engine("onnxruntime", "fp32", fused, options), options),
    }
    graphs = {
        (artifact.engine, artifact.precision): bundle.path / artifact.path for artifact in bundle.manifest.artifacts
    }
    for name, (engine, precision) in STEPS.items():
        try:
            if (engine, precision) not in graphs and precision == "int8":
                graphs[engine, precision] = write_int8_graph(checkpoint, bundle, images, directory)
            if (engine, precision) not in graphs:
                raise EngineUnavailableError(f"the bundle has no {precision} for {engine}")
            opened[name] = subject(construct_engine(engine, precision, graphs[engine, precision], options), options)
        except Exception as error:  # runtimes raise exceptions of many types
            skipped[name] = str(error)
    return opened


def steps(names: Sequence[str], sizes: Sequence[int], results: Results) -> list[Step]:
    rows = []
    for size in sizes:
        rates = [results[index, size].rates for index in range(len(names))]
        gains: list[list[float]] = [[], *(_ratios(after, before) for before, after in pairwise(rates))]
        for name, step_rates, step_gains in zip(names, rates, gains, strict=True):
            rows.append(
                Step(
                    step=name,
                    batch_size=size,
                    images_per_second=statistics.median(step_rates),
                    min_images_per_second=min(step_rates),
                    max_images_per_second=max(step_rates),
                    gain=statistics.median(step_gains) if step_gains else None,
                    min_gain=min(step_gains, default=None),
                    max_gain=max(step_gains, default=None),
                    total_gain=statistics.median(_ratios(step_rates, rates[0])),
                )
            )
    return rows


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    return [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]


def as_markdown(rows: Sequence[Step], head: str, skipped: dict[str, str]) -> str:
    sizes = list(dict.fromkeys(row.batch_size for row in rows))
    lines = []
    for name in dict.fromkeys(row.step for row in rows):
        by_size = [row for row in rows if row.step == name]
        rates = [f"{row.images_per_second:.4g}" for row in by_size]
        lines.append([name, *rates, *map(_gain, by_size), f"{by_size[-1].total_gain:.2f} ×"])
    rates, gains = [f"images/s, batch {size}" for size in sizes], [f"gain, batch {size}" for size in sizes]
    titles = ["step", *rates, *gains, f"total gain, batch {sizes[-1]}"]
    reasons = "".join(f"\nSkipped: {name}: {reason.splitlines()[0]}\n" for name, reason in skipped.items())
    return f"{head}\n{document_sections.markdown(titles, lines)}{reasons}"


def _gain(row: Step) -> str:
    return "" if row.gain is None else f"{row.gain:.2f} × ({row.min_gain:.2f} – {row.max_gain:.2f})"


def _bar(row: Step) -> plot.Bar:
    note = f"{row.gain:.2f} ×" if row.gain else ""
    return plot.Bar(row.step, row.images_per_second, row.min_images_per_second, row.max_images_per_second, note)


def measure(options: argparse.Namespace, console: Console, skipped: dict[str, str]) -> tuple[list[str], Results]:
    """Returns the names of the steps, in order, and their results."""
    checkpoint = load_checkpoint(options.source)
    with tempfile.TemporaryDirectory() as created, ExitStack() as stack:
        directory = Path(created)
        console.print("preparing the graphs")
        bundle = (
            open_bundle(options.bundle)
            if options.bundle
            else build_bundle(checkpoint, directory / "bundle", name="waterfall")
        )
        engine_options = EngineOptions(max_batch=max(options.sizes))
        opened = open_steps(checkpoint, bundle, options.images, directory, engine_options, skipped)
        for step in opened.values():
            stack.callback(step.close)
        loads = f"{len(options.sizes)} batch sizes, {options.rounds} rounds of {options.seconds:g} s"
        console.print(f"measuring {len(opened)} steps at {loads}")
        pixels, subjects = bundle.golden().pixels, list(opened.values())
        return list(opened), measure_in_rounds(subjects, pixels, options.sizes, options.seconds, options.rounds)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", default="random:B/16", help="checkpoint, in any form that `vitserve export` accepts")
    add("--bundle", type=Path, help="bundle of the same source, with bf16 and int8")
    add("--images", type=Path, help="calibration images for int8, used if no bundle is named")
    add("--sizes", type=int, nargs="+", default=[1, 4, 8], help="batch sizes")
    add("--seconds", type=float, default=2.0, help="measured time of each step and batch size in a round")
    add("--rounds", type=int, default=3)
    add("--output", type=Path, default=Path("runs/waterfall"), help="directory of waterfall.json, .csv, .svg and .md")
    add("--docs", type=Path, help="document in which to replace the section --section")
    add("--section", default="waterfall")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    plot.load_figure_class()
    if options.docs is not None:
        document_sections.check(options.docs, options.section)
    skipped = dict[str, str]()
    names, results = measure(options, Console(stderr=True, highlight=False), skipped)
    rows, command = steps(names, options.sizes, results), command_line(sys.argv[1:])
    rounds = f"median of {options.rounds} rounds of {options.seconds:g} s"
    head = (
        f"{options.source} on {machine_line()}; {rounds}; gains relative to the previous step (min – max).\n"
        f"`python -m benchmarks.waterfall {command}`\n"
    )
    text = as_markdown(rows, head, skipped)
    options.output.mkdir(parents=True, exist_ok=True)
    every_round = {f"{names[index]}, batch {size}": timings.rates for (index, size), timings in results.items()}
    about = {"command": command, "skipped": skipped, "every_round": every_round}
    report.write_json(options.output / "waterfall.json", about, rows)
    report.write_csv(options.output / "waterfall.csv", rows)
    (options.output / "waterfall.md").write_text(text, encoding="utf-8")
    largest = options.sizes[-1]
    bars = [_bar(row) for row in rows if row.batch_size == largest]
    plot.draw_waterfall(bars, f"images/s, batch {largest}", options.output / "waterfall.svg")
    if options.docs is not None:
        document_sections.publish(options.docs, options.section, text, options.output / "waterfall.svg")
    Console(width=160, highlight=False).print(text)


if __name__ == "__main__":
    main()
