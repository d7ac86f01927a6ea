"""ResNetV2 with group norm and weight standardization (BiT, arXiv:1912.11370).

It is the ViT paper's baseline classifier and the stem of its hybrid. Parameters have timm's names.
The two differ as published: the classifier normalizes before each convolution and pads symmetrically. The hybrid's stem
normalizes after each convolution and pads like TensorFlow's "SAME": at stride 2, more on the right and at the bottom.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitserve.model.config import ResNetConfig

GROUPS = 32
_EPSILON = 1e-8  # of weight standardization, as in BiT's release


class StdConv(nn.Conv2d):
    """A convolution with weight standardization (arXiv:1903.10520). ``same`` selects TensorFlow's padding."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, same: bool = False) -> None:
        same_padding = same and stride > 1  # at stride 1, "SAME" is symmetric
        padding = 0 if same_padding else (kernel - 1) // 2
        super().__init__(channels_in, channels_out, kernel, stride, padding, bias=False)
        self.same = same_padding

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = self.weight.var(dim=(1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) * torch.rsqrt(variance + _EPSILON)
        if self.same:
            x = pad_same(x, self.kernel_size[0], self.stride[0])
        return F.conv2d(x, weight, None, self.stride, self.padding)


def pad_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Pads a map so that the output has ceil(size / stride) pixels; an odd pixel goes to the right or bottom."""
    wide, high = (max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in (x.shape[-1], x.shape[-2]))
    return F.pad(x, [wide // 2, wide - wide // 2, high // 2, high - high // 2], value=value)


class Norm(nn.GroupNorm):
    """Group norm with optional ReLU."""

    def __init__(self, channels: int, activate: bool = True) -> None:
        super().__init__(GROUPS, channels)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return F.relu(x) if self.activate else x


class Downsample(nn.Module):
    """The shortcut of a block that changes the map's size or channels."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, same: bool, preact: bool) -> None:
        super().__init__()
        self.conv = StdConv(channels_in, channels_out, 1, stride, same)
        self.norm = nn.Identity() if preact else Norm(channels_out, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x))
        return out


class PreActBottleneck(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, stride: int, changes: bool) -> None:
        super().__init__()
        middle = channels_out // 4
        self.norm1, self.conv1 = Norm(channels_in), StdConv(channels_in, middle, 1)
        self.norm2, self.conv2 = Norm(middle), StdConv(middle, middle, 3, stride)
        self.norm3, self.conv3 = Norm(middle), StdConv(middle, channels_out, 1)
        self.downsample = Downsample(channels_in, channels_out, stride, same=False, preact=True) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.norm1(x)
        shortcut = x if self.downsample is None else self.downsample(activated)
        x = self.conv2(self.norm2(self.conv1(activated)))
        out: Tensor = self.conv3(self.norm3(x)) + shortcut
        return out


class Bottleneck(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, stride: int, changes: bool) -> None:
        super().__init__()
        middle = channels_out // 4
        self.conv1, self.norm1 = StdConv(channels_in, middle, 1, same=True), Norm(middle)
        self.conv2, self.norm2 = StdConv(middle, middle, 3, stride, same=True), Norm(middle)
        self.conv3, self.norm3 = StdConv(middle, channels_out, 1, same=True), Norm(channels_out, activate=False)
        self.downsample = Downsample(channels_in, channels_out, stride, same=True, preact=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return F.relu(self.norm3(self.conv3(x)) + shortcut)


class Stage(nn.Module):
    def __init__(
        self, channels_in: int, channels_out: int, depth: int, stride: int, block: type[PreActBottleneck | Bottleneck]
    ) -> None:
        super().__init__()
        first = block(channels_in, channels_out, stride, changes=True)
        self.blocks = nn.Sequential(
            first, *(block(channels_out, channels_out, 1, changes=False) for _ in range(depth - 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x)
        return out


class Root(nn.Module):
    """7 × 7 convolution and max pooling, each of which halves the map."""

    def __init__(self, channels: int, preact: bool) -> None:
        super().__init__()
        self.preact = preact
        self.conv = StdConv(3, channels, 7, 2, same=not preact)
        self.norm = nn.Identity() if preact else Norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        if self.preact:  # BiT pads with zeros, which differs from -inf because no ReLU precedes
            return F.max_pool2d(F.pad(x, [1, 1, 1, 1]), 3, 2)
        return F.max_pool2d(pad_same(x, 3, 2, value=-torch.inf), 3, 2)


class ResNetMap(nn.Module):
    """Normalized images [n, 3, H, W] → feature map [n, channels, H / r, W / r] with r = 4 · 2 ** (stages - 1)."""

    def __init__(self, blocks: tuple[int, ...], width_factor: int, preact: bool) -> None:
        super().__init__()
        self.stem = Root(64 * width_factor, preact)
        channels, stages = 64 * width_factor, []
        for index, depth in enumerate(blocks):
            after = 256 * width_factor * 2**index
            stages.append(
                Stage(channels, after, depth, 1 if index == 0 else 2, PreActBottleneck if preact else Bottleneck)
            )
            channels = after
        self.stages = nn.Sequential(*stages)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.stages(self.stem(x))
        return out


class Head(nn.Module):
    """A linear head, stored as a 1 × 1 convolution in the published weights."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, classes, 1)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)  # type: ignore[arg-type]  # a Conv2d has a bias by default

    @property
    def weight(self) -> Tensor:
        return self.fc.weight

    def forward(self, embedding: Tensor) -> Tensor:
        return F.linear(embedding, self.fc.weight.flatten(1), self.fc.bias)


class ResNet(ResNetMap):
    """Normalized images [n, 3, image size, image size] → logits [n, classes] and embedding [n, channels]."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config.blocks, config.width_factor, preact=True)
        self.config = config
        self.norm = Norm(self.channels)
        self.head = Head(self.channels, config.classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # returns a pair
        embedding = self.norm(super().forward(images)).mean(dim=(2, 3))
        return self.head(embedding), embedding
