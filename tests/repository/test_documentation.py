"""The commands in the documents run, the responses that they show have the shape of real ones, and their links resolve.

Commands run in a directory with the files that the documents name: examples, my-bundle, my-checkpoint, and so on.
Only the address of the server is replaced, and measurements are shortened (SHORTER).
tests/deploy/test_examples.py runs the commands of examples/README.md, and tests/client the programs of docs/clients.md.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from tests.support.documents import anchors, code_blocks, links, markdown_files, named_files, prose
from tests.support.images import encoded, random_image
from tests.support.networks import TINY, network
from tests.support.paths import ROOT
from tests.support.server import Server, start_server
from vitserve import __version__
from vitserve.cli.main import app
from vitserve.export.cache import cached_bundle
from vitserve.model.bundle.bundle import Bundle

DOCUMENTS = ("README.md", "docs/quickstart.md", "docs/clients.md", "examples/images/README.md")
ADDRESS = "http://127.0.0.1:8000"
ADMIN_KEY = "at-least-16-characters"  # as the quickstart sets it

# Options added to commands that measure: what they compute does not change, only for how long.
SHORTER = {
    "vitserve tune": "--seconds 0.01 --max-batch 1",
    "vitserve verify": "--seconds 0.01 --rounds 1 --batch-sizes 1",
    "vitserve bench my-bundle": "--seconds 0.01 --rounds 1 --batch-sizes 1",
    "vitserve bench http:": "--seconds 0.05 --warm-up-seconds 0",
    "vitserve train": "--epochs 1 --device cpu",
}

_INSTALLS = "needs a package index"
_HUB = "needs the Hugging Face hub; tests/export/checkpoint downloads from a local one"
_GENERATES = "tests/client/test_generated.py runs it, with the marker slow"
_DOCKER = "needs Docker; tests/deploy compares docker-compose.yml with the code"
NOT_RUN = {
    "pip install .": _INSTALLS,
    'pip install ".[export]"': _INSTALLS,
    'pip install ".[export,int8]"': _INSTALLS,
    "pip install torch --index-url https://download.pytorch.org/whl/cpu": _INSTALLS,
    'pip install ".[client]"': _INSTALLS,
    "pip install --no-deps .": _INSTALLS,
    "pip install httpx": _INSTALLS,
    "openapi-python-client generate --url http://127.0.0.1:8000/openapi.json": _GENERATES,
    "npx openapi-typescript http://127.0.0.1:8000/openapi.json --output vitserve.d.ts": _GENERATES,
    (
        "openapi-generator-cli generate -g go -i http://127.0.0.1:8000/openapi.json -o vitserve-go "
        "--package-name vitserve --git-user-id example --git-repo-id vitserve-go"
    ): _GENERATES,
    "vitserve serve hf:google/vit-base-patch16-224": _HUB,
    "vitserve serve timm:vit_small_patch16_224.augreg_in21k_ft_in1k": _HUB,
    "vitserve export my-checkpoint --output my-bundle --precision int8 --images photos": (
        "calibrates for a minute; tests/export exports int8"
    ),
    "docker compose up": _DOCKER,
    "VITSERVE_BUNDLE_DIR=$PWD/my-bundle docker compose up": _DOCKER,
}


@dataclass(frozen=True)
class Response:
    """A curl command, with the JSON that a document shows below it."""

    command: str
    shown: Any


def text_of(document: str) -> str:
    path = ROOT / document
    return path.read_text() if path.exists() else ""  # test_documents_exist reports it


def commands() -> list[str]:
    """Every command of the documents, once."""
    blocks = [block for document in DOCUMENTS for block in code_blocks(text_of(document)) if block.is_shell]
    return list(dict.fromkeys(command for block in blocks for command in block.commands))


def responses() -> list[Response]:
    pairs = []
    for document in DOCUMENTS:
        blocks = code_blocks(text_of(document))
        for before, block in pairwise(blocks):
            if block.language == "json" and before.is_shell and before.commands[-1].startswith("curl"):
                pairs.append(Response(before.commands[-1], json.loads(block.text)))
    return pairs


def commands_of(*programs: str) -> list[str]:
    pattern = rf"(\w+=\S+ )*({'|'.join(programs)})\b"
    return [command for command in commands() if command not in NOT_RUN and re.match(pattern, command)]


@pytest.fixture
def directory(tmp_path: Path, bundle: Bundle, transformers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the files that the documents name. Its tuning results are not used by other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copy(ROOT / "README.md", tmp_path)
    if (ROOT / "examples").exists():  # test_documents_exist reports it
        shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "photos").mkdir()
    for index in range(4):
        (tmp_path / f"photos/{index}.jpg").write_bytes(encoded(random_image(seed=index), "JPEG"))
    for index in range(8):
        path = tmp_path / "my-images" / ("cat" if index % 2 else "dog") / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(random_image(seed=index), "JPEG"))
    shutil.copytree(bundle.path, tmp_path / "my-bundle")
    for name in ("my-model", "runs/mine"):
        (tmp_path / name).mkdir(parents=True)
        save_trained(tmp_path / name / "weights.safetensors")
    save_transformers(transformers, tmp_path / "my-checkpoint")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save_trained(path: Path) -> None:
    """As `vitserve train` writes it."""
    metadata = {"config": vars(TINY), "labels": list("abcdefg"), "mean": [0.5] * 3, "std": [0.5] * 3}
    weights = {name: tensor.contiguous() for name, tensor in network(TINY).state_dict().items()}
    save_file(weights, path, {name: json.dumps(value) for name, value in metadata.items()})


def save_transformers(transformers: ModuleType, path: Path) -> None:
    """A small ViT as Transformers writes it."""
    sizes = {"image_size": 32, "patch_size": 16, "hidden_size": 32, "intermediate_size": 64}
    torch.manual_seed(0)  # the same network for each command, which is then traced once
    config = transformers.ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_labels=5)
    transformers.ViTForImageClassification(config).save_pretrained(path)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(path)


@pytest.fixture(scope="module")
def running_server() -> Iterator[Server]:
    """The default model, as `vitserve serve` without a source serves it."""
    running = start_server(environment={"VITSERVE_ADMIN_KEY": ADMIN_KEY})
    yield running
    assert running.stop() == 0


def curl(command: str, server: Server, directory: Path) -> subprocess.CompletedProcess[str]:
    """Runs the command; its status is 22 if the server responds with an error."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (directory / ".curlrc").write_text("fail-with-body\nsilent\n")
    script = command.replace(ADDRESS, server.url)
    environment = os.environ | {"CURL_HOME": str(directory)}
    return subprocess.run(
        ["bash", "-c", script], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


def has_shape(shown: Any, real: Any) -> bool:
    """Whether both have the same keys and types all the way down; of a list, the first element counts."""
    if isinstance(shown, dict) and isinstance(real, dict):
        return shown.keys() == real.keys() and all(has_shape(shown[key], real[key]) for key in shown)
    if isinstance(shown, list) and isinstance(real, list):
        return not shown or not real or has_shape(shown[0], real[0])
    return type(shown) is type(real)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_exist(document: str) -> None:
    assert (ROOT / document).is_file()


def test_every_command_is_run_or_listed() -> None:
    tested = commands_of("make", "curl", "vitserve")
    assert set(commands()) == {*tested, *NOT_RUN}, "run the command in a test, or give the reason in NOT_RUN"


@pytest.mark.parametrize("command", commands_of("make"))
def test_make_targets_exist(command: str) -> None:
    subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, check=True)


@pytest.mark.parametrize("command", commands_of("curl"))
def test_curl_commands_run(command: str, running_server: Server, directory: Path) -> None:
    shown = [response.shown for response in responses() if response.command == command]
    result = curl(command, running_server, directory)
    expected = 22 if any("code" in response for response in shown) else 0
    assert result.returncode == expected, result.stdout + result.stderr
    for response in shown:
        assert has_shape(response, json.loads(result.stdout)), result.stdout


@pytest.mark.parametrize("command", commands_of("vitserve serve"))
def test_serve_commands_become_ready(command: str, directory: Path) -> None:
    """Sources are exported beforehand: tests/export/test_cache.py has a server that exports its source."""
    assignments, _, arguments = command.rpartition("vitserve serve")
    environment = dict(assignment.split("=", 1) for assignment in assignments.split())
    paths = [str(directory / part) if (directory / part).exists() else part for part in shlex.split(arguments)]
    for source in paths:
        if source in (str(directory / "my-checkpoint"), str(directory / "my-model/weights.safetensors")):
            cached_bundle(source, __version__)
    assert start_server(*paths, environment=environment).stop() == 0


@pytest.mark.parametrize("command", [command for command in commands_of("vitserve") if "vitserve serve" not in command])
def test_vitserve_commands_run(command: str, running_server: Server, directory: Path) -> None:
    shorter = [options for start, options in SHORTER.items() if command.startswith(start)]
    words = shlex.split(" ".join([command, *shorter]).replace(ADDRESS, running_server.url))
    result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("path", markdown_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path: Path) -> None:
    for link in links(path.read_text()):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("path", markdown_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(path: Path) -> None:
    assert [name for name in named_files(path.read_text()) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_code_blocks_are_fenced_and_name_their_language(document: str) -> None:
    text = text_of(document)
    assert all(block.language for block in code_blocks(text))
    assert "```" not in prose(text)
    assert not re.search(r"^(    |\t)(?![-*\d ])", prose(text), re.MULTILINE), "an indented code block"


def test_the_site_lists_every_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    pages = set(re.findall(r"[\w-]+\.md", navigation))
    assert pages == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_a_response_of_another_shape_is_noticed() -> None:
    shown = {"results": [{"predictions": [{"label": "cat", "index": 3}]}], "rejected": []}
    assert has_shape(shown, {"results": [{"predictions": [{"label": "dog", "index": 5}]}], "rejected": ["x"]})
    assert not has_shape(shown, {"results": [{"predictions": [{"label": "dog", "class": 5}]}], "rejected": []})
    assert not has_shape(shown, {"results": [{"predictions": [{"label": 5, "index": 5}]}], "rejected": []})
