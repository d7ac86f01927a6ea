"""Image classifiers of transformers, made by the library from config.json and the tensors of a checkpoint.

Only classes of the library itself: code in the directory of a checkpoint is never imported.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.library.owner import Embedding, Logits, check_finite, missing

_NAMES_OF_CODE = {
    "auto_map",
    "custom_pipelines",
    *(f"{prefix}{name}_implementation" for prefix in ("", "_") for name in ("attn", "experts")),
    "_attn_implementation_internal",
    "_experts_implementation_internal",
}
_UNSUPPORTED = {
    "siglip2": "it is a NaFlex network, which takes patches of images of any aspect ratio. The service's images all"
    " have one size. SigLIP 2's checkpoints of a fixed size have model_type siglip, and are supported",
    "imagegpt": "it reads sequences of color clusters, not images",
    "perceiver": "it reads arrays of any kind, which its own preprocessing makes",
    "shieldgemma2": "it is a language model that classifies by generating text",
}


def imported() -> ModuleType:
    """Raises LibraryMissingError."""
    try:
        import transformers
    except (ImportError, RuntimeError) as error:
        raise missing("transformers", error) from error
    module: ModuleType = transformers
    return module


def create(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], size: tuple[int, int] | None = None
) -> Logits | Embedding:
    """The network that config.json, ``settings``, describes, as images → logits; → embedding of a base model.

    ``size``: height and width of the images, if it may differ from the configuration's; the library interpolates the
    position embeddings.

    Raises CheckpointError for a model_type without image classifier, and for tensors that are missing or misshapen.
    """
    check_supported(str(settings.get("model_type")))
    check_finite(tensors)
    config = configuration(settings)
    network = loaded(network_class(config, settings), config, tensors)
    arguments = _interpolation(network, config, size)
    return Embedding(network, arguments) if is_base_model(settings) else Logits(network, arguments)


def is_base_model(settings: Mapping[str, Any]) -> bool:
    """Whether config.json names a class without classifier, such as ViTModel or CLIPVisionModel."""
    named = settings.get("architectures") or []
    return len(named) == 1 and isinstance(named[0], str) and named[0].endswith("Model")


def network_class(config: Any, settings: Mapping[str, Any]) -> Any:
    """The class of the network. Raises CheckpointError."""
    if not is_base_model(settings):
        return classifier_of(config, settings)
    (name,) = settings["architectures"]
    transformers = imported()
    kind: Any = getattr(transformers, name, None)
    if not isinstance(kind, type) or getattr(kind, "config_class", None) is not type(config):
        raise CheckpointError(
            f"architectures in config.json is {name}, which is no network of transformers {transformers.__version__}"
            f" for model_type {settings.get('model_type')!r}"
        )
    if getattr(kind, "main_input_name", "") != "pixel_values":
        raise CheckpointError(f"{name} does not take images")
    return kind


def without_code(settings: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without the keys that name code to load: a module of the checkpoint, or kernels on the hub.

    Raises CheckpointError for quantized weights, which need such code.
    """
    if settings.get("quantization_config") is not None:
        raise CheckpointError("quantized weights are not supported (quantization_config in config.json)")
    if "auto_map" in settings and settings.get("model_type") not in imported().CONFIG_MAPPING:
        raise CheckpointError(
            "the network is code of the checkpoint (auto_map in config.json), which is never executed"
        )
    return {key: value for key, value in settings.items() if key not in _NAMES_OF_CODE}


def check_supported(kind: str) -> None:
    """Raises CheckpointError for a model_type that does not take images of one size."""
    if kind in _UNSUPPORTED:
        raise CheckpointError(f"unsupported model_type {kind!r}: {_UNSUPPORTED[kind]}")


def configuration(settings: Mapping[str, Any]) -> Any:
    """Raises CheckpointError for a model_type that the library does not have, and for values that it rejects."""
    transformers, kind = imported(), settings.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise CheckpointError(f"transformers {transformers.__version__} has no model_type {kind!r}")
    try:
        with quiet():
            return transformers.CONFIG_MAPPING[kind].from_dict(dict(settings))
    except Exception as error:  # the library validates with several packages
        raise CheckpointError(f"transformers rejects config.json: {error}") from error


def classifier_of(config: Any, settings: Mapping[str, Any]) -> Any:
    """The class: the one that ``architectures`` names, or the first one for the model_type."""
    transformers = imported()
    mapping = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if type(config) not in mapping:
        raise CheckpointError(
            f"transformers has no image classifier for model_type {settings.get('model_type')!r}; a base model computes"
            " features, so export a network that was fine-tuned for classification"
        )
    try:
        classes = mapping[type(config)]
    except (ImportError, RuntimeError) as error:  # a package that the module of the network imports
        raise missing("transformers", error) from error
    classes = list(classes) if isinstance(classes, list | tuple) else [classes]
    named = settings.get("architectures") or []
    return next((candidate for candidate in classes if candidate.__name__ in named), classes[0])


def loaded(kind: Any, config: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
    """An instance of the class with the tensors, in float32. Raises CheckpointError."""
    try:
        with quiet():
            network, info = kind.from_pretrained(
                None, config=config, state_dict=dict(tensors), output_loading_info=True, dtype="float32"
            )
    except Exception as error:
        raise CheckpointError(f"transformers cannot load the checkpoint as {kind.__name__}: {error}") from error
    if absent := sorted(info["missing_keys"]):
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise CheckpointError(f"missing tensors of {kind.__name__}: {', '.join(absent[:5])}{more}")
    if mismatched := info["mismatched_keys"]:
        raise CheckpointError(f"tensors of another shape than in {kind.__name__}: {mismatched}")
    result: nn.Module = network.eval()
    return result


def _interpolation(network: nn.Module, config: Any, size: tuple[int, int] | None) -> dict[str, bool]:
    """The argument that makes the network interpolate its position embeddings, if it is needed and there is one."""
    native: Any = getattr(config, "image_size", None) or getattr(
        getattr(config, "vision_config", None), "image_size", None
    )
    native = tuple(native) if isinstance(native, list | tuple) else (native, native)
    takes = "interpolate_pos_encoding" in inspect.signature(network.forward).parameters
    return {"interpolate_pos_encoding": True} if takes and size is not None and native != size else {}


@contextmanager
def quiet() -> Iterator[None]:
    """Hides progress bars and load reports."""
    logging_ = imported().utils.logging
    level, bars = logging_.get_verbosity(), logging_.is_progress_bar_enabled()
    logging_.set_verbosity(logging.CRITICAL)
    logging_.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging_.set_verbosity(level)
        if bars:
            logging_.enable_progress_bar()
