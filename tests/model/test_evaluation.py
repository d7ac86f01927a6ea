"""Calibration and evaluation images, and the loss that is measured on them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.images import encoded, random_image
from vitserve.model.arrays import Outputs
from vitserve.model.bundle.bundle import Evaluation
from vitserve.model.bundle.evaluation import Images, evaluate, read_images
from vitserve.model.bundle.preprocess import Decoder, Preprocessing


def test_directory_names_are_the_labels_of_images(tmp_path: Path) -> None:
    for index in range(20):
        directory = tmp_path / ("cat" if index % 2 else "dog")
        directory.mkdir(exist_ok=True)
        (directory / f"{index}.png").write_bytes(encoded(random_image(seed=index)))
    labels, preprocessing = ["cat", "dog"], Preprocessing(16)
    calibration, evaluation = read_images(tmp_path, preprocessing, labels, calibration=5, evaluation=100)
    assert (calibration.pixels.shape, evaluation.pixels.shape) == ((5, 16, 16, 3), (15, 16, 16, 3))
    assert calibration.classes is not None
    assert evaluation.classes is not None
    assert Counter([*calibration.classes, *evaluation.classes]) == {0: 10, 1: 10}
    decoder = Decoder(preprocessing)
    directories = {decoder.decode(path.read_bytes()).tobytes(): path.parent.name for path in tmp_path.rglob("*.png")}
    assert all(
        directories[pixels.tobytes()] == labels[number]
        for pixels, number in zip(evaluation.pixels, evaluation.classes, strict=True)
    )
    assert read_images(tmp_path, preprocessing, ["cat", "mouse"], 5, 100)[1].classes is None


def test_missing_and_invalid_images_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 images; at least 2"):
        read_images(tmp_path, Preprocessing(16), [], 5, 5)
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"\.png: not an image"):
        read_images(tmp_path, Preprocessing(16), [], 5, 5)


def test_loss_is_in_percentage_points() -> None:
    logits = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]]
    reference = Outputs(logits, logits)
    changed = Outputs(np.concatenate([logits[:8], logits[:2] * -1]), logits)
    images = Images(np.zeros((10, 1, 1, 3), np.uint8), np.array([0, 1, 2, 3, 0, 1, 2, 3, 0, 1]))
    evaluation = evaluate(lambda _: changed, reference, images)
    assert (evaluation.top1_agreement, evaluation.accuracy, evaluation.source_accuracy) == (0.8, 0.8, 1.0)
    assert evaluation.loss == pytest.approx(20)
    unlabeled = evaluate(lambda _: changed, reference, replace(images, classes=None))
    assert unlabeled.loss == pytest.approx(10), "half of the changed predictions"
    assert Evaluation(1, 1.0, 0.0).loss == 0
