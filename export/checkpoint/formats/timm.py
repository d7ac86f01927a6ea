"""timm's ViT, DeiT and BiT ResNetV2: a state dict, with the architecture's name and pretrained_cfg as timm's hub directories hold them in config.json.

Our parameters carry timm's names, so nothing is renamed. The shape is read from the tensors; what they do not show (heads, activation, pooling)
follows from the architecture's name, and a name with a part that is not known is rejected: it may compute something else with the same tensors.
Expected: see model/network/vit.py and model/network/resnet.py.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from vitserve.export.checkpoint.formats.source import Source
from vitserve.export.checkpoint.position_embeddings import square_side
from vitserve.export.checkpoint.state_dict import CheckpointError, Tensors
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ResNetConfig, ViTConfig

MARK = "patch_embed.proj.weight"  # a tensor that only this source has, and of BiT
BIT_MARK = "head.fc.weight"

_HEADS = {"tiny": 3, "xsmall": 4, "small": 6, "medium": 8, "base": 12, "large": 16, "huge": 16, "giant": 16}
_ODD_HEADS = {"vit_base_patch16_gap_224": 16}  # I-JEPA's
_NAME = re.compile(r"(?:vit|deit|deit3)_([a-z]+)(?:_distilled)?((?:_[a-z0-9]+)*)")
_KNOWN_PARTS = re.compile(r"patch\d+|r\d+|s\d+|\d+|gap|reg\d|clip|quickgelu|dinov2|distilled|miil")
_BIT = re.compile(r"resnetv2_\d+x(\d)_bit\w*")


def read(
    tensors: Tensors, architecture: str, pretrained: dict[str, Any], pool: str | None = None, heads: int | None = None
) -> Source:
    """``pretrained`` is timm's pretrained_cfg. Raises CheckpointError."""
    name = architecture.partition(".")[0]
    preprocessing = _preprocessing(pretrained)
    bit = _BIT.fullmatch(name)
    config: ViTConfig | ResNetConfig
    if bit is not None:
        config = _bit_config(tensors, int(bit[1]), preprocessing.image_size)
    else:
        config = _vit_config(tensors, name, pool, heads)
        if config.image_size != preprocessing.image_size:
            raise CheckpointError(
                f"positions are of {config.image_size} pixels, but the configuration says {preprocessing.image_size}"
            )
    weights: dict[str, Tensor] = tensors.rest()
    labels = pretrained.get("label_names")
    return Source(config, weights, preprocessing, tuple(labels) if labels else None)


def _vit_config(tensors: Tensors, name: str, pool: str | None, heads: int | None) -> ViTConfig:
    parts = _NAME.fullmatch(name)
    unknown = [part for part in (parts[2].split("_")[1:] if parts else [name]) if not _KNOWN_PARTS.fullmatch(part)]
    if parts is None or parts[1] not in _HEADS or unknown:
        raise CheckpointError(
            f"architecture {name!r} is not one that is known to compute what ours does: {', '.join(unknown) or (parts and parts[1])}"
        )
    known = parts[2].split("_")
    width, _, patch, _ = tensors.shape(MARK)
    resnet = _stages(tensors)
    if resnet:
        patch *= 4 * 2 ** (len(resnet) - 1)
    swiglu = tensors.shape("blocks.0.mlp.fc1.weight")[0] == 2 * tensors.shape("blocks.0.mlp.fc2.weight")[1]
    class_token, distilled = "cls_token" in tensors, "dist_token" in tensors
    registers = tensors.shape("reg_token")[1] if "reg_token" in tensors else 0
    positions = tensors.shape("pos_embed")[1]
    # deit3, DINOv2 with registers and whatever is like them give positions to patches only: then their number is a square.
    prefix_positions = not _is_square(positions)
    patches = positions - (class_token + distilled + registers if prefix_positions else 0)
    mean = pool == "avg" or (pool is None and ("gap" in known or "fc_norm.weight" in tensors))
    if pool not in (None, "avg", "token"):
        raise CheckpointError(f"timm pools with {pool!r}; known here are token and avg")
    return ViTConfig(
        image_size=square_side(patches) * patch,
        patch_size=patch,
        width=width,
        depth=tensors.count("blocks.{}.norm1.weight"),
        heads=heads or _ODD_HEADS.get(name) or (24 if parts[1] == "giant" and "dinov2" in known else _HEADS[parts[1]]),
        mlp_width=tensors.shape("blocks.0.mlp.fc2.weight")[1],
        classes=_classes(tensors, "head.weight"),
        pool="mean" if mean else "token",
        representation_width=tensors.shape("pre_logits.fc.weight")[0] if "pre_logits.fc.weight" in tensors else None,
        resnet=resnet or None,
        class_token=class_token,
        distillation_token=distilled,
        distillation_head="head_dist.weight" in tensors,
        registers=registers,
        prefix_positions=prefix_positions and class_token + distilled + registers > 0,
        pre_norm="norm_pre.weight" in tensors,
        norm_after_pool="fc_norm.weight" in tensors,
        norm_epsilon=1e-5 if "clip" in known else 1e-6,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        qk_norm="blocks.0.attn.q_norm.weight" in tensors,
        layer_scale="blocks.0.ls1.gamma" in tensors,
        swiglu=swiglu,
        activation="quick_gelu" if "quickgelu" in known else "gelu",
    )


def _bit_config(tensors: Tensors, width_factor: int, image_size: int) -> ResNetConfig:
    return ResNetConfig(image_size, _stages(tensors, "stages"), width_factor, _classes(tensors, BIT_MARK))


def _classes(tensors: Tensors, head: str) -> int:
    if head not in tensors:
        raise CheckpointError(f"missing: {head}; a network without a head has no classes to serve")
    return tensors.shape(head)[0]


def _stages(tensors: Tensors, prefix: str = "patch_embed.backbone.stages") -> tuple[int, ...]:
    """Blocks of each stage of a ResNet; empty where there is none."""
    stages: list[int] = []
    while f"{prefix}.{len(stages)}.blocks.0.conv1.weight" in tensors:
        stages.append(tensors.count(f"{prefix}.{len(stages)}.blocks.{{}}.conv1.weight"))
    return tuple(stages)


def _is_square(number: int) -> bool:
    try:
        square_side(number)
    except CheckpointError:
        return False
    return True


def _preprocessing(pretrained: dict[str, Any]) -> Preprocessing:
    try:
        _, height, width = pretrained["input_size"]
        crop, mode, interpolation = (
            pretrained["crop_pct"],
            pretrained.get("crop_mode", "center"),
            pretrained["interpolation"],
        )
        mean, std = tuple(pretrained["mean"]), tuple(pretrained["std"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the configuration's pretrained_cfg lacks {error}") from error
    if height != width:
        raise CheckpointError(f"images of {width} × {height} pixels are not square, and only squares are served")
    if mode not in ("center", "squash"):
        raise CheckpointError(f"crop mode {mode!r} is not known; center and squash are")
    return Preprocessing(height, crop, interpolation, mean, std, squash=mode == "squash")
