"""What each step from the plain graph to int8 gains: engines alone, one network, one run, taking turns.

    python -m benchmarks.waterfall --source random:B/16 --bundle BUNDLE

Each step is the one before it and one thing more. The last four are artifacts of the bundle; without --bundle one is made first. Where it has no int8,
that is calibrated with --images, or else with seeded textures such as golden images are, and is measured whatever it loses. A gain is the median of the
rounds' ratios, so that a machine's drift cancels.
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

from rich.console import Console

from benchmarks import document_sections
from benchmarks.compare import asked, plain_subject
from benchmarks.plain_graph import write_plain_graph
from vitserve.bench import plot, report
from vitserve.bench.engine import Results, Subject, subject, take_turns
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

PLAIN, DIALECT = "plain graph, ONNX Runtime", "fused attention (MultiHeadAttention)"
STEPS: dict[str, tuple[str, Precision]] = {  # of the bundle: engine and precision
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
    least_per_second: float
    most_per_second: float
    gain: float | None  # times the step before, the median of the rounds' ratios
    least_gain: float | None
    most_gain: float | None
    in_all: float  # times the first step


def calibration(checkpoint: Checkpoint, images: Path | None) -> Pixels:
    if images is not None:
        return read_images(images, checkpoint.preprocessing, checkpoint.labels, 300, 1)[0].pixels
    return make_golden(
        ReferenceNetwork(checkpoint.network, checkpoint.preprocessing).eval(),
        checkpoint.preprocessing.image_size,
        count=32,
        seed=1,
    ).pixels


def subjects(
    checkpoint: Checkpoint,
    bundle: Bundle,
    images: Path | None,
    directory: Path,
    options: EngineOptions,
    skipped: dict[str, str],
) -> dict[str, Subject]:
    """By the name of the step, in their order; one that cannot run here is skipped, and why is said."""
    size = checkpoint.preprocessing.image_size
    write_plain_graph(checkpoint.network, size, directory / "plain.onnx")
    found = {PLAIN: plain_subject(directory / "plain.onnx")}
    network = copy.deepcopy(checkpoint.network)
    if not isinstance(network, ViT):
        raise ValueError("the source is not a Vision Transformer")
    fuse_attention(network)
    trace(ReferenceNetwork(network, checkpoint.preprocessing).eval(), size, directory / "fused.onnx")
    write_onnxruntime_graph(directory / "fused.onnx", directory / "dialect.onnx")
    found[DIALECT] = subject(construct_engine("onnxruntime", "fp32", directory / "dialect.onnx", options), options)
    graphs = {(each.engine, each.precision): bundle.path / each.path for each in bundle.manifest.artifacts}
    for name, (engine, precision) in STEPS.items():
        try:
            if (
                (engine, precision) not in graphs and precision == "int8"
            ):  # of random weights it need not be exact to be as fast as any other
                graphs[engine, precision] = directory / "int8.xml"
                model = int8.quantize(bundle.path / GRAPH, calibration(checkpoint, images), smooth=True)
                int8.save(model, directory / "int8.xml")
            if (engine, precision) not in graphs:
                raise EngineUnavailableError(f"the bundle has no {precision} for {engine}")
            found[name] = subject(construct_engine(engine, precision, graphs[engine, precision], options), options)
        except Exception as error:  # whatever a foreign library raises: the others are still worth measuring
            skipped[name] = str(error)
    return found


def steps(names: Sequence[str], sizes: Sequence[int], results: Results) -> list[Step]:
    found = []
    for size in sizes:
        rates = [results[place, size].rates for place in range(len(names))]
        gains: list[list[float]] = [
            [],
            *([after / before for before, after in zip(*pair, strict=True)] for pair in pairwise(rates)),
        ]
        for name, its, gained in zip(names, rates, gains, strict=True):
            found.append(
                Step(
                    step=name,
                    batch_size=size,
                    images_per_second=statistics.median(its),
                    least_per_second=min(its),
                    most_per_second=max(its),
                    gain=statistics.median(gained) if gained else None,
                    least_gain=min(gained, default=None),
                    most_gain=max(gained, default=None),
                    in_all=statistics.median(after / first for first, after in zip(rates[0], its, strict=True)),
                )
            )
    return found


def as_markdown(found: Sequence[Step], head: str, skipped: dict[str, str]) -> str:
    sizes = list(dict.fromkeys(each.batch_size for each in found))
    rows = []
    for name in dict.fromkeys(each.step for each in found):
        its = [each for each in found if each.step == name]
        gains = [
            "" if each.gain is None else f"{each.gain:.2f} × ({each.least_gain:.2f} – {each.most_gain:.2f})"
            for each in its
        ]
        rows.append([name, *(f"{each.images_per_second:.4g}" for each in its), *gains, f"{its[-1].in_all:.2f} ×"])
    titles = [
        "step",
        *(f"images/s, batch {size}" for size in sizes),
        *(f"gain, batch {size}" for size in sizes),
        f"in all, batch {sizes[-1]}",
    ]
    reasons = "".join(f"\nLeft out: {name}: {reason.splitlines()[0]}\n" for name, reason in skipped.items())
    return f"{head}\n{document_sections.markdown(titles, rows)}{reasons}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="random:B/16", help="as `vitserve export` takes it")
    parser.add_argument("--bundle", type=Path, help="made of the same source, with bf16 and int8")
    parser.add_argument("--images", type=Path, help="to calibrate int8 with, where no bundle is named")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/waterfall"), help="directory of waterfall.json, .csv, .svg and .md"
    )
    parser.add_argument("--docs", type=Path, help="document whose part between the marks of --mark is rewritten")
    parser.add_argument("--mark", default="waterfall")
    options = parser.parse_args()
    console = Console(stderr=True, highlight=False)
    plot.require()
    if options.docs is not None:
        document_sections.check(options.docs, options.mark)
    checkpoint, skipped = load_checkpoint(options.source), dict[str, str]()
    with tempfile.TemporaryDirectory() as made, ExitStack() as stack:
        directory = Path(made)
        console.print("making what is not made yet")
        bundle = (
            open_bundle(options.bundle)
            if options.bundle
            else build_bundle(checkpoint, directory / "bundle", name="waterfall")
        )
        found = subjects(
            checkpoint, bundle, options.images, directory, EngineOptions(max_batch=max(options.sizes)), skipped
        )
        for each in found.values():
            stack.callback(each.close)
        console.print(
            f"measuring {len(found)} steps at {len(options.sizes)} batch sizes, {options.rounds} rounds of {options.seconds:g} s"
        )
        results = take_turns(
            list(found.values()), bundle.golden().pixels, options.sizes, options.seconds, options.rounds
        )
    table = steps(list(found), options.sizes, results)
    where, command = report.where(), asked(sys.argv[1:])
    head = f"{options.source} on {where['cores']} cores of {where['cpu']} ({', '.join(where['instructions'])}); median of {options.rounds} rounds of "
    text = as_markdown(
        table,
        f"{head}{options.seconds:g} s; gains from step to step (least – most).\n`python -m benchmarks.waterfall {command}`\n",
        skipped,
    )
    options.output.mkdir(parents=True, exist_ok=True)
    every = {
        f"{name}, batch {size}": results[place, size].rates
        for place, name in enumerate(found)
        for size in options.sizes
    }
    report.write_json(
        options.output / "waterfall.json", {"asked": command, "skipped": skipped, "every_round": every}, table
    )
    report.write_csv(options.output / "waterfall.csv", table)
    (options.output / "waterfall.md").write_text(text, encoding="utf-8")
    largest = [
        plot.Bar(
            each.step,
            each.images_per_second,
            each.least_per_second,
            each.most_per_second,
            f"{each.gain:.2f} ×" if each.gain else "",
        )
        for each in table
        if each.batch_size == options.sizes[-1]
    ]
    plot.draw_waterfall(largest, f"images/s, batch {options.sizes[-1]}", options.output / "waterfall.svg")
    if options.docs is not None:
        document_sections.publish(options.docs, options.mark, text, options.output / "waterfall.svg")
    Console(width=160, highlight=False).print(text)


if __name__ == "__main__":
    main()
