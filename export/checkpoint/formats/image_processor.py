"""The preprocessing of transformers' image processors: preprocessor_config.json, or image_processor in
processor_config.json.

The processors for one image run the same steps (PilBackend in transformers/image_processing_backends.py): resize,
center crop, rescale, normalize. They differ in the defaults of keys that the file does not have. A null is no default:
a step that is null does not run.
"""

from __future__ import annotations

import math
from typing import Any

from vitserve.export.checkpoint.configuration import Configuration
from vitserve.export.checkpoint.errors import CheckpointError, UnsupportedError
from vitserve.model.bundle.preprocess import Interpolation, Preprocessing

_RESAMPLE: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_HALF = [0.5, 0.5, 0.5]
_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_BIT = {
    "resample": 3,
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "do_center_crop": True,
    "crop_size": 224,
}
# Class → the defaults of its keys. The names of the variants Fast and Pil, and of the older feature extractors, map to
# these.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {"resample": 2, "image_mean": _HALF, "image_std": _HALF, "size": 224},
    "DeiTImageProcessor": {
        "resample": 3,
        "image_mean": _HALF,
        "image_std": _HALF,
        "size": 256,
        "do_center_crop": True,
        "crop_size": 224,
    },
    "BitImageProcessor": _BIT,
    "CLIPImageProcessor": _BIT,
}
# The processor that transformers takes for a model if the file does not name one.
_BY_MODEL = {"vit": "ViTImageProcessor", "deit": "DeiTImageProcessor"}

_WITHOUT_EFFECT = {
    # Names of classes and versions; the first two are read before.
    "processor_class",
    "_processor_class",
    "_valid_processor_keys",
    "transformers_version",
    # The decoder always converts to RGB.
    "do_convert_rgb",
    # Only with do_pad, which is rejected.
    "pad_size",
    # The kind of array that the library returns, and how it groups images.
    "return_tensors",
    "input_data_format",
    "device",
    "disable_grouping",
    # For models of text and images.
    "image_seq_length",
}


def preprocessing(
    keys: Configuration, model: str = "vit", ignored: tuple[str, ...] = ()
) -> tuple[Preprocessing, list[str]]:
    """The preprocessing, and notes about keys in ``ignored``. ``model`` is the model_type of config.json.

    Raises CheckpointError.
    """
    defaults = _defaults(keys, model)
    resize = _resize(keys, defaults)
    resample = keys.take("resample", defaults["resample"])
    if resample not in _RESAMPLE or isinstance(resample, bool):
        raise UnsupportedError(f"unsupported resample {resample!r}; supported are {_RESAMPLE}")
    mean, std = _normalization(keys, defaults)
    keys.require({"do_pad": False, "data_format": "channels_first"})
    keys.ignore(_WITHOUT_EFFECT)
    squash, resized, image_size = resize
    crop = image_size / resized
    if math.floor(image_size / crop) != resized:  # rounding; half a pixel more gives the same size
        crop = image_size / (resized + 0.5)
    result = Preprocessing(image_size, crop, _RESAMPLE[resample], mean, std, squash=squash, floor_crop=True)
    return result, keys.reject_others(ignored)


def _defaults(keys: Configuration, model: str) -> dict[str, Any]:
    named = keys.take("image_processor_type") or keys.take("feature_extractor_type") or ""
    keys.ignore({"feature_extractor_type"})
    if not isinstance(named, str):
        raise keys.fault("image_processor_type", named, "a string")
    kind = named.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    kind = kind or _BY_MODEL.get(model, "BitImageProcessor")
    if kind not in _DEFAULTS:
        raise UnsupportedError(f"unsupported image_processor_type {named!r}; supported are {', '.join(_DEFAULTS)}")
    return {"do_center_crop": False, "default_to_square": True} | _DEFAULTS[kind]


def _resize(keys: Configuration, defaults: dict[str, Any]) -> tuple[bool, int, int]:
    """Whether both sides are resized alike, the size after the resize, and the image size after the crop."""
    if not _step(keys, "do_resize", True):
        raise UnsupportedError(
            f"unsupported do_resize false in {keys.name}: the network takes images of one size, so they must be resized"
        )
    square = _step(keys, "default_to_square", defaults["default_to_square"])
    squash, resized = _size(keys, keys.take("size", defaults["size"]), square)
    if not _step(keys, "do_center_crop", defaults["do_center_crop"]):
        keys.ignore({"crop_size"})
        if not squash:
            raise UnsupportedError(
                f"unsupported do_center_crop false in {keys.name}: it resizes the shorter side without a center crop,"
                " and only square images are supported"
            )
        return squash, resized, resized
    crop_size = _square(keys, "crop_size", keys.take("crop_size", defaults.get("crop_size")))
    if crop_size > resized:
        raise UnsupportedError(
            f"unsupported crop_size {crop_size} in {keys.name}: the image is resized to {resized} pixels"
        )
    return squash, resized, crop_size


def _size(keys: Configuration, size: Any, square: bool) -> tuple[bool, int]:
    """Whether both sides are resized alike, and the size. An integer is the shorter side unless ``square``."""
    if isinstance(size, dict) and size.keys() == {"shortest_edge"}:
        size, square = size["shortest_edge"], False
    squash = square or not isinstance(size, int)
    return squash, _square(keys, "size", size)


def _square(keys: Configuration, name: str, size: Any) -> int:
    """The side of a square that is an integer, a pair, or an object with height and width."""
    if isinstance(size, dict):
        if size.keys() != {"height", "width"}:
            raise UnsupportedError(
                f"unsupported {name} {size} in {keys.name}; supported are height and width, and shortest_edge for size"
            )
        size = [size["height"], size["width"]]
    return Configuration(keys.name, {name: size}).side(name, None)


def _normalization(
    keys: Configuration, defaults: dict[str, Any]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of pixels from 0 to 1.

    The library computes (pixels * factor - mean) / std, with a factor of 1 if it does not rescale.
    """
    factor = 1.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    if _step(keys, "do_rescale", True):
        factor = keys.number("rescale_factor", 1 / 255)
    if _step(keys, "do_normalize", True):
        mean = keys.numbers("image_mean", defaults["image_mean"])
        std = keys.numbers("image_std", defaults["image_std"])
    keys.ignore({"rescale_factor", "image_mean", "image_std"})  # of steps that do not run
    if not factor or not all(std):
        raise CheckpointError(f"rescale_factor and image_std in {keys.name} must not be zero")
    divisor = 1 if factor == 1 / 255 else 255 * factor
    scaled = [tuple(value / divisor for value in values) for values in (mean, std)]
    (red, green, blue), (red_std, green_std, blue_std) = scaled
    return (red, green, blue), (red_std, green_std, blue_std)


def _step(keys: Configuration, name: str, default: bool) -> bool:
    """Whether a step runs."""
    if keys.is_null(name):
        keys.take(name)
        return False
    return keys.flag(name, default)
