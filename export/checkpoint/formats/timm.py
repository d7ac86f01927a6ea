"""timm's ViT, DeiT and BiT ResNetV2: a state dict with the architecture's name and pretrained_cfg, as in config.json.

Our parameters have timm's names, see model/network/vit.py and model/network/resnet.py, so that nothing is renamed.
Tensor shapes determine most of the configuration. Heads, activation and pooling follow from the architecture's name.
A name with an unknown part is rejected, because it may compute something else with the same tensors.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.formats.source import Source
from vitserve.export.checkpoint.position_embeddings import square_side
from vitserve.export.checkpoint.state_dict import Tensors
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import Pool, ResNetConfig, ViTConfig

MARK = "patch_embed.proj.weight"  # a tensor that only timm's ViTs have
BIT_MARK = "head.fc.weight"  # a tensor that only timm's BiT ResNets have

_HEADS = {"tiny": 3, "xsmall": 4, "small": 6, "medium": 8, "base": 12, "large": 16, "huge": 16, "giant": 16}
_EXCEPTIONAL_HEADS = {"vit_base_patch16_gap_224": 16}  # I-JEPA's
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
                f"the position embeddings are for images of {config.image_size} pixels;"
                f" the configuration has {preprocessing.image_size}"
            )
    weights: dict[str, Tensor] = tensors.take_all()
    labels = pretrained.get("label_names")
    return Source(config, weights, preprocessing, tuple(labels) if labels else None)


def _vit_config(tensors: Tensors, name: str, pool: str | None, heads: int | None) -> ViTConfig:
    size, options = _size_and_options(name)
    width, _, patch_size, _ = tensors.shape(MARK)
    resnet = _stages(tensors)
    if resnet:
        patch_size *= 4 * 2 ** (len(resnet) - 1)
    class_token, distilled = "cls_token" in tensors, "dist_token" in tensors
    registers = tensors.shape("reg_token")[1] if "reg_token" in tensors else 0
    prefix = class_token + distilled + registers
    positions = tensors.shape("pos_embed")[1]
    # In deit3 and DINOv2 with registers only patches have positions: then their number is a square.
    prefix_positions = not _is_square(positions)
    mlp_width = tensors.shape("blocks.0.mlp.fc2.weight")[1]
    return ViTConfig(
        image_size=square_side(positions - prefix if prefix_positions else positions) * patch_size,
        patch_size=patch_size,
        width=width,
        depth=tensors.count("blocks.{}.norm1.weight"),
        heads=heads or _heads(name, size, options),
        mlp_width=mlp_width,
        classes=_classes(tensors, "head.weight"),
        pool=_pool(tensors, pool, options),
        representation_width=tensors.shape("pre_logits.fc.weight")[0] if "pre_logits.fc.weight" in tensors else None,
        resnet=resnet or None,
        class_token=class_token,
        distillation_token=distilled,
        distillation_head="head_dist.weight" in tensors,
        registers=registers,
        prefix_positions=prefix_positions and prefix > 0,
        pre_norm="norm_pre.weight" in tensors,
        norm_after_pool="fc_norm.weight" in tensors,
        norm_epsilon=1e-5 if "clip" in options else 1e-6,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        qk_norm="blocks.0.attn.q_norm.weight" in tensors,
        layer_scale="blocks.0.ls1.gamma" in tensors,
        swiglu=tensors.shape("blocks.0.mlp.fc1.weight")[0] == 2 * mlp_width,
        activation="quick_gelu" if "quickgelu" in options else "gelu",
    )


def _size_and_options(name: str) -> tuple[str, list[str]]:
    """("base", ["patch16", "224"]) for vit_base_patch16_224. Raises CheckpointError for an unknown part."""
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in _HEADS:
        raise CheckpointError(f"unsupported architecture {name!r}: not a known size of ViT or DeiT")
    options = match[2].split("_")[1:]
    unknown = [option for option in options if not _KNOWN_PARTS.fullmatch(option)]
    if unknown:
        raise CheckpointError(f"unsupported architecture {name!r}: unknown part {', '.join(unknown)}")
    return match[1], options


def _pool(tensors: Tensors, pool: str | None, options: list[str]) -> Pool:
    if pool not in (None, "avg", "token"):
        raise CheckpointError(f"unsupported pooling {pool!r}; supported are token and avg")
    by_default = pool is None and ("gap" in options or "fc_norm.weight" in tensors)
    return "mean" if pool == "avg" or by_default else "token"


def _heads(name: str, size: str, options: list[str]) -> int:
    if name in _EXCEPTIONAL_HEADS:
        return _EXCEPTIONAL_HEADS[name]
    return 24 if size == "giant" and "dinov2" in options else _HEADS[size]


def _bit_config(tensors: Tensors, width_factor: int, image_size: int) -> ResNetConfig:
    return ResNetConfig(image_size, _stages(tensors, "stages"), width_factor, _classes(tensors, BIT_MARK))


def _classes(tensors: Tensors, head: str) -> int:
    if head not in tensors:
        raise CheckpointError(f"missing tensor: {head}; a network without a head has no classes")
    return tensors.shape(head)[0]


def _stages(tensors: Tensors, prefix: str = "patch_embed.backbone.stages") -> tuple[int, ...]:
    """Blocks per stage of a ResNet; empty for a plain ViT."""
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
        crop, interpolation = pretrained["crop_pct"], pretrained["interpolation"]
        mode = pretrained.get("crop_mode", "center")
        mean, std = tuple(pretrained["mean"]), tuple(pretrained["std"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"pretrained_cfg in config.json lacks {error}") from error
    if height != width:
        raise CheckpointError(f"unsupported image size {width} × {height}: only square images are supported")
    if mode not in ("center", "squash"):
        raise CheckpointError(f"unsupported crop mode {mode!r}; supported are center and squash")
    return Preprocessing(height, crop, interpolation, mean, std, squash=mode == "squash")
