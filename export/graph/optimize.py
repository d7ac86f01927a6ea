"""The optimized network: the same function as the reference network, with less arithmetic. This form is exported.

Each optimization is exact up to rounding. tests/export/test_optimize.py tests each one alone.

- The last block computes only the tokens that the head reads. The other tokens serve as keys and values.
- Pixel normalization becomes part of the patch projection, unless the first convolution pads.
- Layer scale becomes part of the projection before it.

Attention is the single operator of ONNX opset 23 on [n, tokens, width]. The operator splits the heads itself, so there
are no reshapes around it that could keep a runtime from fusing it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vitserve.export.graph.normalization import scale_and_shift
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.network.build import Network
from vitserve.model.network.vit import Attention, Block, LayerScale, ViT


class OptimizedNetwork(nn.Module):
    """uint8 pixels [n, H, W, C] → float32 logits [n, classes] and embedding [n, width], as ReferenceNetwork.

    Works on a copy: ``network`` is not changed.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, network: Network, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        scale, shift = map(torch.from_numpy, scale_and_shift(preprocessing))
        folded = isinstance(self.network, ViT) and fold_normalization(self.network, scale, shift)
        self.register_buffer("scale", None if folded else scale, persistent=False)
        self.register_buffer("shift", None if folded else shift, persistent=False)
        if isinstance(self.network, ViT):
            fold_layer_scale(self.network)
            fuse_attention(self.network)
            trim_last_block(self.network)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        images = pixels.float()
        if self.scale is not None and self.shift is not None:
            images = images * self.scale + self.shift
        outputs: tuple[Tensor, Tensor] = self.network(images.permute(0, 3, 1, 2))
        return outputs


class FusedAttention(nn.Module):
    """An Attention layer that exports as the single Attention operator of ONNX opset 23."""

    mask: Tensor | None

    def __init__(self, source: Attention) -> None:
        super().__init__()
        self.heads = source.heads
        self.qkv, self.q_norm, self.k_norm, self.proj = source.qkv, source.q_norm, source.k_norm, source.proj
        self.register_buffer("mask", source.mask, persistent=False)

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As Attention."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # each [n, tokens, width]
        return self.mix(q, k, v, self.mask if sizes is None else proportional(sizes, x.shape[1]))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs [n, queries, width], and keys averaged over the heads [n, tokens, head width].

        q [n, queries, width]; k, v [n, tokens, width]; mask bool [queries, tokens], or that of proportional().
        """
        q, k = self._by_head(self.q_norm, q), self._by_head(self.k_norm, k)
        mixed, *_ = torch.onnx.ops.attention(q, k, v, mask, q_num_heads=self.heads, kv_num_heads=self.heads)
        return self.proj(mixed), k.reshape(*k.shape[:2], self.heads, -1).mean(2)

    def _by_head(self, norm: nn.Module, x: Tensor) -> Tensor:
        if isinstance(norm, nn.Identity):
            return x
        out: Tensor = norm(x.reshape(*x.shape[:2], self.heads, -1)).flatten(-2)
        return out


class LastBlock(nn.Module):
    """A Block that computes only its first ``read`` tokens, with all tokens as keys and values.

    [n, tokens, width] → [n, read, width].
    """

    mask: Tensor | None

    def __init__(self, block: Block, read: int) -> None:
        super().__init__()
        self.read = read
        self.norm1, self.ls1, self.norm2, self.mlp, self.ls2 = block.norm1, block.ls1, block.norm2, block.mlp, block.ls2
        assert isinstance(block.attn, FusedAttention)
        self.attn = block.attn
        width = self.attn.qkv.in_features
        self.q, self.kv = _rows(self.attn.qkv, slice(width)), _rows(self.attn.qkv, slice(width, 3 * width))
        self.register_buffer("mask", None if self.attn.mask is None else self.attn.mask[:read], persistent=False)

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, None]:
        normed = self.norm1(x)
        k, v = self.kv(normed).chunk(2, dim=-1)
        mask = self.mask if sizes is None else proportional(sizes, self.read)
        mixed, _ = self.attn.mix(self.q(normed[:, : self.read]), k, v, mask)
        tokens: Tensor = x[:, : self.read] + self.ls1(mixed)  # [n, read, width]
        tokens = tokens + self.ls2(self.mlp(self.norm2(tokens)))
        return tokens, None


def proportional(sizes: Tensor, queries: int) -> Tensor:
    """The logarithm of the sizes, float32 [n, 1, queries, tokens]. Attention adds it to queries times keys.

    ONNX allows one row for all queries, but ONNX Runtime does not.
    """
    return sizes.log().transpose(1, 2)[:, None].expand(-1, -1, queries, -1)


def fuse_attention(network: ViT) -> None:
    for block in _blocks(network):
        block.attn = FusedAttention(block.attn)  # type: ignore[assignment]  # same shapes, for export only


def trim_last_block(network: ViT) -> None:
    """Reduces the last block to the class token, and to the distillation token if it has a head.

    A network that averages all tokens is not changed.
    """
    if network.config.pool == "token":
        network.blocks[-1] = LastBlock(_blocks(network)[-1], 1 + network.config.distillation_head)


def fold_layer_scale(network: ViT) -> None:
    for block in _blocks(network):
        for name, projection in (("ls1", block.attn.proj), ("ls2", block.mlp.fc2)):
            scale = getattr(block, name)
            if isinstance(scale, LayerScale):
                _scale_outputs(projection, scale.gamma.detach())
                setattr(block, name, nn.Identity())


def fold_normalization(network: ViT, scale: Tensor, shift: Tensor) -> bool:
    """Makes ``pixels * scale + shift`` part of the patch projection.

    Returns False, without a change, if the first convolution pads: padding a normalized image with zeros differs from
    padding the image itself with zeros.
    """
    embed = network.patch_embed
    if not isinstance(embed.backbone, nn.Identity):
        return False
    weight = embed.proj.weight.detach().double()  # [width, 3, patch, patch]
    bias = (weight * shift.double()[:, None, None]).sum((1, 2, 3))
    if embed.proj.bias is not None:
        bias = bias + embed.proj.bias.detach()
    embed.proj.weight = nn.Parameter((weight * scale.double()[:, None, None]).float(), requires_grad=False)
    embed.proj.bias = nn.Parameter(bias.float(), requires_grad=False)
    return True


def _blocks(network: ViT) -> list[Block]:
    return list(network.blocks)  # type: ignore[arg-type]  # ModuleList is not generic


def _scale_outputs(linear: nn.Linear, scale: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.detach() * scale[:, None], requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach() * scale, requires_grad=False)


def _rows(linear: nn.Linear, rows: slice) -> nn.Linear:
    """A linear layer with only these rows, thus these outputs, of ``linear``."""
    weight = linear.weight.detach()[rows]
    part = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None)
    part.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        part.bias = nn.Parameter(linear.bias.detach()[rows], requires_grad=False)
    return part
