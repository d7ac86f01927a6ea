"""Compiles and runs load_generator.c."""

from __future__ import annotations

import atexit
import csv
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.http.load.requests import ToolMissingError, write_requests
from vitserve.bench.load import LoadResult, Sample

_SOURCE = Path(__file__).with_name("load_generator.c")
_OUTCOMES = {"0": "gave up", "-1": "connection lost", "-2": "not connected"}


@dataclass(frozen=True)
class Load:
    """A closed loop if ``rate`` is 0, otherwise an open loop."""

    requests: Sequence[bytes]  # sent in turn
    seconds: float
    warm_up: float = 1.0  # seconds
    rate: float = 0.0  # arrivals per second
    connections: int = 1  # of the open loop: opened before the first arrival; more are opened as needed
    reconnect: bool = False  # a new connection for each request
    uniform: bool = False  # arrivals at equal intervals instead of Poisson arrivals
    seed: int = 1
    give_up: float = 60.0  # seconds after which a client gives a request up


class RunningLoad:
    def __init__(self, load: Load, process: subprocess.Popen[str], records: Path) -> None:
        self._load, self._process, self._records = load, process, records

    def result(self) -> LoadResult:
        """Waits for the end of the load. Raises RuntimeError if the generator failed."""
        output, errors = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError(errors.strip() or f"load_generator exited with {self._process.returncode}")
        load = self._load
        return LoadResult(
            loop="open" if load.rate else "closed",
            connections=0 if load.rate else load.connections,
            rate=load.rate,
            seconds=load.seconds,
            samples=tuple(_read_samples(self._records)),
            client_cores=json.loads(output)["cpu_cores"],
        )


def _read_samples(records: Path) -> Iterator[Sample]:
    with records.open(newline="") as file:
        for planned, sent, ended, status in list(csv.reader(file))[1:]:
            yield Sample(float(planned), float(sent), float(ended), _OUTCOMES.get(status, status), b"")


@contextmanager
def started(port: int, load: Load) -> Iterator[RunningLoad]:
    """Starts the load. It ends by itself, or at the end of the context. Raises ToolMissingError."""
    program = compiled()
    with tempfile.TemporaryDirectory() as directory:
        records = Path(directory) / "records.csv"
        files = write_requests(load.requests, Path(directory))
        options = {
            "port": port,
            "rate": load.rate,
            "connections": load.connections,
            "warm-up": load.warm_up,
            "seconds": load.seconds,
            "give-up": load.give_up,
            "seed": load.seed,
            "records": records,
        }
        flags = [name for name, given in (("--reconnect", load.reconnect), ("--uniform", load.uniform)) if given]
        command = [str(program), *(f"--{name}={value}" for name, value in options.items()), *flags, *map(str, files)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                yield RunningLoad(load, process, records)
            finally:
                process.kill()


def run(port: int, load: Load) -> LoadResult:
    """Raises ToolMissingError, and RuntimeError if the generator failed."""
    with started(port, load) as running:
        return running.result()


@cache
def compiled() -> Path:
    """The program, compiled once in a run. Raises ToolMissingError, CalledProcessError."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise ToolMissingError("no C compiler is installed (Debian's packages gcc and libc6-dev)")
    directory = tempfile.mkdtemp(prefix="vitserve-load-generator-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    program = Path(directory) / "load_generator"
    subprocess.run([compiler, "-O2", "-o", program, _SOURCE, "-lm"], check=True)
    return program
