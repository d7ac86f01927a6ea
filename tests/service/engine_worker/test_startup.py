"""The start of an engine worker: what it logs for the user, and what it reports to the supervisor."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
from pathlib import Path

import httpx
import pytest

from tests.support.processes import READY, line_count, serving, wait_for_lines
from vitserve.model.bundle.bundle import MANIFEST, Bundle, open_bundle, sha256
from vitserve.service import machine
from vitserve.service.engine_worker.startup import Progress, startup_hints
from vitserve.service.engine_worker.tuning_cache import TuningResult, save_tuning_result
from vitserve.service.ipc import control_messages
from vitserve.service.ipc.control_channel import Channel
from vitserve.service.settings import DEFAULT_BUNDLE, Settings


@pytest.fixture(autouse=True)
def int8_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "multiplies_int8", lambda: True)


def test_the_log_says_which_model_engine_and_precision_serve(bundle: Bundle) -> None:
    with serving("--bundle", str(bundle.path), "--engine", "onnxruntime", "--precision", "fp32") as running:
        running.wait_for(rf"ready: tiny \(version {bundle.manifest.version}\) on onnxruntime in fp32\n")
        assert "demonstration model" not in "".join(running.log)
        assert running.stop() == 0


def test_the_log_names_the_demonstration_model_once() -> None:
    with serving("--engines", "2", "--threads", "1") as running:
        wait_for_lines(running, READY, 2)
        assert line_count(running, "bundled demonstration model compact-hybrid-cifar10") == 1
        assert running.stop() == 0


def test_the_hint_says_how_to_serve_an_own_model() -> None:
    (hint,) = startup_hints(Settings(), open_bundle(DEFAULT_BUNDLE), "openvino")
    assert "CIFAR-10 images into 10 classes (airplane, automobile, " in hint
    assert "`vitserve serve SOURCE`" in hint


def test_the_hint_says_how_to_add_int8(bundle: Bundle) -> None:
    (hint,) = startup_hints(Settings(bundle="b"), without_int8(bundle), "openvino")
    assert "no int8 artifact" in hint
    assert "`vitserve export SOURCE --output BUNDLE --images DIR`" in hint


@pytest.mark.parametrize("engine", ["tensorrt", "onnxruntime-cuda", "torch"])
def test_there_is_no_int8_hint_for_other_engines(bundle: Bundle, engine: str) -> None:
    assert startup_hints(Settings(bundle="b"), without_int8(bundle), engine) == []


def test_there_is_no_int8_hint_when_another_precision_is_set(bundle: Bundle) -> None:
    assert startup_hints(Settings(bundle="b", precision="fp32"), without_int8(bundle), "openvino") == []


def test_there_is_no_int8_hint_when_the_bundle_has_int8() -> None:
    assert startup_hints(Settings(bundle="b"), open_bundle(DEFAULT_BUNDLE), "openvino") == []


def test_there_is_no_int8_hint_without_instructions(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "multiplies_int8", lambda: False)
    assert startup_hints(Settings(bundle="b"), without_int8(bundle), "openvino") == []


def without_int8(bundle: Bundle) -> Bundle:
    artifacts = tuple(artifact for artifact in bundle.manifest.artifacts if artifact.precision != "int8")
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, artifacts=artifacts))


def test_progress_is_limited_but_the_engine_is_always_reported() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel, supervisor = Channel(near), Channel(far)
    supervisor.setblocking(False)
    progress = Progress(channel)
    for step in range(100):
        progress(f"step {step}")
    progress.trying("openvino in bf16")
    received = []
    for _ in range(2):
        message = supervisor.receive()
        assert message is not None
        received.append(message[0])
    assert received == [
        control_messages.Progress("step 0", None),
        control_messages.Progress("loading openvino in bf16", "openvino in bf16"),
    ]
    channel.close()
    supervisor.close()


@pytest.mark.skipif(machine.cores() == 1, reason="more than one core is needed")
def test_a_light_network_gets_an_http_worker_per_core_and_one_thread(bundle: Bundle) -> None:
    """Also after its engine worker is restarted. The number of HTTP workers does not change any more."""
    count = min(8, machine.cores(), Settings().slots // Settings().max_images)
    with serving("--bundle", str(bundle.path), "--workers", "0", "--precision", "fp32") as running:
        wait_for_lines(running, READY, count)
        assert len(running.pids("vitserve.service.http_worker.main")) == count
        (engine,) = running.pids("vitserve.service.engine_worker.main")
        os.kill(engine, signal.SIGKILL)
        wait_for_lines(running, READY, 2 * count)
        assert line_count(running, "threads per stream: 1") == 2
        assert running.stop() == 0


def test_a_tuned_number_of_threads_is_kept_after_a_restart(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save_tuning_result(sha256(bundle.path / MANIFEST), TuningResult("openvino", "fp32", 2, 2, 1.0))
    with serving("--bundle", str(bundle.path)) as running:
        serving_now = httpx.get(f"{running.url}/v1/model").json()["serving"]
        assert (serving_now["streams"], serving_now["threads"]) == (2, 2)
        (engine,) = running.pids("vitserve.service.engine_worker.main")
        os.kill(engine, signal.SIGKILL)
        running.wait_for("streams: 2, threads per stream: 2, as before")
        wait_for_lines(running, READY, 2)
        assert running.stop() == 0


def test_explicit_threads_and_streams_are_used(bundle: Bundle) -> None:
    with serving("--bundle", str(bundle.path), "--threads", "1") as running:
        assert line_count(running, "threads per stream") == 0
        assert running.stop() == 0
