"""The tensors of a checkpoint by name: read from its file, taken one by one, and loaded into a network.

Never executes code from a file. Formats: safetensors, numpy's .npz, and torch files (torch_file.py).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.files import fault_of, is_foreign_pickle, is_json
from vitserve.export.checkpoint.torch_file import TorchFile, read_torch_file
from vitserve.model.config import ResNetConfig, ViTConfig
from vitserve.model.network.build import Network, network_of

_MOST_NAMES = 5  # tensor names listed in a message
# Tensors that no network reads: weights of the loss, states of metrics, counters of weight averaging, indices.
_OF_TRAINING = re.compile(r"(^|[._])(\w*loss\w*|criterion\w*|metrics?|n_averaged|num_updates|position_ids)([._]|$)")


class Tensors:
    """A checkpoint's tensors by name. Each is taken once; the remaining ones are unexpected.

    ``notes`` has the decisions of the reader: tensors that were ignored, and the weights that were taken of several.
    """

    def __init__(self, named: Mapping[str, Tensor], notes: Iterable[str] = ()) -> None:
        self._named = dict(named)
        self.notes = list(notes)

    def __contains__(self, name: str) -> bool:
        return name in self._named

    def __len__(self) -> int:
        return len(self._named)

    def copy(self) -> dict[str, Tensor]:
        """The tensors that are not taken yet, as they are in the file, except those of the training."""
        return {name: tensor for name, tensor in self._named.items() if not _OF_TRAINING.search(name)}

    def names(self, prefix: str) -> list[str]:
        return [name for name in self._named if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises CheckpointError if the tensor is missing."""
        return tuple(self._get(name).shape)

    def shape_of(self, name: str, axes: int) -> tuple[int, ...]:
        """Raises CheckpointError if the tensor is missing or has another number of axes."""
        shape = self.shape(name)
        if len(shape) != axes:
            raise CheckpointError(f"{name} has shape {list(shape)}; expected are {axes} axes")
        return shape

    def take(self, name: str) -> Tensor:
        """Removes and returns a tensor, in float32.

        Raises CheckpointError if it is missing, holds NaN or infinity, or is not of floating-point numbers.
        """
        tensor = self._get(name)
        del self._named[name]
        return _checked(name, tensor)

    def count(self, pattern: str, first: int = 0) -> int:
        """The number of ``pattern.format(first)``, ``pattern.format(first + 1)`` … exist in sequence."""
        number = first
        while pattern.format(number) in self._named:
            number += 1
        return number - first

    def take_all(self) -> dict[str, Tensor]:
        """Takes all remaining tensors, for a format that uses our parameter names."""
        self.ignore_of_training()
        return {name: self.take(name) for name in list(self._named)}

    def rename(self, rename: Callable[[str], str]) -> None:
        self._named = {rename(name): tensor for name, tensor in self._named.items()}

    def ignore(self, *names: str) -> None:
        """Drops tensors that classification does not use, and that networks of this format usually have."""
        for name in names:
            self._named.pop(name, None)

    def ignore_of_training(self) -> None:
        """Drops the tensors of losses and metrics, with a note."""
        self._ignore([name for name in self._named if _OF_TRAINING.search(name)], "no network reads them")

    def ignore_others(self, reason: str) -> None:
        """Drops the remaining tensors, with a note that gives the ``reason``."""
        self._ignore(list(self._named), reason)

    def expect_nothing_more(self) -> None:
        """Raises CheckpointError naming the remaining tensors, except those of the training."""
        self.ignore_of_training()
        if self._named:
            raise CheckpointError(f"unexpected tensors: {_with_shapes(self._named)}")

    def _ignore(self, names: list[str], reason: str) -> None:
        if names:
            self.notes.append(f"ignored tensors: {_first_names(names)}: {reason}")
            self.ignore(*names)

    def _get(self, name: str) -> Tensor:
        if name not in self._named:
            raise CheckpointError(f"missing tensor: {name}")
        return self._named[name]


def read_tensors(path: Path) -> TorchFile:
    """The file's tensors in their groups; files other than torch's have one group, "". Raises CheckpointError."""
    try:
        fault = fault_of(path)
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if fault is not None:
        raise CheckpointError(f"{path} {fault}")
    if path.suffix == ".npz":
        return TorchFile({"": _from_npz(path)})
    # A safetensors file begins with the length of its header, eight bytes, and the header, which is a JSON object. The
    # length may have the first bytes of a pickle.
    if head[4:] == b"\0\0\0\0{":
        return TorchFile({"": _from_safetensors(path)})
    if head.startswith((b"PK", b"\x80\x02")) or is_foreign_pickle(head):
        return read_torch_file(path)
    if head[8:] == b"{" or (path.suffix == ".safetensors" and not is_json(head)):
        return TorchFile({"": _from_safetensors(path)})
    kind = "is JSON, not weights" if is_json(head) else "is neither a safetensors file nor a torch file"
    raise CheckpointError(f"{path} {kind}")


def build_network(config: ViTConfig | ResNetConfig, weights: Mapping[str, Tensor]) -> Network:
    """The network in evaluation mode. Raises CheckpointError naming tensors that do not fit, with their shapes."""
    with torch.device("meta"):  # takes no memory for a configuration that does not fit
        expected = network_of(config).state_dict()
    _check_shapes(expected, weights)
    network = network_of(config)
    network.load_state_dict(weights, strict=True)
    return network.eval()


def _check_shapes(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> None:
    faults = {
        "missing": _with_shapes({name: tensor for name, tensor in expected.items() if name not in actual}),
        "unexpected": _with_shapes({name: tensor for name, tensor in actual.items() if name not in expected}),
        "wrong shape": _first_names(
            f"{name} is {list(actual[name].shape)}, expected {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in actual and actual[name].shape != tensor.shape
        ),
    }
    if any(faults.values()):
        details = "; ".join(f"{kind}: {names}" for kind, names in faults.items() if names)
        raise CheckpointError(f"the weights do not fit the network; {details}")


def _checked(name: str, tensor: Tensor) -> Tensor:
    if name.endswith("num_batches_tracked"):  # batch norm's counter, which inference does not read
        return tensor
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(f"{name} holds {kind}; quantized or sparse weights are not supported")
    tensor = tensor.float()
    wrong = int((~torch.isfinite(tensor)).sum())
    if wrong:
        raise CheckpointError(
            f"the weights are damaged: {wrong:,} of the {tensor.numel():,} values of {name} are NaN or infinite,"
            " as after a training that diverged; export an earlier checkpoint"
        )
    return tensor


def _with_shapes(named: Mapping[str, Tensor]) -> str:
    return _first_names(f"{name} {list(tensor.shape)}" for name, tensor in named.items())


def _first_names(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _MOST_NAMES} more" if len(listed) > _MOST_NAMES else ""
    return ", ".join(listed[:_MOST_NAMES]) + more


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is not a safetensors file, or it is truncated: {error}") from error


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
    """Raises ValueError if an array's header claims more bytes than the file has: numpy allocates that many."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read(file)
    claimed = int(np.prod(shape, dtype=np.float64)) * kind.itemsize
    if kind.hasobject:
        raise ValueError(f"{member.filename} contains Python objects, which are not loaded")
    if not claimed <= member.file_size or member.file_size > 1000 * max(1, member.compress_size):
        raise ValueError(f"{member.filename} claims {claimed:,} bytes but has {member.compress_size:,}")
