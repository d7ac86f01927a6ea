"""Networks of timm, made by timm.create_model() from the name, the arguments, and the tensors of a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.library.owner import Logits, check_finite, check_fit, missing

_OF_CONFIGURATION = ("input_size", "fixed_input_size", "pool_size", "first_conv", "classifier", "num_classes")


def imported() -> ModuleType:
    """Raises LibraryMissingError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm's about itself
            import timm
    except (ImportError, RuntimeError, AttributeError) as error:  # or torchvision, which timm imports, is broken
        raise missing("timm", error) from error
    module: ModuleType = timm
    return module


def create(
    architecture: str,
    arguments: Mapping[str, Any],
    published: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    size: tuple[int, int] | None = None,
) -> nn.Module:
    """The network with the tensors of a checkpoint, as images → logits.

    ``published`` is pretrained_cfg. If ``size``, height and width, is not the one that the tensors are for, timm
    resamples the position embeddings.

    Raises CheckpointError for a name or arguments that timm does not have, and for tensors that do not fit.
    """
    check(architecture, arguments, published, tensors)
    other_size = size is not None and _sized(architecture, arguments, published, size)
    if not other_size:
        network = _made(architecture, arguments, published)
        network.load_state_dict(tensors, strict=True)
        return Logits(network)
    complete = {**arguments, "img_size": size}
    overlay = {**_known(published), "state_dict": dict(tensors), "custom_load": False, "label_offset": 0}
    overlay["num_classes"] = arguments.get("num_classes", overlay.get("num_classes", 1000))
    return Logits(_made(architecture, complete, {}, pretrained=True, pretrained_cfg_overlay=overlay))


def check(
    architecture: str, arguments: Mapping[str, Any], published: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Raises CheckpointError for tensors that are not the network's, or are not finite."""
    check_finite(tensors)
    check_fit(skeleton(architecture, arguments, published).state_dict(), tensors)


def fits(
    architecture: str, arguments: Mapping[str, Any], published: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> bool:
    """Whether the tensors have the names and shapes of the network's."""
    expected = skeleton(architecture, arguments, published).state_dict()
    return expected.keys() == tensors.keys() and all(expected[name].shape == tensors[name].shape for name in expected)


def skeleton(architecture: str, arguments: Mapping[str, Any], published: Mapping[str, Any]) -> nn.Module:
    """The network without memory for its weights. Raises CheckpointError."""
    with torch.device("meta"):
        return _made(architecture, arguments, published)


def _sized(
    architecture: str, arguments: Mapping[str, Any], published: Mapping[str, Any], size: tuple[int, int]
) -> bool:
    """Whether the network takes another image size than ``size``, which then must be an argument."""
    network = skeleton(architecture, arguments, published)
    grid: Any = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return grid is not None and tuple(grid) != size


def _made(architecture: str, arguments: Mapping[str, Any], published: Mapping[str, Any], **more: Any) -> nn.Module:
    timm = imported()
    if not timm.is_model(architecture):
        raise CheckpointError(f"timm has no architecture {architecture!r}")
    configuration = {"pretrained_cfg": _known(published)} if published else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network: nn.Module = timm.create_model(
                architecture, **{"pretrained": False} | configuration | dict(arguments) | more
            )
    except CheckpointError:
        raise
    except Exception as error:  # create_model raises whatever a constructor raises for arguments that do not fit
        raise CheckpointError(
            f"timm cannot create {architecture} with {dict(arguments)}: {type(error).__name__}: {error}"
        ) from error
    return network


def _known(published: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that affect how a network is made, and nothing that names a place to load weights from."""
    return {key: published[key] for key in _OF_CONFIGURATION if published.get(key) is not None}
