"""Images for calibrating and evaluating a model, decoded as the service decodes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitserve.model.arrays import Activation, Outputs, Pixels, agreement_of, to_predictions, to_probabilities
from vitserve.model.bundle.bundle import Evaluation
from vitserve.model.bundle.preprocess import Decoder, ImageError, Preprocessing

Classes = npt.NDArray[np.int64]
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
_LISTED = 3  # files named in a message
_MOST_LABELED = 5_000  # pixels are kept in memory: 0.75 GB at 224 pixels


@dataclass(frozen=True)
class Images:
    pixels: Pixels  # [n, H, W, C]
    classes: Classes | None  # [n]; None if unknown


def read_images(
    source: Path,
    preprocessing: Preprocessing,
    labels: Sequence[str],
    calibration: int,
    evaluation: int,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Images, Images]:
    """Reads up to ``calibration`` images for calibration and up to ``evaluation`` other images for evaluation.

    ``source`` is an archive in the format of `vitserve train`, whose train split is for calibration and test split
    for evaluation, or a directory that is searched recursively. If every image lies in a directory named after a label,
    that label is its class. Hidden files are skipped. So are images that cannot be decoded; ``note`` receives their
    number, names and reasons.

    Raises ValueError if there are fewer than two images that can be decoded, or the source is neither.
    """
    decoder = Decoder(preprocessing)
    if source.is_dir():
        return _of_directory(source, decoder, labels, (calibration, evaluation), note)
    with _opened_archive(source) as arrays:
        return (
            _of_archive(source, arrays, "train", decoder, calibration, note),
            _of_archive(source, arrays, "test", decoder, evaluation, note),
        )


def read_labeled_images(
    source: Path, preprocessing: Preprocessing, labels: Sequence[str], note: Callable[[str], None] = lambda text: None
) -> Images:
    """Up to 5,000 images of a directory, or of the test split of an archive. Raises ValueError.

    On the images of its training, a network's probabilities are too high.
    """
    if source.is_dir():
        return read_images(source, preprocessing, labels, 0, _MOST_LABELED, note)[1]
    with _opened_archive(source) as arrays:
        return _of_archive(source, arrays, "test", Decoder(preprocessing), _MOST_LABELED, note)


def image_files(directory: Path) -> list[Path]:
    """The images in the directory and below, by their suffixes, sorted.

    Hidden files are not among them: macOS writes ._1.jpg for 1.jpg, and __MACOSX into archives.
    """

    def hidden(path: Path) -> bool:
        return any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(directory).parts)

    return sorted(path for path in directory.rglob("*") if path.suffix.lower() in SUFFIXES and not hidden(path))


def evaluate(
    run: Callable[[Pixels], Outputs], reference: Outputs, images: Images, activation: Activation = "softmax"
) -> Evaluation:
    """Compares the outputs of ``run`` with the fp32 network's and, if the classes are known, with the classes.

    With sigmoid an image may have several classes, so the one that is known gives no accuracy.
    """
    outputs = run(images.pixels)
    actual_probabilities, expected_probabilities = (
        to_probabilities(result.logits, activation) for result in (outputs, reference)
    )
    accuracy = source_accuracy = None
    if images.classes is not None and activation == "softmax":
        predicted, expected = (to_predictions(result.logits, activation) for result in (outputs, reference))
        rows = np.arange(len(images.classes))
        accuracy, source_accuracy = (float(classes[rows, images.classes].mean()) for classes in (predicted, expected))
    return Evaluation(
        images=len(images.pixels),
        top1_agreement=agreement_of(outputs.logits, reference.logits, activation),
        probability=float(np.abs(actual_probabilities - expected_probabilities).max()),
        accuracy=accuracy,
        source_accuracy=source_accuracy,
    )


def _opened_archive(source: Path) -> Any:
    """Raises ValueError."""
    try:
        arrays = np.load(source, allow_pickle=False)
    except ValueError:
        arrays = None
    names = {f"{split}_{name}" for split in ("train", "test") for name in ("jpeg", "offsets", "labels")}
    if not isinstance(arrays, np.lib.npyio.NpzFile) or not names <= set(arrays.files):
        raise ValueError(f"{source} is neither a directory of images nor an archive for `vitserve train`")
    return arrays


def _of_archive(
    source: Path, arrays: Any, split: str, decoder: Decoder, count: int, note: Callable[[str], None]
) -> Images:
    encoded, offsets = arrays[f"{split}_jpeg"], arrays[f"{split}_offsets"]
    classes = arrays[f"{split}_labels"].astype(np.int64)
    chosen = np.sort(_random_indices(len(classes), count))
    images = ((f"image {index}", encoded[offsets[index] : offsets[index + 1]].tobytes) for index in chosen)
    pixels, decoded, faults = _decode(images, decoder, count)
    _report(f"the {split} images of {source}", len(chosen), faults, note, 1)
    return Images(np.stack(pixels), classes[chosen[decoded]])


def _of_directory(
    directory: Path, decoder: Decoder, labels: Sequence[str], counts: tuple[int, int], note: Callable[[str], None]
) -> tuple[Images, Images]:
    files = image_files(directory)
    if len(files) < 2:
        raise ValueError(
            f"{directory} contains {len(files)} images; at least 2 are needed, for calibration and evaluation"
        )
    calibration = min(counts[0], len(files) // 2)
    order = _random_indices(len(files), len(files))
    images = ((str(files[number].relative_to(directory)), files[number].read_bytes) for number in order)
    pixels, decoded, faults = _decode(images, decoder, calibration + counts[1])
    _report(str(directory), len(files), faults, note, 2)
    calibration = min(calibration, len(pixels) // 2)
    index = {label: number for number, label in enumerate(labels)}
    classes = np.array([index.get(path.parent.name, -1) for path in files])
    known = bool((classes >= 0).all())
    stacked, chosen, parts = np.stack(pixels), order[decoded], []
    for part in (slice(calibration), slice(calibration, None)):
        parts.append(Images(stacked[part], classes[chosen[part]] if known else None))
    return parts[0], parts[1]


def _decode(
    images: Iterable[tuple[str, Callable[[], bytes]]], decoder: Decoder, count: int
) -> tuple[list[Pixels], list[int], list[str]]:
    """The pixels of the first ``count`` images that can be decoded, their places, and the faults of the others."""
    pixels, decoded, faults = list[Pixels](), list[int](), list[str]()
    for place, (name, read) in enumerate(images):
        if len(pixels) == count:
            break
        try:
            pixels.append(decoder.decode(read()))
            decoded.append(place)
        except (ImageError, OSError) as error:
            faults.append(f"{name}: {getattr(error, 'strerror', None) or error}")
    return pixels, decoded, faults


def _report(source: str, images: int, faults: list[str], note: Callable[[str], None], least: int) -> None:
    """Raises ValueError if fewer than ``least`` images are left."""
    more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
    listed = "; ".join(faults[:_LISTED]) + more
    if images - len(faults) < least:
        raise ValueError(f"{source}: {images - len(faults)} of {images} images can be decoded: {listed}")
    if faults:
        note(f"skipped {len(faults)} images of {source} that cannot be decoded: {listed}")


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
