"""Requests per second at the door: vitserve against plain FastAPI + ONNX Runtime, same graph, same image, in one run, taking turns.

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
from contextlib import contextmanager
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


def contenders(bundle: Path, port: int, against: Path | None) -> list[Contender]:
    """The yardstick first."""
    vitserve = ["-m", "vitserve", "serve", "--bundle", str(bundle.resolve()), "--port", str(port), "--log-level", "error", "--timeout-ms", "60000"]
    plain = ["-m", "uvicorn", "bench.plain:create_app", "--factory", "--port", str(port), "--no-access-log", "--log-level", "error"]
    if against is None:
        yardstick = Contender("plain FastAPI + ONNX Runtime", [sys.executable, *plain], ROOT)
    else:
        yardstick = Contender(f"vitserve of {against.name}", [sys.executable, *vitserve], against)
    return [yardstick, Contender("vitserve", [sys.executable, *vitserve], ROOT)]


@contextmanager
def running(contender: Contender, bundle: Path, image: bytes, port: int) -> Iterator[None]:
    """Yields when the server answers the image with 200."""
    process = subprocess.Popen(contender.command, cwd=contender.folder, env=os.environ | {"BUNDLE": str(bundle.resolve())})
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/classify", data=image, headers={"Content-Type": "image/jpeg"})
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


def load(port: int, image: Path, connections: int, seconds: int) -> dict[str, float]:
    script = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "60s", "-s", str(HERE / "post.lua"), f"http://127.0.0.1:{port}/v1/classify"]
    out = subprocess.run(script, env=os.environ | {"IMAGE": str(image)}, capture_output=True, text=True, check=True).stdout
    result: dict[str, float] = json.loads(out.split("RESULT ", 1)[1])
    return result


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
    parser.add_argument("--seconds", type=int, default=6, help="length of each run, after one of a third as warm-up")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each server takes; the median counts")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("wrk is needed: apt-get install wrk")
    console = Console(width=140)
    with tempfile.TemporaryDirectory() as folder:
        image = options.image or made_image(folder)
        port = free_port()
        servers = contenders(options.bundle, port, options.against)
        rates: dict[tuple[str, int], list[float]] = {}
        medians: dict[tuple[str, int], list[float]] = {}
        for turn in range(options.rounds):
            for contender in servers:
                name = contender.name
                with running(contender, options.bundle, image.read_bytes(), port):
                    load(port, image, max(options.connections), max(1, options.seconds // 3))
                    for connections in options.connections:
                        result = load(port, image, connections, options.seconds)
                        if result["errors"]:
                            sys.exit(f"{name} at {connections} connections: {result['errors']:.0f} errors; the figure is void")
                        rates.setdefault((name, connections), []).append(result["requests"] / result["seconds"])
                        medians.setdefault((name, connections), []).append(result["p50_ms"])
                        console.print(f"[dim]round {turn + 1}, {name}, {connections}: {rates[name, connections][-1]:.0f}/s[/dim]")
        table = Table(title=f"requests/s (p50 ms), {image.stat().st_size / 1000:.0f} KB {image.name}, median of {options.rounds}")
        table.add_column("server")
        for connections in options.connections:
            table.add_column(f"{connections} connections", justify="right")
        for name in [each.name for each in servers]:
            cells = [f"{statistics.median(rates[name, each]):.0f} ({statistics.median(medians[name, each]):.3f})" for each in options.connections]
            table.add_row(name, *cells)
        first, second = [each.name for each in servers]
        ratios = [f"{statistics.median(rates[second, each]) / statistics.median(rates[first, each]):.2f} ×" for each in options.connections]
        table.add_row("ratio", *ratios)
        console.print(table)


if __name__ == "__main__":
    main()
