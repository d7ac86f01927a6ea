"""Fixtures of the checkpoint tests: a fixed seed, and a hub on loopback with a client machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.hub_client import ClientMachine
from tests.support.hub_server import HubServer


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def machine(hub: HubServer, tmp_path: Path) -> ClientMachine:
    return ClientMachine(tmp_path, hub.url)


@pytest.fixture
def offline_machine(tmp_path: Path) -> ClientMachine:
    """A machine with the same cache, whose hub has closed its port."""
    with HubServer() as server:
        return ClientMachine(tmp_path, server.url)
