"""The clients of an HTTP worker: their API keys, and how many images each may have in flight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vitserve.service import errors
from vitserve.service.credentials.api_keys import ApiKeyFile
from vitserve.service.http_worker.dispatch.dispatcher import Dispatcher
from vitserve.service.settings import Settings

_BEARER = b"bearer "


@dataclass(eq=False)
class Client:
    name: str  # of its API key
    images: int = 0  # in flight


class Allowance:
    """The images of one request. Without API keys, there is no limit."""

    __slots__ = ("_client", "_images", "_share")

    def __init__(self, client: Client | None = None, share: float = 1.0) -> None:
        self._client, self._share, self._images = client, share, 0

    @property
    def fields(self) -> dict[str, object]:
        """For the request log."""
        return {} if self._client is None else {"key": self._client.name}

    def rejection(self, images: int, dispatcher: Dispatcher) -> errors.OverloadedError | None:
        """If the client would have more than its share of the slots. A request alone is never too large."""
        client = self._client
        if client is None or not client.images:
            return None
        limit = max(1, int(self._share * dispatcher.slot_table.shape.slots_per_worker))
        if client.images + images <= limit:
            return None
        detail = f"the API key {client.name!r} has {client.images} images in flight; the limit is {limit}"
        return errors.OverloadedError(detail, "key", dispatcher.slot_table.image_seconds() * limit)

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
        return Allowance(self._clients.setdefault(name, Client(name)), self._share)

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
