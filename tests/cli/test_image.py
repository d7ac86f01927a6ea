"""``vitserve image``: the directory that it writes, and the image that a real program builds from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vitserve import __version__
from vitserve.cli.main import app
from vitserve.model.bundle.bundle import Bundle, open_bundle

TAG = "localhost/vitserve-test-image:1"
STORE = {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}


def run(*arguments: object, **environment: str) -> Any:
    return CliRunner().invoke(app, ["image", *map(str, arguments)], env={"COLUMNS": "300", **environment})


def buildah(*arguments: str) -> str:
    environment = os.environ | STORE
    return subprocess.run(["buildah", *arguments], check=True, capture_output=True, text=True, env=environment).stdout


@pytest.fixture
def no_images() -> Iterator[None]:
    yield
    buildah("rmi", TAG)


def test_a_bundle_and_a_dockerfile_are_written(bundle: Bundle, tmp_path: Path) -> None:
    context = tmp_path / "context"
    result = run(bundle.path, "-t", "registry.example:5000/cats:1", "--context", context, "--no-build")
    assert result.exit_code == 0, result.output
    assert f"build it with: docker build -t registry.example:5000/cats:1 {context}" in " ".join(result.output.split())
    assert open_bundle(context / "bundle").manifest == bundle.manifest
    lines = (context / "Dockerfile").read_text().splitlines()
    assert f"ARG BASE=vitserve:{__version__}-cpu" in lines
    assert "ENV VITSERVE_BUNDLE=/models/bundle" in lines
    assert all(path.stat().st_mode & 0o004 for path in context.rglob("bundle/*")), "another user reads it"
    again = run(bundle.path, "-t", "cats", "--context", context, "--no-build")
    assert again.exit_code == 0, again.output
    (context / "secret.txt").write_text("not for the image")
    rejected = run(bundle.path, "-t", "cats", "--context", context, "--no-build")
    assert rejected.exit_code == 2
    assert "has other files (secret.txt)" in rejected.output


def test_a_checkpoint_is_exported_first(tmp_path: Path) -> None:
    result = run("random:one-block/4", "-t", "cats", "--context", tmp_path / "context", "--no-build")
    assert result.exit_code == 0, result.output
    assert open_bundle(tmp_path / "context" / "bundle").manifest.variant == "one-block/4"


def test_a_builder_that_is_missing_or_fails_is_reported(bundle: Bundle, tmp_path: Path) -> None:
    missing = run(bundle.path, "-t", "cats", "--context", tmp_path / "a", "--builder", "podman", PATH=str(tmp_path))
    assert missing.exit_code == 2
    assert "podman is not installed" in missing.output
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    path = f"{program.parent}:/usr/bin:/bin"
    failed = run(bundle.path, "-t", "cats", "--context", tmp_path / "b", "--builder", "docker", PATH=path)
    assert failed.exit_code == 2
    assert "failed; --base names the image of vitserve" in failed.output


@pytest.mark.skipif(shutil.which("buildah") is None, reason="buildah is not installed")
@pytest.mark.usefixtures("no_images")
def test_an_image_is_built(bundle: Bundle, tmp_path: Path) -> None:
    options = ("--context", tmp_path / "context", "--builder", "buildah", "--base", "scratch")
    result = run(bundle.path, "-t", TAG, *options, **STORE)
    assert result.exit_code == 0, result.output
    assert f"{TAG}: run it with: podman run" in result.output
    found = json.loads(buildah("inspect", "--type", "image", TAG))["OCIv1"]["config"]
    assert "VITSERVE_BUNDLE=/models/bundle" in found["Env"]
    assert found["Labels"]["org.opencontainers.image.title"] == bundle.manifest.name
