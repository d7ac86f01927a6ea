"""Servers of other projects: the benchmark stops them with all of their child processes."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.processes import ServerFailedError, free_port, process_tree

SERVER = """
import subprocess, sys, http.server
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[2], "w").write(str(child.pid))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def responds(port: int) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
    return False


def test_child_processes_in_their_own_session_are_stopped(tmp_path: Path) -> None:
    port, note = free_port(), tmp_path / "child"
    command = [sys.executable, "-c", SERVER, str(port), str(note)]
    with process_tree(command, tmp_path, {}, port, lambda: responds(port)) as started:
        child = psutil.Process(int(note.read_text()))
        assert child.is_running()
        assert started.cpu_seconds() > 0
        with (
            pytest.raises(ServerFailedError, match=f"port {port} is already in use"),
            process_tree(["true"], tmp_path, {}, port, lambda: True),
        ):
            pass
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert not responds(port)


def test_a_server_that_exits_is_reported_with_its_output(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        pytest.raises(ServerFailedError, match="exited: no such model"),
        process_tree(command, tmp_path, {}, free_port(), lambda: False),
    ):
        pass
