"""k8s/components/model-volume/reload.py beside a real service."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import httpx
import pytest

from tests.support.manifests import K8S
from tests.support.networks import checkpoint
from tests.support.server import Server, start_server
from vitserve.export.build_bundle import build_bundle
from vitserve.model.bundle.bundle import Bundle

SCRIPT = K8S / "components" / "model-volume" / "reload.py"
KEY = "key of this test"


@pytest.fixture(scope="module")
def reload() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("model_volume_reload", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@dataclass
class Volume:
    """Bundles side by side, and the link ``current`` to one of them, which the server serves."""

    directory: Path
    server: Server

    @property
    def current(self) -> Path:
        return self.directory / "current"

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2])

    def publish(self, name: str) -> None:
        link = self.directory / "next"
        link.symlink_to(name)
        link.replace(self.current)

    def publish_the_other(self) -> None:
        self.publish("second" if os.readlink(self.current) == "first" else "first")

    def served_version(self) -> str:
        return str(httpx.get(f"{self.server.url}/v1/model").json()["version"])

    def reload_count(self) -> int:
        lines = httpx.get(f"{self.server.url}/metrics").text.splitlines()
        return int(sum(float(line.split()[-1]) for line in lines if line.startswith("vitserve_reloads_total{")))


@pytest.fixture(scope="module")
def volume(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Volume]:
    directory = tmp_path_factory.mktemp("volume")
    shutil.copytree(bundle.path, directory / "first")
    build_bundle(checkpoint(seed=1), directory / "second", name="tiny")
    shutil.copytree(directory / "first", directory / "damaged")
    (directory / "damaged" / "labels.txt").write_text("not the file whose sha256 is in the manifest\n")
    manifest = directory / "damaged" / "bundle.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": "damaged"}))
    (directory / "current").symlink_to("first")
    server = start_server("--bundle", str(directory / "current"), "--engine", "onnxruntime", "--admin-key", KEY)
    yield Volume(directory, server)
    assert server.stop() == 0


def test_each_change_is_reloaded_once_even_if_rejected(
    volume: Volume, reload: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = volume.served_version()
    watcher = reload.Watcher(volume.current / "bundle.json", volume.port, KEY)
    watcher.check()
    assert (volume.served_version(), volume.reload_count()) == (first, 0)
    volume.publish("second")
    watcher.check()
    watcher.check()
    second = volume.served_version()
    assert second != first
    assert volume.reload_count() == 1
    volume.publish("damaged")
    watcher.check()
    watcher.check()
    assert (volume.served_version(), volume.reload_count()) == (second, 2)
    assert "the service responded 409" in caplog.text
    assert "labels.txt" in caplog.text
    volume.publish("first")
    watcher.check()
    assert (volume.served_version(), volume.reload_count()) == (first, 3)


def test_change_before_the_first_check_is_reloaded(volume: Volume, reload: ModuleType) -> None:
    before = volume.served_version()
    volume.publish_the_other()
    reload.Watcher(volume.current / "bundle.json", volume.port, KEY).check()
    assert volume.served_version() != before


def test_script_reloads_and_exits_on_sigterm(volume: Volume) -> None:
    environment = os.environ | {
        "VITSERVE_BUNDLE": str(volume.current),
        "VITSERVE_PORT": "1",  # not used: administration has a port of its own
        "VITSERVE_ADMIN_PORT": str(volume.port),
        "VITSERVE_ADMIN_KEY": KEY,
    }
    before = volume.served_version()
    volume.publish_the_other()
    process = subprocess.Popen([sys.executable, SCRIPT, "0.05"], env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process.stderr as lines:
        assert "the service responded 200" in next(iter(lines))
        assert volume.served_version() != before
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_check_raises_while_the_service_is_unreachable(tmp_path: Path, reload: ModuleType) -> None:
    (tmp_path / "bundle.json").write_text("{}")
    watcher = reload.Watcher(tmp_path / "bundle.json", 1, KEY)
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            watcher.check()
