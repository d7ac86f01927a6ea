"""What happens to the real processes when they are killed, stopped, reloaded and told to end, under load: nothing that was admitted is lost."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from tests.support.http import classify, metric
from tests.support.images import encoded, random_image
from tests.support.load import Load, expectations
from tests.support.networks import checkpoint
from tests.support.paths import ROOT
from tests.support.server import Server, start_server
from tests.support.waiting import eventually
from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.load import Checkpoint
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ViTConfig
from vitserve.model.network.vit import ViT
from vitserve.service.ipc.memory_layout import RUNNING, WAITING
from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.settings import Settings
from vitserve.service.supervisor.child_process import Child

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")

ENGINE, HTTP_WORKER = "vitserve.service.engine_worker.main", "vitserve.service.http_worker.main"
OTHER = ViTConfig(image_size=24, patch_size=8, width=48, depth=1, heads=3, mlp_width=64, classes=11)
SLOW = ViTConfig(image_size=448, patch_size=16, width=256, depth=4, heads=4, mlp_width=1024, classes=7)
PATIENT = ("--timeout-ms", "60000")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of another image size and number of classes."""
    return build_bundle(checkpoint(OTHER, seed=1), tmp_path_factory.mktemp("bundles") / "other", name="other")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Slow enough, tens of milliseconds an image, to be found running."""
    torch.manual_seed(0)
    made = Checkpoint(
        ViT(SLOW).eval(), tuple(f"class {index}" for index in range(SLOW.classes)), Preprocessing(SLOW.image_size)
    )
    return build_bundle(made, tmp_path_factory.mktemp("bundles") / "slow", name="slow", precisions=[])


@pytest.fixture(scope="module")
def expected(bundle: Bundle, other: Bundle) -> dict[tuple[str, str], np.ndarray]:
    return expectations(bundle, other)


@contextmanager
def serving(*arguments: str, until: str = "vitserve.http_worker: ready") -> Iterator[Server]:
    """Whatever the test leaves of it is killed."""
    running = start_server(*arguments, until=until)
    try:
        yield running
    finally:
        for pid in [*running.pids(HTTP_WORKER), *running.pids(ENGINE), running.process.pid]:
            kill(pid)
        running.process.wait(60)


def kill(pid: int, with_signal: signal.Signals = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, with_signal)


def ended(pid: int) -> bool:
    """Gone, or a zombie whose parent has gone too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def count(running: Server, pattern: str) -> int:
    return len(re.findall(pattern, "".join(running.log)))


def slot_table_of(engine: int) -> SlotTable:
    """The shared memory as the engine worker of this id has it."""
    for each in Path(f"/proc/{engine}/fd").iterdir():
        if "vitserve-slots" in os.readlink(each):
            descriptor = os.open(each, os.O_RDWR)
            try:
                return SlotTable(descriptor)
            finally:
                os.close(descriptor)
    raise AssertionError("the engine has no slot table")


# -- engines


OFTEN = pytest.mark.parametrize("times", [6, pytest.param(20, marks=pytest.mark.slow)])


@OFTEN
def test_an_engine_killed_again_and_again_under_load_loses_nothing(
    times: int, bundle: Bundle, expected: dict[tuple[str, str], np.ndarray]
) -> None:
    with serving("--bundle", str(bundle.path), *PATIENT) as running:
        with Load(running.url, expected) as load:
            for number in range(times):
                load.wait_for(200)
                (engine,) = running.pids(ENGINE)
                kill(engine)
                eventually(lambda: count(running, "vitserve.http_worker: ready") == number + 2, "ready again")  # noqa: B023
            load.wait_for(200)
        assert set(load.counts) == {"200"}, load.complaints[:3]
        with httpx.Client(base_url=running.url) as client:
            assert metric(client, "vitserve_restarts_total", process="engine", cause="died") == times
            assert metric(client, "vitserve_images_in_flight") == 0
            assert metric(client, "vitserve_images_total", outcome="ok") == load.counts["200"]
            assert metric(client, "vitserve_images_retried_total") > times
        assert running.stop() == 0


def test_of_two_engines_one_may_die(bundle: Bundle, expected: dict[tuple[str, str], np.ndarray]) -> None:
    with serving("--bundle", str(bundle.path), *PATIENT, "--engines", "2", "--threads", "1") as running:
        eventually(lambda: count(running, "vitserve.http_worker: ready") == 2, "both engines ready")
        with Load(running.url, expected) as load, httpx.Client(base_url=running.url) as client:
            for number in range(4):
                load.wait_for(200)
                kill(running.pids(ENGINE)[0])
                running.wait_for(rf"(?s)(another is started.*){{{number + 1}}}")
                assert client.get("/readyz").status_code == 200
                eventually(lambda: count(running, "vitserve.http_worker: ready") == number + 3, "both ready again")  # noqa: B023
        assert set(load.counts) == {"200"}, load.complaints[:3]
        assert running.stop() == 0


def test_an_engine_that_stands_still_is_replaced(bundle: Bundle, expected: dict[tuple[str, str], np.ndarray]) -> None:
    with serving("--bundle", str(bundle.path), *PATIENT, "--hang-seconds", "1") as running:
        with Load(running.url, expected) as load:
            load.wait_for(100)
            (engine,) = running.pids(ENGINE)
            kill(engine, signal.SIGSTOP)
            running.wait_for("engine-0-b has been silent for 1.0 s; it is killed")
            load.wait_for(100)
        assert ended(engine)
        assert set(load.counts) == {"200"}, load.complaints[:3]
        with httpx.Client(base_url=running.url) as client:
            assert metric(client, "vitserve_restarts_total", process="engine", cause="hung") == 1
        assert running.stop() == 0


def test_an_image_that_was_in_flight_in_two_crashes_is_answered_500_and_reported(slow: Bundle) -> None:
    with (
        serving("--bundle", str(slow.path), "--max-batch", "1", *PATIENT) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(classify(client, encoded(random_image()))))
        asking.start()
        for number in range(2):
            (engine,) = running.pids(ENGINE)
            slot_table = slot_table_of(engine)
            eventually(lambda: slot_table.count(RUNNING), "running")  # noqa: B023
            kill(engine)
            if number == 0:
                eventually(lambda: ended(engine) and running.pids(ENGINE), "another engine")  # noqa: B023
                eventually(lambda: count(running, "vitserve.http_worker: ready") == 2, "ready again")
        asking.join(60)
        assert answers[0].status_code == 500
        assert answers[0].json()["code"] == "engine_failed"
        assert "2 engine workers crashed while running this image" in answers[0].json()["detail"]
        running.wait_for(r"image \d+ was running in 2 engine crashes; not retrying it")
        running.wait_for(r"(?s)(vitserve.http_worker: ready.*){3}")
        assert classify(client, encoded(random_image())).status_code == 200
        assert metric(client, "vitserve_images_total", outcome="engine_failed") == 1
        assert metric(client, "vitserve_images_in_flight") == 0
        assert running.stop() == 0


CHILD = """
import logging, os, socket, sys, threading, time
from prometheus_client import CollectorRegistry
from vitserve.service.ipc import memory_layout
from vitserve.service.ipc import wire_format
from vitserve.service.ipc.control_channel import Channel
from vitserve.service.engine_worker.batch_loop import EngineProcess
from vitserve.service.engines.engine import DeviceLost
from vitserve.service.metrics import Metrics
from vitserve.service.ipc.shared_memory import Ring
from vitserve.service.ipc.slots import Slots
from tests.support.dispatching import MODEL_INFO, FakeEngine
logging.basicConfig()
def act():
    %s
memory = memory_layout.create(memory_layout.Shape(1, 8, 1, 1, 4, 16, 3), MODEL_INFO.to_json())
process = EngineProcess(FakeEngine(act), Ring(memory), 0, 7, dict.fromkeys(range(1, 5), 0.001), Metrics(CollectorRegistry()), hang_seconds=0.2)
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
link, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
Channel(ours).send({"kind": "connect", "HTTP worker": 0, "epoch": 1}, [its.fileno()])
slots = Slots(Ring(memory), 0, 1)
ticket = slots.take(time.monotonic() + 60, 5)
slots.submit(ticket, 0)
link.send(wire_format.pack_submission(1, wire_format.Submission(ticket.slot, wire_format.SUBMIT, 5, ticket.sequence, ticket.deadline)))
process.run(Channel(theirs))
"""


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("time.sleep(60)", "a batch of 1 has been running for"),
        ("sys.exit()", "a thread ended, and with it this process"),
        ("raise DeviceLost('an illegal address')", "DeviceLost: an illegal address"),
    ],
    ids=["a stream that hangs", "a thread that ends", "a device that answers no more"],
)
def test_what_would_leave_callers_waiting_ends_the_engine_process(act: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD % act], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == os.EX_SOFTWARE
    assert said in done.stderr


# -- HTTP workers


def remote_ports(pid: int) -> set[int]:
    """Of the TCP connections that a process has."""
    inodes = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(each).removeprefix("socket:[").removesuffix("]"))
        except FileNotFoundError:
            continue
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(row[2].rpartition(":")[2], 16) for row in rows if row[9] in inodes and row[3] == "01"}


def test_a_killed_front_breaks_only_its_own_connections_and_is_back(
    bundle: Bundle, expected: dict[tuple[str, str], np.ndarray]
) -> None:
    with serving("--bundle", str(bundle.path), *PATIENT, "--workers", "2") as running:
        eventually(lambda: count(running, "vitserve.http_worker: ready") == 2, "both HTTP workers ready")
        with Load(running.url, expected) as load:
            load.wait_for(200)
            doomed, spared = running.pids(HTTP_WORKER)
            theirs = remote_ports(doomed)
            assert theirs
            before = dict(load.ports)
            kill(doomed)
            eventually(lambda: count(running, "vitserve.http_worker: ready") == 3, "the HTTP worker back")
            load.wait_for(500)
        assert set(load.counts) <= {"200", "broken"}, load.complaints[:3]
        assert set(load.broken) <= theirs, "a connection of the other HTTP worker broke"
        assert {port for port in before.values() if port not in theirs} <= set(load.ports.values()), (
            "or was opened again"
        )
        assert len(load.broken) == len(set(load.broken))
        assert spared in running.pids(HTTP_WORKER)
        assert doomed not in running.pids(HTTP_WORKER)
        with httpx.Client(base_url=running.url) as client:
            eventually(lambda: metric(client, "vitserve_images_in_flight") == 0, "all slots reclaimed")
            assert metric(client, "vitserve_restarts_total", process="worker", cause="died") == 1
            assert metric(client, "vitserve_ready") == 1, "one sample: a dead process leaves no ghost"
        assert running.stop() == 0


def test_clients_who_leave_free_their_places(slow: Bundle) -> None:
    with (
        serving("--bundle", str(slow.path), "--max-batch", "1", *PATIENT) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        host, port = running.url.removeprefix("http://").split(":")
        image = encoded(random_image())
        heading = (
            f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(image)}\r\n\r\n"
        )
        connections = [socket.create_connection((host, int(port))) for _ in range(30)]
        for connection in connections:
            connection.sendall(heading.encode() + image)
        slot_table = slot_table_of(running.pids(ENGINE)[0])
        eventually(lambda: slot_table.count(WAITING) >= 20, "twenty of them decoded and waiting")
        for connection in connections:
            connection.close()
        assert classify(client, image).status_code == 200
        eventually(lambda: metric(client, "vitserve_images_in_flight") == 0, "all places free")
        assert metric(client, "vitserve_requests_total", status="499") > 20
        assert metric(client, "vitserve_batch_size_sum") < 15, "nobody ran those that nobody waits for"
        assert running.stop() == 0


# -- reload


class Switch:
    """A bundle's path that leads now here, now there."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "current"

    def to(self, target: Path) -> None:
        new = self.path.with_name("new")
        new.symlink_to(target)
        new.replace(self.path)


def reload(client: httpx.Client, key: str = "secret") -> httpx.Response:
    return client.post("/v1/admin/reload", headers={"Authorization": f"Bearer {key}"})


@OFTEN
def test_reloads_between_two_models_under_load_lose_nothing(
    times: int, tmp_path: Path, bundle: Bundle, other: Bundle, expected: dict[tuple[str, str], np.ndarray]
) -> None:
    switch = Switch(tmp_path)
    switch.to(bundle.path)
    with (
        serving("--bundle", str(switch.path), *PATIENT, "--admin-key", "secret") as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        with Load(running.url, expected) as load:
            for number in range(times):
                load.wait_for(50)
                target = (other, bundle)[number % 2]
                switch.to(target.path)
                if number < times - 2:
                    answer = reload(client)
                    assert answer.json() == {"model": target.manifest.name, "version": target.manifest.version}
                else:
                    running.process.send_signal(signal.SIGHUP)
                    eventually(lambda: count(running, "reload: ok") == number + 1, "reloaded")  # noqa: B023
                    assert classify(client, encoded(random_image())).json()["model"] == target.manifest.name
            load.wait_for(50)
        assert set(load.counts) == {"200"}, load.complaints[:3]
        assert set(load.versions) == set(expected), "each was served"
        assert metric(client, "vitserve_reloads_total", result="ok") == times
        assert metric(client, "vitserve_restarts_total") == 0
        assert metric(client, "vitserve_images_in_flight") == 0
        eventually(lambda: len(running.pids(ENGINE)) == 1, "the old engines gone")
        assert running.stop() == 0


def test_a_bundle_that_cannot_be_served_is_refused_and_the_old_one_serves_on(
    tmp_path: Path, bundle: Bundle, expected: dict[tuple[str, str], np.ndarray]
) -> None:
    switch, bad = Switch(tmp_path), tmp_path / "bad"
    shutil.copytree(bundle.path, bad)
    with (bad / "golden.npz").open("r+b") as file:
        file.seek(1000)
        file.write(b"damaged")
    switch.to(bundle.path)
    with (
        serving("--bundle", str(switch.path), *PATIENT, "--admin-key", "secret") as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        with Load(running.url, expected, connections=4) as load:
            load.wait_for(50)
            switch.to(bad)
            rejected = reload(client)
            assert (rejected.status_code, rejected.json()["code"]) == (409, "reload_rejected")
            assert "bad_bundle" in rejected.json()["detail"]
            assert "golden.npz" in rejected.json()["detail"]
            running.wait_for(r"the bundle cannot be served \(bad_bundle\): .*golden.npz")
            load.wait_for(50)
        assert set(load.counts) == {"200"}, load.complaints[:3]
        assert metric(client, "vitserve_reloads_total", result="bad_bundle") == 1
        assert client.get("/readyz").status_code == 200
        # An engine that dies now finds only the bad one.
        kill(running.pids(ENGINE)[0])
        eventually(
            lambda: any("the bundle cannot be served" in each for each in client.get("/readyz").json()["reasons"]),
            "unready",
        )
        answer = classify(client, encoded(random_image()))
        assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        assert "golden.npz" in answer.json()["detail"]
        switch.to(bundle.path)
        assert reload(client).status_code == 200
        assert client.get("/readyz").status_code == 200
        assert classify(client, encoded(random_image())).status_code == 200
        assert running.stop() == 0


def test_reloading_needs_the_key(bundle: Bundle, server: Server, client: httpx.Client) -> None:
    assert reload(client).status_code == 403
    assert "no admin_key is set" in reload(client).json()["detail"]
    with (
        serving("--bundle", str(bundle.path), "--admin-key", "secret") as running,
        httpx.Client(base_url=running.url, timeout=60) as keyed,
    ):
        for answer in (reload(keyed, "wrong"), keyed.post("/v1/admin/reload"), reload(keyed, "secre")):
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
        assert reload(keyed).status_code == 200
        assert running.stop() == 0


def test_an_engine_killed_while_it_opens_the_new_bundle_leaves_the_old_model_serving(
    tmp_path: Path, bundle: Bundle, other: Bundle, expected: dict[tuple[str, str], np.ndarray]
) -> None:
    switch = Switch(tmp_path)
    switch.to(bundle.path)
    with (
        serving("--bundle", str(switch.path), *PATIENT) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        with Load(running.url, expected, connections=4) as load:
            load.wait_for(50)
            (serving_now,) = running.pids(ENGINE)
            switch.to(other.path)
            running.process.send_signal(signal.SIGHUP)
            eventually(lambda: len(running.pids(ENGINE)) == 2, "a second engine")
            (opening,) = set(running.pids(ENGINE)) - {serving_now}
            kill(opening)
            running.wait_for(r"ended by SIGKILL while it opened the bundle")
            load.wait_for(50)
        assert set(load.counts) == {"200"}, load.complaints[:3]
        assert set(load.versions) == {(bundle.manifest.name, bundle.manifest.version)}
        assert running.pids(ENGINE) == [serving_now]
        assert metric(client, "vitserve_reloads_total", result="died") == 1
        assert running.stop() == 0


def test_an_engine_that_is_replaced_during_a_reload_does_not_take_the_old_model_back(
    bundle: Bundle, expected: dict[tuple[str, str], np.ndarray]
) -> None:
    """Both open the same directory at the same time: which of them is there first, differs."""
    with serving("--bundle", str(bundle.path), *PATIENT) as running:
        with Load(running.url, expected, connections=4) as load:
            for number in range(4):
                load.wait_for(20)
                kill(running.pids(ENGINE)[0])
                running.process.send_signal(signal.SIGHUP)
                eventually(lambda: count(running, "reload: ok") == number + 1, "reloaded")  # noqa: B023
            load.wait_for(20)
            eventually(lambda: len(running.pids(ENGINE)) == 1, "one engine left")
            load.wait_for(20)
        assert set(load.counts) == {"200"}, load.complaints[:3]
        assert running.stop() == 0


def test_an_engine_that_finds_another_bundle_after_a_crash_serves_that_as_a_reload(
    tmp_path: Path, bundle: Bundle, other: Bundle, expected: dict[tuple[str, str], np.ndarray]
) -> None:
    """The directory was changed, and before anybody said so, the engine died: its images are given to the new model."""
    switch = Switch(tmp_path)
    switch.to(bundle.path)
    with serving("--bundle", str(switch.path), *PATIENT) as running:
        with Load(running.url, expected) as load:
            load.wait_for(50)
            switch.to(other.path)
            kill(running.pids(ENGINE)[0])
            running.wait_for("is not the one that is being served; it is opened as a new model")
            running.wait_for("ready: other")
            load.wait_for(100)
            for number in range(2):  # nothing is left of the model that ended so
                running.process.send_signal(signal.SIGHUP)
                eventually(lambda: count(running, "reload: ok") == number + 2, "reloaded")  # noqa: B023
            load.wait_for(100)
        assert set(load.counts) == {"200"}, load.complaints[:3]
        assert set(load.versions) == set(expected)
        assert running.stop() == 0


def test_a_child_whose_fork_holds_its_channel_has_ended_all_the_same() -> None:
    async def watch() -> tuple[int, object, str]:
        opening = {"process": "forking", "settings": dataclasses.asdict(Settings())}
        child = Child("tests.support.forking_child", "forking", 1, opening, [], {})
        async with asyncio.timeout(60):
            first, last = await child.receive(), await child.receive()
        assert first is not None
        return first[0]["pid"], last, await child.ended()

    fork, last, how = asyncio.run(watch())
    assert last is None
    assert how == "with exit status 3"
    eventually(lambda: ended(fork), "ended")


# -- the end


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_under_load_fails_nobody(
    bundle: Bundle, expected: dict[tuple[str, str], np.ndarray], workers: str
) -> None:
    with serving("--bundle", str(bundle.path), *PATIENT, "--workers", workers) as running:
        with Load(running.url, expected, leave_when_told=True) as load:
            load.wait_for(200)
            assert running.stop() == 0
            load.join()
        assert set(load.counts) == {"200"}, load.complaints[:3]
        assert "Traceback" not in "".join(running.log)


def test_draining_is_not_ready_at_once_and_closes_kept_connections(slow: Bundle) -> None:
    with serving("--bundle", str(slow.path), "--max-batch", "1", *PATIENT) as running:
        with httpx.Client(base_url=running.url, timeout=60) as asking, httpx.Client(base_url=running.url) as probe:
            assert probe.get("/readyz").status_code == 200
            answers: list[httpx.Response] = []
            many = [("image", encoded(random_image(seed=seed))) for seed in range(20)]
            thread = threading.Thread(target=lambda: answers.append(asking.post("/v1/classify", files=many)))
            thread.start()
            slot_table = slot_table_of(running.pids(ENGINE)[0])
            eventually(lambda: slot_table.count(RUNNING), "running")
            running.process.send_signal(signal.SIGTERM)
            running.wait_for("draining")
            said: list[httpx.Response] = []  # the supervisor says so a moment before its HTTP workers hear it
            eventually(lambda: said.append(probe.get("/readyz")) or said[-1].status_code == 503, "not ready")  # type: ignore[func-returns-value]
            assert not answers, "it is still being answered"
            thread.join(60)
        assert said[-1].json()["reasons"] == ["draining: the service is stopping"]
        assert said[-1].headers["connection"] == "close"
        assert answers[0].status_code == 200
        assert answers[0].headers["connection"] == "close"
        assert all("predictions" in each for each in answers[0].json()["results"])
        assert running.process.wait(60) == 0


@pytest.mark.parametrize(
    ("why", "arguments"), [("a second signal", ()), ("drain_seconds, 0.2, are over", ("--drain-seconds", "0.2"))]
)
def test_a_drain_has_its_bounds(slow: Bundle, why: str, arguments: tuple[str, ...]) -> None:
    with (
        serving("--bundle", str(slow.path), "--max-batch", "1", *PATIENT, *arguments) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        failures: list[Exception] = []

        def ask() -> None:
            try:
                client.post("/v1/classify", files=[("image", encoded(random_image(seed=seed))) for seed in range(60)])
            except httpx.HTTPError as error:
                failures.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        slot_table = slot_table_of(running.pids(ENGINE)[0])
        eventually(lambda: slot_table.count(RUNNING), "running")
        children = running.pids(HTTP_WORKER) + running.pids(ENGINE)
        running.process.send_signal(signal.SIGTERM)
        running.wait_for("draining")
        if not arguments:
            running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 1
        thread.join(60)
        assert failures
        running.wait_for(f"{why}: what is not answered by now will not be")
        assert all(ended(pid) for pid in children)


def test_when_the_supervisor_is_killed_nothing_is_left_of_it(
    bundle: Bundle, expected: dict[tuple[str, str], np.ndarray]
) -> None:
    with serving("--bundle", str(bundle.path), *PATIENT, "--workers", "2") as running:
        (engine,) = running.pids(ENGINE)
        children = [engine, *running.pids(HTTP_WORKER)]
        environment = Path(f"/proc/{engine}/environ").read_bytes().split(b"\0")
        (directory,) = [
            Path(each.partition(b"=")[2].decode())
            for each in environment
            if each.startswith(b"PROMETHEUS_MULTIPROC_DIR=")
        ]
        assert directory.is_dir()
        with Load(running.url, expected) as load:
            load.wait_for(100)
            kill(running.process.pid)
            eventually(lambda: all(ended(pid) for pid in children), "all ended")
            load.join()  # rejected: nobody listens any more
        assert not directory.exists(), (
            "the counters' files are gone; the slot table went with the last process that had it"
        )


def test_an_engine_that_ends_the_processes_that_open_it_is_left_out(tmp_path: Path, bundle: Bundle) -> None:
    """As a driver's fault would. A module that ends whoever imports it stands in the way of the genuine one."""
    (tmp_path / "openvino.py").write_text("import os\nos._exit(3)\n")
    running = start_server("--bundle", str(bundle.path), environment={"PYTHONPATH": str(tmp_path)})
    with httpx.Client(base_url=running.url, timeout=60) as client:
        assert classify(client, encoded(random_image())).status_code == 200
        serving = client.get("/v1/model").json()["serving"]
    assert (serving["engine"], serving["precision"]) == ("onnxruntime", "fp32")
    assert {(each["engine"], each["cause"], each["reason"]) for each in serving["rejected"]} == {
        ("openvino", "crashed", "it ended the processes that opened it")
    }
    assert running.stop() == 0


@pytest.mark.parametrize(
    ("module", "name"),
    [("vitserve.service.http_worker.main", "http-worker-0"), ("vitserve.service.engine_worker.main", "engine-0-b")],
)
def test_what_never_comes_up_is_given_up_with_the_reason(
    tmp_path: Path, bundle: Bundle, module: str, name: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import os, sys\nif {module!r} in sys.orig_argv:\n    os._exit(3)\n")
    command = [sys.executable, "-m", "vitserve", "serve", "--port", "0", "--bundle", str(bundle.path)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert re.search(rf"giving up: {name} ended with exit status 3.*; that was attempt 5 of 5", done.stderr), (
        done.stderr
    )
    assert "Traceback" not in done.stderr


def cpu_seconds(pids: list[int]) -> float:
    return (
        sum(int(task.read_text().split()[0]) for pid in pids for task in Path(f"/proc/{pid}/task").glob("*/schedstat"))
        / 1e9
    )


def test_idle_they_cost_next_to_nothing(bundle: Bundle) -> None:
    """Processor time, not the clock's: less than a hundredth of a core, of all processes together."""
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this kernel does not account for processor time in nanoseconds")
    with serving("--bundle", str(bundle.path)) as running, httpx.Client(base_url=running.url) as client:
        assert classify(client, encoded(random_image())).status_code == 200
        pids = [running.process.pid, *running.pids(HTTP_WORKER), *running.pids(ENGINE)]
        before = cpu_seconds(pids)
        threading.Event().wait(5)
        assert cpu_seconds(pids) - before < 0.05
        assert running.stop() == 0
