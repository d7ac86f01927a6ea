"""Fits a head on images in directories named after their classes: logistic regression on their embeddings."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vitserve.model.arrays import Floats
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.evaluation import image_files, in_batches, read_images
from vitserve.model.bundle.head import Head, HeadError, backbone_of
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.engines.selection import open_engine

BATCH = 16
LEAST_IMAGES = 4  # of a class: some are held out
_STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # inverse regularization, chosen by cross-validation


@dataclass(frozen=True)
class FittedHead:
    head: Head
    images: int
    held_out: int  # of these images, for the accuracy


def fit_head(
    bundle: Bundle,
    name: str,
    directory: Path,
    options: EngineOptions,
    held_out: float = 0.2,
    note: Callable[[str], None] = lambda text: None,
) -> FittedHead:
    """The classes are the names of the directories that the images are in, sorted.

    The share ``held_out`` of each class gives the accuracy that the head states. Then it is fitted on all images.
    Embeddings are those of the engine that the service would use. Raises HeadError, and ValueError for the images.
    """
    if not 0 < held_out < 1:
        raise HeadError(f"held_out is {held_out}; it must be between 0 and 1")
    labels = sorted({path.parent.name for path in image_files(directory)})
    if len(labels) < 2:
        raise HeadError(f"{directory} must have a directory of images for each of two or more classes")
    _, images = read_images(directory, bundle.manifest.preprocessing, labels, 0, len(image_files(directory)), note)
    assert images.classes is not None  # every image is in a directory named after a label
    counts = Counter(images.classes.tolist())
    for index, label in enumerate(labels):
        if counts[index] < LEAST_IMAGES:
            raise HeadError(f"class {label!r} has {counts[index]} images; at least {LEAST_IMAGES} are needed")
    opened = open_engine(bundle, options)
    try:
        embeddings = in_batches(lambda pixels: opened.engine.run(0, pixels), BATCH)(images.pixels).embedding
    finally:
        opened.engine.close()
    accuracy, test = _held_out_accuracy(embeddings, images.classes, held_out)
    weight, bias = _fit(embeddings, images.classes)
    backbone = backbone_of(bundle.manifest.files)
    head = Head(name, tuple(labels), weight, bias, backbone, accuracy=round(accuracy, 4))
    return FittedHead(head, len(images.classes), test)


def _held_out_accuracy(embeddings: Floats, classes: npt.NDArray[np.int64], share: float) -> tuple[float, int]:
    """The accuracy on a stratified share of the images, and their number."""
    from sklearn.model_selection import train_test_split

    number = max(round(share * len(classes)), len(set(classes.tolist())))
    parts = train_test_split(embeddings, classes, test_size=number, stratify=classes, random_state=0)
    train, test, train_classes, test_classes = parts
    weight, bias = _fit(train, train_classes)
    return float(((test @ weight.T + bias).argmax(axis=1) == test_classes).mean()), len(test_classes)


def _fit(embeddings: Floats, classes: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Weight float32 [classes, width] and bias float32 [classes], of embeddings that are not standardized."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    mean, scale = embeddings.mean(axis=0), embeddings.std(axis=0) + 1e-6
    standardized = (embeddings - mean) / scale
    folds = StratifiedKFold(min(3, min(Counter(classes.tolist()).values())), shuffle=True, random_state=0)
    search = GridSearchCV(LogisticRegression(max_iter=1000), {"C": _STRENGTHS}, cv=folds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence: cross-validation decides
        regression = search.fit(standardized, classes).best_estimator_
    weight, bias = regression.coef_, regression.intercept_
    if len(weight) == 1:
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    weight = weight / scale
    return weight.astype(np.float32), (bias - weight @ mean).astype(np.float32)
