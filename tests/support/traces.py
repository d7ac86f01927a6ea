"""Traced graphs, kept for the whole run: a second export of the same network copies the graph of the first.

Tracing takes a second or two, nine tenths of an export of a tiny network. Half of the exports are of a network that
another test has exported before.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from vitserve.export import torch_model
from vitserve.export.graph.optimize import OptimizedNetwork
from vitserve.export.graph.trace import trace
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.network.build import Network

_MODULE = vars(nn.Module())  # what every module has


@contextmanager
def traces_in(directory: Path) -> Iterator[None]:
    """Exports inside the ``with`` block keep their graphs in ``directory``. Several processes may use it at once."""

    trace_now = trace

    def kept_trace(network: nn.Module, shape: int | tuple[int, int, int], path: Path) -> None:
        if not isinstance(network, OptimizedNetwork):  # of another library, whose modules may hold anything
            trace_now(network, shape, path)
            return
        kept = directory / identity(network, shape)
        if not kept.exists():
            with tempfile.TemporaryDirectory(dir=directory) as temporary:
                made = Path(temporary) / "made"
                made.mkdir()
                trace_now(network, shape, made / path.name)
                with suppress(OSError):  # another process was faster
                    os.rename(made, kept)
        for file in kept.iterdir():
            shutil.copy(file, path.with_name(file.name))

    with pytest.MonkeyPatch.context() as patch:
        for user in (torch_model.__name__, __name__):
            patch.setattr(f"{user}.trace", kept_trace)
        # The exporter reads its table of operators again for each graph, which takes a fifth of the time.
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


def traced(network: Network, preprocessing: Preprocessing, path: Path) -> Path:
    """Writes the graph that an export of the network would write to ``path``. Returns ``path``."""
    optimized = OptimizedNetwork(network, preprocessing).eval()
    trace(optimized, preprocessing.shape, path)
    return path


def identity(network: nn.Module, shape: int | tuple[int, int, int]) -> str:
    """Differs for networks that differ in a module, an attribute or a value."""
    digest = hashlib.sha256(f"{shape}".encode())
    for name, module in network.named_modules(remove_duplicate=False):
        attributes = {key: value for key, value in vars(module).items() if key not in _MODULE}
        digest.update(f"{name} {type(module)} {module.training} {attributes}".encode())
    tensors: list[tuple[str, Any]] = [*network.named_parameters(), *network.named_buffers()]
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()
