"""A real `vitserve serve` process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.paths import ROOT


@dataclass
class Server:
    """A `vitserve serve` of its own process, on a free port."""

    process: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)
    _ended: bool = False
    _grown: threading.Condition = field(default_factory=threading.Condition)

    def read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                with self._grown:
                    self.log.append(line)
                    self._grown.notify_all()
        with self._grown:
            self._ended = True
            self._grown.notify_all()

    def wait_for(self, pattern: str) -> str:
        """The last group (or the whole) of the pattern in the log, as soon as it is there."""
        with self._grown:
            while not (found := re.search(pattern, "".join(self.log))):
                assert not self._ended, f"the server ended without {pattern!r}:\n{''.join(self.log)}"
                assert self._grown.wait(60), f"no {pattern!r} within a minute:\n{''.join(self.log)}"
            return found.group(found.lastindex or 0)

    def pids(self, module: str) -> list[int]:
        """Of the processes that the supervisor has started to run this module, in the order of their start."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
                command = (directory / "cmdline").read_bytes().split(b"\0")
            except (OSError, IndexError):  # it has ended meanwhile
                continue
            if parent == self.process.pid and module.encode() in command:
                found.append(int(directory.name))
        return sorted(found)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def start_server(
    *arguments: str, until: str = "vitserve.http_worker: ready", environment: Mapping[str, str] | None = None
) -> Server:
    """Returns when the log says so; whatever it says instead is in the failure."""
    command = [sys.executable, "-m", "vitserve", "serve", "--port", "0", *arguments]
    complete = os.environ | {"PYTHONWARNINGS": "default"} | dict(environment or {})
    process = subprocess.Popen(
        command, cwd=ROOT, env=complete, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stderr is not None
    running = Server(process)
    threading.Thread(target=running.read, daemon=True).start()  # a pipe that nobody reads would stop the server
    running.url = running.wait_for(r"running on (http://[\d.:]+)")
    running.wait_for(re.escape(until))
    return running
