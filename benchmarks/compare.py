"""vitserve beside other servers, the same network behind each: requests a second and latencies, in one run, by the same client.

    python -m benchmarks.compare --bundle BUNDLE --source random:B/16 --peers FOLDER --work FOLDER --images PHOTOS --engine-alone

In every round each server is started, asked for some images of known answer, warmed, measured at each number of connections, and stopped: nothing else runs
meanwhile but the client, which shares the cores. Rounds go forwards and backwards in turn. Medians are reported, with the least and the most of the rounds.
--peers is a directory of the others' scripts, --work one with their virtual environments; whoever lacks theirs is skipped, and the table says so.
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
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from benchmarks import document_sections
from benchmarks.comparison import Compared, Measured, write_all
from benchmarks.processes import ServerFailedError
from benchmarks.servers import NAMES, ROOT, Server, Setup, answers, running, server_under_test
from vitserve.bench import plot
from vitserve.bench.client import Client, ConnectionGoneError, run
from vitserve.bench.engine import Subject, opened, take_turns
from vitserve.bench.load import closed_loop
from vitserve.bench.report import ServiceRow, summary
from vitserve.bench.request import Picture, made_picture, read_pictures
from vitserve.model.bundle.bundle import Bundle, open_bundle
from vitserve.service import machine
from vitserve.service.engines.engine import EngineOptions

CHECKED_IMAGES = 8


def known_pictures(bundle: Bundle) -> list[Picture]:
    """Golden images, lossless and of the size that the network sees: whoever resizes them, and however, changes nothing."""
    found = []
    for pixels in bundle.golden().pixels[:CHECKED_IMAGES]:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        found.append(Picture(out.getvalue(), "image/png"))
    return found


def right_answers(bundle: Bundle) -> list[int]:
    return [int(each) for each in bundle.golden().reference.logits[:CHECKED_IMAGES].argmax(1)]


def measured(
    chosen: Server, pictures: Sequence[Picture], connections: Sequence[int], warm_up: float, seconds: float
) -> list[ServiceRow]:
    """Raises Gone. A server that answers anything but 200 has its row, and the count of it."""
    requests = [chosen.request(picture) for picture in pictures]

    async def load(count: int) -> ServiceRow:
        client = Client("127.0.0.1", chosen.port)
        try:
            return summary(await closed_loop(client, requests, count, warm_up, seconds))
        finally:
            client.close()

    return [run(load(count)) for count in connections]


def one_turn(
    name: str,
    setup: Setup,
    known: Sequence[Picture],
    pictures: Sequence[Picture],
    options: argparse.Namespace,
    found: Compared,
) -> None:
    """Whatever keeps a server from being measured is kept as the reason, and the others go on."""
    chosen = server_under_test(name, setup)
    if isinstance(chosen, str):
        found.skipped[name] = chosen
        return
    try:
        with running(chosen, known[0]) as started:
            classes = answers(chosen, known)
            rows = measured(chosen, pictures, options.connections, options.warm_up_seconds, options.seconds)
    except (ServerFailedError, ConnectionGoneError) as error:
        found.skipped[name] = str(error)
        return
    for row in rows:
        found.services.append(
            Measured(name, chosen.name, started, sum(a == b for a, b in zip(classes, found.right, strict=True)), row)
        )


def split_of(serve: str) -> tuple[int, int]:
    """Streams and threads that the options of `vitserve serve` name: engines alone are measured as they are served."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    named, _ = parser.parse_known_args(shlex.split(serve))
    return named.streams, named.threads


def engines_turn(
    bundle: Bundle, graph: Path, serve: str, sizes: Sequence[int], seconds: float, found: Compared
) -> None:
    """The plain graph in ONNX Runtime, as others run it, and each of the bundle's artifacts."""

    def skipped(reason: str) -> None:
        name, _, why = reason.partition(": ")
        found.skipped[name] = why

    streams, threads = split_of(serve)
    options = EngineOptions(streams=streams, threads=threads, max_batch=max(sizes))
    subjects = [plain_subject(graph), *(subject for _, subject in opened(bundle, options, skipped))]
    try:
        results = take_turns(subjects, bundle.golden().pixels, sizes, seconds, 1)
        for place, subject in enumerate(subjects):
            found.engines += [results[place, size].row(subject, size) for size in sizes]
    finally:
        for subject in subjects:
            subject.close()


def plain_subject(graph: Path) -> Subject:
    """A session as most people make it; pixels are normalized beforehand, which is not timed."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    prepared: dict[int, np.ndarray] = {}

    def run(stream: int, pixels: np.ndarray) -> object:
        if len(pixels) not in prepared:
            prepared[len(pixels)] = (
                ((pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)).transpose(0, 3, 1, 2).copy()
            )
        return session.run(None, {"pixels": prepared[len(pixels)]})

    return Subject("plain graph, onnxruntime", "fp32", 1, machine.cores(), run)


@contextmanager
def plain_graph(options: argparse.Namespace) -> Iterator[Path]:
    """The file named, or else exported from the source by a process of its own."""
    if options.graph is not None:
        yield options.graph
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "plain.onnx"
        if options.source:
            subprocess.run(
                [sys.executable, "-m", "benchmarks.plain_graph", options.source, str(path)],
                cwd=ROOT,
                check=True,
                stdout=sys.stderr,
            )
        yield path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--source", default="", help="of which the bundle was made: exported plainly for the others")
    parser.add_argument("--graph", type=Path, help="the others' graph, in place of --source")
    parser.add_argument("--peers", type=Path, help="directory of the others' scripts")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("peers"),
        help="directory of their virtual environments: triton, litserve, bentoml, ray",
    )
    parser.add_argument(
        "--servers",
        nargs="+",
        default=list(NAMES),
        help=f"of {' '.join(NAMES)}; against-PRECISION is the checkout of --against",
    )
    parser.add_argument(
        "--against", type=Path, help="directory of another checkout of vitserve: what a change cost or gained"
    )
    parser.add_argument("--images", type=Path, help="what is posted, a file or directory; a JPEG made here unless told")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--warm-up-seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", default="", help='further options of `vitserve serve`: "--streams 1 --threads 2"')
    parser.add_argument("--peer-threads", type=int, default=machine.cores(), help="threads of the others' engines")
    parser.add_argument("--engine-alone", action="store_true", help="measure the engines alone too, in the same rounds")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 8], help="batch sizes of the engines alone")
    parser.add_argument("--engine-seconds", type=float, default=2.0)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/compare"), help="directory of comparison.json, .csv, .svg and .md"
    )
    parser.add_argument("--docs", type=Path, help="document whose part between the marks of --mark is rewritten")
    parser.add_argument("--mark", default="b16")
    options = parser.parse_args()
    others = any(not name.startswith(("vitserve-", "against-")) for name in options.servers)
    if not options.source and options.graph is None and (others or options.engine_alone):
        parser.error("the others' graph is wanted: --source or --graph")
    for path in (options.peers, options.work, options.against, options.graph):
        if path is not None and path != options.work and not path.exists():
            parser.error(f"there is no {path}")
    options.peers, options.work = (None if path is None else path.resolve() for path in (options.peers, options.work))
    return options


def asked(words: Sequence[str]) -> str:
    """The command line without this machine's paths: they are nobody else's."""
    private = ("--bundle", "--graph", "--peers", "--work", "--against", "--images", "--output", "--docs")
    return shlex.join(before[2:].upper() if before in private else word for before, word in pairwise(["", *words]))


def main() -> None:
    options = arguments()
    console = Console(stderr=True, highlight=False)
    plot.require()
    if options.docs is not None:
        document_sections.check(options.docs, options.mark)
    bundle = open_bundle(options.bundle)
    found = Compared(bundle.manifest.name, asked(sys.argv[1:]), options.rounds, options.seconds, right_answers(bundle))
    with plain_graph(options) as graph, tempfile.TemporaryDirectory() as directory:
        pictures = read_pictures(options.images or made_picture(directory))
        kilobytes = f"{np.median([len(each.content) for each in pictures]) / 1000:.0f} KB"
        found.images = (
            f"{len(pictures)} images of {kilobytes} in the median" if len(pictures) > 1 else f"one image of {kilobytes}"
        )
        size = bundle.manifest.preprocessing.image_size
        setup = Setup(
            bundle,
            graph.resolve(),
            size,
            options.peers,
            options.work,
            options.peer_threads,
            tuple(shlex.split(options.serve)),
            options.against,
        )
        for turn in range(options.rounds):
            for name in options.servers if turn % 2 == 0 else options.servers[::-1]:
                if name in found.skipped:
                    continue
                console.print(f"round {turn + 1} of {options.rounds}: {name}")
                one_turn(name, setup, known_pictures(bundle), pictures, options, found)
            if options.engine_alone:
                console.print(f"round {turn + 1} of {options.rounds}: engines alone")
                engines_turn(bundle, graph, options.serve, options.sizes, options.engine_seconds, found)
            if found.services or found.engines:
                text = write_all(
                    found, options.output
                )  # in every round: what was measured is not lost by what comes after
    for name, reason in found.skipped.items():
        console.print(f"skipped: {name}: {reason}")
    if not found.services and not found.engines:
        sys.exit("nothing could be measured")
    if options.docs is not None:
        document_sections.publish(options.docs, options.mark, text, options.output / "comparison.svg")
    Console(width=160, highlight=False).print(text)


if __name__ == "__main__":
    main()
