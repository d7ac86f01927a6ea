"""The preprocessing of any image processor of transformers, found by running the processor.

The resolved settings of the processor say which sizes may matter. Each combination of them is compared with the
processor on generated images. A processor that does something else than resize, crop and normalize matches none.
"""

from __future__ import annotations

import io
import math
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.files import CONFIG, PREPROCESSOR, PROCESSOR
from vitserve.export.checkpoint.library import transformers_network
from vitserve.model.bundle.preprocess import Decoder, Interpolation, Preprocessing

_RESAMPLE: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_SIZES = ((331, 260), (250, 417), (640, 427))  # width and height of the generated images
_LEVELS = 1.01  # of 255; the greatest difference from a processor that uses Pillow
_TORCH_LEVELS = 0.1  # the mean difference from a processor that uses torch only, which rounds differently


@dataclass(frozen=True)
class Processor:
    preprocessing: Preprocessing
    reversed_channels: bool = False  # the network takes BGR


def read_processor(path: Path) -> Processor:
    """``path`` is a directory with a processor's configuration, or the file. Raises CheckpointError."""
    processor = loaded(path, "pil")
    images = [_image(*size, seed) for seed, size in enumerate(_SIZES)]
    outputs = [output_of(processor, image) for image in images]
    if len({output.shape for output in outputs}) != 1 or outputs[0].ndim != 3 or outputs[0].shape[0] not in (1, 3):
        raise CheckpointError(
            f"unsupported {_name(processor)}: it makes arrays of the shapes {[output.shape for output in outputs]} from"
            " images of different sizes, and the service's images all have one size"
        )
    limit = _limit(processor)
    try:
        candidates = list(_candidates(processor.to_dict(), outputs[0].shape))
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise CheckpointError(f"unsupported {_name(processor)}: {error}") from error
    for candidate in candidates:
        difference = [_levels(candidate, image, output) for image, output in zip(images, outputs, strict=True)]
        if max(limit(levels) for levels in difference) <= 1:
            return candidate
    raise CheckpointError(
        f"unsupported {_name(processor)}: no resize, crop and normalization gives its output for generated images;"
        f" its settings are {_shown(processor.to_dict())}"
    )


def loaded(path: Path, backend: str | None) -> Any:
    """The processor, without code of the checkpoint. A ``backend`` of None is the library's choice.

    Raises CheckpointError.
    """
    transformers = transformers_network.imported()
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings(), transformers_network.quiet():
        warnings.simplefilter("ignore")
        directory = Path(temporary)
        if path.is_dir():
            files = [path / name for name in (CONFIG, PREPROCESSOR, PROCESSOR) if (path / name).exists()]
        else:
            files = [path]
        for file in files:  # without code of the checkpoint, and under the names that the library looks for
            name = file.name if path.is_dir() else PREPROCESSOR
            shutil.copyfile(file, directory / name)
        try:
            return transformers.AutoImageProcessor.from_pretrained(
                temporary, backend=backend, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the library raises whatever its constructors raise
            raise CheckpointError(f"transformers cannot make the image processor of {path}: {error}") from error


def output_of(processor: Any, image: Image.Image) -> npt.NDArray[np.float32]:
    """[channels, height, width]. Raises CheckpointError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = processor(images=image, return_tensors="np")
    except Exception as error:
        raise CheckpointError(f"{_name(processor)} cannot process an image: {error}") from error
    array: npt.NDArray[np.float32] = np.asarray(result["pixel_values"])[0]
    return array


def _candidates(settings: dict[str, Any], shape: tuple[int, ...]) -> Iterator[Processor]:
    _, height, width = shape
    resample = _RESAMPLE.get(int(settings.get("resample") or 0), "bicubic")
    base = Preprocessing(
        height, interpolation=resample, floor_crop=True, width=None if width == height else width, **_norms(settings)
    )
    for reverse in (False, True):
        for size in sorted(set(_resized(settings, height))):
            crop = height / size if math.floor(height / (height / size)) == size else height / (size + 0.5)
            for squash in (True, False):
                for floor in (True, False):
                    if 0 < crop <= 1:
                        order = -1 if reverse else 1
                        yield Processor(
                            replace(
                                base,
                                crop=crop,
                                squash=squash,
                                floor_crop=floor,
                                mean=base.mean[::order],
                                std=base.std[::order],
                            ),
                            reverse,
                        )


def _resized(settings: dict[str, Any], height: int) -> Iterator[int]:
    """Sizes that the shorter side may be resized to."""
    size = settings.get("size") or {}
    yield height
    for named in (size.get("shortest_edge"), size.get("height"), settings.get("resize_short")):
        if named:
            yield named
            yield int(named * 256 / 224)  # LevitImageProcessor
            if settings.get("crop_pct"):
                yield int(named / settings["crop_pct"])


def _norms(settings: dict[str, Any]) -> dict[str, Any]:
    mean, std = [0.0] * 3, [1.0] * 3
    if settings.get("do_normalize"):
        mean, std = (list(settings[key]) for key in ("image_mean", "image_std"))
        if settings.get("include_top"):  # EfficientNetImageProcessor divides by it twice
            std = [value * value for value in std]
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    scale = 1.0 if factor == 1 / 255 else 1 / (255 * factor)
    return {"mean": tuple(value * scale for value in mean), "std": tuple(value * scale for value in std)}


def _levels(candidate: Processor, image: Image.Image, output: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The differences from the processor's output, in levels of 255."""
    preprocessing = candidate.preprocessing
    pixels = Decoder(preprocessing, mode="exact").decode(encoded(image)).astype(np.float64)
    order = -1 if candidate.reversed_channels else 1
    pixels = pixels[:, :, ::order]
    mean, std = (np.array(values)[::order] for values in (preprocessing.mean, preprocessing.std))
    expected = output.transpose(1, 2, 0) * std + mean
    levels: npt.NDArray[np.float64] = np.abs(expected * 255 - pixels)
    return levels


def _limit(processor: Any) -> Any:
    if "Pil" in type(processor).__name__:
        return lambda levels: levels.max() / _LEVELS
    return lambda levels: levels.mean() / _TORCH_LEVELS


def _image(width: int, height: int, seed: int) -> Image.Image:
    """Smooth waves, in which a shift by half a pixel shows, and different channels."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (height // 12, width // 12, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image) -> bytes:
    """Without loss."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def _name(processor: Any) -> str:
    return type(processor).__name__.removesuffix("Pil")


def _shown(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)[:300]
