"""Processes that crash while they start: a crashing engine is skipped, and the supervisor gives up at last."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.http import classify
from tests.support.images import encoded, random_image
from tests.support.paths import ROOT
from tests.support.processes import ENGINE_WORKER, HTTP_WORKER, serving
from vitserve.model.bundle.bundle import Bundle


@pytest.mark.slow
def test_an_engine_that_crashes_its_process_is_skipped(tmp_path: Path, bundle: Bundle) -> None:
    """As a faulty driver would. A module of the library's name ends the process that imports it."""
    (tmp_path / "openvino.py").write_text("import os\nos._exit(3)\n")
    with (
        serving("--bundle", str(bundle.path), environment={"PYTHONPATH": str(tmp_path)}) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        assert classify(client, encoded(random_image())).status_code == 200
        model = client.get("/v1/model").json()["serving"]
        assert (model["engine"], model["precision"]) == ("onnxruntime", "fp32")
        rejections = model["rejected"]
        assert {(rejection["engine"], rejection["cause"]) for rejection in rejections} == {("openvino", "crashed")}
        assert all(rejection["reason"] for rejection in rejections)
        running.wait_for("disabling openvino in .* until the next reload: 2 processes crashed while loading it")
        assert running.stop() == 0


@pytest.mark.parametrize(("module", "name"), [(HTTP_WORKER, "http-worker-0"), (ENGINE_WORKER, "engine-worker-0-b")])
def test_the_supervisor_gives_up_with_the_reason(tmp_path: Path, bundle: Bundle, module: str, name: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import os, sys\nif {module!r} in sys.orig_argv:\n    os._exit(3)\n")
    command = [sys.executable, "-m", "vitserve", "serve", "--port", "0", "--bundle", str(bundle.path)]
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 1
    pattern = rf"giving up: {name} exited \(exit status 3\).* \(attempt 5 of 5\)"
    assert re.search(pattern, result.stderr), result.stderr
    assert "Traceback" not in result.stderr
