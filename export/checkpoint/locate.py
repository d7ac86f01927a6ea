"""Finds the files of a checkpoint: a local path, a model on the hub, or random weights. Does not import torch.

PATH                       a file or directory
hf:owner/name[@revision]   a model on the Hugging Face hub
timm:NAME[@revision]       timm's model of that name on the hub
random:VARIANT             a variant of vitserve.model.config with random weights
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.requirements import require_packages
from vitserve.model.config import any_variant

if TYPE_CHECKING:
    from vitserve.export.checkpoint.hub import Snapshot

_SCHEMES = {"hf": "hf:owner/name", "timm": "timm:NAME", "random": "random:VARIANT"}
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+-]*")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", re.ASCII)
_HUB_URL = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", re.ASCII)
_TIMM_NAME = re.compile(r"(vit|deit3?)_\w+(\.\w+)?|resnetv2_\w+_bit(\.\w+)?")


def split_scheme(source: str) -> tuple[str, str]:
    """("hf", "owner/name") for hf:owner/name; ("", source) for a path."""
    scheme, _, name = source.partition(":")
    return (scheme, name) if scheme in _SCHEMES and ":" in source else ("", source)


def check_source(source: str) -> None:
    """Raises CheckpointError if the path does not exist or the scheme is unknown, ValueError for an unknown variant.

    Does not contact the hub.
    """
    scheme, name = split_scheme(source)
    if scheme == "random":
        any_variant(name)
    elif not scheme and not Path(source).exists():
        raise CheckpointError(_missing(source))


def _missing(source: str) -> str:
    """The fault of a source that is no path, and the source that may be meant."""
    if url := _HUB_URL.match(source):
        return f"{source} is a URL; for the model on the Hugging Face hub, write hf:{url[1]}"
    prefix, colon, name = source.partition(":")
    if colon and _SCHEME.fullmatch(prefix):
        hint = f"; for the model on the Hugging Face hub, write hf:{name}" if prefix in ("hf-hub", "hf_hub") else ""
        return f"unknown source {source!r}: use a path, {', '.join(_SCHEMES.values())}{hint}"
    if _HUB_NAME.fullmatch(source):
        return f"{source}: no such file or directory; for the model on the Hugging Face hub, write hf:{source}"
    if _TIMM_NAME.fullmatch(source):
        return f"{source}: no such file or directory; for timm's model of that name on the hub, write timm:{source}"
    return f"{source}: no such file or directory; a model on the hub is written hf:owner/name"


def fetch_snapshot(source: str) -> Snapshot | None:
    """Downloads a model on the hub; None for any other source. Raises HubError, MissingPackageError."""
    scheme, name = split_scheme(source)
    if scheme not in ("hf", "timm"):
        return None
    require_packages("huggingface_hub")
    from vitserve.export.checkpoint.hub import fetch

    return fetch(name if scheme == "hf" else f"timm/{name}")
