"""The library that a checkpoint comes from, and how it builds the network itself.

Its network is the reference for our own, and is exported if we have none. Needed at export only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from vitserve.export.checkpoint.errors import CheckpointError

# Keys that say how often a part of the network is repeated.
_REPEATED = re.compile(r"depths?$|^(num_)?(hidden_|encoder_|decoder_)?(layers|blocks)$|^n_layer$")
Build = Callable[[tuple[int, int]], nn.Module]


class LibraryMissingError(CheckpointError):
    """The library is not installed, or cannot be imported."""


@dataclass(frozen=True)
class Owner:
    library: str  # the name of its distribution
    build: Build  # (height, width) in pixels → the network in evaluation mode. Raises CheckpointError

    @property
    def name(self) -> str:
        """With the installed version."""
        try:
            return f"{self.library} {version(self.library)}"
        except PackageNotFoundError:
            return self.library


class Logits(nn.Module):
    """Images [n, channels, H, W] → logits [n, classes], whatever object the library's network returns."""

    def __init__(self, network: nn.Module, arguments: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.network, self.arguments = network.eval().requires_grad_(False), dict(arguments or {})

    def forward(self, images: Tensor) -> Tensor:
        output = self.network(images, **self.arguments)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits


class Embedding(nn.Module):
    """Images [n, channels, H, W] → embedding [n, width] of a base model of Transformers.

    It is the ``pooler_output`` if the network has one, else the first token of the last layer.
    """

    def __init__(self, network: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.network, self.arguments = network.eval().requires_grad_(False), dict(arguments)

    def forward(self, images: Tensor) -> Tensor:
        output = self.network(images, **self.arguments)
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        embedding: Tensor = output.last_hidden_state[:, 0] if pooled is None else pooled
        return embedding.flatten(1)


class Reversed(nn.Module):
    """RGB images → the logits of a network that takes BGR."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.flip(1))
        return logits


def missing(library: str, error: BaseException) -> LibraryMissingError:
    """The error for a library that cannot be imported."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    extra = "timm" if library == "torchvision" else library
    return LibraryMissingError(f"{library} is required ({reason}): pip install 'vitserve[{extra}]'")


def check_fit(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError naming the tensors that do not fit the library's network, with their shapes."""
    faults = {
        "missing": [f"{name} {list(tensor.shape)}" for name, tensor in expected.items() if name not in actual],
        "unexpected": [f"{name} {list(tensor.shape)}" for name, tensor in actual.items() if name not in expected],
        "wrong shape": [
            f"{name} is {list(actual[name].shape)}, expected {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in actual and actual[name].shape != tensor.shape
        ],
    }
    if any(faults.values()):
        details = "; ".join(f"{kind}: {_first(names)}" for kind, names in faults.items() if names)
        raise CheckpointError(f"the weights do not fit the library's network; {details}")


def check_repeats(arguments: Mapping[str, Any], tensors: int, name: str) -> None:
    """A configuration cannot make a library build more layers than there are tensors. ``name`` is for messages.

    Raises CheckpointError.
    """
    for key, value in arguments.items():
        if isinstance(value, dict) and key.endswith("_config"):
            check_repeats(value, tensors, f"{key} in {name}")
        numbers = value if isinstance(value, list | tuple) else [value]
        if _REPEATED.search(key) and any(isinstance(number, int) and number > max(tensors, 1) for number in numbers):
            raise CheckpointError(f"{key} in {name} is {value}, but the weights have {tensors} tensors")


def check_finite(named: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError naming a tensor with NaN or infinity."""
    for name, tensor in named.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"the weights are damaged: {name} has values that are NaN or infinite")


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
