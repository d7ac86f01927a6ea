"""k8s/components/model-volume/reload.py beside a real service: what it notices, what it asks for, and when it leaves the service alone."""

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

from tests.support.networks import checkpoint
from tests.support.paths import ROOT
from tests.support.server import Server, start_server
from vitserve.export.build_bundle import build_bundle
from vitserve.model.bundle.bundle import Bundle

SCRIPT = ROOT / "k8s" / "components" / "model-volume" / "reload.py"
KEY = "of the test"


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
    """Folders side by side, and the link ``current`` to one of them, which is what the service was told to serve."""

    directory: Path
    server: Server

    @property
    def current(self) -> Path:
        return self.directory / "current"

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2])

    def publish(self, name: str) -> None:
        fresh = self.directory / "fresh"
        fresh.symlink_to(name)
        fresh.replace(self.current)

    def served(self) -> str:
        return str(httpx.get(f"{self.server.url}/v1/model").json()["version"])

    def reloads(self) -> int:
        lines = httpx.get(f"{self.server.url}/metrics").text.splitlines()
        return int(sum(float(line.split()[-1]) for line in lines if line.startswith("vitserve_reloads_total{")))


@pytest.fixture(scope="module")
def volume(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Volume]:
    directory = tmp_path_factory.mktemp("volume")
    shutil.copytree(bundle.path, directory / "first")
    build_bundle(checkpoint(seed=1), directory / "second", name="tiny")
    shutil.copytree(directory / "first", directory / "damaged")
    (directory / "damaged" / "labels.txt").write_text("not what the manifest's sha256 says\n")
    manifest = directory / "damaged" / "bundle.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": "damaged"}))
    (directory / "current").symlink_to("first")
    running = start_server("--bundle", str(directory / "current"), "--engine", "onnxruntime", "--admin-key", KEY)
    yield Volume(directory, running)
    assert running.stop() == 0


def test_a_change_is_reloaded_once_and_a_refusal_is_not_asked_for_again(
    volume: Volume, reload: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = volume.served()
    watch = reload.Watch(volume.current / "bundle.json", volume.port, KEY)
    watch.look()
    assert (volume.served(), volume.reloads()) == (first, 0)
    volume.publish("second")
    watch.look()
    watch.look()
    second = volume.served()
    assert second != first
    assert volume.reloads() == 1
    volume.publish("damaged")
    watch.look()
    watch.look()
    assert (volume.served(), volume.reloads()) == (second, 2)
    assert "the service answers 409" in caplog.text
    assert "labels.txt" in caplog.text
    volume.publish("first")
    watch.look()
    assert (volume.served(), volume.reloads()) == (first, 3)


def test_what_changed_before_it_looked_is_noticed(volume: Volume, reload: ModuleType) -> None:
    before = volume.served()
    volume.publish("second" if os.readlink(volume.current) == "first" else "first")
    reload.Watch(volume.current / "bundle.json", volume.port, KEY).look()
    assert volume.served() != before


def test_it_reloads_in_its_own_process_and_ends_when_it_is_told_to(volume: Volume) -> None:
    environment = os.environ | {
        "VITSERVE_BUNDLE": str(volume.current),
        "VITSERVE_PORT": str(volume.port),
        "VITSERVE_ADMIN_KEY": KEY,
    }
    before = volume.served()
    volume.publish("second" if os.readlink(volume.current) == "first" else "first")
    process = subprocess.Popen([sys.executable, SCRIPT, "0.05"], env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process.stderr as lines:
        assert "the service answers 200" in next(iter(lines))
        assert volume.served() != before
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_service_that_is_away_is_asked_again(tmp_path: Path, reload: ModuleType) -> None:
    (tmp_path / "bundle.json").write_text("{}")
    watch = reload.Watch(tmp_path / "bundle.json", 1, KEY)
    for _ in range(2):
        with pytest.raises(OSError, match="rejected"):
            watch.look()
