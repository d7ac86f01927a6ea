"""Checks the admin key, and limits the attempts to guess it."""

from __future__ import annotations

import hmac
import time

from vitserve.service import errors

ATTEMPTS = 5  # wrong keys at once
SECONDS_PER_ATTEMPT = 10.0  # after that, one is allowed in so many seconds


class AdminKey:
    def __init__(self, key: str) -> None:
        self._key = key
        self._attempts = float(ATTEMPTS)  # that are left
        self._updated = time.monotonic()

    def check(self, authorization: str, now: float | None = None) -> None:
        """``authorization``: the value of the header. ``now``: monotonic seconds, by default the current time.

        Raises ForbiddenError if no key is configured, UnauthorizedError for a wrong one or none, and
        TooManyAttemptsError after too many wrong ones: then the right key is not accepted either, or guessing could go
        on. A request without a key is no guess.
        """
        if not self._key:
            raise errors.ForbiddenError(
                "no admin_key is set, so this route is disabled; SIGHUP also reloads the bundle"
            )
        if not authorization:
            raise errors.UnauthorizedError("the Authorization header is missing: not the admin key")
        self._refill(time.monotonic() if now is None else now)
        if self._attempts < 1:
            wait_seconds = (1 - self._attempts) * SECONDS_PER_ATTEMPT
            raise errors.TooManyAttemptsError("too many wrong admin keys; SIGHUP also reloads the bundle", wait_seconds)
        if not hmac.compare_digest(authorization.encode(), f"Bearer {self._key}".encode()):
            self._attempts -= 1
            raise errors.UnauthorizedError("the bearer token is not the admin key", invalid=True)

    def _refill(self, now: float) -> None:
        self._attempts = min(float(ATTEMPTS), self._attempts + max(0.0, now - self._updated) / SECONDS_PER_ATTEMPT)
        self._updated = now
