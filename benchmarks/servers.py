"""The servers that benchmarks/compare.py compares: how each is started, asked and read."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import ServerFailedError, free_port, process_tree
from vitserve.bench.client import Client, ConnectionGoneError, NoResponseError
from vitserve.bench.request import Picture, multipart, open_inference, raw
from vitserve.model.bundle.bundle import Bundle

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Server:
    name: str
    command: Sequence[str]
    port: int
    request: Callable[[Picture], bytes]
    top: Callable[[Any], int]  # the most probable class's index, of the answer's JSON
    directory: Path = ROOT
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """What all of them serve, and with what."""

    bundle: Bundle
    graph: Path  # the plain graph of the same network, for the others
    image_size: int
    peers: Path | None  # the directory of the others' scripts
    work: Path  # the directory of their virtual environments
    peer_threads: int
    serve: Sequence[str] = ()  # further options of `vitserve serve`
    against: Path | None = None  # another checkout of vitserve


# Each peer's virtual environment, or "" for this one, and the port that its script names.
_PEERS = {
    "plain": ("", 8104),
    "triton": ("triton", 8105),
    "triton-openvino": ("triton", 8105),
    "litserve": ("litserve", 8101),
    "bentoml": ("bentoml", 8102),
    "ray": ("ray", 8103),
}
TITLES = {
    "plain": "plain FastAPI + ONNX Runtime fp32",
    "triton": "Triton + ONNX Runtime fp32",
    "triton-openvino": "Triton + OpenVINO bf16",
    "litserve": "LitServe + ONNX Runtime fp32",
    "bentoml": "BentoML + ONNX Runtime fp32",
    "ray": "Ray Serve + ONNX Runtime fp32",
}
NAMES = ("vitserve-fp32", "vitserve-bf16", "vitserve-int8", *_PEERS)


def server_under_test(name: str, setup: Setup) -> Server | str:
    """Or why it cannot take part."""
    precision = name.partition("-")[2]
    if name.startswith(("vitserve-", "against-")) and precision not in {
        each.precision for each in setup.bundle.manifest.artifacts
    }:
        return f"the bundle has no {precision}"
    if name.startswith("vitserve-"):
        return _vitserve(precision, setup, ROOT, "vitserve")
    if name.startswith("against-"):
        if setup.against is None:
            return "no other checkout was named (--against)"
        return _vitserve(precision, setup, setup.against, f"vitserve of {setup.against.name}")
    if name not in _PEERS:
        raise ValueError(f"there is no server {name!r}; known: {', '.join((*NAMES, 'against-fp32'))}")
    if setup.peers is None:
        return "the directory of its script was not named (--peers)"
    environment, port = _PEERS[name]
    venv = setup.work / environment if environment else Path(sys.prefix)
    if not (venv / "bin" / "python").exists():
        return f"it has no virtual environment: {environment} in the directory of --work"
    variables = {
        "MODEL": str(setup.graph),
        "SIZE": str(setup.image_size),
        "THREADS": str(setup.peer_threads),
        "VENV": str(venv),
    }
    variables["PATH"] = f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"
    if name.endswith("-openvino"):
        variables["ENGINE"] = "openvino"
    python = str(venv / "bin" / "python")
    commands: dict[str, tuple[list[str], Callable[[Picture], bytes], Callable[[Any], int]]] = {
        "plain": (
            [
                python,
                "-m",
                "uvicorn",
                "plain_fastapi:app",
                "--port",
                str(port),
                "--no-access-log",
                "--log-level",
                "error",
            ],
            lambda picture: raw("/predict", picture),
            _predictions,
        ),
        "triton": (
            [str(setup.peers / "tritonserver" / "run")],
            lambda picture: open_inference("/v2/models/vit/infer", picture, "image", "logits"),
            _tensor,
        ),
        "litserve": ([python, "lit.py"], lambda picture: multipart("/predict", picture, "request"), _predictions),
        "bentoml": (
            [str(venv / "bin" / "bentoml"), "serve", "bento:Direct", "--port", str(port)],
            lambda picture: multipart("/classify", picture, "image"),
            _predictions,
        ),
        "ray": ([python, "ray_serve.py"], lambda picture: raw("/predict", picture), _predictions),
    }
    command, request, top = commands[name.removesuffix("-openvino")]
    return Server(TITLES[name], command, port, request, top, setup.peers, variables)


def _vitserve(precision: str, setup: Setup, checkout: Path, title: str) -> Server:
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "vitserve",
        "serve",
        "--bundle",
        str(setup.bundle.path.resolve()),
        "--port",
        str(port),
        "--precision",
        precision,
    ]
    command += ["--log-level", "warning", "--timeout-ms", "60000", *setup.serve]
    return Server(
        f"{title} {precision}", command, port, lambda picture: raw("/v1/classify", picture), _results, checkout
    )


def _results(answer: Any) -> int:
    return int(answer["results"][0]["predictions"][0]["index"])


def _predictions(answer: Any) -> int:
    return int(answer["predictions"][0]["label"])


def _tensor(answer: Any) -> int:
    logits = answer["outputs"][0]["data"]
    return int(logits.index(max(logits)))


@contextmanager
def running(chosen: Server, first: Picture) -> Iterator[float]:
    """Yields as soon as it answers the picture with 200, with the seconds from its start. Raises Failed."""
    with process_tree(
        chosen.command,
        chosen.directory,
        chosen.environment,
        chosen.port,
        lambda: asyncio.run(_asked(chosen, first)) is not None,
    ) as seconds:
        yield seconds


def answers(chosen: Server, pictures: Sequence[Picture]) -> list[int]:
    """The class that a running server gives each picture. Raises Failed."""
    found = []
    for picture in pictures:
        top = asyncio.run(_asked(chosen, picture))
        if top is None:
            raise ServerFailedError("it did not answer an image that it had to classify")
        found.append(top)
    return found


async def _asked(chosen: Server, picture: Picture) -> int | None:
    client = Client("127.0.0.1", chosen.port)
    try:
        answer = await client.ask(chosen.request(picture))
    except (ConnectionGoneError, NoResponseError):
        return None
    finally:
        client.close()
    return chosen.top(json.loads(answer.body)) if answer.status == 200 else None
