"""The bundle: the directory that holds all that serving one model needs. Read by service/, written by export/; needs no torch.

bundle.json   the Manifest below        labels.txt   one label a line
model.onnx    the reference graph       golden.npz   pixels, and the source network's float32 outputs for them
model.onnx.data  its weights, mapped into memory by whoever reads them; the graphs of other dialects share them
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from pydantic.dataclasses import dataclass as validated

from vitserve.model.arrays import Outputs, Pixels, Precision
from vitserve.model.bundle.parity import Parity
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ResNetConfig, ViTConfig

SCHEMA_VERSION = 2
MANIFEST = "bundle.json"
GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
_STRICT = pydantic.ConfigDict(extra="forbid")


class BundleError(ValueError):
    """The directory is not a bundle, or not the one that its manifest describes."""


class DamagedFileError(BundleError):
    """A file of the bundle is missing or not the one that the manifest describes."""


@validated(frozen=True, config=_STRICT)
class AttentionKernels:
    """What the runtime made of the attention, read from its own optimized graph on the machine that made the bundle."""

    kernels: dict[str, int]  # the fused ones, by name
    softmax_layers: int  # left outside of them

    @property
    def fused(self) -> int:
        return sum(self.kernels.values())


@validated(frozen=True, config=_STRICT)
class Evaluation:
    """What real images say about an artifact, against the float32 network and, where they are labeled, against the truth."""

    images: int
    top1_agreement: float  # with the float32 network
    probability: float  # greatest difference of a class probability
    accuracy: float | None = None
    source_accuracy: float | None = None  # of the float32 network

    @property
    def loss(self) -> float:
        """Points of accuracy lost; of images without labels, half the points of disagreement, since a changed answer may as well be the better one."""
        if self.accuracy is not None and self.source_accuracy is not None:
            return 100 * (self.source_accuracy - self.accuracy)
        return 50 * (1 - self.top1_agreement)


@validated(frozen=True, config=_STRICT)
class Artifact:
    """One way of running the model that was verified equal to its source when the bundle was made."""

    engine: str
    precision: Precision
    path: str  # relative to the bundle
    parity: Parity
    weights: str | None = None  # a second file that ``path`` needs
    attention: AttentionKernels | None = None
    evaluation: Evaluation | None = None
    simulated: bool = False  # verified by simulated arithmetic, on a machine without the real one

    @property
    def files(self) -> tuple[str, ...]:
        return (self.path,) if self.weights is None else (self.path, self.weights)


@validated(frozen=True, config=_STRICT)
class Manifest:
    schema_version: int
    name: str
    version: str  # by default the first twelve digits of the graph's sha256
    variant: str
    config: ViTConfig | ResNetConfig
    preprocessing: Preprocessing
    artifacts: tuple[Artifact, ...]
    files: dict[str, str] = field(default_factory=dict)  # name → sha256
    training: dict[str, Any] | None = None  # the trained model's own record: recipe, seconds, machine, accuracy


@dataclass(frozen=True)
class Golden:
    pixels: Pixels  # [k, H, W, 3]
    reference: Outputs


@dataclass(frozen=True)
class Bundle:
    path: Path
    manifest: Manifest
    labels: tuple[str, ...]
    damaged: Mapping[str, str] = field(
        default_factory=dict
    )  # artifacts' files that are not what the manifest says → why

    def golden(self) -> Golden:
        with np.load(self.path / "golden.npz", allow_pickle=False) as arrays:
            return Golden(arrays["pixels"], Outputs(arrays["logits"], arrays["embedding"]))

    def summary(self) -> dict[str, Any]:
        """The manifest as plain JSON, without the training record's tables."""
        plain: dict[str, Any] = pydantic.TypeAdapter(Manifest).dump_python(
            self.manifest, mode="json", exclude={"training"}
        )
        return plain


def open_bundle(path: Path) -> Bundle:
    """Reads a bundle and verifies the sha256 of every file. Raises BundleError, saying what is wrong.

    A damaged file that only artifacts need is left to open_engine(), which rejects those and serves another.
    """
    try:
        manifest = pydantic.TypeAdapter(Manifest).validate_json((path / MANIFEST).read_bytes())
    except OSError as error:
        raise BundleError(f"{path} is not a bundle: {error.strerror}: bundle.json") from error
    except ValueError as error:
        raise BundleError(f"{path}/bundle.json is not a manifest: {error}") from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise BundleError(f"{path} has schema version {manifest.schema_version}; this vitserve reads {SCHEMA_VERSION}")
    of_artifacts = {name for artifact in manifest.artifacts for name in artifact.files}
    damaged = {}
    for name, expected in manifest.files.items():
        try:
            _verify(path, name, expected)
        except DamagedFileError as error:
            if name not in of_artifacts:
                raise
            damaged[name] = str(error)
    labels = tuple((path / "labels.txt").read_text(encoding="utf-8").splitlines())
    if len(labels) != manifest.config.classes:
        raise BundleError(
            f"{path}/labels.txt has {len(labels)} labels; the model has {manifest.config.classes} classes"
        )
    return Bundle(path, manifest, labels, damaged)


def write_bundle(path: Path, manifest: Manifest, contents: Path) -> Bundle:
    """Makes the directory ``contents`` (labels.txt, golden.npz, graph and artifacts) into the bundle ``path``, all of it or nothing.

    Adds the sha256 of each file to the manifest. A bundle already at ``path`` is replaced; anything else there raises BundleError.
    """
    if path.exists() and not (path / MANIFEST).exists():
        raise BundleError(f"{path} exists and is not a bundle; it is left alone")
    files = {each.name: sha256(each) for each in sorted(contents.iterdir())}
    complete = pydantic.TypeAdapter(Manifest).dump_python(manifest, mode="json") | {"files": files}
    text = pydantic.TypeAdapter(dict[str, Any]).dump_json(complete, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as beside:
        fresh = Path(beside) / "bundle"
        fresh.mkdir()  # as readable as other directories made here, whatever ``contents`` is
        for each in contents.iterdir():
            shutil.copy2(each, fresh)
        (fresh / MANIFEST).write_bytes(text)
        if path.exists():
            path.rename(Path(beside) / "old")
        fresh.rename(path)
    return open_bundle(path)


def save_golden(path: Path, pixels: Pixels, reference: Outputs) -> None:
    arrays: Mapping[str, Any] = {"pixels": pixels, **reference._asdict()}
    np.savez_compressed(path, **arrays)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(path: Path, name: str, expected: str) -> None:
    if Path(name).name != name:
        raise BundleError(f"{path}/bundle.json names a file outside the bundle: {name!r}")
    try:
        actual = sha256(path / name)
    except OSError as error:
        raise DamagedFileError(f"{path}/{name}: {error.strerror}") from error
    if actual != expected:
        raise DamagedFileError(f"{path}/{name} has sha256 {actual[:12]}…; the manifest says {expected[:12]}…")
