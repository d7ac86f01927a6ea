"""A network in torch as the source of a bundle, compared with the network of the library that trained it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.library.network import LibraryNetwork, unfuse
from vitserve.export.checkpoint.library.owner import LibraryMissingError, Owner
from vitserve.export.checkpoint.overrides import NetworkChoice
from vitserve.export.golden_images import open_graph, textures
from vitserve.export.graph.optimize import OptimizedNetwork
from vitserve.export.graph.passes import optimize_verified
from vitserve.export.graph.reference import ReferenceNetwork
from vitserve.export.graph.trace import trace
from vitserve.export.quantize.bf16_simulation import simulate_bf16
from vitserve.model.arrays import Outputs, Pixels
from vitserve.model.bundle.evaluation import in_batches
from vitserve.model.bundle.parity import TOLERANCE, compare
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import NetworkConfig
from vitserve.model.network.build import Network
from vitserve.model.network.vit import ViT

_BATCH = 16
_COMPARED = 4  # images on which our network is compared with the library's


@dataclass(frozen=True)
class TorchModel:
    """The SourceModel of one of our networks, or of a library's."""

    network: Network | LibraryNetwork
    preprocessing: Preprocessing
    architecture: str
    owner: nn.Module | None = None  # the library's network, images → logits
    reference: str = "vitserve"

    @property
    def config(self) -> NetworkConfig:
        return self.network.config

    def run(self, pixels: Pixels) -> Outputs:
        return _run(ReferenceNetwork(self.network, self.preprocessing, self.owner).eval(), pixels)

    def run_unmerged(self, pixels: Pixels) -> Outputs | None:
        network = unmerged(self.network)
        return None if network is self.network else _run(ReferenceNetwork(network, self.preprocessing).eval(), pixels)

    def run_bf16(self, pixels: Pixels) -> Outputs:
        return _run(simulate_bf16(ReferenceNetwork(self.network, self.preprocessing)).eval(), pixels)

    def write_graph(self, path: Path) -> None:
        if not isinstance(self.network, LibraryNetwork):
            trace(OptimizedNetwork(self.network, self.preprocessing).eval(), self.preprocessing.shape, path)
            return
        network = ReferenceNetwork(self.network, self.preprocessing).eval()
        try:
            trace(network, self.preprocessing.shape, path)
        except Exception as error:  # the errors of the exporter have no common base class
            if not unfuse(network):
                raise CheckpointError(f"torch cannot trace {self.architecture}: {_first_line(error)}") from error
            try:
                trace(network, self.preprocessing.shape, path)
            except Exception as second_error:
                raise CheckpointError(
                    f"torch cannot trace {self.architecture}: {_first_line(second_error)}"
                ) from second_error
        optimize_verified(path, self._is_equal)

    def _is_equal(self, graph: Path) -> bool:
        """Whether ONNX Runtime computes the network's outputs for two images with the graph."""
        pixels = textures(self.preprocessing.shape, 2)
        with open_graph(graph, len(pixels)) as run:
            return compare(run(pixels), self.run(pixels)).failure("fp32") is None


def torch_model(
    network: Network | LibraryNetwork,
    preprocessing: Preprocessing,
    architecture: str,
    owner: Owner | None,
    progress: Callable[[str], None],
    choice: NetworkChoice = "auto",
) -> TorchModel:
    """Builds the library's network, and compares ours with it.

    If they differ, the library's is exported, with a warning. Raises CheckpointError if ours was chosen, or if the
    library's was chosen and there is none.
    """
    original = unmerged(network)
    if original is not network:  # the library merges no tokens, so it is compared with the network before
        if torch_model(original, preprocessing, architecture, owner, progress, choice).network is not original:
            raise CheckpointError(f"--merge needs vitserve's form of {architecture}, and the library's is exported")
        return TorchModel(network, preprocessing, architecture)
    if isinstance(network, LibraryNetwork):
        return TorchModel(network, preprocessing, architecture, reference=network.config.library)
    if owner is None:
        if choice == "library":
            raise CheckpointError("--network library: no library has the network of this checkpoint")
        return TorchModel(network, preprocessing, architecture)
    if choice == "library":
        return _of_library(owner.build(preprocessing.shape[:2]), preprocessing, architecture, owner)
    try:
        library = owner.build(preprocessing.shape[:2])
    except LibraryMissingError as error:
        progress(f"note: the artifacts are compared with vitserve's form of the network only: {error}")
        return TorchModel(network, preprocessing, architecture)
    except CheckpointError as error:
        progress(f"warning: {owner.name} does not load the checkpoint, so it is not compared with it: {error}")
        return TorchModel(network, preprocessing, architecture)
    model = TorchModel(network, preprocessing, architecture, library, owner.name)
    pixels = textures(preprocessing.shape, _COMPARED)
    difference = _relative(TorchModel(network, preprocessing, architecture).run(pixels), model.run(pixels))
    if difference <= TOLERANCE["fp32"]:
        return model
    reason = f"vitserve's form of {architecture} differs from {owner.name} by {difference:.1e} of the largest logit"
    if choice == "ours":
        raise CheckpointError(f"--network ours: {reason}; allowed is {TOLERANCE['fp32']:.0e}")
    progress(f"warning: {reason}; the library's network is exported instead, without our optimizations")
    return _of_library(library, preprocessing, architecture, owner)


def unmerged(network: Network | LibraryNetwork) -> Network | LibraryNetwork:
    """The network without token merging, with the same weights. Itself if it merges no tokens."""
    return network if not isinstance(network, ViT) or not network.config.merge else merging(network, 0)


def merging(network: ViT, merge: int) -> ViT:
    """The network that merges so many tokens in each block, with the same weights. Raises ValueError."""
    copied = ViT(replace(network.config, merge=merge))
    copied.load_state_dict(network.state_dict())
    return copied.eval()


def _of_library(library: nn.Module, preprocessing: Preprocessing, architecture: str, owner: Owner) -> TorchModel:
    network = LibraryNetwork(library, owner.name, architecture, preprocessing.shape)
    return TorchModel(network, preprocessing, architecture, reference=owner.name)


def _run(network: nn.Module, pixels: Pixels) -> Outputs:
    def batch(part: Pixels) -> Outputs:
        with torch.inference_mode():
            logits, embedding = network(torch.from_numpy(part))
        return Outputs(logits.numpy(), embedding.numpy())

    return in_batches(batch, _BATCH)(pixels)


def _relative(actual: Outputs, expected: Outputs) -> float:
    if actual.logits.shape != expected.logits.shape:
        return float("inf")
    scale = max(float(np.abs(expected.logits).max()), 1e-12)
    difference = float(np.abs(actual.logits - expected.logits).max() / scale)
    return difference if np.isfinite(difference) else 0.0  # make_golden() reports NaN and infinity


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    lines = [line for line in str(cause).splitlines() if line.strip()] or [repr(cause)]
    return f"{type(cause).__name__}: {lines[0]}"
