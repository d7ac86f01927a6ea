"""torchvision's vision transformer, made by the library from the tensors of a checkpoint."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn

from vitserve.export.checkpoint.library.owner import Logits, check_fit, missing
from vitserve.model.config import ViTConfig


def create(config: ViTConfig, tensors: Mapping[str, Tensor], size: tuple[int, int]) -> nn.Module:
    """Images → logits. The library interpolates the position embeddings to ``size``. Raises CheckpointError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchvision.models import vision_transformer as library  # type: ignore[import-untyped]
    except (ImportError, RuntimeError, AttributeError) as error:
        raise missing("torchvision", error) from error
    network = library.VisionTransformer(
        image_size=size[0],
        patch_size=config.patch_size,
        num_layers=config.depth,
        num_heads=config.heads,
        hidden_dim=config.width,
        mlp_dim=config.mlp_width,
        num_classes=config.classes,
        representation_size=config.representation_width,
    )
    weights = library.interpolate_embeddings(size[0], config.patch_size, OrderedDict(tensors))
    check_fit(network.state_dict(), {_current(name): tensor for name, tensor in weights.items()})
    network.load_state_dict(weights, strict=True)
    return Logits(network)


def _current(name: str) -> str:
    """Older names of the MLP, which the library's loader renames."""
    return name.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")
