"""The image to serve with, built from docker/Dockerfile without a container engine and run as one would: read-only, without root, without capabilities."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from tests.support.images import encoded, random_image
from tests.support.paths import ROOT
from tests.support.server import Server
from vitserve import __version__

IMAGE = "localhost/vitserve:cpu"
MAX_BYTES = 600_000_000

pytestmark = pytest.mark.slow


def try_run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docker_try_run", ROOT / "docker" / "try_run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Image:
    root: Path
    said: dict[str, Any]

    def size(self) -> int:
        seen = {(each.st_dev, each.st_ino): each.st_size for path in self.root.rglob("*") if (each := path.lstat())}
        return sum(seen.values())


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    built = subprocess.run([ROOT / "docker" / "try-build", "cpu"], capture_output=True, text=True, check=False)
    if built.returncode == 77:
        pytest.skip(built.stdout.strip())
    assert built.returncode == 0, built.stderr[-5000:]
    runner = try_run()
    container, root = runner.mounted(IMAGE)
    yield Image(root, runner.config(IMAGE))
    runner.remove(container)


@dataclass
class Container(Server):
    pid: int = 0  # of its pid 1, as this machine counts

    def inside(self, *command: str) -> subprocess.CompletedProcess[str]:
        entered = [
            "nsenter",
            "--target",
            str(self.pid),
            "--mount",
            "--pid",
            "--root",
            "--setuid",
            "10001",
            "--setgid",
            "10001",
        ]
        environment = dict(
            each.split("=", 1) for each in Path(f"/proc/{self.pid}/environ").read_text().rstrip("\0").split("\0")
        )
        return subprocess.run([*entered, *command], env=environment, capture_output=True, text=True, check=False)


def names(directory: Path) -> set[str]:
    return {each.name for each in directory.iterdir()}


def children(pid: int) -> list[int]:
    """Of a process of one thread, or which it started from its first."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@pytest.fixture
def container(image: Image) -> Iterator[Container]:
    port = free_port()
    command = try_run().command(image.root, image.said, [f"VITSERVE_PORT={port}"], [])
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    running = Container(process, f"http://127.0.0.1:{port}")
    threading.Thread(target=running.read, daemon=True).start()  # a pipe that nobody reads would stop the service
    try:
        running.wait_for("vitserve.http_worker: ready")
        (running.pid,) = children(process.pid)
        yield running
    finally:
        for each in children(process.pid) if process.poll() is None else ():
            os.kill(each, signal.SIGKILL)  # pid 1 of its namespace, whose end is the end of all in it
        process.wait()


def test_it_is_small_and_holds_what_serving_needs_and_no_more(image: Image) -> None:
    assert image.size() < MAX_BYTES
    (packages,) = (image.root / "opt" / "vitserve" / "lib").glob("python3*/site-packages")
    assert {"service", "model", "onnxruntime", "openvino", "PIL"} <= names(packages)
    assert not names(packages) & {
        "torch",
        "onnx",
        "transformers",
        "timm",
        "openvino_telemetry",
        "pip",
        "setuptools",
        "tests",
    }
    programs = {
        name for directory in ("opt/vitserve/bin", "usr/bin", "usr/local/bin") for name in names(image.root / directory)
    }
    assert {"vitserve", "dumb-init"} <= programs
    assert not programs & {"gcc", "cc", "g++", "make", "ld", "pip"}
    assert not (image.root / "src").exists()


def test_it_says_what_it_is(image: Image) -> None:
    labels = image.said["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert image.said["User"] == "10001:10001"
    assert image.said["Entrypoint"] == ["dumb-init", "--single-child", "--", "vitserve"]
    assert list(image.said["Volumes"]) == ["/var/cache/vitserve"]


def test_it_answers_without_root_on_a_root_that_is_read_only_and_ends_with_status_0(
    image: Image, container: Container
) -> None:
    answer = httpx.post(
        f"{container.url}/v1/classify",
        content=encoded(random_image(400, 300), "JPEG"),
        headers={"Content-Type": "image/jpeg"},
        timeout=60,
    )
    assert answer.status_code == 200
    assert len(answer.json()["results"][0]["predictions"]) == 5
    status = Path(f"/proc/{container.pid}/status").read_text()
    assert re.search(r"^Uid:\t10001\t10001\t10001\t10001$", status, re.MULTILINE)
    assert re.search(r"^NSpid:\t\d+\t1$", status, re.MULTILINE)
    assert re.search(r"^CapBnd:\t0+$", status, re.MULTILINE)
    assert Path(f"/proc/{container.pid}/cmdline").read_bytes().startswith(b"dumb-init\0")
    rejected = container.inside("python", "-c", "open('/opt/vitserve/mine', 'w')")
    assert "Read-only file system" in rejected.stderr
    kept = container.inside("python", "-c", "import os; print(*os.listdir('/var/cache/vitserve'))")
    assert "compiled" in kept.stdout, f"engines did not keep what they compiled: {kept}"
    assert "engines are compiled at every start" not in "".join(container.log)

    health = image.said["Healthcheck"]["Test"]
    assert health[0] == "CMD"
    assert container.inside(*health[1:]).returncode == 0
    os.kill(container.pid, signal.SIGHUP)
    container.wait_for("reload: ok")
    os.kill(container.pid, signal.SIGTERM)
    assert container.process.wait(60) == 0
    assert "draining" in "".join(container.log)


def test_the_health_check_fails_where_nobody_answers(image: Image, container: Container) -> None:
    (supervisor,) = children(container.pid)
    for each in (supervisor, *children(supervisor)):
        os.kill(each, signal.SIGSTOP)
    assert container.inside(*image.said["Healthcheck"]["Test"][1:]).returncode != 0


def test_it_inspects_the_model_that_comes_along(image: Image) -> None:
    command = try_run().command(image.root, image.said, [], ["inspect", "--json"])
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout)
