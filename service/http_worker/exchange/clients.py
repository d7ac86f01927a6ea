"""The clients of an HTTP worker: their API keys, and how many images each may have in flight."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vitserve.service import errors
from vitserve.service.credentials.api_keys import ApiKeyFile
from vitserve.service.http_worker.dispatch.dispatcher import Dispatcher
from vitserve.service.settings import Settings

_BEARER = b"bearer "
# A batch of another key delays an image little if it takes at most so many seconds, or times as long as one image.
_QUICK = 0.005, 1.25
_ACTIVE_SECONDS = 10.0  # after its latest request, a key counts as one that others must leave room for


# Until a rejection because of the key is answered. At random, so that the next requests do not come together.
_REJECTION_SECONDS = 0.1, 0.4
_MOST_DELAYED = 64  # such rejections at a time: connections that wait cannot be closed for others


@dataclass(eq=False)
class Client:
    name: str  # of its API key
    images: int = 0  # in flight
    latest: float = -math.inf  # request, monotonic seconds


@dataclass
class Activity:
    """Which keys have sent requests lately."""

    newest: Client | None = None
    before: Client | None = None  # the newest of the others

    def record(self, client: Client, now: float) -> None:
        client.latest = now
        if client is not self.newest:
            self.newest, self.before = client, self.newest

    def has_others(self, client: Client, now: float) -> bool:
        """Whether another key was active in the last seconds."""
        other = self.before if client is self.newest else self.newest
        return other is not None and now - other.latest < _ACTIVE_SECONDS


class Allowance:
    """The images of one request. Without API keys, there is no limit."""

    __slots__ = ("_activity", "_client", "_images", "_share")

    def __init__(self, client: Client | None = None, share: float = 1.0, activity: Activity | None = None) -> None:
        self._client, self._share, self._activity, self._images = client, share, activity, 0

    @property
    def fields(self) -> dict[str, object]:
        """For the request log."""
        return {} if self._client is None else {"key": self._client.name}

    def rejection(self, images: int, dispatcher: Dispatcher) -> errors.OverloadedError | None:
        """If the client would have more than its share. A request alone is never too large.

        A key that is alone may take its share of the slots. While other keys are active, it may only keep the engines
        busy, so that an image of another key waits for the batches that run, and not for a queue of images.
        """
        client = self._client
        if client is None or not client.images:
            return None
        table = dispatcher.slot_table
        limit = max(1, int(self._share * table.shape.slots_per_worker))
        if self._activity is not None and self._activity.has_others(client, time.monotonic()):
            limit = min(limit, max(1, math.ceil(table.images_at_once(*_QUICK) / table.shape.workers)))
        if client.images + images <= limit:
            return None
        detail = f"the API key {client.name!r} has {client.images} images in flight; the limit is {limit}"
        return errors.OverloadedError(detail, "key", table.image_seconds() * limit)

    def take(self, images: int) -> None:
        if self._client is not None:
            self._client.images += images
            self._images = images

    def give_back(self) -> None:
        if self._client is not None:
            self._client.images -= self._images
            self._images = 0


UNLIMITED = Allowance()


class Clients:
    def __init__(self, settings: Settings) -> None:
        self._file = ApiKeyFile(Path(settings.api_keys)) if settings.api_keys else None
        self._share = settings.key_share
        self._clients: dict[str, Client] = {}
        self._activity = Activity()
        self._delayed = 0

    def allowance(self, headers: Iterable[tuple[bytes, bytes]]) -> Allowance:
        """Of a client with a key in ``Authorization: Bearer`` or ``X-API-Key``. Raises UnauthorizedError."""
        if self._file is None:
            return UNLIMITED
        key = _key_of(headers)
        if key is None:
            raise errors.UnauthorizedError("the request has no API key: send Authorization: Bearer KEY")
        name = self._file.name_of(key)
        if name is None:
            raise errors.UnauthorizedError("the API key is not known", invalid=True)
        client = self._clients.setdefault(name, Client(name))
        self._activity.record(client, time.monotonic())
        return Allowance(client, self._share, self._activity)

    def delay(self, answer: Callable[[], None]) -> bool:
        """Calls ``answer`` in a moment, so that a client's next request does not come at once.

        False if too many others wait. Then the answer must be given now.
        """
        if self._delayed >= _MOST_DELAYED:
            return False
        self._delayed += 1

        def end() -> None:
            self._delayed -= 1
            answer()

        asyncio.get_running_loop().call_later(random.uniform(*_REJECTION_SECONDS), end)
        return True

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """As allowance(), for requests without images."""
        self.allowance(headers)


def _key_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    for name, value in headers:
        if name == b"authorization" and value[: len(_BEARER)].lower() == _BEARER:
            return value[len(_BEARER) :].strip()
        if name == b"x-api-key":
            return value.strip()
    return None
