"""The file with the API keys of clients, and their requests.

Each line has a name and a key, or the key's SHA-256, which a reader of the file cannot use:

    # teams
    mobile   9f86d081884c7d659a2feaa0c55ad015
    batch    sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

from vitserve.service.credentials.watched_file import WatchedFiles

log = logging.getLogger(__name__)

LEAST_CHARACTERS = 16
_NAME, _HASH = re.compile(r"[\w.-]{1,64}", re.ASCII), re.compile(r"sha256:([0-9a-f]{64})")
_KEY = re.compile(rf"[!-~]{{{LEAST_CHARACTERS},512}}")


class ApiKeysError(ValueError):
    """The file cannot be read, or a line is invalid."""


def read_api_keys(path: Path) -> dict[bytes, str]:
    """SHA-256 of a key → its name. Raises ApiKeysError, which names the line but never shows it."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError) as error:
        raise ApiKeysError(f"the API keys cannot be read from {path}: {error}") from error
    keys: dict[bytes, str] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        name, key = words if len(words) == 2 else ("", "")
        stated = _HASH.fullmatch(key)
        if not _NAME.fullmatch(name) or not (stated or _KEY.fullmatch(key)):
            raise ApiKeysError(
                f"line {number} of {path} is no name and key of {LEAST_CHARACTERS} characters or more, or sha256:HEX"
            )
        digest = bytes.fromhex(stated[1]) if stated else hashlib.sha256(key.encode()).digest()
        if keys.setdefault(digest, name) != name:
            raise ApiKeysError(f"line {number} of {path} has the key of {keys[digest]!r} again")
    return keys


class ApiKeyFile:
    """Follows changes of the file. If it cannot be read, the keys stay as they are, and an error is logged."""

    def __init__(self, path: Path) -> None:
        self._path, self._files = path, WatchedFiles(path)
        self._names: dict[bytes, str] = {}

    def name_of(self, key: bytes) -> str | None:
        """The name of a key. None if there is no such key.

        Looking up a digest takes the same time whichever part of the key is wrong.
        """
        if self._files.changed():
            self._read_again()
        return self._names.get(hashlib.sha256(key).digest())

    def _read_again(self) -> None:
        try:
            self._names = read_api_keys(self._path)
        except ApiKeysError as error:
            log.error("the API keys stay as they are: %s", error)
        else:
            log.info("%d API keys have been read from %s", len(self._names), self._path)
