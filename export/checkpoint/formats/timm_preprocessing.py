"""timm's evaluation transform, from pretrained_cfg, and the keys there that have no effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitserve.export.checkpoint.configuration import Configuration
from vitserve.export.checkpoint.errors import CheckpointError, UnsupportedError
from vitserve.model.bundle.preprocess import Preprocessing

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Keys of pretrained_cfg that have no effect on the outputs of the saved weights.
_PRETRAINED_WITHOUT_EFFECT = (
    # Where the original weights came from.
    {"url", "file", "state_dict", "hf_hub_id", "source", "architecture", "tag", "custom_load"},
    {"license", "description", "origin_url", "paper_name", "paper_ids", "notes"},
    # Other image sizes that the network was measured with.
    {"test_input_size", "min_input_size", "test_crop_pct", "pool_size", "test_pool_size"},
    # Names of layers that timm changes for other numbers of channels or classes.
    {"first_conv", "classifier", "num_features"},
)
# Keys at the root of config.json: those that timm writes for information, and those of transformers' timm_wrapper.
_ROOT_WITHOUT_EFFECT = ({"num_features", "do_pooling"},)


def preprocessing_of(pretrained: Configuration, arguments: Mapping[str, Any] | None = None) -> Preprocessing:
    """As timm.data.resolve_data_config() reads it, with its defaults for keys that are absent or null.

    ``arguments`` are those of the network, whose channels and fixed image size apply before ``pretrained``'s.
    """
    size = pretrained.take("input_size", (3, 224, 224))
    if not isinstance(size, list | tuple) or len(size) != 3 or not all(isinstance(side, int) for side in size):
        raise pretrained.fault("input_size", size, "channels, height and width")
    channels, *sides = size
    if arguments is not None:
        channels = arguments.get("in_chans", channels)
        sides = _fixed(arguments.get("img_size"), pretrained) or sides
    if channels not in (1, 3):
        raise UnsupportedError(
            f"unsupported input_size in {pretrained.name}: images have 3 channels (RGB) or 1 (gray), not {channels}"
        )
    height, width = (Configuration(pretrained.name, {"input_size": side}).integer("input_size") for side in sides)
    crop, mode = pretrained.number("crop_pct", 0.875) or 0.875, pretrained.text("crop_mode", "center") or "center"
    if mode not in ("center", "squash", "border"):
        raise UnsupportedError(
            f"unsupported crop_mode {mode!r} in {pretrained.name}; supported are center, squash, and border"
        )
    interpolation: Any = pretrained.text("interpolation", "bicubic") or "bicubic"
    mean, std = (
        _values(pretrained, key, default, channels)
        for key, default in (("mean", _IMAGENET_MEAN), ("std", _IMAGENET_STD))
    )
    if not all(std):
        raise CheckpointError(f"std in {pretrained.name} must not be zero")
    try:
        return Preprocessing(
            height,
            crop,
            interpolation,
            mean,
            std,
            squash=mode == "squash",
            width=None if width == height else width,
            border=mode == "border",
        )
    except ValueError as error:
        raise UnsupportedError(f"unsupported crop_pct or interpolation in {pretrained.name}: {error}") from error


def check_square_rgb(preprocessing: Preprocessing, name: str) -> None:
    """Raises CheckpointError for images that our own networks do not take."""
    height, width, channels = preprocessing.shape
    if height != width:
        raise UnsupportedError(f"unsupported input_size {width} × {height} in {name}: only square images are supported")
    if channels != 3:
        raise UnsupportedError(f"unsupported input_size in {name}: only images of 3 channels are supported")


def reject_unknown(config: Configuration, pretrained: Configuration, ignored: tuple[str, ...]) -> list[str]:
    """Raises CheckpointError naming keys that nothing has read. Returns notes about keys in ``ignored``."""
    pretrained.ignore(*_PRETRAINED_WITHOUT_EFFECT)
    config.ignore(*_ROOT_WITHOUT_EFFECT)
    notes = pretrained.reject_others(ignored)
    return notes + (config.reject_others(ignored) if config is not pretrained else [])


def _values(pretrained: Configuration, key: str, default: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One for each channel. Of three values for a network of gray images, which timm writes, the mean is taken."""
    values = pretrained.numbers(key, default)
    return values if channels == 3 else (sum(values) / 3,)


def _fixed(size: Any, pretrained: Configuration) -> list[int] | None:
    """The image size of the network's arguments, which applies if the network takes no other."""
    if not pretrained.flag("fixed_input_size", False) or size is None:
        return None
    return [size, size] if isinstance(size, int) else list(size)
