"""The admin key: the right one is accepted, and guessing is limited."""

from __future__ import annotations

import pytest

from vitserve.service import errors
from vitserve.service.http_worker.admin_key import ATTEMPTS, SECONDS_PER_ATTEMPT, AdminKey

RIGHT, WRONG = "Bearer 0123456789abcdef", "Bearer 0123456789abcdeg"


@pytest.fixture
def key() -> AdminKey:
    key = AdminKey("0123456789abcdef")
    key.check(RIGHT, now=0.0)
    return key


def test_the_right_key_is_accepted_any_number_of_times(key: AdminKey) -> None:
    for _ in range(100):
        key.check(RIGHT, now=1.0)


@pytest.mark.parametrize(
    "authorization", ["", "Bearer ", WRONG, RIGHT[:-1], RIGHT + "0", "Basic 0123456789abcdef", "é"]
)
def test_others_are_rejected(key: AdminKey, authorization: str) -> None:
    with pytest.raises(errors.UnauthorizedError, match="not the admin key"):
        key.check(authorization, now=1.0)


def test_after_some_wrong_keys_no_key_is_accepted_for_a_while(key: AdminKey) -> None:
    for _ in range(ATTEMPTS):
        with pytest.raises(errors.UnauthorizedError):
            key.check(WRONG, now=1.0)
    for authorization in (WRONG, RIGHT):
        with pytest.raises(errors.TooManyAttemptsError) as raised:
            key.check(authorization, now=1.0)
        assert raised.value.headers()["Retry-After"] == str(int(SECONDS_PER_ATTEMPT))
    key.check(RIGHT, now=1.0 + SECONDS_PER_ATTEMPT)


def test_the_number_of_guesses_is_limited(key: AdminKey) -> None:
    guesses = 0
    for second in range(1000):
        try:
            key.check(WRONG, now=float(second))
        except errors.UnauthorizedError:
            guesses += 1
        except errors.TooManyAttemptsError:
            pass
    assert guesses <= ATTEMPTS + 1000 / SECONDS_PER_ATTEMPT


def test_without_a_key_nothing_is_accepted() -> None:
    for authorization in ("", "Bearer ", "Bearer"):
        with pytest.raises(errors.ForbiddenError, match="no admin_key is set"):
            AdminKey("").check(authorization)


def test_a_request_without_a_key_is_no_guess(key: AdminKey) -> None:
    for _ in range(2 * ATTEMPTS):
        with pytest.raises(errors.UnauthorizedError):
            key.check("", now=1.0)
    key.check(RIGHT, now=1.0)
