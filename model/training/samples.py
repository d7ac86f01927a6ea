"""Where the labeled images of a training are, and which of them are for training, validation, and the test.

A directory has a directory of images for each class, or such directories in train/ and in val/ or test/, or both.
An archive (.npz) has, for the splits "train" and "test": {split}_jpeg, concatenated encoded images, uint8;
{split}_offsets [n + 1]; {split}_labels [n]; and classes, the labels of the classes.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitserve.model.bundle.evaluation import image_files

HELD_OUT_SHARE = 0.1  # of the images without a split of their own: for validation, and for the test
LEAST_IMAGES = 3  # of a class: one each for training, validation, and the test
_VALIDATION_NAMES = ("val", "valid", "validation")


class TrainingDataError(ValueError):
    """The images cannot be used for training."""


@dataclass(frozen=True)
class Sample:
    """An encoded image."""

    name: str
    label: int  # index of its class
    read: Callable[[], bytes]  # may raise OSError


@dataclass(frozen=True)
class DataSet:
    labels: tuple[str, ...]
    training: Sequence[Sample]
    validation: Sequence[Sample]
    test: Sequence[Sample]
    description: str  # of the splits


def read_data_set(source: Path, validation_images: int, share: float, seed: int) -> DataSet:
    """Finds the images, without decoding them.

    Where a split is missing, a tenth of the others is held out, chosen by ``seed``: at most ``validation_images`` for
    validation. ``share`` of the training images is used; those of a smaller share are among those of a larger one.
    Raises TrainingDataError.
    """
    if source.is_dir():
        labels, training, validation, test = _of_directory(source, seed)
    elif source.is_file():
        labels, training, validation, test = _of_archive(source)
    else:
        raise TrainingDataError(f"{source} does not exist")
    if len(labels) < 2:
        raise TrainingDataError(f"{source} has {len(labels)} classes; at least 2 are needed")
    if not validation:
        most = min(validation_images, max(len(labels), round(HELD_OUT_SHARE * len(training))))
        training, validation = hold_out(training, most, seed)
    else:
        training, _ = hold_out(training, 0, seed)  # in random order, so that a share has images of all classes
    used = training[: round(len(training) * share)]
    _check_classes(labels, used, source)
    description = f"{len(used):,} training, {len(validation):,} validation, and {len(test):,} test images"
    return DataSet(tuple(labels), used, validation, test, description)


def hold_out(samples: Sequence[Sample], count: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """The other samples and ``count`` held-out ones, both in random order."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [samples[index] for index in order[count:]], [samples[index] for index in order[:count]]


def _check_classes(labels: Sequence[str], samples: Sequence[Sample], source: Path) -> None:
    counts = Counter(sample.label for sample in samples)
    missing = [label for index, label in enumerate(labels) if not counts[index]]
    if missing:
        raise TrainingDataError(f"{source} has no training images of the classes {', '.join(missing[:5])}")


_Splits = tuple[list[str], list[Sample], list[Sample], list[Sample]]


def _of_directory(directory: Path, seed: int) -> _Splits:
    if not (directory / "train").is_dir():
        labels = _class_names(directory)
        samples = _samples(directory, labels)
        return labels, *_split_by_class(directory, labels, samples, seed)
    labels = _class_names(directory / "train")
    validation_name = next((name for name in _VALIDATION_NAMES if (directory / name).is_dir()), "")
    splits = {name: _samples(directory / name, labels) for name in (validation_name, "test") if name}
    present = [name for name, samples in splits.items() if samples]
    if not present:
        raise TrainingDataError(f"{directory} has train/, but no images in val/ or test/")
    # With one of them only, it is the test: it must not choose anything during the training.
    validation = splits[validation_name] if len(present) == 2 else []
    return labels, _samples(directory / "train", labels), validation, splits[present[-1]]


def _class_names(directory: Path) -> list[str]:
    return sorted({path.relative_to(directory).parts[0] for path in image_files(directory) if path.parent != directory})


def _samples(directory: Path, labels: Sequence[str]) -> list[Sample]:
    """Images may be in directories below that of their class. Raises TrainingDataError for other classes."""
    if not directory.is_dir():
        return []
    index = {label: number for number, label in enumerate(labels)}
    samples = []
    for path in image_files(directory):
        label = path.relative_to(directory).parts[0] if path.parent != directory else ""
        if label not in index:
            place = f"in {label!r}, which is no class of train/" if label else "in no directory of a class"
            raise TrainingDataError(f"{path} is {place}")
        samples.append(Sample(str(path.relative_to(directory)), index[label], path.read_bytes))
    return samples


def _split_by_class(
    directory: Path, labels: Sequence[str], samples: Sequence[Sample], seed: int
) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """A tenth of each class, and at least one image, for validation, and another for the test."""
    random = np.random.default_rng(seed)
    parts: tuple[list[Sample], list[Sample], list[Sample]] = [], [], []
    for number, label in enumerate(labels):
        members = [sample for sample in samples if sample.label == number]
        if len(members) < LEAST_IMAGES:
            raise TrainingDataError(
                f"{directory / label} has {len(members)} images; at least {LEAST_IMAGES} are needed:"
                " for training, validation, and the test"
            )
        order = [members[index] for index in random.permutation(len(members))]
        held = max(1, round(HELD_OUT_SHARE * len(order)))
        for part, chosen in zip(parts, (order[2 * held :], order[:held], order[held : 2 * held]), strict=True):
            part.extend(chosen)
    return parts


def _of_archive(path: Path) -> _Splits:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            labels = [str(name) for name in arrays["classes"]]
            return labels, _archived(arrays, "train"), [], _archived(arrays, "test")
    except (ValueError, KeyError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        missing = f": it lacks {error}" if isinstance(error, KeyError) else ""
        raise TrainingDataError(f"{path} is no directory and no archive for `vitserve train`{missing}") from error


def _archived(arrays: Any, split: str) -> list[Sample]:
    encoded, offsets = arrays[f"{split}_jpeg"], arrays[f"{split}_offsets"]

    def reader(start: int, end: int) -> Callable[[], bytes]:
        return lambda: bytes(encoded[start:end].tobytes())

    spans = zip(offsets[:-1].tolist(), offsets[1:].tolist(), arrays[f"{split}_labels"].tolist(), strict=True)
    return [
        Sample(f"{split} image {number}", int(label), reader(start, end))
        for number, (start, end, label) in enumerate(spans)
    ]
