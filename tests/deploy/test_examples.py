"""Every command of examples/README.md runs, except those that need Docker, a cluster or the internet."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import httpx
import pytest

from tests.support.images import encoded, random_image
from tests.support.paths import ROOT
from tests.support.server import Server

README = (ROOT / "examples" / "README.md").read_text()
NOT_RUN = {
    "sh examples/own_checkpoint.sh hf:google/vit-base-patch16-224 vit-base": "downloads from the Hugging Face hub",
    "sh examples/own_checkpoint.sh timm:vit_small_patch16_224.augreg_in21k_ft_in1k vit-small": "downloads from the hub",
    "docker compose up": "needs Docker",
    "VITSERVE_BUNDLE_DIR=$PWD/my-bundle docker compose up": "needs Docker",
    "kubectl apply -k k8s/examples/cpu -n my-namespace": "needs a cluster",
}
PAGE = "python examples/javascript/serve.py --port 8080"
CHECKPOINT = "sh examples/own_checkpoint.sh my-checkpoint my-bundle"


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def clients() -> list[str]:
    return [command for command in commands() if re.match(r"(sh examples/curl|python examples/client|node) ?", command)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A root directory with the examples, small images, and commands `python` and `vitserve` that run this checkout."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "examples" / "images").mkdir(exist_ok=True)
    for name in ("cat", "dog"):
        (tmp_path / "examples" / "images" / f"{name}.jpg").write_bytes(encoded(random_image(), "JPEG"))
    programs = {"python": "", "vitserve": "-m vitserve"}
    (tmp_path / "bin").mkdir()
    for name, arguments in programs.items():
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
        program.chmod(0o755)
    return tmp_path


def environment(directory: Path) -> dict[str, str]:
    path = f"{directory / 'bin'}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "VITSERVE_PORT": "0"}


def run(command: str, directory: Path) -> subprocess.CompletedProcess[str]:
    for program in ("curl", "kubectl", "node"):
        if program in command and shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    return subprocess.run(
        ["sh", "-c", command], cwd=directory, env=environment(directory), capture_output=True, text=True, check=False
    )


@contextmanager
def running(command: str, directory: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        shlex.split(command),
        cwd=directory,
        env=environment(directory),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def at(url: str, command: str) -> str:
    """The command of a client with the server's address."""
    if command.startswith("node"):
        return f"VITSERVE_URL={url} {command}"
    return f"{command} {url}" if "curl.sh" in command else f"{command} --url {url}"


def test_every_command_is_run_or_listed() -> None:
    rendered = [command for command in commands() if command.startswith("kubectl kustomize")]
    assert len(clients()) == 3
    assert set(commands()) == {*clients(), *rendered, PAGE, CHECKPOINT, *NOT_RUN}


def test_readme_links_to_existing_files() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / "examples" / target).exists() or target == "images", target


@pytest.mark.parametrize("command", clients())
def test_clients_print_predictions(command: str, server: Server, directory: Path) -> None:
    result = run(at(server.url, command), directory)
    assert result.returncode == 0, result.stdout + result.stderr
    assert str(classify(server.url, directory)[0]["label"]) in result.stdout


def classify(url: str, directory: Path) -> list[dict[str, object]]:
    image = (directory / "examples" / "images" / "cat.jpg").read_bytes()
    response = httpx.post(f"{url}/v1/classify", content=image, params={"top_k": 1}, timeout=60)
    predictions: list[dict[str, object]] = response.json()["results"][0]["predictions"]
    return predictions


@pytest.mark.parametrize("command", clients())
def test_clients_fail_for_a_file_that_is_not_an_image(command: str, server: Server, directory: Path) -> None:
    (directory / "examples" / "images" / "cat.jpg").write_text("not an image")
    result = run(at(server.url, command), directory)
    assert result.returncode != 0
    assert "not an image" in result.stdout + result.stderr


def test_page_is_served_and_its_requests_are_forwarded(server: Server, directory: Path) -> None:
    command = PAGE.replace("8080", "0") + f" --url {server.url}"
    with running(command, directory) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        page = httpx.get(url)
        assert "Classify an image" in page.text
        for module in re.findall(r'from "\./(\S+)"', page.text):
            assert httpx.get(f"{url}/{module}").headers["content-type"] == "text/javascript"
        assert classify(url, directory) == classify(server.url, directory)
        rejected = httpx.post(f"{url}/v1/classify", content=b"not an image")
        assert (rejected.status_code, rejected.json()["code"]) == (422, "not_an_image")
        assert httpx.post(f"{url}/v1/admin/reload").status_code == 404


@pytest.mark.slow
def test_own_checkpoint_is_exported_and_served(directory: Path, transformers: ModuleType) -> None:
    config = transformers.ViTConfig(
        image_size=32, patch_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.ViTForImageClassification(config).save_pretrained(directory / "my-checkpoint")
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(directory / "my-checkpoint")
    with running(CHECKPOINT, directory) as process:
        assert process.stdout is not None
        threading.Thread(target=process.stdout.read, daemon=True).start()
        server = Server(process)
        threading.Thread(target=server.read, daemon=True).start()
        server.url = server.wait_for(r"running on (http://[\d.:]+)")
        server.wait_for("vitserve.http_worker: ready")
        assert len(classify(server.url, directory)) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert (directory / "my-bundle" / "bundle.json").is_file()


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith("kubectl kustomize")])
def test_kubernetes_examples_render(command: str) -> None:
    assert "kind: Deployment" in run(command, ROOT).stdout
