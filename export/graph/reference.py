"""The reference network: the source network with its normalization. All other forms are compared with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitserve.export.graph.normalization import scale_and_shift
from vitserve.model.bundle.preprocess import Preprocessing


class ReferenceNetwork(nn.Module):
    """uint8 pixels [n, H, W, C] → float32 logits [n, classes] and embedding [n, width]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, owner: nn.Module | None = None) -> None:
        """``owner`` is the same network in the library that trained it, images → logits. Its logits are taken."""
        super().__init__()
        self.network, self.owner = network, owner
        scale, shift = map(torch.from_numpy, scale_and_shift(preprocessing))
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        images = (pixels.float() * self.scale + self.shift).permute(0, 3, 1, 2)
        logits, embedding = self.network(images)
        return (logits if self.owner is None else self.owner(images)), embedding
