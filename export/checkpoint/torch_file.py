"""Reads a file that torch.save() wrote, with torch's restricted unpickler, and finds the state dicts in it.

The unpickler creates tensors and plain data only, and never calls a function that a file names. Training scripts also
save their arguments and metrics. The types of those are allowed here; most are replaced by a placeholder that holds
nothing.
"""

from __future__ import annotations

import argparse
import pickle
import re
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.files import is_foreign_pickle

_MOST_LEVELS = 4  # of nested containers that are searched for state dicts
_GLOBAL = re.compile(r"(?:GLOBAL|class) ([\w.]+)")  # in the messages of torch's unpickler
_PROTOCOL = "Unsupported operand"  # an instruction that only other pickle protocols have
_REMEDY = "where the network was trained, save the weights alone: torch.save(model.state_dict(), FILE)"


class Placeholder:
    """Stands for a value that is not needed. Takes whatever the pickle passes."""

    def __new__(cls, *arguments: object) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


_REPLACED = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray"),
    *(f"pathlib{local}.{system}Path" for local in ("", "._local") for system in ("", "Posix", "Windows", "Pure")),
    *("datetime.datetime", "datetime.timedelta", "datetime.date"),
)
_ALLOWED: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    *((Placeholder, name) for name in _REPLACED),
]


@dataclass(frozen=True)
class TorchFile:
    groups: dict[str, dict[str, Tensor]]  # key ("" at the top, else "state_dict" or "models.student") → its tensors
    architecture: str = ""  # the name of the network, where the training script saved it


def read_torch_file(path: Path) -> TorchFile:
    """Raises CheckpointError."""
    try:
        # A file object, because torch takes the name of a path into account.
        with path.open("rb") as file, warnings.catch_warnings(), torch.serialization.safe_globals(_ALLOWED):
            warnings.simplefilter("ignore")  # about pickle protocols; the error below says it
            loaded: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} {_fault(path, str(error))}") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise CheckpointError(f"{path} is truncated or not a torch file: {reason}") from error
    groups = dict(_groups(loaded, "", 0))
    if not groups:
        raise CheckpointError(f"{path} has no state dict, a mapping of names to tensors; {_REMEDY}")
    return TorchFile(groups, _architecture(loaded))


def _groups(value: Any, key: str, level: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every mapping or sequence that holds tensors by name, at any level."""
    items: dict[str, Any]
    if isinstance(value, list | tuple):
        items = {str(index): item for index, item in enumerate(value) if isinstance(item, dict)}
    elif isinstance(value, dict):
        items = {name: item for name, item in value.items() if isinstance(name, str)}
    else:
        return
    tensors = {name: item for name, item in items.items() if isinstance(item, Tensor)}
    if tensors:
        yield key, tensors
    if level < _MOST_LEVELS:
        for name, item in items.items():
            yield from _groups(item, f"{key}.{name}" if key else name, level + 1)


def _architecture(loaded: Any) -> str:
    """As timm's training script saves it: the key arch, or the argument model."""
    if not isinstance(loaded, dict):
        return ""
    named = loaded.get("arch") or getattr(loaded.get("args"), "model", "")
    return named if isinstance(named, str) else ""


def _fault(path: Path, message: str) -> str:
    """The rest of a sentence that begins with the file's name. torch's own message advises unsafe loading."""
    with path.open("rb") as file:
        foreign = is_foreign_pickle(file.read(2))
    if foreign or _PROTOCOL in message:
        return (
            "is pickled with a protocol that the safe loader does not read (only 2);"
            " save it again with torch.save() and its default protocol, or as safetensors"
        )
    kinds = _unsafe_kinds(path, message)
    if not kinds:
        reasons = [line for line in message.split("WeightsUnpickler error:")[-1].splitlines() if line.strip()]
        return f"is truncated or not a torch file: {reasons[0].strip()}"
    return f"contains {', '.join(kinds)}, which is not loaded because loading it could execute code; {_REMEDY}"


def _unsafe_kinds(path: Path, message: str) -> list[str]:
    try:
        with path.open("rb") as file:
            named: list[str] = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # torch reads them from its zip format only
        named = _GLOBAL.findall(message)[:1]
    allowed = {entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__name__}" for entry in _ALLOWED}
    kinds = sorted(set(named) - allowed)
    return [*kinds[:3], *([f"and {len(kinds) - 3} more types"] if len(kinds) > 3 else [])]
