"""benchmarks.single_client against the real server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.support.images import encoded, random_image
from tests.support.paths import ROOT
from vitserve.model.bundle.bundle import Bundle


def test_start_up_memory_and_latency_are_printed(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "image.jpg").write_bytes(encoded(random_image()))
    command = [sys.executable, "-m", "benchmarks.single_client", "--images", str(tmp_path)]
    command += ["--starts", "1", "--requests", "5", f"--serve=--bundle {bundle.path}"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    line = r"ready after (#) s, (#) MB; p50 of 5 requests: (#) ms = inference (#) \+ decoding (#) \+ other (#)\n"
    match = re.fullmatch(line.replace("#", r"[\d.]+"), output)
    assert match is not None, output
    ready, memory, total, *parts = (float(number) for number in match.groups())
    assert ready > 0
    assert 100 < memory < 1000, "of three processes with numpy and an engine"
    assert total > max(parts)
