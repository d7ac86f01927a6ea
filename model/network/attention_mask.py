"""The mask of axial and local attention."""

from __future__ import annotations

import torch
from torch import Tensor

from vitserve.model.config import ViTConfig


def mask(config: ViTConfig, block: int) -> Tensor | None:
    """bool [tokens, tokens], true if the row's token attends to the column's; None for global attention.

    A mask keeps the fused attention operator and exports without a loop. At a ViT's sequence lengths a factorized form
    would save little.
    """
    if config.attention == "global":
        return None
    y, x = torch.meshgrid(torch.arange(config.grid), torch.arange(config.grid), indexing="ij")
    down = (y.flatten()[:, None] - y.flatten()[None]).abs()  # [grid², grid²], in patches
    across = (x.flatten()[:, None] - x.flatten()[None]).abs()
    axial = (down if block % 2 == 0 else across) == 0
    near = axial if config.attention == "axial" else torch.maximum(down, across) <= config.window // 2
    attends = torch.ones(config.tokens, config.tokens, dtype=torch.bool)
    attends[config.prefix :, config.prefix :] = near
    return attends
