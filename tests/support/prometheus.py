"""A real Prometheus with the repository's configuration, queried over its HTTP interface."""

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

INTERVAL = "2s"  # of scrapes and rule evaluations, instead of 15 s; a scrape may take that long during overload


@dataclass
class Prometheus:
    client: httpx.Client
    at: float | None = None  # evaluation time of queries, in seconds since the epoch; None: now

    def get(self, path: str, **parameters: str) -> Any:
        body = self.client.get(f"/api/v1/{path}", params=parameters).json()
        assert body["status"] == "success", f"{parameters}: {body}"
        return body["data"]

    def query(self, expression: str) -> list[float]:
        """The value of every series in the result."""
        parameters = {} if self.at is None else {"time": str(self.at)}
        result = self.get("query", query=expression, **parameters)["result"]
        return [float(series["value"][1]) for series in result]

    def wait_for(self, expression: str) -> None:
        """Return as soon as the result is not empty. Raises AssertionError after a minute."""
        deadline = time.monotonic() + 60
        while not self.query(expression):
            assert time.monotonic() < deadline, f"no value within a minute for {expression}"
            time.sleep(0.1)  # not `eventually`: its frequent queries would take CPU time from the service under test


@contextmanager
def prometheus(target: str, directory: Path) -> Iterator[Prometheus]:
    """A Prometheus that scrapes ``target`` (host:port) instead of the configured target."""
    shutil.copytree(CONFIGURATION.parent, directory / "etc")
    configuration = CONFIGURATION.read_text()
    assert configuration.count("vitserve:8001") == 1
    (directory / "etc" / CONFIGURATION.name).write_text(
        configuration.replace("vitserve:8001", target).replace("15s", INTERVAL)
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
