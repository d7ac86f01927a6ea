"""The tree of exceptions that become problem responses."""

from __future__ import annotations

from vitserve.service import errors


def test_every_error_has_its_own_code_and_is_documented() -> None:
    kinds = errors.error_types()
    assert len({error.code for error in kinds}) == len(kinds)
    assert errors.__doc__ is not None
    for error in kinds:
        assert f"{error.__name__} {error.status}" in errors.__doc__
