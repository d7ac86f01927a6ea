"""Measures the latency of a client with its own API key while another key floods the server.

    python -m benchmarks.contention.fairness --bundle BUNDLE

A client sends one image after the other, with pauses: alone, and while 64 connections with another key send images as
fast as they are answered. Prints the latencies of the first client. Sends to 127.0.0.1 only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import httpx

from benchmarks.attacks import small_image
from benchmarks.http.quantiles import quantile
from benchmarks.processes import free_port
from benchmarks.servers import is_ready

KEYS = {"patient": "patient-0123456789", "flood": "flood-0123456789"}
CONNECTIONS = 64
PAUSE_SECONDS = 0.05


def send(port: int, key: str, seconds: float, pause: float, connection: Connection) -> None:
    """Sends the latencies of the answered requests, and the number of the others, to ``connection``."""
    image, ends = small_image(), time.monotonic() + seconds
    headers, answered, others = {"Authorization": f"Bearer {KEYS[key]}"}, list[float](), 0
    with httpx.Client(timeout=30, headers=headers) as client:
        while time.monotonic() < ends:
            began = time.monotonic()
            if client.post(f"http://127.0.0.1:{port}/v1/classify", content=image).status_code == 200:
                answered.append(time.monotonic() - began)
            else:
                others += 1
            time.sleep(pause)
    connection.send((answered, others))


def started(port: int, key: str, seconds: float, pause: float) -> Connection:
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=send, args=(port, key, seconds, pause, theirs)).start()
    return ours


def report(name: str, answered: list[float], others: int) -> None:
    p50, p99 = (1000 * quantile(answered, q) for q in (0.5, 0.99))
    sys.stdout.write(f"| {name} | {len(answered)} | {others} | {p50:.1f} | {p99:.1f} |\n")


def flood_command(port: int, seconds: float, image: Path) -> list[str]:
    """wrk is a process of its own that needs little of the CPU."""
    script = image.with_suffix(".lua")
    script.write_text(
        f'wrk.method = "POST"\nwrk.headers["Authorization"] = "Bearer {KEYS["flood"]}"\n'
        f'wrk.body = io.open("{image}", "rb"):read("*a")\n'
    )
    url = f"http://127.0.0.1:{port}/v1/classify"
    return ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:.0f}s", "-s", str(script), url]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="", help="default: the demonstration model")
    parser.add_argument("--key-share", default="0.5")
    parser.add_argument("--seconds", type=float, default=20)
    arguments = parser.parse_args()
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        keys, image = Path(directory) / "keys", Path(directory) / "image.jpg"
        keys.write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()))
        image.write_bytes(small_image())
        bundle = ["--bundle", arguments.bundle] if arguments.bundle else []
        options = ["--key-share", arguments.key_share, *bundle]
        command = [sys.executable, "-m", "vitserve", "serve", "--port", str(port), "--api-keys", str(keys)]
        with subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL) as server:
            try:
                while not is_ready(port):
                    time.sleep(0.1)
                sys.stdout.write("| client | answered | rejected | p50 ms | p99 ms |\n|---|---:|---:|---:|---:|\n")
                report("alone", *started(port, "patient", arguments.seconds, PAUSE_SECONDS).recv())
                flood = subprocess.Popen(flood_command(port, arguments.seconds + 2, image), stdout=subprocess.PIPE)
                time.sleep(1)
                report("beside a flood", *started(port, "patient", arguments.seconds, PAUSE_SECONDS).recv())
                output = flood.communicate()[0].decode()
                sys.stdout.write(
                    "\n" + "".join(line for line in output.splitlines(True) if "/sec" in line or "Non" in line)
                )
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
