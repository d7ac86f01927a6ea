"""Heads: further classifiers on the embeddings of a bundle's network. Each is a file in BUNDLE/heads.

They are not part of the manifest, so that a head can be added without a new engine. A head names the weights of the
network that it belongs to instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitserve.model.arrays import Activation, Floats, to_probabilities
from vitserve.model.bundle.bundle import GRAPH, HEADS, WEIGHTS

NO_HEAD = "none"  # in a request: no classifier at all
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SUFFIX = ".npz"


class HeadError(ValueError):
    """The head is damaged, or does not fit the network."""


@dataclass(frozen=True)
class Head:
    name: str
    labels: tuple[str, ...]
    weight: Floats  # float32 [classes, width]
    bias: Floats  # float32 [classes]
    backbone: str  # backbone_of() the bundle that it was made for
    activation: Activation = "softmax"
    accuracy: float | None = None  # on held-out images, if it was fitted here

    def __post_init__(self) -> None:
        """Raises HeadError."""
        if not _NAME.fullmatch(self.name) or self.name == NO_HEAD:
            raise HeadError(
                f"{self.name[:100]!r} is no name of a head: use up to 64 lower-case letters, digits, '.', '_', "
                f"and '-', and not {NO_HEAD!r}"
            )
        classes = len(self.labels)
        if self.weight.ndim != 2 or self.weight.shape[0] != classes or self.bias.shape != (classes,) or classes < 2:
            raise HeadError(
                f"head {self.name!r} has {classes} labels, weights {list(self.weight.shape)}, and biases "
                f"{list(self.bias.shape)}; it needs two or more labels, [labels, width], and [labels]"
            )
        if not (np.isfinite(self.weight).all() and np.isfinite(self.bias).all()):
            raise HeadError(f"head {self.name!r} has weights that are not finite numbers")
        if self.activation not in ("softmax", "sigmoid"):
            raise HeadError(f"head {self.name!r} has the unknown activation {self.activation!r}")

    @property
    def version(self) -> str:
        """The first twelve digits of a sha256 over everything that its results depend on."""
        digest = hashlib.sha256(json.dumps([self.labels, self.activation, self.backbone]).encode())
        digest.update(self.weight.tobytes() + self.bias.tobytes())
        return digest.hexdigest()[:12]

    def probabilities(self, embedding: Floats) -> Floats:
        """[classes]. ``embedding``: float32 [width]."""
        return to_probabilities(self.weight @ embedding + self.bias, self.activation)


def backbone_of(files: Mapping[str, str]) -> str:
    """Identifies the network. ``files``: of the manifest, name → sha256."""
    return hashlib.sha256("".join(files.get(name, "") for name in (GRAPH, WEIGHTS)).encode()).hexdigest()


def check_fits(head: Head, backbone: str, width: int) -> None:
    """``backbone`` and the ``width`` of embeddings are those of the bundle. Raises HeadError."""
    if head.backbone != backbone:
        raise HeadError(f"head {head.name!r} was made for the embeddings of another network; add it again")
    if head.weight.shape[1] != width:
        raise HeadError(f"head {head.name!r} reads {head.weight.shape[1]} values; embeddings have {width}")


def head_files(bundle: Path) -> dict[str, Path]:
    """By name."""
    return {path.stem: path for path in sorted((bundle / HEADS).glob(f"[!.]*{_SUFFIX}"))}


def read_head(path: Path) -> Head:
    """Raises HeadError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            labels = tuple(map(str, about.pop("labels")))
            return Head(path.stem, labels, arrays["weight"], arrays["bias"], **about)
    except HeadError:
        raise
    except Exception as error:  # numpy, zipfile and json raise many kinds
        raise HeadError(f"{path} cannot be read as a head: {error}") from error


def write_head(bundle: Path, head: Head) -> Path:
    """Atomically: services that watch the directory never see a part of the file."""
    path = bundle / HEADS / f"{head.name}{_SUFFIX}"
    path.parent.mkdir(exist_ok=True)
    about = {
        "labels": head.labels,
        "backbone": head.backbone,
        "activation": head.activation,
        "accuracy": head.accuracy,
    }
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=_SUFFIX, delete=False) as file:
        try:
            described = np.frombuffer(json.dumps(about).encode(), np.uint8)
            np.savez(file, weight=head.weight, bias=head.bias, about=described)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return path
