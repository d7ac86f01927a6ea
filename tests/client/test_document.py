"""The programs of docs/clients.md run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import code_blocks
from tests.support.paths import ROOT
from tests.support.server import Server

BLOCKS = code_blocks((ROOT / "docs" / "clients.md").read_text())
GENERATED = "vitserve_client"  # tests/client/test_generated.py runs it
PYTHON = [block.text for block in BLOCKS if block.language == "python" and GENERATED not in block.text]
JAVASCRIPT = [block.text for block in BLOCKS if block.language == "js"]
ADDRESS = "http://127.0.0.1:8000"


def run(command: list[str], program: str, server: Server) -> str:
    result = subprocess.run(
        [*command, program.replace(ADDRESS, server.url)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@pytest.mark.parametrize("program", PYTHON)
def test_python_programs_run(program: str, server: Server) -> None:
    assert run([sys.executable, "-W", "error", "-c"], program, server)


@pytest.mark.parametrize("program", JAVASCRIPT)
def test_javascript_programs_run(program: str, server: Server, tmp_path: Path) -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    assert run(["node", "--input-type=module", "--eval"], program, server)


def test_all_programs_are_run() -> None:
    assert (len(PYTHON), len(JAVASCRIPT)) == (3, 1)
