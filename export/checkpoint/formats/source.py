"""What every source makes of its checkpoint: the shape, the weights under our names, labels and preprocessing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitserve.export.checkpoint.state_dict import CheckpointError
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ResNetConfig, ViTConfig

# Of the published sizes, by width: Ti, S, B, L, H (the papers' tables). What a file of weights alone does not say.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


@dataclass(frozen=True)
class Source:
    config: ViTConfig | ResNetConfig
    weights: dict[str, Tensor]
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None = None  # None where the checkpoint names none


def heads_of(width: int) -> int:
    """Raises CheckpointError for a width that is none of the published sizes."""
    if width not in _HEADS:
        raise CheckpointError(
            f"how many heads a width of {width} has cannot be told from weights alone; known are {_HEADS}"
        )
    return _HEADS[width]
