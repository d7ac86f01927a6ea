"""The cpu image: built from docker/Dockerfile and run read-only, without root and without capabilities."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from benchmarks.processes import free_port
from tests.support.container import Config, image_config, mount, remove, run_command
from tests.support.http import post_jpeg
from tests.support.paths import ROOT
from tests.support.server import Server
from vitserve import __version__

IMAGE = "localhost/vitserve:cpu"
MAX_BYTES = 430_000_000

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the first build downloads the base and every wheel


@dataclass
class Image:
    root: Path
    config: Config

    def size_bytes(self) -> int:
        files = {(file.st_dev, file.st_ino): file.st_size for path in self.root.rglob("*") if (file := path.lstat())}
        return sum(files.values())


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    build = subprocess.run(
        [ROOT / "tests" / "deploy" / "try-build", "cpu"], capture_output=True, text=True, check=False
    )
    if build.returncode == 77:
        pytest.skip(build.stdout.strip())
    assert build.returncode == 0, build.stderr[-5000:]
    container, root = mount(IMAGE)
    yield Image(root, image_config(IMAGE))
    remove(container)


@dataclass
class Container(Server):
    pid: int = 0  # of the container's process 1, in this machine's numbering

    def exec(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside the container, as its user and with its environment."""
        namespaces = ["--mount", "--pid", "--root", "--setuid", "10001", "--setgid", "10001"]
        return subprocess.run(
            ["nsenter", "--target", str(self.pid), *namespaces, *command],
            env=psutil.Process(self.pid).environ(),
            capture_output=True,
            text=True,
            check=False,
        )


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def child_pids(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children()]


@pytest.fixture
def container(image: Image) -> Iterator[Container]:
    port = free_port()
    command = run_command(image.root, image.config, [f"VITSERVE_PORT={port}"], [])
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    running = Container(process, f"http://127.0.0.1:{port}")
    threading.Thread(target=running.read, daemon=True).start()  # a full pipe would block the service
    try:
        running.wait_for("vitserve.http_worker: ready")
        (running.pid,) = child_pids(process.pid)
        yield running
    finally:
        for pid in child_pids(process.pid) if process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)  # the kernel then kills every process of that namespace
        process.wait()


def test_image_is_small_and_holds_only_what_serving_needs(image: Image) -> None:
    assert image.size_bytes() < MAX_BYTES
    (packages,) = (image.root / "opt" / "vitserve" / "lib").glob("python3*/site-packages")
    installed = names(packages)
    assert {"vitserve", "openvino", "PIL"} <= installed
    build_only = {"torch", "onnx", "transformers", "timm", "openvino_telemetry", "pip", "setuptools"}
    assert not installed & build_only
    assert not installed & {"onnxruntime", "service", "model", "export", "bench", "benchmarks", "tests"}
    assert not list(packages.glob("openvino/libs/*intel_gpu*"))
    programs = {
        name for directory in ("opt/vitserve/bin", "usr/bin", "usr/local/bin") for name in names(image.root / directory)
    }
    assert {"vitserve", "dumb-init"} <= programs
    assert not programs & {"gcc", "cc", "g++", "make", "ld", "pip"}
    assert not (image.root / "src").exists()


def test_image_metadata_names_version_user_and_entry_point(image: Image) -> None:
    labels = image.config["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert image.config["User"] == "10001:10001"
    assert image.config["Entrypoint"] == ["dumb-init", "--single-child", "--", "vitserve"]
    assert list(image.config["Volumes"]) == ["/var/cache/vitserve"]


def test_container_serves_without_privileges_and_exits_with_0(image: Image, container: Container) -> None:
    response = post_jpeg(container.url)
    assert response.status_code == 200
    assert len(response.json()["results"][0]["predictions"]) == 5
    status = Path(f"/proc/{container.pid}/status").read_text()
    assert re.search(r"^Uid:\t10001\t10001\t10001\t10001$", status, re.MULTILINE)
    assert re.search(r"^NSpid:\t\d+\t1$", status, re.MULTILINE)
    assert re.search(r"^CapBnd:\t0+$", status, re.MULTILINE)
    assert psutil.Process(container.pid).cmdline()[0] == "dumb-init"
    write = container.exec("python", "-c", "open('/opt/vitserve/file', 'w')")
    assert "Read-only file system" in write.stderr
    listing = container.exec("python", "-c", "import os; print(*os.listdir('/var/cache/vitserve'))")
    assert "compiled" in listing.stdout, f"the engine did not cache what it compiled: {listing}"
    assert "cannot use the engine cache" not in "".join(container.log)

    health_check = image.config["Healthcheck"]["Test"]
    assert health_check[0] == "CMD"
    assert container.exec(*health_check[1:]).returncode == 0
    os.kill(container.pid, signal.SIGHUP)
    container.wait_for("reload: ok")
    os.kill(container.pid, signal.SIGTERM)
    assert container.process.wait(60) == 0
    assert "draining" in "".join(container.log)


def test_health_check_fails_when_the_service_hangs(image: Image, container: Container) -> None:
    (supervisor,) = child_pids(container.pid)
    for pid in (supervisor, *child_pids(supervisor)):
        os.kill(pid, signal.SIGSTOP)
    assert container.exec(*image.config["Healthcheck"]["Test"][1:]).returncode != 0


def test_container_inspects_the_default_bundle(image: Image) -> None:
    command = run_command(image.root, image.config, [], ["inspect", "--json"])
    inspection = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(inspection.stdout)
