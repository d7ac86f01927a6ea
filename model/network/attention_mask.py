"""Which token attends to which, where that is not all to all."""

from __future__ import annotations

import torch
from torch import Tensor

from vitserve.model.config import ViTConfig


def mask(config: ViTConfig, block: int) -> Tensor | None:
    """bool [tokens, tokens], true where the row's token attends to the column's; None where all do.

    A mask and not a factorised form: the sequence of a ViT is short, the operator stays the fused one, and nothing loops when it is exported.
    """
    if config.attention == "global":
        return None
    y, x = torch.meshgrid(torch.arange(config.grid), torch.arange(config.grid), indexing="ij")
    down = (y.flatten()[:, None] - y.flatten()[None]).abs()  # [grid², grid²], in patches
    across = (x.flatten()[:, None] - x.flatten()[None]).abs()
    axial = (down if block % 2 == 0 else across) == 0
    near = axial if config.attention == "axial" else torch.maximum(down, across) <= config.window // 2
    whole = torch.ones(config.tokens, config.tokens, dtype=torch.bool)
    whole[config.prefix :, config.prefix :] = near
    return whole
