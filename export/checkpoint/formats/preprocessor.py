"""The preprocessing that the user states: a configuration of another library, and options. Needs no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from vitserve.export.checkpoint.configuration import Configuration, read_json
from vitserve.export.checkpoint.errors import CheckpointError, OptionNeededError, UnsupportedError
from vitserve.export.checkpoint.files import CONFIG, PREPROCESSOR, PROCESSOR
from vitserve.export.checkpoint.formats import image_processor
from vitserve.export.checkpoint.formats.timm_preprocessing import preprocessing_of
from vitserve.export.checkpoint.overrides import Overrides
from vitserve.model.bundle.preprocess import Preprocessing

_TORCHVISION = "torchvision:"


def stated_preprocessing(overrides: Overrides) -> Preprocessing | None:
    """That of --preprocessor: a file or directory of transformers or timm, or torchvision:WEIGHTS.

    Raises CheckpointError.
    """
    stated = overrides.preprocessor
    if not stated:
        return None
    if stated.startswith(_TORCHVISION):
        from vitserve.export.checkpoint.formats import torchvision

        return torchvision.preprocessing_of(stated.removeprefix(_TORCHVISION))
    path = Path(stated)
    directory = path if path.is_dir() else path.parent
    config = read_json(directory / CONFIG) if (directory / CONFIG).exists() else {}
    if path.is_dir() and isinstance(config.get("pretrained_cfg"), dict):
        return preprocessing_of(Configuration(f"pretrained_cfg in {directory / CONFIG}", config["pretrained_cfg"]), {})
    keys = preprocessor_of(path) if path.is_dir() else Configuration(str(path), read_json(path))
    if "pretrained_cfg" in keys:
        return preprocessing_of(keys.section("pretrained_cfg"), {})
    model = str(config.get("model_type")) if config else "vit"
    try:
        return image_processor.preprocessing(keys, model, overrides.ignored_keys)[0]
    except UnsupportedError as error:
        return _of_library(path, error)


def named_processor(path: Path, overrides: Overrides) -> Path | None:
    """The file or directory with the configuration of transformers' image processor that the preprocessing is from.

    ``path`` is that of the checkpoint. None if there is no such file, or if an option states something else.
    """
    values = (overrides.mean, overrides.std, overrides.interpolation, overrides.crop, overrides.squash)
    if overrides.image_size or any(value is not None for value in values):
        return None
    if overrides.preprocessor.startswith(_TORCHVISION):
        return None
    path = Path(overrides.preprocessor) if overrides.preprocessor else path
    if path.is_file():
        return path if overrides.preprocessor and "pretrained_cfg" not in read_json(path) else None
    if (path / CONFIG).exists() and "pretrained_cfg" in read_json(path / CONFIG):  # timm's, which is read first
        return None
    return path if any((path / name).exists() for name in (PREPROCESSOR, PROCESSOR)) else None


def with_options(preprocessing: Preprocessing, overrides: Overrides) -> Preprocessing:
    """With the options for single values, such as --mean. Raises CheckpointError."""
    stated: dict[str, Any] = {
        "mean": overrides.mean,
        "std": overrides.std,
        "interpolation": overrides.interpolation,
        "crop": overrides.crop,
        "squash": overrides.squash,
    }
    try:
        return replace(preprocessing, **{name: value for name, value in stated.items() if value is not None})
    except ValueError as error:
        raise CheckpointError(f"the options of the preprocessing do not fit: {error}") from error


def preprocessor_of(directory: Path) -> Configuration:
    """transformers reads image_processor in processor_config.json first, if it exists. Raises CheckpointError."""
    if (directory / PROCESSOR).exists():
        nested = Configuration(PROCESSOR, read_json(directory / PROCESSOR))
        if "image_processor" in nested:
            return nested.section("image_processor")
    if not (directory / PREPROCESSOR).exists():
        raise OptionNeededError(
            f"{directory} has no {PREPROCESSOR}, which says how images are prepared: transformers' Trainer writes it"
            " only if it gets the processor. If the model was fine-tuned, give the file of its base model:"
            " --preprocessor FILE"
        )
    return Configuration(PREPROCESSOR, read_json(directory / PREPROCESSOR))


def _of_library(path: Path, error: UnsupportedError) -> Preprocessing:
    """Found by running the processor of transformers, if it is installed. Raises ``error`` if that fails."""
    try:
        from vitserve.export.checkpoint.library.image_processing import read_processor

        processor = read_processor(path)
    except (ImportError, CheckpointError):
        raise error from None
    if processor.reversed_channels:
        raise error
    return processor.preprocessing
