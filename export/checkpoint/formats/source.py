"""The common result of all formats: configuration, weights under our parameter names, preprocessing and labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ResNetConfig, ViTConfig

# Width → heads of the published sizes Ti, S, B, L and H. Weights alone do not show the number of heads.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


@dataclass(frozen=True)
class Source:
    config: ViTConfig | ResNetConfig
    weights: dict[str, Tensor]
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None = None  # None if the checkpoint has no labels


def heads_of(width: int) -> int:
    """The number of heads. Raises CheckpointError for a width other than the published sizes'."""
    if width not in _HEADS:
        raise CheckpointError(
            f"cannot determine the number of heads for width {width} from weights alone; known widths: {_HEADS}"
        )
    return _HEADS[width]
