"""The servers that benchmarks.compare compares: how to start each one, and its requests and responses."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import ServerFailedError, StartedServer, free_port, process_tree
from vitserve.bench.client import Client, ConnectionGoneError, NoResponseError
from vitserve.bench.request import EncodedImage, multipart, open_inference, raw
from vitserve.model.bundle.bundle import Bundle

ROOT = Path(__file__).parent.parent
PEERS_DIR = ROOT / "benchmarks" / "peers"
ENVIRONMENTS_DIR = ROOT / "runs" / "peers"  # of the peers' virtual environments

RequestFormat = Callable[[EncodedImage], bytes]
ResponseFormat = Callable[[Any], int]  # from the response's JSON to the index of the most probable class


class ServerUnavailableError(RuntimeError):
    """A server cannot be measured here. The message says what is missing."""


@dataclass(frozen=True)
class Server:
    title: str
    command: Sequence[str]
    port: int
    request: RequestFormat
    predicted_class: ResponseFormat
    directory: Path = ROOT
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """The common parts of all servers."""

    bundle: Bundle
    graph: Path  # the plain graph of the same network, for the peers
    image_size: int
    peer_threads: int
    peers_dir: Path = PEERS_DIR
    environments_dir: Path = ENVIRONMENTS_DIR
    serve_options: Sequence[str] = ()  # additional options of `vitserve serve`


@dataclass(frozen=True)
class Peer:
    """A server of another project. Its command and port are fixed by its script in benchmarks/peers/."""

    title: str
    environment: str  # name of its virtual environment; empty: the current one
    port: int
    command: str  # {bin} is the directory of the environment's programs, {peers} the one of the scripts
    request: RequestFormat
    predicted_class: ResponseFormat
    variables: Mapping[str, str] = field(default_factory=dict)


def vitserve_class(response: Any) -> int:
    return int(response["results"][0]["predictions"][0]["index"])


def _first_label(response: Any) -> int:
    return int(response["predictions"][0]["label"])


def _largest_logit(response: Any) -> int:
    logits = response["outputs"][0]["data"]
    return int(logits.index(max(logits)))


def _post_predict(image: EncodedImage) -> bytes:
    return raw("/predict", image)


def _post_tensor(image: EncodedImage) -> bytes:
    return open_inference("/v2/models/vit/infer", image, "image", "logits")


def _post_request_field(image: EncodedImage) -> bytes:
    return multipart("/predict", image, "request")


def _post_image_field(image: EncodedImage) -> bytes:
    return multipart("/classify", image, "image")


_UVICORN = "{bin}/python -m uvicorn plain_fastapi:app --port 8104 --no-access-log --log-level error"
_TRITON = "{peers}/tritonserver/run"
_BENTOML = "{bin}/bentoml serve bento:Direct --port 8102"
PEERS = {
    "plain": Peer("plain FastAPI + ONNX Runtime fp32", "", 8104, _UVICORN, _post_predict, _first_label),
    "triton": Peer("Triton + ONNX Runtime fp32", "triton", 8105, _TRITON, _post_tensor, _largest_logit),
    "triton-openvino": Peer(
        "Triton + OpenVINO bf16", "triton", 8105, _TRITON, _post_tensor, _largest_logit, {"ENGINE": "openvino"}
    ),
    "litserve": Peer(
        "LitServe + ONNX Runtime fp32",
        "litserve",
        8101,
        "{bin}/python lit.py",
        _post_request_field,
        _first_label,
    ),
    "bentoml": Peer("BentoML + ONNX Runtime fp32", "bentoml", 8102, _BENTOML, _post_image_field, _first_label),
    "ray": Peer("Ray Serve + ONNX Runtime fp32", "ray", 8103, "{bin}/python ray_serve.py", _post_predict, _first_label),
}
NAMES = ("vitserve-fp32", "vitserve-bf16", "vitserve-int8", *PEERS)


def server_under_test(name: str, setup: Setup) -> Server:
    """Raises ServerUnavailableError, and ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"unknown server {name!r}; the servers are {', '.join(NAMES)}")
    if name in PEERS:
        return _peer(PEERS[name], setup)
    precision = name.removeprefix("vitserve-")
    if precision not in {artifact.precision for artifact in setup.bundle.manifest.artifacts}:
        raise ServerUnavailableError(f"the bundle has no {precision}")
    options = ["--bundle", str(setup.bundle.path.resolve()), "--precision", precision, "--timeout-ms", "60000"]
    return vitserve_server(f"vitserve {precision}", ROOT, [*options, *setup.serve_options])


def vitserve_server(title: str, checkout: Path, options: Sequence[str]) -> Server:
    """`vitserve serve` of a checkout, whatever version of vitserve is installed."""
    port = free_port()
    command = [sys.executable, "-m", "vitserve", "serve", "--port", str(port), "--log-level", "warning", *options]
    variables = {"PYTHONPATH": str(checkout)}
    return Server(title, command, port, post_classify, vitserve_class, checkout, variables)


def check_checkout(server: Server) -> None:
    """Raises ServerFailedError unless vitserve is imported from the checkout."""
    command = [sys.executable, "-c", "import vitserve; print(vitserve.__file__)"]
    environment = os.environ | server.environment
    done = subprocess.run(command, cwd=server.directory, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or server.directory not in Path(done.stdout.strip()).parents:
        reason = done.stdout.strip() or done.stderr.strip()[-500:]
        raise ServerFailedError(f"vitserve is not imported from {server.directory}: {reason}")


def post_classify(image: EncodedImage) -> bytes:
    return raw("/v1/classify", image)


def _peer(peer: Peer, setup: Setup) -> Server:
    environment = setup.environments_dir / peer.environment if peer.environment else Path(sys.prefix)
    binaries = environment / "bin"
    if not (binaries / "python").exists():
        raise ServerUnavailableError(f"virtual environment not found: {peer.environment} (see benchmarks/peers/)")
    variables = {
        "MODEL": str(setup.graph),
        "SIZE": str(setup.image_size),
        "THREADS": str(setup.peer_threads),
        "VENV": str(environment),
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        **peer.variables,
    }
    command = [word.format(bin=binaries, peers=setup.peers_dir) for word in peer.command.split()]
    return Server(peer.title, command, peer.port, peer.request, peer.predicted_class, setup.peers_dir, variables)


@contextmanager
def running(server: Server, image: EncodedImage) -> Iterator[StartedServer]:
    """Starts the server and yields as soon as it responds to the image with status 200. Raises ServerFailedError."""

    def responds() -> bool:
        return asyncio.run(_predict(server, image)) is not None

    with process_tree(server.command, server.directory, server.environment, server.port, responds) as started:
        yield started


def predictions(server: Server, images: Sequence[EncodedImage]) -> list[int]:
    """The class that a running server predicts for each image. Raises ServerFailedError."""
    classes = []
    for image in images:
        predicted = asyncio.run(_predict(server, image))
        if predicted is None:
            raise ServerFailedError("it did not classify one of the images with known classes")
        classes.append(predicted)
    return classes


async def _predict(server: Server, image: EncodedImage) -> int | None:
    client = Client("127.0.0.1", server.port)
    try:
        response = await client.send(server.request(image))
    except (ConnectionGoneError, NoResponseError):
        return None
    finally:
        client.close()
    return server.predicted_class(json.loads(response.body)) if response.status == 200 else None


def is_ready(port: int) -> bool:
    """Whether vitserve on this port reports that it is ready."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
