"""Requests per second at the door: vitserve against plain FastAPI + ONNX Runtime, same graph, same image, in one run.

Both are up all the time and take turns in short spells, because a machine's speed drifts; ratios and differences are medians over pairs of spells.

    python -m bench.door --bundle service/default_bundle --image photo.jpg --connections 1 16 64

With --against FOLDER, vitserve of another checkout takes part instead: what a change cost or gained.
Needs wrk (a Debian package). An error in a run makes its figure void, and is said.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
ROOT = HERE.parent


class Contender(NamedTuple):
    name: str
    command: list[str]
    folder: Path
    port: int


class Spell(NamedTuple):
    rate: float  # requests a second
    p50_ms: float


def contenders(bundle: Path, against: Path | None) -> tuple[Contender, Contender]:
    """The yardstick, and vitserve."""
    ports = free_port(), free_port()

    def vitserve(name: str, folder: Path, port: int) -> Contender:
        command = ["-m", "vitserve", "serve", "--bundle", str(bundle.resolve()), "--port", str(port), "--log-level", "error", "--timeout-ms", "60000"]
        return Contender(name, [sys.executable, *command], folder, port)

    plain = ["-m", "uvicorn", "bench.plain:create_app", "--factory", "--port", str(ports[0]), "--no-access-log", "--log-level", "error"]
    if against is None:
        yardstick = Contender("plain FastAPI + ONNX Runtime", [sys.executable, *plain], ROOT, ports[0])
    else:
        yardstick = vitserve(f"vitserve of {against.name}", against, ports[0])
    return yardstick, vitserve("vitserve", ROOT, ports[1])


@contextmanager
def running(contender: Contender, bundle: Path, image: bytes) -> Iterator[None]:
    """Yields when the server answers the image with 200."""
    process = subprocess.Popen(contender.command, cwd=contender.folder, env=os.environ | {"BUNDLE": str(bundle.resolve())})
    request = urllib.request.Request(f"http://127.0.0.1:{contender.port}/v1/classify", data=image, headers={"Content-Type": "image/jpeg"})
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(request, timeout=60).read()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        else:
            raise RuntimeError(f"{contender.name} did not answer within a minute")
        yield
    finally:
        process.terminate()
        process.wait()


def load(contender: Contender, image: Path, connections: int, seconds: int) -> Spell:
    url = f"http://127.0.0.1:{contender.port}/v1/classify"
    script = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "60s", "-s", str(HERE / "post.lua"), url]
    out = subprocess.run(script, env=os.environ | {"IMAGE": str(image)}, capture_output=True, text=True, check=True).stdout
    result: dict[str, float] = json.loads(out.split("RESULT ", 1)[1])
    if result["errors"]:
        sys.exit(f"{contender.name} at {connections} connections: {result['errors']:.0f} errors; the figure is void")
    return Spell(result["requests"] / result["seconds"], result["p50_ms"])


def made_image(folder: str) -> Path:
    """A JPEG of 500 × 333 pixels and about 40 KB, where no photo was named."""
    noise = np.random.default_rng(0).integers(0, 256, (84, 125, 3), np.uint8)
    path = Path(folder) / "made.jpg"
    Image.fromarray(noise).resize((500, 333), Image.Resampling.BICUBIC).save(path, quality=88)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=ROOT / "service" / "default_bundle")
    parser.add_argument("--image", type=Path, help="what is posted; a JPEG made here unless told")
    parser.add_argument("--against", type=Path, help="folder of another checkout of vitserve to compare with")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=int, default=2, help="length of a spell")
    parser.add_argument("--rounds", type=int, default=8, help="spells that each server has")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("wrk is needed: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        image = options.image or made_image(folder)
        pair = contenders(options.bundle, options.against)
        for each in pair:
            stack.enter_context(running(each, options.bundle, image.read_bytes()))
            load(each, image, max(options.connections), options.seconds)
        spells = {connections: take_turns(pair, image, connections, options.seconds, options.rounds) for connections in options.connections}
        Console(width=140).print(report(pair, spells, f"{image.stat().st_size / 1000:.0f} KB {image.name}, {options.rounds} spells of {options.seconds} s"))


def take_turns(pair: tuple[Contender, Contender], image: Path, connections: int, seconds: int, rounds: int) -> list[tuple[Spell, Spell]]:
    found = []
    for turn in range(rounds):
        order = pair if turn % 2 else pair[::-1]  # neither always comes after the other
        spells = {each.name: load(each, image, connections, seconds) for each in order}
        found.append((spells[pair[0].name], spells[pair[1].name]))
    return found


def report(pair: tuple[Contender, Contender], spells: dict[int, list[tuple[Spell, Spell]]], title: str) -> Table:
    table = Table("server", *(f"{connections} connections" for connections in spells), title=f"requests/s (p50 ms), {title}")
    for place, each in enumerate(pair):
        medians = [
            (statistics.median(turn[place].rate for turn in turns), statistics.median(turn[place].p50_ms for turn in turns)) for turns in spells.values()
        ]
        table.add_row(each.name, *(f"{rate:.0f} ({p50:.3f})" for rate, p50 in medians))
    ratios = [statistics.median(second.rate / first.rate for first, second in turns) for turns in spells.values()]
    later = [statistics.median(second.p50_ms - first.p50_ms for first, second in turns) for turns in spells.values()]
    table.add_row("ratio (difference)", *(f"{ratio:.2f} × ({difference:+.3f})" for ratio, difference in zip(ratios, later, strict=True)))
    return table


if __name__ == "__main__":
    main()
