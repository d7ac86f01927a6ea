"""Google's .npz release (github.com/google-research/vision_transformer): ViT and R+ViT.

Axes are in JAX's order: a kernel is [in, out], a convolution's [height, width, in, out].
Tensors (optional ones in parentheses):

    cls, embedding/{kernel,bias}, head/*, (pre_logits/*)
    Transformer/posembed_input/pos_embedding, Transformer/encoder_norm/{scale,bias}
    Transformer/encoderblock_N:
        LayerNorm_0, MultiHeadDotProductAttention_1/{query,key,value,out}, LayerNorm_2, MlpBlock_3/{Dense_0,Dense_1}
    a hybrid's ResNet: conv_root, gn_root, and blockN/unitM: conv1…3, gn1…3, (conv_proj, gn_proj)
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.formats.source import Source
from vitserve.export.checkpoint.position_embeddings import GOOGLE, square_side
from vitserve.export.checkpoint.state_dict import Tensors
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ViTConfig

MARK = "Transformer/posembed_input/pos_embedding"  # a tensor that only this format has

_BLOCK, _ATTENTION = "Transformer/encoderblock_{}", "MultiHeadDotProductAttention_1"


def read(tensors: Tensors) -> Source:
    """Raises CheckpointError."""
    resnet = _stages(tensors)
    side, _, _, width = tensors.shape_of("embedding/kernel", 4)
    patch = side * (4 * 2 ** (len(resnet) - 1) if resnet else 1)
    _, heads, _ = tensors.shape_of(f"{_BLOCK.format(0)}/{_ATTENTION}/query/kernel", 3)
    if "head/kernel" not in tensors:
        raise CheckpointError("the checkpoint has no classification head (head/kernel): it is a base model")
    config = ViTConfig(
        image_size=square_side(tensors.shape_of(MARK, 3)[1] - 1) * patch,
        patch_size=patch,
        width=width,
        depth=tensors.count(_BLOCK + "/LayerNorm_0/scale"),
        heads=heads,
        mlp_width=tensors.shape(f"{_BLOCK.format(0)}/MlpBlock_3/Dense_0/kernel")[-1],
        classes=tensors.shape_of("head/kernel", 2)[1],
        representation_width=tensors.shape("pre_logits/kernel")[1] if "pre_logits/kernel" in tensors else None,
        resnet=resnet or None,
    )
    weights = {"cls_token": tensors.take("cls"), "pos_embed": tensors.take(MARK)}
    weights |= {
        "patch_embed.proj.weight": _filters(tensors.take("embedding/kernel")),
        "patch_embed.proj.bias": tensors.take("embedding/bias"),
    }
    weights |= _norm(tensors, "Transformer/encoder_norm", "norm") | _dense(tensors, "head", "head")
    if config.representation_width is not None:
        weights |= _dense(tensors, "pre_logits", "pre_logits.fc")
    for index in range(config.depth):
        weights |= _block(tensors, _BLOCK.format(index), f"blocks.{index}")
    for stage, units in enumerate(resnet):
        for unit in range(units):
            weights |= _unit(
                tensors, f"block{stage + 1}/unit{unit + 1}", f"patch_embed.backbone.stages.{stage}.blocks.{unit}"
            )
    if resnet:
        weights["patch_embed.backbone.stem.conv.weight"] = _filters(tensors.take("conv_root/kernel"))
        weights |= _norm(tensors, "gn_root", "patch_embed.backbone.stem.norm")
    tensors.expect_nothing_more()
    # The release's preprocessing: (pixels / 255 - 0.5) / 0.5, both sides resized to the image size, bilinear.
    preprocessing = Preprocessing(config.image_size, interpolation="bilinear", squash=True)
    return Source(config, weights, preprocessing, interpolation=GOOGLE, notes=tuple(tensors.notes))


def _stages(tensors: Tensors) -> tuple[int, ...]:
    """Units per stage of a hybrid's ResNet; empty for a plain ViT."""
    stages: list[int] = []
    while f"block{len(stages) + 1}/unit1/conv1/kernel" in tensors:
        stages.append(tensors.count(f"block{len(stages) + 1}/unit{{}}/conv1/kernel", first=1))
    return tuple(stages)


def _block(tensors: Tensors, source: str, target: str) -> dict[str, Tensor]:
    kernels, biases = [], []
    for name in ("query", "key", "value"):
        kernel = tensors.take(f"{source}/{_ATTENTION}/{name}/kernel")  # [width, heads, head width]
        kernels.append(kernel.flatten(1))
        biases.append(tensors.take(f"{source}/{_ATTENTION}/{name}/bias").flatten())
    out = tensors.take(f"{source}/{_ATTENTION}/out/kernel")  # [heads, head width, width]
    parts = {
        f"{target}.attn.qkv.weight": torch.cat(kernels, dim=1).T.contiguous(),
        f"{target}.attn.qkv.bias": torch.cat(biases),
        f"{target}.attn.proj.weight": out.flatten(0, 1).T.contiguous(),
        f"{target}.attn.proj.bias": tensors.take(f"{source}/{_ATTENTION}/out/bias"),
    }
    parts |= _norm(tensors, f"{source}/LayerNorm_0", f"{target}.norm1") | _norm(
        tensors, f"{source}/LayerNorm_2", f"{target}.norm2"
    )
    return (
        parts
        | _dense(tensors, f"{source}/MlpBlock_3/Dense_0", f"{target}.mlp.fc1")
        | _dense(tensors, f"{source}/MlpBlock_3/Dense_1", f"{target}.mlp.fc2")
    )


def _unit(tensors: Tensors, source: str, target: str) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    for number in (1, 2, 3):
        parts[f"{target}.conv{number}.weight"] = _filters(tensors.take(f"{source}/conv{number}/kernel"))
        parts |= _norm(tensors, f"{source}/gn{number}", f"{target}.norm{number}")
    if f"{source}/conv_proj/kernel" in tensors:
        parts[f"{target}.downsample.conv.weight"] = _filters(tensors.take(f"{source}/conv_proj/kernel"))
        parts |= _norm(tensors, f"{source}/gn_proj", f"{target}.downsample.norm")
    return parts


def _filters(kernel: Tensor) -> Tensor:
    """[height, width, in, out] → [out, in, height, width]."""
    return kernel.permute(3, 2, 0, 1).contiguous()


def _norm(tensors: Tensors, source: str, target: str) -> dict[str, Tensor]:
    return {
        f"{target}.weight": tensors.take(f"{source}/scale").flatten(),
        f"{target}.bias": tensors.take(f"{source}/bias").flatten(),
    }


def _dense(tensors: Tensors, source: str, target: str) -> dict[str, Tensor]:
    return {
        f"{target}.weight": tensors.take(f"{source}/kernel").T.contiguous(),
        f"{target}.bias": tensors.take(f"{source}/bias"),
    }
