"""Compares vitserve with other servers that serve the same network: throughput and latency, with the same client.

    python -m benchmarks.compare --bundle BUNDLE --source random:B/16 --images PHOTOS --engine-alone

In every round, each server is started, checked with images whose classes are known, warmed up, measured at each number
of connections, and stopped. Only one server runs at a time. It shares the CPU cores with the client. The order of the
servers reverses from round to round. The results are the median, minimum and maximum of the rounds.

benchmarks/peers/README.md describes how to install the other servers. Servers that are not installed are skipped.
"""

from __future__ import annotations

import argparse
import io
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from benchmarks import document_sections
from benchmarks.comparison import Comparison, ServerResult, write_all
from benchmarks.processes import ServerFailedError
from benchmarks.servers import (
    ENVIRONMENTS_DIR,
    NAMES,
    PEERS,
    PEERS_DIR,
    ROOT,
    Server,
    ServerUnavailableError,
    Setup,
    predictions,
    running,
    server_under_test,
)
from vitserve.bench import plot
from vitserve.bench.client import Client, ConnectionGoneError, run
from vitserve.bench.engine import Subject, measure_in_rounds, opened
from vitserve.bench.load import closed_loop
from vitserve.bench.report import ServiceRow, summarize
from vitserve.bench.request import EncodedImage, read_encoded_images, write_sample_image
from vitserve.model.bundle.bundle import Bundle, open_bundle
from vitserve.service import machine
from vitserve.service.engines.engine import EngineOptions

KNOWN_IMAGES = 8


def known_images(bundle: Bundle) -> list[EncodedImage]:
    """Golden images as PNGs of the network's image size, so that a server's way of resizing makes no difference."""
    images = []
    for pixels in bundle.golden().pixels[:KNOWN_IMAGES]:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        images.append(EncodedImage(out.getvalue(), "image/png"))
    return images


def known_classes(bundle: Bundle) -> list[int]:
    return [int(index) for index in bundle.golden().reference.logits[:KNOWN_IMAGES].argmax(1)]


def measure_loads(
    server: Server, images: Sequence[EncodedImage], connections: Sequence[int], warm_up: float, seconds: float
) -> list[ServiceRow]:
    """One row for each number of connections. Error responses are counted in the row. Raises ConnectionGoneError."""
    requests = [server.request(image) for image in images]

    async def load(count: int) -> ServiceRow:
        client = Client("127.0.0.1", server.port)
        try:
            return summarize(await closed_loop(client, requests, count, warm_up, seconds))
        finally:
            client.close()

    return [run(load(count)) for count in connections]


def measure_server(
    name: str, setup: Setup, images: Sequence[EncodedImage], options: argparse.Namespace, comparison: Comparison
) -> None:
    """One round of one server. A failure is recorded as the reason to skip the server in the following rounds."""
    known = known_images(setup.bundle)
    try:
        server = server_under_test(name, setup)
        with running(server, known[0]) as started:
            classes = predictions(server, known)
            rows = measure_loads(server, images, options.connections, options.warm_up_seconds, options.seconds)
    except (ServerUnavailableError, ServerFailedError, ConnectionGoneError) as error:
        comparison.skipped[name] = str(error)
        return
    same_classes = sum(a == b for a, b in zip(classes, comparison.expected_classes, strict=True))
    comparison.servers += [ServerResult(name, server.title, started.start_seconds, same_classes, row) for row in rows]


def streams_and_threads(serve_options: str) -> tuple[int, int]:
    """Reads them from the options of `vitserve serve`, so that engines are measured as they are served."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    parsed, _ = parser.parse_known_args(shlex.split(serve_options))
    return parsed.streams, parsed.threads


def measure_engines(bundle: Bundle, graph: Path, options: argparse.Namespace, comparison: Comparison) -> None:
    """One round of the engines alone: the plain graph in ONNX Runtime, and every artifact of the bundle."""

    def skipped(reason: str) -> None:
        name, _, cause = reason.partition(": ")
        comparison.skipped[name] = cause

    streams, threads = streams_and_threads(options.serve)
    engine_options = EngineOptions(streams=streams, threads=threads, max_batch=max(options.sizes))
    subjects = [plain_subject(graph), *(subject for _, subject in opened(bundle, engine_options, skipped))]
    try:
        results = measure_in_rounds(subjects, bundle.golden().pixels, options.sizes, options.engine_seconds, 1)
        for index, subject in enumerate(subjects):
            comparison.engines += [results[index, size].row(subject, size) for size in options.sizes]
    finally:
        for subject in subjects:
            subject.close()


def plain_subject(graph: Path) -> Subject:
    """An ONNX Runtime session with default options. Normalizing the pixels is not part of the measured time."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    normalized: dict[int, np.ndarray] = {}  # by batch size

    def run_batch(stream: int, pixels: np.ndarray) -> object:
        if len(pixels) not in normalized:
            scaled = (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
            normalized[len(pixels)] = scaled.transpose(0, 3, 1, 2).copy()
        return session.run(None, {"pixels": normalized[len(pixels)]})

    return Subject("plain graph, onnxruntime", "fp32", 1, machine.cores(), run_batch)


@contextmanager
def plain_graph(options: argparse.Namespace) -> Iterator[Path]:
    """The file from --graph, or an export of --source, which runs in another process because it needs torch."""
    if options.graph is not None:
        yield options.graph
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "plain.onnx"
        if options.source:
            command = [sys.executable, "-m", "benchmarks.plain_graph", options.source, str(path)]
            subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        yield path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bundle", type=Path, required=True)
    add("--source", default="", help="checkpoint of the bundle, exported with torch.onnx.export for the peers")
    add("--graph", type=Path, help="graph for the peers, instead of --source")
    add("--peers", type=Path, default=PEERS_DIR, help="directory of the peers' scripts")
    add("--environments", type=Path, default=ENVIRONMENTS_DIR, help="directory of the peers' virtual environments")
    add("--servers", nargs="+", default=list(NAMES), choices=NAMES, metavar="NAME", help=f"from {' '.join(NAMES)}")
    add("--images", type=Path, help="image file or directory to send (default: a generated JPEG)")
    add("--connections", type=int, nargs="+", default=[1, 8])
    add("--seconds", type=float, default=8.0, help="measured time of each load")
    add("--warm-up-seconds", type=float, default=2.0)
    add("--rounds", type=int, default=3)
    add("--serve", default="", help='additional options of `vitserve serve`: "--streams 1 --threads 2"')
    add("--peer-threads", type=int, default=machine.cores(), help="threads of the peers' engines")
    add("--engine-alone", action="store_true", help="also measure the engines alone, in the same rounds")
    add("--sizes", type=int, nargs="+", default=[1, 4, 8], help="batch sizes for --engine-alone")
    add("--engine-seconds", type=float, default=2.0, help="measured time of each engine and batch size")
    add("--output", type=Path, default=Path("runs/compare"), help="directory of comparison.json, .csv, .svg and .md")
    add("--docs", type=Path, help="document in which to replace the section --section")
    add("--section", default="b16")
    options = parser.parse_args()
    if not options.source and options.graph is None and (options.engine_alone or set(options.servers) & set(PEERS)):
        parser.error("the peers need a graph: add --source or --graph")
    for path in (options.peers, options.graph):
        if path is not None and not path.exists():
            parser.error(f"{path} does not exist")
    options.peers, options.environments = options.peers.resolve(), options.environments.resolve()
    return options


def describe_images(images: Sequence[EncodedImage]) -> str:
    kilobytes = f"{np.median([len(image.content) for image in images]) / 1000:.0f} KB"
    return f"{len(images)} images with a median size of {kilobytes}" if len(images) > 1 else f"one image of {kilobytes}"


def compare(options: argparse.Namespace, console: Console) -> Comparison:
    """Runs all rounds. Writes the results after each round, so that an interruption does not lose them."""
    bundle = open_bundle(options.bundle)
    command = document_sections.command_line(sys.argv[1:])
    comparison = Comparison(bundle.manifest.name, command, options.rounds, options.seconds, known_classes(bundle))
    with plain_graph(options) as graph, tempfile.TemporaryDirectory() as directory:
        images = read_encoded_images(options.images or write_sample_image(directory))
        comparison.images = describe_images(images)
        setup = Setup(
            bundle,
            graph.resolve(),
            bundle.manifest.preprocessing.image_size,
            options.peer_threads,
            options.peers,
            options.environments,
            tuple(shlex.split(options.serve)),
        )
        for number in range(options.rounds):
            for name in options.servers if number % 2 == 0 else options.servers[::-1]:
                if name not in comparison.skipped:
                    console.print(f"round {number + 1} of {options.rounds}: {name}")
                    measure_server(name, setup, images, options, comparison)
            if options.engine_alone:
                console.print(f"round {number + 1} of {options.rounds}: engines alone")
                measure_engines(bundle, graph, options, comparison)
            if comparison.servers or comparison.engines:
                write_all(comparison, options.output)
    return comparison


def main() -> None:
    options = parse_arguments()
    console = Console(stderr=True, highlight=False)
    plot.load_figure_class()
    if options.docs is not None:
        document_sections.check(options.docs, options.section)
    comparison = compare(options, console)
    for name, reason in comparison.skipped.items():
        console.print(f"skipped: {name}: {reason}")
    if not comparison.servers and not comparison.engines:
        sys.exit("no server could be measured")
    text = (options.output / "comparison.md").read_text(encoding="utf-8")
    if options.docs is not None:
        document_sections.publish(options.docs, options.section, text, options.output / "comparison.svg")
    Console(width=160, highlight=False).print(text)


if __name__ == "__main__":
    main()
