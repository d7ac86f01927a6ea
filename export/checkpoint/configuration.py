"""A JSON configuration of another library. Each key is read once; a key that nothing reads is rejected by name.

A key that is not understood may change the outputs of the network. So only keys that are known to have no effect on the
outputs are ignored, and the formats give the reason for each of them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vitserve.export.checkpoint.errors import CheckpointError, UnsupportedError
from vitserve.export.checkpoint.files import fault_of

GREATEST_NUMBER = 1e30  # NaN and infinity, which Python's JSON has, are not below it
GREATEST_INTEGER = (
    1_000_000  # above every width, depth and image size; protects from allocating as much as a file claims
)


class Configuration:
    """The keys of one JSON object. The methods raise CheckpointError naming the file, the key and the value."""

    def __init__(self, name: str, keys: Mapping[str, Any], *, null_is_default: bool = False) -> None:
        """``name`` is for messages. ``null_is_default``: the library takes null for an absent key."""
        self.name = name
        self._keys = {key: value for key, value in keys.items() if not (null_is_default and value is None)}
        self._null_is_default = null_is_default

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def take(self, key: str, default: Any = None) -> Any:
        """The value as it is."""
        return self._keys.pop(key, default)

    def is_null(self, key: str) -> bool:
        return key in self._keys and self._keys[key] is None

    def rest(self) -> dict[str, Any]:
        """Takes all keys that are left."""
        keys, self._keys = self._keys, {}
        return keys

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Without a default, the key is required."""
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= GREATEST_INTEGER:
            raise self.fault(key, value, f"an integer from {least:,} to {GREATEST_INTEGER:,}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.take(key, default)
        if not _is_number(value):
            raise self.fault(key, value, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.fault(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Without a default, the key is required."""
        value = self.take(key, default)
        if not isinstance(value, str):
            raise self.fault(key, value, "a string")
        return value

    def numbers(self, key: str, default: Any, channels: int = 3) -> tuple[float, ...]:
        """One number for each channel. A single number stands for all of them."""
        value = self.take(key, default)
        values = value if isinstance(value, list | tuple) else [value]
        values = list(values) * channels if len(values) == 1 else values
        if len(values) != channels or not all(_is_number(part) for part in values):
            raise self.fault(key, value, "one number or three" if channels == 3 else "one number")
        return tuple(float(part) for part in values)

    def side(self, key: str, default: Any) -> int:
        """Of a square: an integer, or two equal ones."""
        value = self.take(key, default)
        sides = value if isinstance(value, list | tuple) else [value, value]
        if len(sides) != 2 or not all(_is_size(part) for part in sides):
            raise self.fault(key, value, "a positive integer, or two equal ones")
        if sides[0] != sides[1]:
            raise UnsupportedError(
                f"unsupported {key} {sides[1]} × {sides[0]} in {self.name}: only square images are supported"
            )
        return int(sides[0])

    def section(self, key: str) -> Configuration:
        """A nested object. Empty if the key is absent or null."""
        value = self.take(key)
        if value is not None and not isinstance(value, dict):
            raise self.fault(key, value, "an object")
        return Configuration(f"{key} in {self.name}", value or {}, null_is_default=self._null_is_default)

    def ignore(self, *groups: Collection[str]) -> None:
        """Drops keys that have no effect on the outputs."""
        for group in groups:
            for key in group:
                self._keys.pop(key, None)

    def require(self, values: Mapping[str, Any]) -> None:
        """Drops keys that have no effect with these values, or null. Rejects another value."""
        for key, only in values.items():
            value = self.take(key)
            if value is not None and value != only:
                raise UnsupportedError(f"unsupported {key} {_shown(value)} in {self.name}; supported is {_shown(only)}")

    def reject_others(self, ignored: Collection[str]) -> list[str]:
        """Raises CheckpointError naming the keys that nothing has read, except those that are null, thus not set.

        Returns notes about keys in ``ignored``.
        """
        self._keys = {key: value for key, value in self._keys.items() if value is not None}
        unknown = sorted(self._keys.keys() - set(ignored))
        if unknown:
            keys = ", ".join(f"{key} {_shown(self._keys[key])}" for key in unknown[:5])
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise UnsupportedError(
                f"{self.name} has keys that may change the outputs and that this version does not know: {keys}{more};"
                f" for a key without effect on the outputs, pass --ignore-key to `vitserve export`"
            )
        return [f"{key} {_shown(self._keys[key])} in {self.name} is ignored as requested" for key in sorted(self._keys)]

    def fault(self, key: str, value: Any, allowed: str) -> CheckpointError:
        return CheckpointError(f"{key} in {self.name} must be {allowed}, not {_shown(value)}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        loaded = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        fault = fault_of(path) or f"is not JSON: {error}"
        raise CheckpointError(f"{path} {fault}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return loaded


def shards_of(index: Path) -> list[str]:
    """The names of the files that an index of weights names, which are beside it. Raises CheckpointError."""
    weight_map = read_json(index).get("weight_map")
    shards = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not shards or not all(isinstance(shard, str) and shard for shard in shards):
        raise CheckpointError(f"{index} is not an index of weights: weight_map must map names of tensors to files")
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names a file outside its directory: {shard!r}")
    return sorted(set(shards))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < GREATEST_NUMBER


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= GREATEST_INTEGER


def _shown(value: Any) -> str:
    """As in the file, at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
