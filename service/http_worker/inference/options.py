"""Reads the options of a request, which are text in a query or a form, and values in JSON.

All functions raise BadRequestError, which names the option and the values that are allowed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from vitserve.service import errors
from vitserve.service.settings import Settings

TIMEOUT = "timeout_ms"
_NUMBER = re.compile(r"\s*[+-]?[0-9]{1,100}\s*", re.ASCII)  # int() accepts more, such as 1_0
_FLAGS = {"true": True, "1": True, "false": False, "0": False}

T = TypeVar("T", bound=str)


def reject_unknown(kind: str, names: Iterable[str], allowed: Sequence[str] = ()) -> None:
    """For the first name that is not allowed."""
    for name in names:
        if name not in allowed:
            raise errors.BadRequestError(
                f"unknown {kind} {name[:100]!r}; allowed: {', '.join(allowed) if allowed else 'none'}"
            )


def timeout_ms(options: Mapping[str, Any], settings: Settings) -> int:
    return read_timeout_ms(options.get(TIMEOUT, settings.timeout_ms))


def read_timeout_ms(value: Any) -> int:
    return whole_number(TIMEOUT, value, 1, 3_600_000)


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """1.0 is the integer 1, as in JSON Schema (2020-12, core, 4.2.3)."""
    try:
        if (
            isinstance(value, bool)
            or (isinstance(value, float) and not value.is_integer())
            or (isinstance(value, str) and not _NUMBER.fullmatch(value))
        ):
            raise ValueError
        number = int(value)
    except (TypeError, ValueError) as error:
        raise errors.BadRequestError(f"{name} must be an integer from {low} to {high}") from error
    if not low <= number <= high:
        raise errors.BadRequestError(f"{name} is {str(number)[:100]}; it must be from {low} to {high}")
    return number


def flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    known = _FLAGS.get(value.lower()) if isinstance(value, str) else None
    if known is None:
        raise errors.BadRequestError(f"{name} is {str(value)[:100]!r}; it must be true or false")
    return known


def choice(name: str, value: Any, allowed: Sequence[T]) -> T:
    for possible in allowed:
        if value == possible:
            return possible
    raise errors.BadRequestError(f"{name} is {str(value)[:100]!r}; it must be {' or '.join(allowed)}")
