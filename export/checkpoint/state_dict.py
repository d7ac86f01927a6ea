"""Reads the tensors of a checkpoint file and loads them into a network. Never executes code from the file.

Formats: safetensors, numpy's .npz, and torch files that torch's restricted unpickler accepts.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vitserve.export.checkpoint.errors import CheckpointError

_MAX_NAMES = 5  # tensor names listed in an error message
_WRAPPERS = ("state_dict", "model")  # keys under which training scripts save the weights


class Tensors:
    """A checkpoint's tensors by their original names. Each is taken once; the remaining ones are unexpected."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self._named = dict(named)

    def __contains__(self, name: str) -> bool:
        return name in self._named

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises CheckpointError if the tensor is missing."""
        return tuple(self._get(name).shape)

    def take(self, name: str) -> Tensor:
        """Removes and returns a tensor. Raises CheckpointError if it is missing."""
        tensor = self._get(name)
        del self._named[name]
        return tensor

    def count(self, pattern: str, first: int = 0) -> int:
        """How many of ``pattern.format(first)``, ``pattern.format(first + 1)`` … exist in sequence."""
        number = first
        while pattern.format(number) in self._named:
            number += 1
        return number - first

    def take_all(self) -> dict[str, Tensor]:
        """Takes all remaining tensors, for a format that uses our parameter names."""
        named, self._named = self._named, {}
        return named

    def ignore(self, *names: str) -> None:
        """Drops tensors that classification does not use."""
        for name in names:
            self._named.pop(name, None)

    def expect_nothing_more(self) -> None:
        """Raises CheckpointError naming the remaining tensors."""
        if self._named:
            names = _first_names(f"{name} {list(tensor.shape)}" for name, tensor in self._named.items())
            raise CheckpointError(f"unexpected tensors: {names}")

    def _get(self, name: str) -> Tensor:
        if name not in self._named:
            raise CheckpointError(f"missing tensor: {name}")
        return self._named[name]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the file, floating-point ones in float32. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if path.suffix == ".npz":
        named = _from_npz(path)
    elif path.suffix == ".safetensors" or magic[:2] not in (b"PK", b"\x80\x02"):
        named = _from_safetensors(path)
    else:
        named = _from_torch(path)
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in named.items()}


def fill(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads the weights. Raises CheckpointError naming the missing, unexpected and misshapen tensors, with shapes."""
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    actual = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    faults = {
        "missing": [f"{name} {list(shape)}" for name, shape in expected.items() if name not in actual],
        "unexpected": [f"{name} {list(shape)}" for name, shape in actual.items() if name not in expected],
        "wrong shape": [
            f"{name} is {list(actual[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if actual.get(name, shape) != shape
        ],
    }
    if any(faults.values()):
        details = "; ".join(f"{kind}: {_first_names(names)}" for kind, names in faults.items() if names)
        raise CheckpointError(f"the weights do not fit the network; {details}")
    network.load_state_dict(weights, strict=True)


def _first_names(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _MAX_NAMES} more" if len(listed) > _MAX_NAMES else ""
    return ", ".join(listed[:_MAX_NAMES]) + more


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def _from_torch(path: Path) -> dict[str, Tensor]:
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} contains a pickle with more than tensors, which is not executed: {str(error).splitlines()[0]}"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated or not a torch file: {error}") from error
    for wrapper in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path} is not a state dict, a mapping of names to tensors")
    return loaded


def _from_npz(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                _check_claimed_size(archive, member)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is not an archive of numeric arrays: {error}") from error


def _check_claimed_size(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raises ValueError if an array's header claims more bytes than the file has: numpy allocates what it claims."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read(file)
    claimed = int(np.prod(shape, dtype=np.float64)) * kind.itemsize
    if kind.hasobject:
        raise ValueError(f"{member.filename} contains Python objects, which are not loaded")
    if not claimed <= member.file_size or member.file_size > 1000 * max(1, member.compress_size):
        raise ValueError(f"{member.filename} claims {claimed:,} bytes but has {member.compress_size:,}")
