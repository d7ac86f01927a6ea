"""Fetches a model from the Hugging Face hub, or from the hub at HF_ENDPOINT, into the cache of huggingface_hub.

huggingface_hub does the transfer, so HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and its other environment variables apply.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vitserve.export.checkpoint.configuration import shards_of
from vitserve.export.checkpoint.errors import CheckpointError, HubError
from vitserve.export.checkpoint.files import CONFIG, INDEX, PICKLED_INDEX, PREPROCESSOR, PROCESSOR, WEIGHTS

# The revision becomes a path below the cache's refs/, so it must not lead out of that directory.
_SOURCE = re.compile(r"([\w.-]+/[\w.-]+)(?:@(?![/.])(?!.*\.\.)([\w./+-]+))?", re.ASCII)
_FORM = "a model on the hub: write owner/name or owner/name@revision"
_SHARD = re.compile(r"[\w-][\w.-]*\.(safetensors|bin)", re.ASCII)


@dataclass(frozen=True)
class Snapshot:
    """The files of one commit, in the cache."""

    path: Path
    commit: str


def fetch(source: str) -> Snapshot:
    """Downloads the files that make up the model ``owner/name`` or ``owner/name@revision``.

    ``revision`` is a branch, tag or commit; the default is main.
    The files are config.json, the preprocessor's configuration if it exists, and the weights: the first file of
    files.WEIGHTS, with its shards if it is an index. Cached files are not downloaded again.
    If the hub cannot be reached, the cached commit of the revision is used.

    Raises HubError if the source is malformed, the repository or revision does not exist, access is not granted,
    the config or the weights are missing, the download fails, or the hub is unreachable and the model not cached.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise HubError(f"{source!r} is not {_FORM}")
    repository, revision = match.groups(default=constants.DEFAULT_REVISION)
    path = _download(repository, revision, [CONFIG, PREPROCESSOR, PROCESSOR, INDEX, PICKLED_INDEX])
    files = _files(repository, path)
    if CONFIG not in files:
        raise HubError(f"{repository} has no {CONFIG}")
    missing = [name for name in _weights(repository, path, files) if not (path / name).exists()]
    if missing:
        _download(repository, path.name, missing)
    return Snapshot(path, path.name)


def _download(repository: str, revision: str, files: list[str]) -> Path:
    """The directory of the revision's commit, which is named after the commit."""
    hub = constants.ENDPOINT
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))
    except HFValidationError as error:
        raise HubError(f"{repository!r} is not {_FORM} ({error})") from error
    except GatedRepoError as error:  # a subclass of RepositoryNotFoundError
        raise HubError(
            f"{repository} is gated: request access at {hub}/{repository}, then set HF_TOKEN to a token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(f"{hub} has no model {repository}; if it is private, set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repository} has no revision {revision}") from error
    except LocalEntryNotFoundError as error:
        reason = _first_line(error.__cause__ or error)
        raise HubError(
            f"{hub} cannot be reached, and {repository}@{revision} is not complete in the cache "
            f"({constants.HF_HUB_CACHE}): {reason}"
        ) from error
    except Exception as error:  # huggingface_hub raises the errors of its HTTP client and does not export them
        raise HubError(f"cannot download {repository} from {hub}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _files(repository: str, snapshot: Path) -> set[str]:
    try:
        return {file.path for file in get_cached_repo_tree(repository, revision=snapshot.name)}
    except CachedRepoTreeNotFoundError:  # offline, and another program filled the cache
        return {path.name for path in snapshot.iterdir()}


def _weights(repository: str, snapshot: Path, files: set[str]) -> list[str]:
    weights = next((name for name in WEIGHTS if name in files), None)
    if weights is None:
        raise HubError(f"{repository} has no weights: none of {', '.join(WEIGHTS)}")
    if weights not in (INDEX, PICKLED_INDEX):
        return [weights]
    try:
        shards = shards_of(snapshot / weights)
    except CheckpointError as error:
        raise HubError(f"{weights} of {repository} is not an index of shards: {error}") from error
    for shard in shards:
        if not _SHARD.fullmatch(shard) or shard not in files:
            raise HubError(f"{weights} of {repository} names {shard!r}, which is not a weights file of the repository")
    return shards
