"""A real Prometheus of the shipped configuration, asked over its HTTP interface. Used by test_saturation.py."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.processes import free_port
from tests.support.promql import CONFIGURATION

INTERVAL = "2s"  # of scrapes and of evaluation, instead of 15 s: the test shall not take minutes. A scrape may take as long, beside an overload


@dataclass
class Prometheus:
    client: httpx.Client
    at: float | None = None  # the moment that queries are about; None for now

    def ask(self, path: str, **parameters: str) -> Any:
        answer = self.client.get(f"/api/v1/{path}", params=parameters)
        body = answer.json()
        assert body["status"] == "success", f"{parameters}: {body}"
        return body["data"]

    def query(self, expression: str) -> list[float]:
        """The value of each series that it gives."""
        moment = {} if self.at is None else {"time": str(self.at)}
        return [float(each["value"][1]) for each in self.ask("query", query=expression, **moment)["result"]]

    def wait_for(self, expression: str) -> None:
        """Until it gives something."""
        ends = time.monotonic() + 60
        while not self.query(expression):
            assert time.monotonic() < ends, f"within a minute nothing for {expression}"
            time.sleep(
                0.1
            )  # it announces itself nowhere, and who asks without pause takes the time of what is being watched


@contextmanager
def prometheus(target: str, directory: Path) -> Iterator[Prometheus]:
    """Scrapes ``target`` (host:port) in the place of the one that the configuration names."""
    shutil.copytree(CONFIGURATION.parent, directory / "etc")
    configuration = CONFIGURATION.read_text()
    assert configuration.count("vitserve:8000") == 1
    (directory / "etc" / CONFIGURATION.name).write_text(
        configuration.replace("vitserve:8000", target).replace("15s", INTERVAL)
    )
    address = f"127.0.0.1:{free_port()}"
    options = [
        f"--config.file={directory}/etc/{CONFIGURATION.name}",
        f"--storage.tsdb.path={directory}/data",
        f"--web.listen-address={address}",
    ]
    process = subprocess.Popen(["prometheus", *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "ready to receive web requests" in line:
                break
        else:
            raise AssertionError("Prometheus did not start")
        with httpx.Client(base_url=f"http://{address}", timeout=60) as client:
            yield Prometheus(client)
    finally:
        process.terminate()
        process.stderr.read()
        process.wait(60)
        process.stderr.close()
