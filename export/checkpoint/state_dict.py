"""Reads the tensors of anybody's checkpoint file and puts them into a network, executing nothing that the file holds.

Safetensors, numpy's .npz, and torch's own files as far as torch's restricted unpickler reads them.
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

_SHOWN = 5  # names in a message; of a thousand wrong ones, the first tell what happened
_WRAPPERS = ("state_dict", "model")  # keys under which training scripts put the weights


class CheckpointError(ValueError):
    """The file is not a checkpoint that can be exported."""


class Tensors:
    """A checkpoint's tensors under their foreign names. Each is taken once, so that what is left over was not expected."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self._named = dict(named)

    def __contains__(self, name: str) -> bool:
        return name in self._named

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises CheckpointError where it is missing."""
        return tuple(self._look(name).shape)

    def take(self, name: str) -> Tensor:
        """Raises CheckpointError where it is missing."""
        tensor = self._look(name)
        del self._named[name]
        return tensor

    def count(self, pattern: str, first: int = 0) -> int:
        """How many of ``pattern.format(first)``, ``pattern.format(first + 1)`` … are there."""
        number = first
        while pattern.format(number) in self._named:
            number += 1
        return number - first

    def rest(self) -> dict[str, Tensor]:
        """Takes all that is left, for a source whose names are ours."""
        named, self._named = self._named, {}
        return named

    def ignore(self, *names: str) -> None:
        """What is known to be of no use for classifying."""
        for name in names:
            self._named.pop(name, None)

    def expect_nothing_more(self) -> None:
        """Raises CheckpointError naming what is left."""
        if self._named:
            raise CheckpointError(
                f"unexpected: {_some(f'{name} {list(tensor.shape)}' for name, tensor in self._named.items())}"
            )

    def _look(self, name: str) -> Tensor:
        if name not in self._named:
            raise CheckpointError(f"missing: {name}")
        return self._named[name]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file, floating ones in float32. Raises CheckpointError."""
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
    """Raises CheckpointError naming every tensor that is missing, unexpected or misshapen, with both shapes."""
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    faults = {
        "missing": [f"{name} {list(shape)}" for name, shape in wanted.items() if name not in given],
        "unexpected": [f"{name} {list(shape)}" for name, shape in given.items() if name not in wanted],
        "misshapen": [
            f"{name} is {list(given[name])} and should be {list(shape)}"
            for name, shape in wanted.items()
            if given.get(name, shape) != shape
        ],
    }
    if any(faults.values()):
        raise CheckpointError(
            "the weights do not fit the network; "
            + "; ".join(f"{kind}: {_some(names)}" for kind, names in faults.items() if names)
        )
    network.load_state_dict(weights, strict=True)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


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
            f"{path} holds more than tensors, and what else a pickle holds is not executed: {str(error).splitlines()[0]}"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated or not a file of torch: {error}") from error
    for wrapper in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path} is not a state dict: a name for each tensor, and nothing else")
    return loaded


def _from_npz(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                _check_claim(archive, member)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is not an archive of plain arrays: {error}") from error


def _check_claim(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """That an array's header claims as many bytes as are there: memory is taken by the claim."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read(file)
    claimed = int(np.prod(shape, dtype=np.float64)) * kind.itemsize
    if kind.hasobject:
        raise ValueError(f"{member.filename} holds objects, which only executing them would read")
    if not claimed <= member.file_size or member.file_size > 1000 * max(1, member.compress_size):
        raise ValueError(f"{member.filename} claims {claimed:,} bytes; {member.compress_size:,} are there")
