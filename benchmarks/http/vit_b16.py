"""A large network: the server compared with its engine alone, and the time that HTTP adds for a single client."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.http.load.load_generator import Load, run
from benchmarks.http.quantiles import spread
from benchmarks.processes import ServerFailedError
from benchmarks.servers import Server
from benchmarks.single_client import send_all
from vitserve.bench.report import throughput
from vitserve.bench.request import EncodedImage

CONNECTIONS = 8
_ENGINE_SECONDS = 1.0  # for each batch size
_SINGLE_REQUESTS, _WARM_UP_REQUESTS = 40, 5


@dataclass(frozen=True)
class VitB16:
    """One server in one round."""

    engine_per_second: float  # images; the engine alone, at its best batch size
    per_second: float  # images; the server, at 8 connections
    p50_ms: float  # of a single client's request
    engine_ms: float  # of them, inference and decoding, from Server-Timing
    decode_ms: float
    remaining_ms: float

    @property
    def share(self) -> float:
        return self.per_second / self.engine_per_second


def measure(server: Server, bundle: Path, precision: str, images: Sequence[EncodedImage], seconds: int) -> VitB16:
    """The server runs and is idle. Raises ServerFailedError, ToolMissingError."""
    engine = engine_alone(server, bundle, precision)
    requests = [server.request(image) for image in images]
    loaded = run(server.port, Load(requests, seconds, warm_up=2.0, connections=CONNECTIONS))
    if errors := {sample.outcome for sample in loaded.samples} - {"200"}:
        raise ServerFailedError(f"responses of {', '.join(sorted(errors))}")
    latencies = send_all(server.port, images, _SINGLE_REQUESTS + _WARM_UP_REQUESTS, 0.0)[_WARM_UP_REQUESTS:]
    return VitB16(
        engine_per_second=engine,
        per_second=throughput(loaded),
        p50_ms=statistics.median(latency.total for latency in latencies),
        engine_ms=statistics.median(latency.inference for latency in latencies),
        decode_ms=statistics.median(latency.decode for latency in latencies),
        remaining_ms=statistics.median(latency.overhead for latency in latencies),
    )


def engine_alone(server: Server, bundle: Path, precision: str) -> float:
    """Images per second at the best batch size, by `vitserve bench` of the server's checkout."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "engine.json"
        command = [sys.executable, "-m", "vitserve", "bench", str(bundle.resolve()), "--precision", precision]
        command += ["--rounds", "1", "--seconds", str(_ENGINE_SECONDS), "--json", str(output)]
        environment = os.environ | server.environment
        done = subprocess.run(
            command, cwd=server.directory, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ServerFailedError(f"vitserve bench failed: {done.stderr.strip()[-500:]}")
        rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    return max(float(row["images_per_second"]) for row in rows)


def cells(rounds: Sequence[VitB16]) -> dict[str, str]:
    return {
        "engine alone, images/s": spread([each.engine_per_second for each in rounds]),
        f"{CONNECTIONS} connections, images/s": spread([each.per_second for each in rounds]),
        "% of the engine alone": spread([100 * each.share for each in rounds]),
        "1 connection, p50 ms": spread([each.p50_ms for each in rounds], 4),
        "engine": spread([each.engine_ms for each in rounds], 4),
        "decoding": spread([each.decode_ms for each in rounds]),
        "remaining": spread([each.remaining_ms for each in rounds]),
    }
