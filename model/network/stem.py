"""The convolutional stem of the compact hybrids. The pixels of its feature map become the tokens."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn


class ConvNorm(nn.Module):
    """3 × 3 convolution, optional 2 × 2 max pooling, batch norm, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, halve: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)
        self.halve = halve

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.halve:
            x = F.max_pool2d(x, 2)
        return F.relu(self.norm(x))


class Residual(nn.Module):
    """A residual branch of one or more convolutions."""

    def __init__(self, channels: int, convolutions: int) -> None:
        super().__init__()
        branch = [ConvNorm(channels, channels) for _ in range(convolutions)]
        self.branch = branch[0] if convolutions == 1 else nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.branch(x)
        return added


class ConvStem(nn.Module):
    """[n, 3, H, W] → [n, channels[-1], H / r, W / r] with r = 2 ** (len(channels) - 1)."""

    def __init__(self, channels: tuple[int, ...], convolutions: int = 1) -> None:
        super().__init__()
        stages: list[nn.Module] = [ConvNorm(3, channels[0])]
        for before, after in itertools.pairwise(channels):
            stages += [ConvNorm(before, after, halve=True), Residual(after, convolutions)]
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(x)
        return x
