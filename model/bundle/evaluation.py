"""Images that a model is calibrated with and judged on, decoded as the service decodes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vitserve.model.arrays import Outputs, Pixels, softmax
from vitserve.model.bundle.bundle import Evaluation
from vitserve.model.bundle.preprocess import Decoder, ImageError, Preprocessing

Classes = npt.NDArray[np.int64]
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


@dataclass(frozen=True)
class Images:
    pixels: Pixels  # [n, H, W, 3]
    classes: Classes | None  # [n]; None where nobody says what they show


def read_images(
    source: Path, preprocessing: Preprocessing, labels: Sequence[str], calibration: int, evaluation: int
) -> tuple[Images, Images]:
    """Up to ``calibration`` images to calibrate with, and up to ``evaluation`` others to judge on.

    ``source`` is an archive as `vitserve train` takes it (calibrated with its train split, judged on its test split), or a directory, searched through;
    if the directories that hold its images are called as labels, those are their classes. Raises ValueError where there are none, too few, or a broken one.
    """
    decoder = Decoder(preprocessing)
    if source.is_dir():
        return _of_directory(source, decoder, labels, calibration, evaluation)
    with np.load(source, allow_pickle=False) as arrays:
        return _of_archive(arrays, "train", decoder, calibration), _of_archive(arrays, "test", decoder, evaluation)


def evaluate(run: Callable[[Pixels], Outputs], reference: Outputs, images: Images) -> Evaluation:
    """What ``run`` says to the images against what the float32 network says, and against the truth where that is known."""
    outputs = run(images.pixels)
    predicted, expected = outputs.logits.argmax(1), reference.logits.argmax(1)
    accuracy, source_accuracy = (
        (None, None)
        if images.classes is None
        else (float((each == images.classes).mean()) for each in (predicted, expected))
    )
    return Evaluation(
        images=len(images.pixels),
        top1_agreement=float((predicted == expected).mean()),
        probability=float(np.abs(softmax(outputs.logits) - softmax(reference.logits)).max()),
        accuracy=accuracy,
        source_accuracy=source_accuracy,
    )


def _of_archive(arrays: np.lib.npyio.NpzFile, split: str, decoder: Decoder, count: int) -> Images:
    encoded, offsets, classes = (
        arrays[f"{split}_jpeg"],
        arrays[f"{split}_offsets"],
        arrays[f"{split}_labels"].astype(np.int64),
    )
    chosen = np.sort(_some(len(classes), count))
    pixels = [decoder.decode(encoded[offsets[index] : offsets[index + 1]].tobytes()) for index in chosen]
    return Images(np.stack(pixels), classes[chosen])


def _of_directory(
    directory: Path, decoder: Decoder, labels: Sequence[str], calibration: int, evaluation: int
) -> tuple[Images, Images]:
    files = sorted(each for each in directory.rglob("*") if each.suffix.lower() in _SUFFIXES)
    if len(files) < 2:
        raise ValueError(
            f"{directory} holds {len(files)} images; at least 2 are needed, one to calibrate with and another to judge on"
        )
    calibration = min(calibration, len(files) // 2)
    order = _some(len(files), calibration + evaluation)
    index = {label: number for number, label in enumerate(labels)}
    classes = np.array([index.get(each.parent.name, -1) for each in files])
    known = bool((classes >= 0).all())
    pixels = [_decode(files[number], decoder) for number in order]
    parts = []
    for part in (slice(calibration), slice(calibration, None)):
        parts.append(Images(np.stack(pixels[part]), classes[order[part]] if known else None))
    return parts[0], parts[1]


def _decode(file: Path, decoder: Decoder) -> Pixels:
    try:
        return decoder.decode(file.read_bytes())
    except ImageError as error:
        raise ValueError(f"{file}: {error}") from error


def _some(of: int, count: int) -> npt.NDArray[np.int64]:
    """Indices of ``count`` out of ``of``, mixed, always the same."""
    return np.random.default_rng(0).permutation(of)[:count]


def in_batches(run: Callable[[Pixels], Outputs], size: int) -> Callable[[Pixels], Outputs]:
    """Of any number of images, ``size`` at a time."""

    def whole(pixels: Pixels) -> Outputs:
        parts = [run(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        return Outputs(
            np.concatenate([part.logits for part in parts]), np.concatenate([part.embedding for part in parts])
        )

    return whole
