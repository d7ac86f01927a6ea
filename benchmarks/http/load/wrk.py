"""Runs wrk (https://github.com/wg/wrk), a load generator that costs about 20 µs of CPU a request: a closed loop."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.http.load.requests import ToolMissingError, write_requests

_SCRIPT = Path(__file__).with_name("wrk.lua")
_RESPONSE_TIMEOUT_SECONDS = 60


class WrkResult(NamedTuple):
    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    errors: int  # responses with a status above 399, and requests without a response
    cores: float  # CPU cores that wrk used


def run(port: int, requests: Sequence[bytes], connections: int, seconds: int) -> WrkResult:
    """Sends the requests in turn on each connection. Raises ToolMissingError, CalledProcessError."""
    program = shutil.which("wrk")
    if program is None:
        raise ToolMissingError("wrk is not installed (Debian's package wrk)")
    with tempfile.TemporaryDirectory() as directory:
        files = write_requests(requests, Path(directory))
        command = [program, "-t1", f"-c{connections}", f"-d{seconds}s", f"--timeout={_RESPONSE_TIMEOUT_SECONDS}s"]
        command += ["-s", str(_SCRIPT), f"http://127.0.0.1:{port}/", "--", *map(str, files)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    measured = json.loads(done.stdout.splitlines()[-1])
    return WrkResult(**measured, cores=cpu_seconds / measured["seconds"])
