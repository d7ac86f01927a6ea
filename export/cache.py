"""A source's bundle, exported the first time it is asked for and kept."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.load import fetched, load_checkpoint
from vitserve.model.bundle.bundle import BundleError, open_bundle, sha256
from vitserve.service.machine import cache_dir


def cached_bundle(source: str, exporter: str, progress: Callable[[str], None] = lambda step: None) -> Path:
    """The directory of the bundle. A changed checkpoint, or another ``exporter`` (vitserve's version), is another bundle.

    Raises CheckpointError, ExportError, OSError.
    """
    digest = hashlib.sha256("\n".join([exporter, *_identity(source)]).encode()).hexdigest()
    name = source if ":" in source else Path(source).resolve().name
    path = cache_dir() / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.')[:80]}-{digest[:16]}"
    try:
        open_bundle(path)
    except BundleError:  # not there, or damaged: then it is made again
        progress(f"exporting {source} to {path}")
        build_bundle(load_checkpoint(source), path, name=name, progress=progress)
    return path


def _identity(source: str) -> Iterator[str]:
    """What the bundle depends on: names of files with their sha256; of a model on the hub, its commit."""
    located = fetched(source)
    if located is not None:
        yield f"{source}@{located.revision}"
        return
    path = Path(source)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    yield "" if files else source
    for each in files:
        if each.is_file():
            yield f"{each.name} {sha256(each)}"
