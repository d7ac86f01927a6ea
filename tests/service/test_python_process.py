"""Child processes run vitserve's code, and none of the working directory's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import onnx
import pytest

from vitserve.model.bundle.bundle import Bundle
from vitserve.service.engines.gpu_artifacts import build_cast_graph
from vitserve.service.ipc.control_messages import Progress, StartHttpWorker
from vitserve.service.settings import Settings
from vitserve.service.supervisor.child_process import ChildProcess

NAMES = ("vitserve.py", "export.py", "service.py", "model.py", "tests.py")


@pytest.fixture
def executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Changes to a directory with modules named like ours. They create the returned file when they are executed."""
    marker, directory = tmp_path / "executed", tmp_path / "project"
    directory.mkdir()
    for name in NAMES:
        (directory / name).write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.chdir(directory)
    return marker


def test_building_a_cast_graph_runs_no_code_of_the_user(tmp_path: Path, bundle: Bundle, executed: Path) -> None:
    path = tmp_path / "graph.onnx"
    build_cast_graph(bundle, path, "fp16", lambda step: None)
    assert onnx.load(path, load_external_data=False).graph.node
    assert not executed.exists()


def test_starting_a_child_runs_no_code_of_the_user(executed: Path) -> None:
    async def start() -> object:
        message = StartHttpWorker("forking", 1, Settings(), worker=0, decode_threads=1)
        child = ChildProcess("tests.support.forking_child", message, [], {})
        received = await child.receive()
        await child.reap()
        return received and received[0]

    assert isinstance(asyncio.run(start()), Progress)
    assert not executed.exists()
