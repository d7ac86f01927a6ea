"""The Vision Transformer of "An Image is Worth 16x16 Words" (arXiv:2010.11929), in PyTorch.

Parameters carry the names that timm gives them, so that its state dicts load strictly.
File order: attention → MLP → block → patch embedding → ViT.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ViTConfig
from model.stem import ConvStem

LAYER_NORM_EPSILON = 1e-6  # the paper's released code and timm; torch's own default is 1e-5


class Attention(nn.Module):
    """Multi-head self-attention (the paper's appendix A)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [n, heads, t, head width]
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, t, width))
        return out


class Mlp(nn.Module):
    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block (the paper's equations 2 and 3)."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, LAYER_NORM_EPSILON)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, LAYER_NORM_EPSILON)
        self.mlp = Mlp(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class PatchEmbed(nn.Module):
    """[n, 3, H, W] → [n, grid², width]: every patch of the image, or of the stem's feature map, projected to a token."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        patch = config.patch_size // config.stem_reduction
        channels = 3 if config.stem is None else config.stem[-1]
        self.backbone = nn.Identity() if config.stem is None else ConvStem(config.stem)
        self.proj = nn.Conv2d(channels, config.width, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.proj(self.backbone(images))  # [n, width, grid, grid]
        return x.flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Normalised images [n, 3, image size, image size] → logits [n, classes] and embedding [n, width], both in the input's type."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.pool == "token" else None
        self.pos_embed = nn.Parameter(torch.empty(1, config.tokens, config.width))
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.mlp_width) for _ in range(config.depth))
        norm = nn.LayerNorm(config.width, LAYER_NORM_EPSILON)
        # timm's names: with the mean, the norm comes after the pooling and is called fc_norm.
        self.norm = norm if config.pool == "token" else nn.Identity()
        self.fc_norm = norm if config.pool == "mean" else nn.Identity()
        self.pre_logits: nn.Sequential | nn.Identity = nn.Identity()
        if config.representation_width is not None:
            self.pre_logits = nn.Sequential()
            self.pre_logits.add_module("fc", nn.Linear(config.width, config.representation_width))
            self.pre_logits.add_module("act", nn.Tanh())
        self.head = nn.Linear(config.representation_width or config.width, config.classes)
        self._initialise()

    def forward(self, images: Tensor, intermediates: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Logits and embedding. A dict given as ``intermediates`` is filled with "tokens", "block00"…, "norm", each [n, tokens, width]."""
        seen: dict[str, Tensor] = {} if intermediates is None else intermediates
        x = self.patch_embed(images)  # [n, grid², width]
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = seen["tokens"] = x + self.pos_embed
        for index, block in enumerate(self.blocks):
            x = seen[f"block{index:02}"] = block(x)
        x = seen["norm"] = self.norm(x)
        embedding = x[:, 0] if self.config.pool == "token" else self.fc_norm(x.mean(dim=1))
        return self.head(self.pre_logits(embedding)), embedding

    def _initialise(self) -> None:
        """Truncated normal of 0.02 for linear layers and positions, as timm and DeiT; the head starts at zero, as in the paper's code."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.zeros_(self.head.weight)
