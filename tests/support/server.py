"""A real `vitserve serve` process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from tests.support.paths import ROOT


@dataclass
class Server:
    """`vitserve serve` in a process of its own, on a free port."""

    process: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)
    _ended: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def read(self) -> None:
        """Collects the log until the process exits."""
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                with self._changed:
                    self.log.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for(self, pattern: str) -> str:
        """Waits until the pattern is in the log. Returns its last group, or the whole match if it has none."""
        with self._changed:
            while not (match := re.search(pattern, "".join(self.log))):
                assert not self._ended, f"the server ended without {pattern!r}:\n{''.join(self.log)}"
                assert self._changed.wait(60), f"no {pattern!r} within a minute:\n{''.join(self.log)}"
            return match.group(match.lastindex or 0)

    def pids(self, module: str) -> list[int]:
        """The supervisor's children that run this module, oldest first."""
        try:
            children = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []
        return sorted(child.pid for child in children if module in _command_line(child))

    def stop(self) -> int:
        """Returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def _command_line(process: psutil.Process) -> list[str]:
    try:
        arguments: list[str] = process.cmdline()
    except psutil.NoSuchProcess:  # it has exited
        return []
    return arguments


def start_server(
    *arguments: str,
    until: str = "vitserve.http_worker: ready",
    environment: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
    open_files: int | None = None,
) -> Server:
    """Returns once the log contains ``until``. If the server exits before that, the AssertionError shows its log.

    ``prefix`` is a command that runs the server's command. ``open_files``: the limit of open files, soft and hard.
    The networks of the tests are light, so the default number of HTTP workers would be that of the cores.
    """
    workers = () if "--workers" in arguments else ("--workers", "1")
    command = [*prefix, sys.executable, "-m", "vitserve", "serve", "--port", "0", *workers, *arguments]
    if open_files is not None:
        command = ["bash", "-c", f'ulimit -n {open_files}; exec "$@"', "bash", *command]
    complete = os.environ | {"PYTHONWARNINGS": "default"} | dict(environment or {})
    process = subprocess.Popen(
        command, cwd=ROOT, env=complete, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    running = Server(process)
    threading.Thread(target=running.read, daemon=True).start()  # a pipe that is full would block the server
    try:
        running.url = running.wait_for(r"running on (https?://[\d.:]+)")
        running.wait_for(re.escape(until))
    except BaseException:
        process.kill()
        process.wait(60)
        raise
    return running
