"""Compares the pixels of a bundle with the image processor of transformers that the checkpoint names.

Transformers 5 has two forms of its processors. Those that use Pillow give the same pixels as ours. Those that use
torchvision, the default, round differently; torch's kernels for uint8 have weights of 16 bits, Pillow's of 22.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitserve.export.checkpoint.configuration import read_json
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.files import PREPROCESSOR, PROCESSOR
from vitserve.export.checkpoint.library import transformers_network
from vitserve.export.checkpoint.library.image_processing import encoded, loaded, output_of
from vitserve.export.checkpoint.library.owner import LibraryMissingError
from vitserve.export.golden_images import textures
from vitserve.export.source_model import SourceModel
from vitserve.model.bundle.preprocess import Decoder, Preprocessing
from vitserve.model.bundle.processor import ProcessorComparison

# Height and width of the images, relative to the network's: two larger ones, as most photos are, and one that is
# enlarged in one direction, which shows more of the rounding.
_SIZES = ((1.5, 2.3), (2.3, 1.7), (0.67, 2.86))
_TEXTURES, _NOISE = 3, 1  # images of each size; the edges of noise are the sharpest
_INTEGER = 0.01  # levels; the processor's values are levels if they are so close to integers


def compare_processor(path: Path, source: SourceModel, progress: Callable[[str], None]) -> ProcessorComparison | None:
    """``path`` has the processor's configuration. None, and a note, if the processor cannot be made or compared.

    Without transformers, there is nothing to compare.
    """
    try:
        result = _compared(path, source)
    except LibraryMissingError:
        return None
    except CheckpointError as error:
        progress(f"note: the pixels are not compared with the checkpoint's image processor: {error}")
        return None
    progress(f"preprocessing: {result}")
    return result


def _compared(path: Path, source: SourceModel) -> ProcessorComparison:
    processor = loaded(path, _backend(path))
    preprocessing = source.preprocessing
    pairs = [(pixels, _pixels(processor, image, preprocessing)) for image, pixels in _images(preprocessing)]
    actual, wanted = (np.stack(pixels) for pixels in zip(*pairs, strict=True))
    levels = np.abs(actual - wanted)
    logits, expected = (source.run(np.rint(pixels).clip(0, 255).astype(np.uint8)).logits for pixels in (actual, wanted))
    return ProcessorComparison(
        _described(processor),
        len(actual),
        _rounded(levels.max()),
        float(levels.mean()) if levels.max() > _INTEGER else 0.0,
        float(np.abs(logits - expected).max() / max(np.abs(expected).max(), 1e-12)),
    )


def _backend(path: Path) -> str | None:
    """pil for a name that ends in Pil, which the library does not take into account; else the library's choice."""
    for file in (path / PROCESSOR, path / PREPROCESSOR) if path.is_dir() else (path,):
        if file.exists():
            settings = read_json(file)
            kind = settings.get("image_processor", settings).get("image_processor_type")
            return "pil" if isinstance(kind, str) and kind.endswith("Pil") else None
    return None


def _images(preprocessing: Preprocessing) -> Iterator[tuple[Image.Image, npt.NDArray[np.float64]]]:
    """Images, and our pixels of them, [height, width, channels]."""
    height, width, _ = preprocessing.shape
    decoder = Decoder(preprocessing, mode="exact")
    random = np.random.default_rng(0)
    for high, wide in _SIZES:
        shape = round(height * high), round(width * wide), 3
        for pixels in (*textures(shape, _TEXTURES), *random.integers(0, 256, (_NOISE, *shape), np.uint8)):
            image = Image.fromarray(pixels)
            yield image, decoder.decode(encoded(image)).astype(np.float64)


def _pixels(processor: Any, image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.float64]:
    """Those of the processor before its normalization, [height, width, channels]. Raises CheckpointError."""
    output = output_of(processor, image).transpose(1, 2, 0).astype(np.float64)
    if output.shape != preprocessing.shape:
        raise CheckpointError(
            f"it makes arrays of the shape {output.shape}, and the network takes {preprocessing.shape}"
        )
    is_reversed = bool(getattr(processor, "do_flip_channel_order", False))
    values: npt.NDArray[np.float64] = output[:, :, ::-1] if is_reversed else output
    levels: npt.NDArray[np.float64] = 255 * (values * np.array(preprocessing.std) + np.array(preprocessing.mean))
    return levels


def _rounded(levels: float) -> float:
    """Values of the processor are integers too, except for the rounding of its normalization."""
    return float(np.rint(levels)) if abs(levels - np.rint(levels)) < _INTEGER else float(levels)


def _described(processor: Any) -> str:
    version = transformers_network.imported().__version__
    return f"{type(processor).__name__} of transformers {version} (backend {getattr(processor, 'backend', 'unknown')})"
