"""Fetches a model's files from the Hugging Face hub (or whatever HF_ENDPOINT names) into its cache.

huggingface_hub does the transfer, so HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and the rest of its environment mean what they mean everywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx2  # what huggingface_hub speaks HTTP with, and whose errors it lets through
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

CONFIG, PREPROCESSING = "config.json", "preprocessor_config.json"
SINGLE, INDEX, PICKLED = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)  # the first that is there holds the weights
SOURCE = re.compile(
    r"([\w.-]+/[\w.-]+)(?:@(?![/.])(?!.*\.\.)([\w./+-]+))?", re.ASCII
)  # no revision that leads out of the cache's refs/
FORM = "a model on the hub, which looks like owner/name or owner/name@revision"
SHARD = re.compile(
    r"[\w-][\w.-]*\.safetensors", re.ASCII
)  # an index is somebody else's: it may name files beside it, and weights only


class HubError(ValueError):
    """The model cannot be had; the message is for people."""


class _UnreachableError(Exception):
    """Nobody who could know was asked. Says why."""


@dataclass(frozen=True)
class Located:
    path: Path  # the snapshot's directory in the cache
    revision: str  # the commit that was asked for, or that the branch or tag stood for


def fetch(source: str) -> Located:
    """The files of ``owner/name`` or ``owner/name@revision`` (a branch, tag or commit; main if there is none) that a model consists of.

    These are config.json, preprocessor_config.json if there is one, and the weights: model.safetensors, or the index and its shards, or
    where there is neither, pytorch_model.bin. Nothing else is downloaded, and what is cached is not downloaded again. If the hub cannot be
    reached, what the revision last stood for is taken from the cache.

    Raises HubError: source is malformed; there is no such repository or revision; access is not granted; config or weights are missing;
    the hub is out of reach and the model not in the cache; the download broke off, or the cache cannot be written.
    """
    repository, revision = _parsed(source)
    try:
        commit, names = _looked_up(repository, revision)
    except _UnreachableError as error:
        return _cached(repository, revision, error)
    path = _gathered(repository, names, partial(_download, repository, commit))
    # Only now: until all of it is there, whoever is offline keeps what the revision stood for before.
    _remember(repository, revision, commit)
    return Located(path, commit)


def _parsed(source: str) -> tuple[str, str]:
    match = SOURCE.fullmatch(source)
    if match is None:
        raise HubError(f"{source!r} is not {FORM}")
    repository, revision = match.groups(default=constants.DEFAULT_REVISION)
    try:
        _directory(repository)
    except HFValidationError as error:  # the rest of the hub's rules: no -- in a name, and so on
        raise HubError(f"{source!r} is not {FORM}: {error}") from error
    return repository, revision


def _looked_up(repository: str, revision: str) -> tuple[str, set[str]]:
    """The commit that the revision stands for now, and the names of its files. Raises HubError and _Unreachable."""
    try:
        info = HfApi().model_info(repository, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except OfflineModeIsEnabled as error:
        raise _UnreachableError("HF_HUB_OFFLINE is set") from error
    except httpx2.RequestError as error:
        raise _UnreachableError(f"{constants.ENDPOINT} cannot be reached ({error})") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 429 or status >= 500:
            raise _UnreachableError(f"{constants.ENDPOINT} answers {status}") from error
        raise _refusal(repository, revision, error) from error
    except ValueError as error:  # a page where JSON should be: a proxy's, or a network's that wants a login
        raise HubError(f"{constants.ENDPOINT} does not answer {repository} as a hub does: {error}") from error
    if info.sha is None:
        raise HubError(f"{constants.ENDPOINT} does not say which commit {revision} of {repository} is")
    return info.sha, {file.rfilename for file in info.siblings or ()}


def _refusal(repository: str, revision: str, error: HfHubHTTPError) -> HubError:
    if isinstance(error, GatedRepoError):  # before its base class, RepositoryNotFoundError
        return HubError(
            f"{repository} is gated: ask for access at {constants.ENDPOINT}/{repository}, then set HF_TOKEN to a token of that account"
        )
    if isinstance(error, RepositoryNotFoundError):
        return HubError(
            f"{constants.ENDPOINT} has no model {repository}; or it is private, which wants HF_TOKEN set to a token that may read it"
        )
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{repository} has no revision {revision}")
    return HubError(f"{constants.ENDPOINT} rejects {repository}: {' '.join(str(error).split())}")


def _gathered(repository: str, names: Collection[str], get: Callable[[str], Path]) -> Path:
    """Gets each wanted one of the names, and returns their directory. Weights come last, so that a snapshot of ours that has them has all."""
    weights = next((name for name in (SINGLE, INDEX, PICKLED) if name in names), None)
    if CONFIG not in names:
        raise HubError(f"{repository} has no {CONFIG}")
    if weights is None:
        raise HubError(f"{repository} has no weights: none of {SINGLE}, {INDEX}, {PICKLED}")
    directory = get(CONFIG).parent
    if PREPROCESSING in names:
        get(PREPROCESSING)
    first = get(weights)
    for shard in _shards(repository, first, names) if weights == INDEX else ():
        get(shard)
    return directory


def _shards(repository: str, index: Path, names: Collection[str]) -> list[str]:
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(f"{INDEX} of {repository} is not an index of shards: {error!r}") from error
    for shard in shards:
        if not isinstance(shard, str) or not SHARD.fullmatch(shard) or shard not in names:
            raise HubError(f"{INDEX} of {repository} names {shard!r}, which is not among its weights")
    return shards


def _download(repository: str, commit: str, name: str) -> Path:
    try:
        return Path(hf_hub_download(repository, name, revision=commit))
    except HfHubHTTPError as error:
        raise _refusal(repository, commit, error) from error
    except (httpx2.HTTPError, OSError) as error:
        raise HubError(f"{name} of {repository} could not be fetched: {error}") from error


def _cached(repository: str, revision: str, reason: _UnreachableError) -> Located:
    """From the cache alone. What other programs have put there has no listing, so that what they skipped cannot be known, except for a shard."""
    refs, snapshots = _directory(repository) / "refs", _directory(repository) / "snapshots"
    commit = (refs / revision).read_text().strip() if (refs / revision).is_file() else revision
    snapshot = snapshots / commit
    names = {path.name for path in snapshot.iterdir() if path.is_file()} if snapshot.is_dir() else set()
    if not names:
        raise HubError(f"{repository}@{revision} is not in the cache ({constants.HF_HUB_CACHE}), and {reason}")
    try:
        return Located(_gathered(repository, names, snapshot.joinpath), commit)
    except HubError as error:
        raise HubError(f"{repository}@{revision} is only partly in the cache ({error}), and {reason}") from error


def _remember(repository: str, revision: str, commit: str) -> None:
    """What huggingface_hub does itself unless it is given a commit: refs/main and the like are how a branch is found offline."""
    ref = _directory(repository) / "refs" / revision
    if revision == commit:
        return
    with contextlib.suppress(OSError):  # a cache that cannot be written has all the files nevertheless
        ref.parent.mkdir(parents=True, exist_ok=True)
        fresh = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
        fresh.write_text(commit)
        fresh.replace(ref)


def _directory(repository: str) -> Path:
    return Path(constants.HF_HUB_CACHE).resolve() / repo_folder_name(repo_id=repository, repo_type="model")
