"""The servers that the HTTP benchmark compares: two checkouts of vitserve, Triton, and plain FastAPI."""

from __future__ import annotations

import argparse
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.http import photos
from benchmarks.http.models import one_block
from benchmarks.http.results import Results
from benchmarks.http.scenarios import Scenario, Target
from benchmarks.processes import ServerFailedError
from benchmarks.servers import (
    Server,
    ServerUnavailableError,
    Setup,
    check_checkout,
    running,
    server_under_test,
    vitserve_server,
)
from vitserve.model.bundle.bundle import open_bundle

CHECKOUTS, PEERS = ("new", "old"), ("triton", "plain")
PEER_THREADS = 1  # more threads make a network of one block slower


@contextmanager
def running_targets(scenario: Scenario, options: argparse.Namespace, found: Results) -> Iterator[list[Target]]:
    """Starts the servers of a scenario. The reason for each that is missing is added to the results."""
    targets = []
    with ExitStack() as stack:
        for name in options.servers:
            if name in PEERS and not scenario.has_peers:
                continue
            try:
                server = _server(name, scenario, options)
                started = stack.enter_context(running(server, photos.thumbnail()))
            except (ServerUnavailableError, ServerFailedError) as error:
                found.skipped[name] = str(error)
            else:
                found.titles[name] = server.title
                targets.append(Target(name, server, started))
        yield targets


def _server(name: str, scenario: Scenario, options: argparse.Namespace) -> Server:
    """Raises ServerUnavailableError."""
    if name in PEERS:
        bundle, graph = one_block(options.models)
        size = open_bundle(bundle).manifest.preprocessing.image_size
        setup = Setup(open_bundle(bundle), graph, size, PEER_THREADS, environments_dir=options.environments.resolve())
        server = server_under_test(name, setup)
        return replace(server, title=server.title.partition(" + ")[0])  # they all run ONNX Runtime in float32
    checkout: Path | None = getattr(options, name)
    if checkout is None:
        raise ServerUnavailableError(f"no checkout was given (--{name})")
    directory = checkout.resolve()
    further = shlex.split(f"{options.serve} {getattr(options, f'{name}_serve')}")
    serve_options = [*_bundle_options(scenario, options), *scenario.serve_options, *further]
    server = vitserve_server(_title(name, directory), directory, serve_options)
    check_checkout(server)
    return server


def _bundle_options(scenario: Scenario, options: argparse.Namespace) -> list[str]:
    """Raises ServerUnavailableError if the bundle was not given."""
    if scenario.model == "default":
        return []
    if scenario.model == "one-block":
        return ["--bundle", str(one_block(options.models)[0])]
    if options.bundle is None:
        raise ServerUnavailableError("the scenario needs a bundle of ViT-B/16 in int8 (--bundle)")
    return ["--bundle", str(options.bundle.resolve()), "--precision", "int8"]


def _title(name: str, checkout: Path) -> str:
    """The other checkout is named by its commit."""
    if name == "new":
        return "vitserve"
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"vitserve {done.stdout.strip() or checkout.name}"
