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
    with pytest.raises(ValueError, match=r"0 of 2 images can be decoded: .\.png: not an image"):
        read_images(tmp_path, Preprocessing(16), [], 5, 5)


def test_hidden_files_are_skipped_and_broken_ones_are_named(tmp_path: Path) -> None:
    """macOS's files, a dead link, an empty and a truncated file do not end the command."""
    for index in range(6):
        (tmp_path / f"{index}.png").write_bytes(encoded(random_image(seed=index)))
    for hidden in ("._1.png", ".DS_Store.jpg", ".thumbnails/2.png", "__MACOSX/3.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"\0\5\26\7")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "truncated.png").write_bytes((tmp_path / "0.png").read_bytes()[:100])
    (tmp_path / "link.webp").symlink_to(tmp_path / "missing.webp")
    notes: list[str] = []
    calibration, evaluation = read_images(tmp_path, Preprocessing(16), [], 2, 100, notes.append)
    assert (len(calibration.pixels), len(evaluation.pixels)) == (2, 4)
    (note,) = notes
    assert note.startswith(f"skipped 3 images of {tmp_path} that cannot be decoded: ")
    assert all(name in note for name in ("empty.jpg: ", "truncated.png: ", "link.webp: No such file or directory"))
    assert "._" not in note


def test_broken_images_of_an_archive_are_skipped_with_their_classes(tmp_path: Path) -> None:
    images = [encoded(random_image(seed=index), "JPEG") for index in range(6)]
    images[2] = b"broken"
    content = np.frombuffer(b"".join(images), np.uint8)
    offsets = np.cumsum([0, *map(len, images)])
    arrays = {"jpeg": content, "offsets": offsets, "labels": np.arange(6)}
    archive = {f"{split}_{name}": array for split in ("train", "test") for name, array in arrays.items()}
    np.savez(tmp_path / "data.npz", **archive)  # type: ignore[arg-type]  # numpy's stub has another argument
    notes: list[str] = []
    for part in read_images(tmp_path / "data.npz", Preprocessing(16), [], 10, 10, notes.append):
        assert part.classes is not None
        assert part.classes.tolist() == [0, 1, 3, 4, 5]
        assert len(part.pixels) == 5
    assert [note.split(" that")[0] for note in notes] == [
        f"skipped 1 images of the {split} images of {tmp_path}/data.npz" for split in ("train", "test")
    ]


def test_another_file_is_no_source_of_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name, content in (("photo.jpg", encoded(random_image(), "JPEG")), ("other.npz", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is neither a directory of images nor an archive"):
            read_images(tmp_path / name, Preprocessing(16), [], 5, 5)


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
