"""What a client meets who is alone: when the service is ready, its memory, and what of an answer's time is neither engine nor decoding.

    python -m benchmarks.single_client --images PHOTOS --serve="--bundle BUNDLE --streams 1 --threads 2"

Linux alone: memory is the proportional set size of every process (/proc/PID/smaps_rollup). Engine and decoding are what the answer's Server-Timing says.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import shlex
import socket
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.processes import descendants, free_port, process_tree
from vitserve.bench.http1 import AnswerReader
from vitserve.bench.report import printer
from vitserve.bench.request import Picture, raw, read_pictures

_UNCOUNTED = 10  # first answers
_READY_PAUSE_SECONDS = 0.01
_TIMING = re.compile(rb"(\w+);dur=([\d.]+)")


class Answered(NamedTuple):
    """Milliseconds."""

    whole: float
    decode: float
    run: float

    @property
    def between(self) -> float:
        return self.whole - self.decode - self.run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a file or a directory, posted in turn")
    parser.add_argument("--serve", default="", help="further options of `vitserve serve`")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--requests", type=int, default=140, help="of each start")
    parser.add_argument(
        "--pause-ms", type=float, default=0.0, help="before each request: code that has not run for a while runs slower"
    )
    given = parser.parse_args()
    pictures, console = read_pictures(given.images), printer()
    for _ in range(given.starts):
        port = free_port()
        command = [sys.executable, "-m", "vitserve", "serve", "--port", str(port), *shlex.split(given.serve)]
        with process_tree(command, Path.cwd(), {}, port, partial(ready, port), _READY_PAUSE_SECONDS) as seconds:
            answers = ask(port, pictures, given.requests + _UNCOUNTED, given.pause_ms / 1000)[_UNCOUNTED:]
            memory = sum(proportional_bytes(pid) for pid in descendants(os.getpid()))
        whole, decode, run, between = (
            statistics.median(each) for each in (*zip(*answers, strict=True), [answer.between for answer in answers])
        )
        console.print(
            f"ready after {seconds:.2f} s, {memory / 1e6:.0f} MB; p50 of {len(answers)} answers: {whole:.2f} ms"
            f" = engine {run:.2f} + decoding {decode:.2f}, and {between:.2f} between",
            highlight=False,
        )


def ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def ask(port: int, pictures: list[Picture], count: int, pause_seconds: float) -> list[Answered]:
    """One after the other, on one connection. Raises RuntimeError for any answer but 200."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return [
            _asked(connection, raw("/v1/classify", pictures[number % len(pictures)]), pause_seconds)
            for number in range(count)
        ]


def _asked(connection: socket.socket, request: bytes, pause_seconds: float) -> Answered:
    """To the last byte of the answer: what it takes to understand it is the client's own."""
    reader, answer, received = AnswerReader(), None, b""
    time.sleep(pause_seconds)
    began = time.perf_counter()
    connection.sendall(request)
    while answer is None:
        data = connection.recv(65536)
        whole = 1000 * (time.perf_counter() - began)
        if not data:
            raise RuntimeError(f"the service hung up after {len(received)} bytes of an answer")
        received += data
        answer = reader.feed(data)
    if answer.status != 200:
        raise RuntimeError(f"the service answered {answer.status}")
    spent = {name.decode(): float(milliseconds) for name, milliseconds in _TIMING.findall(received)}
    return Answered(whole, spent["decode"], spent["run"])


def proportional_bytes(pid: int) -> int:
    """What it has in memory, of what it shares its share."""
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found.group(1))


if __name__ == "__main__":
    main()
