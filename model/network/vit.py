"""The Vision Transformer of "An Image is Worth 16x16 Words" (arXiv:2010.11929), in PyTorch.

Parameters have timm's names, so that timm's state dicts load strictly.
File order: attention → MLPs → block → patch embedding → ViT.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitserve.model.config import Activation, ViTConfig
from vitserve.model.network.attention_mask import mask
from vitserve.model.network.resnet import ResNetMap
from vitserve.model.network.stem import ConvStem
from vitserve.model.network.token_merging import merge_tokens


class Attention(nn.Module):
    """Multi-head self-attention (the paper's appendix A)."""

    mask: Tensor | None

    def __init__(self, config: ViTConfig, block: int) -> None:
        super().__init__()
        self.register_buffer("mask", mask(config, block), persistent=False)
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        head_width = config.width // config.heads
        self.q_norm = nn.LayerNorm(head_width, config.norm_epsilon) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_width, config.norm_epsilon) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs [n, t, width], and keys averaged over the heads [n, t, head width].

        ``sizes``: [n, t, 1], the patches in each token, which then gets as much attention as these patches
        (proportional attention, arXiv:2210.09461, equation 1).
        """
        n, t, width = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [n, heads, t, head width]
        k = self.k_norm(k)
        mask = self.mask if sizes is None else sizes.log().transpose(1, 2)[:, None]  # [n, 1, 1, t]
        mixed = F.scaled_dot_product_attention(self.q_norm(q), k, v, attn_mask=mask)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, t, width))
        return out, k.mean(1)


def activate(x: Tensor, activation: Activation) -> Tensor:
    match activation:
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "quick_gelu":  # OpenAI's CLIP
            return x * torch.sigmoid(1.702 * x)
        case "relu":
            return F.relu(x)
        case "silu":
            return F.silu(x)


class Mlp(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(activate(self.fc1(x), self.activation))
        return out


class SwiGlu(nn.Module):
    """Gated MLP; one matrix holds gate and value, in this order."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, 2 * config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        out: Tensor = self.fc2(F.silu(gate) * value)
        return out


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block (the paper's equations 2 and 3)."""

    def __init__(self, config: ViTConfig, index: int) -> None:
        super().__init__()
        self.prefix = config.prefix
        self.merge = config.merge if index < config.depth - 1 else 0  # nothing follows the last block
        self.norm1 = nn.LayerNorm(config.width, config.norm_epsilon)
        self.attn = Attention(config, index)
        self.ls1 = LayerScale(config.width) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.width, config.norm_epsilon)
        self.mlp = SwiGlu(config) if config.swiglu else Mlp(config)
        self.ls2 = LayerScale(config.width) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens, and the patches in each of them, [n, tokens, 1]. None for the sizes: every token is one patch."""
        mixed, keys = self.attn(self.norm1(x), sizes)
        x = x + self.ls1(mixed)
        if self.merge:
            sizes = torch.ones_like(x[:, :, :1]) if sizes is None else sizes
            x, sizes = merge_tokens(x, sizes, keys, self.prefix, self.merge)
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return x, sizes


class PatchEmbed(nn.Module):
    """[n, 3, H, W] → [n, grid², width]: projects each patch of the image or of the stem's feature map to a token."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        patch = config.patch_size // config.stem_reduction
        channels = 3
        self.backbone: nn.Module = nn.Identity()
        if config.stem is not None:
            self.backbone, channels = ConvStem(config.stem, config.stem_convolutions), config.stem[-1]
        if config.resnet is not None:
            self.backbone = ResNetMap(config.resnet, 1, preact=False)
            channels = self.backbone.channels
        self.proj = nn.Conv2d(channels, config.width, patch, stride=patch, bias=not config.pre_norm)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.proj(self.backbone(images))  # [n, width, grid, grid]
        return x.flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Normalized images [n, 3, image size, image size] → logits [n, classes] and embedding [n, embedding width]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.distillation_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, config.width)) if config.registers else None
        self.pos_embed = nn.Parameter(
            torch.empty(1, config.grid**2 + config.prefix * config.prefix_positions, config.width)
        )
        self.norm_pre = nn.LayerNorm(config.width, config.norm_epsilon) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        norm = nn.LayerNorm(config.width, config.norm_epsilon)
        # timm's name for the norm after the pooling is fc_norm.
        self.norm = nn.Identity() if config.norm_after_pool else norm
        self.fc_norm = norm if config.norm_after_pool else nn.Identity()
        self.pre_logits: nn.Sequential | nn.Identity = nn.Identity()
        if config.representation_width is not None:
            self.pre_logits = nn.Sequential()
            self.pre_logits.add_module("fc", nn.Linear(config.embedding_width, config.representation_width))
            self.pre_logits.add_module("act", nn.Tanh())
        self.head = nn.Linear(config.representation_width or config.embedding_width, config.classes)
        self.head_dist = nn.Linear(config.width, config.classes) if config.distillation_head else None
        self._initialize()

    def forward(self, images: Tensor, intermediates: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Logits and embedding. Fills ``intermediates``: "tokens", "block00"…, "norm", each [n, tokens, width]."""
        seen: dict[str, Tensor] = {} if intermediates is None else intermediates
        x = seen["tokens"] = self.norm_pre(self._tokens(images))
        sizes: Tensor | None = None
        for index, block in enumerate(self.blocks):
            x, sizes = block(x, sizes)
            seen[f"block{index:02}"] = x
        x = seen["norm"] = self.norm(x)
        embedding = self._pool(x, sizes)
        logits = self.head(self.pre_logits(embedding))
        if self.head_dist is not None:
            logits = (logits + self.head_dist(x[:, 1])) / 2
        return logits, embedding

    def _tokens(self, images: Tensor) -> Tensor:
        """Prefix tokens and patches, with position embeddings: [n, tokens, width]."""
        x = self.patch_embed(images)  # [n, grid², width]
        tokens = (self.cls_token, self.dist_token, self.reg_token)
        prefix = [token.expand(x.shape[0], -1, -1) for token in tokens if token is not None]
        if self.config.prefix_positions:
            return torch.cat([*prefix, x], dim=1) + self.pos_embed
        return torch.cat([*prefix, x + self.pos_embed], dim=1)

    def _pool(self, x: Tensor, sizes: Tensor | None) -> Tensor:
        """[n, tokens, width] → [n, embedding width]."""
        if self.config.pool == "token":
            return x[:, 0]
        patches = x[:, self.config.prefix :]
        if sizes is None:
            average = patches.mean(dim=1)
        else:  # of all patches, of which a merged token has several
            weights = sizes[:, self.config.prefix :]
            average = (patches * weights).sum(dim=1) / weights.sum(dim=1)
        mean: Tensor = self.fc_norm(average)
        return mean if self.config.pool == "mean" else torch.cat([x[:, 0], mean], dim=1)

    def _initialize(self) -> None:
        """Truncated normal (0.02) for linear layers and positions, as in timm; zero for the head, as in the paper."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.dist_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        nn.init.zeros_(self.head.weight)
