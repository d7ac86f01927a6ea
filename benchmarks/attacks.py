"""Attacks a server, and measures what other clients notice.

    python -m benchmarks.attacks

Starts `vitserve serve` with the default model. A client in a process of its own sends a small image fifty times a
second, alone and during each attack, which is repeated until the client has sent 200. Prints, for each attack: the
statuses that the attacker gets, the latency and the errors of the other client, the largest memory of all processes
(PSS), and the seconds from the end of the attack until three small images in succession are answered in the usual time.
Sends to 127.0.0.1 only.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import httpx
import numpy as np
import psutil
from PIL import Image

from benchmarks.http.quantiles import quantile
from benchmarks.processes import free_port
from benchmarks.servers import is_ready

MIB = 2**20
LEAST_REQUESTS = 200  # of the other client, for each attack
INTERVAL = 0.02  # seconds between them
MEMORY_INTERVAL = 0.25  # seconds; the kernel holds up a process while it adds up its pages
_BOUNDARY = "B"
_FORM = f"multipart/form-data; boundary={_BOUNDARY}"
_JSON = "application/json"


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


class Attacker:
    """Sends requests of one kind, and counts the statuses of the responses."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.statuses: Counter[str] = Counter()

    def post(self, body: bytes, media_type: str = "image/png", times: int = 1, timeout_ms: int = 10_000) -> None:
        url = f"http://127.0.0.1:{self.port}/v1/classify?timeout_ms={timeout_ms}"

        def once(_: int) -> str:
            try:
                response = httpx.post(url, content=body, headers={"Content-Type": media_type}, timeout=60)
            except httpx.HTTPError as error:  # the connection is closed while the body is sent
                return type(error).__name__
            return str(response.status_code)

        with ThreadPoolExecutor(times) as pool:
            self.statuses.update(pool.map(once, range(times)))

    def hold(self, data: bytes, connections: int, seconds: float) -> None:
        """Sends the data on each connection, keeps them open, and then reads what the server has answered."""
        opened = [socket.create_connection(("127.0.0.1", self.port)) for _ in range(connections)]
        for connection in opened:
            connection.settimeout(seconds)
            with contextlib.suppress(OSError):  # the server has answered, and reads no more
                connection.sendall(data)
        time.sleep(seconds)
        for connection in opened:
            connection.setblocking(False)
            try:
                answer = connection.recv(64)
                self.statuses[answer.split()[1].decode() if answer else "closed"] += 1
            except OSError:
                self.statuses["no answer yet"] += 1
            connection.close()


def progressive(scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    image = encoded(Image.new("RGB", (4000, 3000), "teal"), "JPEG", progressive=True)
    last = image.rfind(b"\xff\xda")
    return image[:-2] + image[last:-2] * scans + image[-2:]


def attacks() -> dict[str, Callable[[Attacker], None]]:
    numbers = b'{"images": [' + b"1," * (16 * MIB) + b"1]}"
    unknown = b"{" + b",".join(b'"k%d": 1' % number for number in range(10**6)) + b"}"
    alike = f"--{_BOUNDARY}\r\nContent-Disposition: form-data; name=a; filename=a\r\n\r\n".encode()
    alike += f"\r\n--{_BOUNDARY}-".encode() * (30 * MIB // 6)
    transparent = Image.new("RGBA", (7000, 7000), (10, 200, 30, 128))
    png = encoded(transparent, "PNG")
    part = f"--{_BOUNDARY}\r\nContent-Disposition: form-data; name=i; filename=i\r\n\r\n".encode() + png + b"\r\n"
    form = part * 64 + f"--{_BOUNDARY}--\r\n".encode()
    webp = encoded(Image.new("RGBA", (16383, 3051), (10, 200, 30, 128)), "WEBP", lossless=True, method=0, quality=0)
    header = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\n"
    held = header + b"Content-Type: image/png\r\nContent-Length: %d\r\n\r\n" % (32 * MIB)
    empty = png[:33] + (b"\0\0\0\0IDAT" + (0x35AF061E).to_bytes(4)) * 2_000_000
    scans = progressive(2000)
    return {
        "JSON of 16 M numbers, 33 MB": lambda attacker: attacker.post(numbers[: 32 * MIB], _JSON, times=2),
        "JSON of 1 M unknown fields": lambda attacker: attacker.post(unknown, _JSON, times=2),
        "form of look-alike boundaries, 30 MB": lambda attacker: attacker.post(alike, _FORM, times=2),
        "header of 64 MB": lambda attacker: attacker.hold(header + b"A: " + b"x" * (64 * MIB), 1, 2),
        "64 bodies of 32 MiB, held": lambda attacker: attacker.hold(held + bytes(32 * MIB - 1), 64, 3),
        "WebP of 50 megapixels in 38 bytes, 8 at once": lambda attacker: attacker.post(webp, times=8),
        "transparent PNG of 49 megapixels, 8 at once": lambda attacker: attacker.post(png, times=8),
        "form of 64 such PNGs": lambda attacker: attacker.post(form, _FORM),
        "progressive JPEG of 2,000 scans, 4 at once": lambda attacker: attacker.post(scans, times=4),
        "PNG of 2 million empty chunks, 24 MB, 2 at once": lambda attacker: attacker.post(empty, times=2),
        "1,000 connections with unfinished headers": lambda attacker: attacker.hold(header, 1000, 12),
        "1,000 connections without a byte": lambda attacker: attacker.hold(b"", 1000, 5),
    }


def small_image() -> bytes:
    rng = np.random.default_rng(0)
    return encoded(Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")


def request(client: httpx.Client, port: int, image: bytes) -> tuple[float, bool]:
    """Its seconds, and whether it was answered with 200."""
    began = time.monotonic()
    try:
        answered = client.post(f"http://127.0.0.1:{port}/v1/classify", content=image).status_code == 200
    except httpx.HTTPError:
        answered = False
    return time.monotonic() - began, answered


def send_small_images(port: int, connection: Connection) -> None:
    """Sends (seconds, answered) of each request to ``connection``, until that has a message."""
    image = small_image()
    with httpx.Client(timeout=30) as client:
        while not connection.poll(INTERVAL):
            connection.send(request(client, port, image))
    connection.send(None)


class Bystander:
    """The client that does not attack."""

    def __init__(self, port: int, supervisor: psutil.Process) -> None:
        self._supervisor = supervisor
        self._connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")  # a copy of this process would hold the attacks' bodies
        self._process = context.Process(target=send_small_images, args=(port, theirs))
        self._threads = [threading.Thread(target=self._receive), threading.Thread(target=self._sample)]
        self._stopped = threading.Event()
        self.seconds: list[float] = []
        self.errors = 0
        self.memory = 0.0

    def _receive(self) -> None:
        while (result := self._connection.recv()) is not None:
            seconds, answered = result
            self.seconds.append(seconds)
            self.errors += not answered

    def _sample(self) -> None:
        while not self._stopped.wait(MEMORY_INTERVAL):
            self.memory = max(self.memory, pss(self._supervisor))

    def __enter__(self) -> Bystander:
        self._process.start()
        for thread in self._threads:
            thread.start()
        while not self.seconds:  # the process has started
            time.sleep(INTERVAL)
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.send("stop")
        self._process.join()
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def row(self) -> str:
        times = quantile(self.seconds, 0.5), quantile(self.seconds, 0.99), max(self.seconds)
        in_milliseconds = " / ".join(f"{1000 * value:.0f}" for value in times)
        return f"{len(self.seconds)} | {self.errors} | {in_milliseconds} | {self.memory:.0f}"


def pss(supervisor: psutil.Process) -> float:
    total = 0
    for process in (supervisor, *supervisor.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has ended
            continue
    return total / MIB


def recovery(port: int, usual: float) -> float:
    """Seconds until three images in succession take at most three times the usual time."""
    began, fast, image = time.monotonic(), 0, small_image()
    with httpx.Client(timeout=30) as client:
        while fast < 3 and time.monotonic() - began < 60:
            seconds, answered = request(client, port, image)
            fast = fast + 1 if answered and seconds <= 3 * usual else 0
    return time.monotonic() - began


def main() -> None:
    port = free_port()
    command = [sys.executable, "-m", "vitserve", "serve", "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            measure(port, psutil.Process(server.pid))
        finally:
            server.terminate()


def measure(port: int, supervisor: psutil.Process) -> None:
    while not is_ready(port):
        time.sleep(0.1)
    with Bystander(port, supervisor) as alone:
        time.sleep(8)
    usual = quantile(alone.seconds, 0.99)
    sys.stdout.write(
        "| attack | attacker gets | requests of others | errors | p50 / p99 / max ms | memory MB | recovered s |\n"
    )
    sys.stdout.write("|---|---|---:|---:|---:|---:|---:|\n")
    sys.stdout.write(f"| none | | {alone.row()} | |\n")
    for name, attack in attacks().items():
        attacker = Attacker(port)
        with Bystander(port, supervisor) as other:
            while len(other.seconds) < LEAST_REQUESTS:
                attack(attacker)
        seconds = recovery(port, usual)
        got = ", ".join(f"{count} × {status}" for status, count in sorted(attacker.statuses.items()))
        sys.stdout.write(f"| {name} | {got} | {other.row()} | {seconds:.1f} |\n")


if __name__ == "__main__":
    main()
