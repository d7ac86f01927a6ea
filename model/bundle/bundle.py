"""The bundle: a directory with everything needed to serve one model. Reading it does not import torch.

bundle.json      the manifest, see Manifest
labels.txt       one label per line, see labels.py
golden.npz       golden images and the source network's float32 outputs for them
model.onnx       the optimized graph
model.onnx.data  its weights, memory-mapped when read; runtime-specific graphs share them
heads            further classifiers that were added later, see head.py; not in the manifest
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from pydantic.dataclasses import dataclass as validated

from vitserve.model.arrays import Activation, Outputs, Pixels, Precision
from vitserve.model.bundle.calibration import ProbabilityCalibration
from vitserve.model.bundle.labels import LABELS, read_labels
from vitserve.model.bundle.parity import Parity
from vitserve.model.bundle.plan import PlanReport
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.bundle.processor import ProcessorComparison
from vitserve.model.config import NetworkConfig, merges_tokens

SCHEMA_VERSION = 2
MANIFEST = "bundle.json"
GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
HEADS = "heads"
_STRICT = pydantic.ConfigDict(extra="forbid")


class BundleError(ValueError):
    """The directory is not a bundle that this version can read, or it does not match its manifest."""


class DamagedFileError(BundleError):
    """A file of the bundle is missing, or its sha256 differs from the manifest's."""


@validated(frozen=True, config=_STRICT)
class AttentionKernels:
    """The runtime's execution of attention, read from its compiled graph on the machine that exported the bundle."""

    kernels: dict[str, int]  # fused attention kernels: name → count
    softmax_layers: int  # softmax layers outside of fused kernels

    @property
    def fused(self) -> int:
        """Number of fused kernels."""
        return sum(self.kernels.values())


@validated(frozen=True, config=_STRICT)
class Quantization:
    """The number of layers with weights that an artifact computes in its reduced precision, read from its graph."""

    layers: int
    of: int

    @property
    def share(self) -> float:
        return self.layers / self.of if self.of else 0.0


@validated(frozen=True, config=_STRICT)
class Evaluation:
    """An artifact's results on real images, compared with the float32 network and, if given, with the labels."""

    images: int
    top1_agreement: float  # with the float32 network; share of images with the same class, or of classes in common
    probability: float  # largest difference of a class probability
    accuracy: float | None = None  # None for images without labels
    source_accuracy: float | None = None  # the float32 network's

    @property
    def loss(self) -> float:
        """Lost accuracy in percentage points; without labels, half the percentage of changed predictions."""
        if self.accuracy is not None and self.source_accuracy is not None:
            return 100 * (self.source_accuracy - self.accuracy)
        return 50 * (1 - self.top1_agreement)


@validated(frozen=True, config=_STRICT)
class Artifact:
    """One runtime's form of the model, verified against the source network during export."""

    engine: str
    precision: Precision
    path: str  # relative to the bundle
    parity: Parity
    weights: str | None = None  # a second file that ``path`` refers to
    attention: AttentionKernels | None = None
    evaluation: Evaluation | None = None
    simulated: bool = False  # verified by simulating the precision, on a machine that does not support it
    quantization: Quantization | None = None  # of a calibrated precision
    plan: PlanReport | None = None  # ``path`` is this TensorRT plan, which is used on the GPUs that it was built for

    @property
    def files(self) -> tuple[str, ...]:
        return (self.path,) if self.weights is None else (self.path, self.weights)


@validated(frozen=True, config=_STRICT)
class Manifest:
    schema_version: int
    name: str
    version: str  # default: the first twelve digits of a sha256 over graph and weights
    variant: str
    config: NetworkConfig
    preprocessing: Preprocessing
    artifacts: tuple[Artifact, ...]
    files: dict[str, str] = field(default_factory=dict)  # name → sha256
    training: dict[str, Any] | None = None  # `vitserve train`'s report: recipe, seconds, machine, accuracy
    activation: Activation = "softmax"  # from logits to probabilities
    labels: tuple[str, ...] | None = None  # only if labels.txt cannot hold them
    reference: str = ""  # whose network the golden outputs are from: the library and its version, or vitserve
    processor: ProcessorComparison | None = None  # with the image processor that the checkpoint names, if it does
    probability_calibration: ProbabilityCalibration | None = None  # None: probabilities are as the network has them


@dataclass(frozen=True)
class Golden:
    pixels: Pixels  # [k, H, W, C]; textures, then images of the model's domain
    reference: Outputs
    domain_images: int = 0  # how many of the last images are of the model's domain
    # The network merges tokens. Where two similarities are nearly equal, rounding decides which tokens are merged, so
    # that single images differ more.
    judged_by_median: bool = False
    # The outputs that artifacts had at export, by engine and precision. Empty in bundles of earlier versions.
    recorded: Mapping[tuple[str, str], Outputs] = field(default_factory=dict)


@dataclass(frozen=True)
class Bundle:
    path: Path
    manifest: Manifest
    labels: tuple[str, ...]
    damaged_files: Mapping[str, str] = field(default_factory=dict)  # of artifacts: name → fault

    def golden(self) -> Golden:
        with np.load(self.path / "golden.npz", allow_pickle=False) as arrays:
            domain_images = int(arrays["domain_images"]) if "domain_images" in arrays else 0
            reference = Outputs(arrays["logits"], arrays["embedding"])
            recorded = dict[tuple[str, str], Outputs]()
            for artifact in self.manifest.artifacts:
                names = _recorded_names(artifact.engine, artifact.precision)
                if names[0] in arrays:
                    recorded[artifact.engine, artifact.precision] = Outputs(*(arrays[name] for name in names))
            merges = merges_tokens(self.manifest.config)
            return Golden(arrays["pixels"], reference, domain_images, merges, recorded)

    def summary(self) -> dict[str, Any]:
        """The manifest as JSON-compatible values, without the training report and the labels.

        ``input`` has height, width and channels of the pixels.
        """
        plain: dict[str, Any] = pydantic.TypeAdapter(Manifest).dump_python(
            self.manifest, mode="json", exclude={"training", "labels"}
        )
        height, width, channels = self.manifest.preprocessing.shape
        return plain | {"input": {"height": height, "width": width, "channels": channels}}


def open_bundle(path: Path) -> Bundle:
    """Reads a bundle and verifies the sha256 of every file. Raises BundleError.

    Damaged files that only artifacts use are listed in the result: open_engine() rejects those artifacts
    and opens another one.
    """
    manifest = _read_manifest(path)
    damaged_files = _damaged_files(path, manifest)
    labels = read_labels(path) if manifest.labels is None else manifest.labels
    if len(labels) != manifest.config.classes:
        raise BundleError(f"{path}/{LABELS} has {len(labels)} labels; the model has {manifest.config.classes} classes")
    return Bundle(path, manifest, labels, damaged_files)


def _read_manifest(path: Path) -> Manifest:
    try:
        fields = json.loads((path / MANIFEST).read_bytes())
        other_schema = isinstance(fields, dict) and fields.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION
        manifest = None if other_schema else pydantic.TypeAdapter(Manifest).validate_python(fields)
    except OSError as error:
        raise BundleError(f"{path} is not a bundle: {error.strerror}: {MANIFEST}") from error
    except ValueError as error:
        raise BundleError(f"{path}/{MANIFEST} is not a valid manifest: {error}") from error
    if manifest is None:
        raise BundleError(
            f"{path} has bundle schema {fields['schema_version']}, but this version of vitserve reads {SCHEMA_VERSION};"
            " export the model again with `vitserve export`"
        )
    return manifest


def _damaged_files(path: Path, manifest: Manifest) -> dict[str, str]:
    """The damaged files of artifacts → fault. Raises DamagedFileError for any other damaged file."""
    artifact_files = {name for artifact in manifest.artifacts for name in artifact.files}
    damaged_files = {}
    for name, expected in manifest.files.items():
        try:
            _verify(path, name, expected)
        except DamagedFileError as error:
            if name not in artifact_files:
                raise
            damaged_files[name] = str(error)
    return damaged_files


def check_destination(path: Path) -> None:
    """Raises BundleError if write_bundle() cannot write to ``path``, before the minutes that an export takes."""
    if path.is_dir():
        if not (path / MANIFEST).exists() and any(path.iterdir()):
            raise BundleError(f"{path} exists and is not a bundle; choose another directory")
        if os.path.ismount(path):
            raise BundleError(f"{path} is a mount point, which cannot be replaced; choose a directory in it")
    elif path.exists():
        raise BundleError(f"{path} exists and is not a directory; choose another path")
    parent = next(ancestor for ancestor in path.absolute().parents if ancestor.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BundleError(f"{path} cannot be written: {parent} is not a directory in which you may create files")


def write_bundle(path: Path, manifest: Manifest, contents: Path) -> Bundle:
    """Writes the files of the directory ``contents`` and the manifest, with their sha256, to ``path``, atomically.

    Replaces a bundle at ``path``, once the new one has been opened, but keeps its heads. Raises BundleError if anything
    else is there. If anything fails, ``path`` is unchanged.
    """
    check_destination(path)
    files = {file.name: sha256(file) for file in sorted(contents.iterdir())}
    complete = pydantic.TypeAdapter(Manifest).dump_python(manifest, mode="json") | {"files": files}
    text = pydantic.TypeAdapter(dict[str, Any]).dump_json(complete, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as beside:
        fresh, old = Path(beside) / "bundle", Path(beside) / "old"
        fresh.mkdir()  # with the default permissions, because ``contents`` may be a private temporary directory
        for file in contents.iterdir():
            shutil.copy2(file, fresh)
        (fresh / MANIFEST).write_bytes(text)
        bundle = open_bundle(fresh)
        if (path / HEADS).is_dir():
            shutil.copytree(path / HEADS, fresh / HEADS)
        if path.exists():
            path.rename(old)
        try:
            fresh.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
    return replace(bundle, path=path)


def save_golden(path: Path, golden: Golden) -> None:
    arrays: Mapping[str, Any] = {"pixels": golden.pixels, **golden.reference._asdict()}
    recorded: Mapping[str, Any] = {
        name: array
        for key, outputs in golden.recorded.items()
        for name, array in zip(_recorded_names(*key), outputs, strict=True)
    }
    np.savez_compressed(path, **arrays, **recorded, domain_images=np.array(golden.domain_images))


def _recorded_names(engine: str, precision: str) -> list[str]:
    return [f"{engine}-{precision}-{name}" for name in Outputs._fields]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(path: Path, name: str, expected: str) -> None:
    if Path(name).name != name:
        raise BundleError(f"{path}/{MANIFEST} names a file outside the bundle: {name!r}")
    try:
        actual = sha256(path / name)
    except OSError as error:
        raise DamagedFileError(f"{path}/{name}: {error.strerror}") from error
    if actual != expected:
        raise DamagedFileError(f"{path}/{name} has sha256 {actual[:12]}…; the manifest says {expected[:12]}…")
