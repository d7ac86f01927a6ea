"""Images for calibrating and evaluating a model, decoded as the service decodes them."""

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
    classes: Classes | None  # [n]; None if unknown


def read_images(
    source: Path, preprocessing: Preprocessing, labels: Sequence[str], calibration: int, evaluation: int
) -> tuple[Images, Images]:
    """Reads up to ``calibration`` images for calibration and up to ``evaluation`` other images for evaluation.

    ``source`` is an archive in the format of `vitserve train`, whose train split is for calibration and test split
    for evaluation, or a directory that is searched recursively. If every image lies in a directory named after a label,
    that label is its class.

    Raises ValueError if there are fewer than two images or one cannot be decoded.
    """
    decoder = Decoder(preprocessing)
    if source.is_dir():
        return _of_directory(source, decoder, labels, calibration, evaluation)
    with np.load(source, allow_pickle=False) as arrays:
        return _of_archive(arrays, "train", decoder, calibration), _of_archive(arrays, "test", decoder, evaluation)


def evaluate(run: Callable[[Pixels], Outputs], reference: Outputs, images: Images) -> Evaluation:
    """Compares the outputs of ``run`` with the fp32 network's and, if the classes are known, with the classes."""
    outputs = run(images.pixels)
    predicted, expected = outputs.logits.argmax(1), reference.logits.argmax(1)
    accuracy = source_accuracy = None
    if images.classes is not None:
        accuracy, source_accuracy = (float((top1 == images.classes).mean()) for top1 in (predicted, expected))
    return Evaluation(
        images=len(images.pixels),
        top1_agreement=float((predicted == expected).mean()),
        probability=float(np.abs(softmax(outputs.logits) - softmax(reference.logits)).max()),
        accuracy=accuracy,
        source_accuracy=source_accuracy,
    )


def _of_archive(arrays: np.lib.npyio.NpzFile, split: str, decoder: Decoder, count: int) -> Images:
    encoded, offsets = arrays[f"{split}_jpeg"], arrays[f"{split}_offsets"]
    classes = arrays[f"{split}_labels"].astype(np.int64)
    chosen = np.sort(_random_indices(len(classes), count))
    pixels = [decoder.decode(encoded[offsets[index] : offsets[index + 1]].tobytes()) for index in chosen]
    return Images(np.stack(pixels), classes[chosen])


def _of_directory(
    directory: Path, decoder: Decoder, labels: Sequence[str], calibration: int, evaluation: int
) -> tuple[Images, Images]:
    files = sorted(path for path in directory.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if len(files) < 2:
        raise ValueError(
            f"{directory} contains {len(files)} images; at least 2 are needed, for calibration and evaluation"
        )
    calibration = min(calibration, len(files) // 2)
    order = _random_indices(len(files), calibration + evaluation)
    index = {label: number for number, label in enumerate(labels)}
    classes = np.array([index.get(path.parent.name, -1) for path in files])
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


def _random_indices(total: int, count: int) -> npt.NDArray[np.int64]:
    """``count`` of ``total`` indices in random order, the same in every run."""
    return np.random.default_rng(0).permutation(total)[:count]


def in_batches(run: Callable[[Pixels], Outputs], size: int) -> Callable[[Pixels], Outputs]:
    """Runs any number of images, ``size`` at a time."""

    def run_all(pixels: Pixels) -> Outputs:
        parts = [run(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        return Outputs(
            np.concatenate([part.logits for part in parts]), np.concatenate([part.embedding for part in parts])
        )

    return run_all
