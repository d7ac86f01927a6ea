"""Bundles of checkpoints, exported on first use and kept in the user's cache directory. Does not import torch."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from vitserve.export.checkpoint.errors import OptionNeededError
from vitserve.export.checkpoint.locate import check_source, fetch_snapshot
from vitserve.export.load_source import is_onnx, load_source, packages_for
from vitserve.export.onnx_file.external import external_files
from vitserve.export.requirements import require_packages
from vitserve.model.bundle.bundle import BundleError, open_bundle, sha256
from vitserve.service.machine import cache_dir


def cached_bundle(source: str, version: str, progress: Callable[[str], None] = lambda step: None) -> Path:
    """The directory of the source's bundle, exported now unless it is cached.

    A changed checkpoint or another ``version`` of vitserve is exported again.
    Checks the path first, then the cache. Only an export imports torch.

    Raises CheckpointError, ExportError, MissingPackageError, ValueError, OSError.
    """
    check_source(source)
    digest = hashlib.sha256("\n".join([version, *_identity(source)]).encode()).hexdigest()
    name = source if ":" in source else Path(source).resolve().name
    path = cache_dir() / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.')[:80]}-{digest[:16]}"
    try:
        open_bundle(path)
    except BundleError:  # missing or damaged
        require_packages(*packages_for(source))
        progress(f"exporting {source} to {path}")
        _export(source, path, name, progress)
    return path


def _export(source: str, path: Path, name: str, progress: Callable[[str], None]) -> None:
    from vitserve.export.build_bundle import build_bundle

    try:
        checkpoint = load_source(source)
    except OptionNeededError as error:
        raise OptionNeededError(
            f"{error}. `vitserve serve` does not have this option, so export it first:"
            f" vitserve export {shlex.quote(source)} --output BUNDLE"
        ) from error
    for note in checkpoint.notes:
        progress(f"note: {note}")
    build_bundle(checkpoint, path, name=name, progress=progress)


def _identity(source: str) -> Iterator[str]:
    """Changes with the source: the commit of a model on the hub, else the names and sha256 of the files."""
    snapshot = fetch_snapshot(source)
    if snapshot is not None:
        yield f"{source}@{snapshot.commit}"
        return
    path = Path(source)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    if path.is_file() and is_onnx(source):
        files += external_files(path)
    yield "" if files else source
    for file in files:
        if file.is_file():
            yield f"{file.name} {sha256(file)}"
