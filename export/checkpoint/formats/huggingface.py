"""Image classifiers of transformers: ViT, DeiT (with or without teacher), DINOv2 (with or without registers).

Tensors (optional ones in parentheses), with the prefix vit., deit., dinov2. or dinov2_with_registers.:

    embeddings: cls_token, position_embeddings, patch_embeddings.projection.*, (distillation_token), (register_tokens)
    encoder.layer.N: attention.attention.{query,key,value}.*, attention.output.dense.*, norms and MLP
    layernorm.*

and without a prefix: classifier.*, or cls_classifier.* and distillation_classifier.*
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.formats.source import Source
from vitserve.export.checkpoint.state_dict import Tensors
from vitserve.model.bundle.preprocess import Interpolation, Preprocessing
from vitserve.model.config import Activation, ViTConfig

_PREFIXES = {"vit": "vit", "deit": "deit", "dinov2": "dinov2", "dinov2_with_registers": "dinov2_with_registers"}
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
_RESAMPLE: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers

_VIT_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_DINO_BLOCK = {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_SWIGLU_BLOCK = {"norm1": "norm1", "norm2": "norm2", "mlp.weights_in": "mlp.fc1", "mlp.weights_out": "mlp.fc2"}


def read(tensors: Tensors, config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Source:
    """``config`` and ``preprocessor`` are config.json and preprocessor_config.json. Raises CheckpointError."""
    kind = config.get("model_type")
    if kind not in _PREFIXES:
        raise CheckpointError(f"unsupported model_type {kind!r}; supported are {', '.join(_PREFIXES)}")
    shape = _shape(tensors, config, kind)
    return Source(shape, _weights(tensors, shape, kind), preprocessing(preprocessor), _labels(config, shape.classes))


def _shape(tensors: Tensors, config: Mapping[str, Any], kind: str) -> ViTConfig:
    dino, teacher = kind.startswith("dinov2"), "distillation_classifier.weight" in tensors
    activation = config.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise CheckpointError(f"unsupported hidden_act {activation!r}; supported are {', '.join(_ACTIVATIONS)}")
    swiglu = bool(dino and config.get("use_swiglu_ffn", False))
    block = f"{_PREFIXES[kind]}.encoder.layer.0"
    second = "mlp.weights_out" if swiglu else "mlp.fc2" if dino else "output.dense"
    return ViTConfig(
        image_size=_side(config, "image_size"),
        patch_size=_side(config, "patch_size"),
        width=_number(config, "hidden_size"),
        depth=_number(config, "num_hidden_layers"),
        heads=_number(config, "num_attention_heads"),
        mlp_width=tensors.shape(f"{block}.{second}.weight")[1],
        classes=tensors.shape("cls_classifier.weight" if teacher else "classifier.weight")[0],
        pool="token+mean" if dino else "token",
        distillation_token=kind == "deit",
        distillation_head=teacher,
        registers=_number(config, "num_register_tokens") if kind == "dinov2_with_registers" else 0,
        prefix_positions=not dino,
        norm_epsilon=float(config.get("layer_norm_eps", 1e-6 if dino else 1e-12)),
        qkv_bias=bool(config.get("qkv_bias", True)),
        layer_scale=dino,
        swiglu=swiglu,
        activation=_ACTIVATIONS[activation],
    )


def _weights(tensors: Tensors, shape: ViTConfig, kind: str) -> dict[str, Tensor]:
    prefix, dino = _PREFIXES[kind], kind.startswith("dinov2")
    embeddings = f"{prefix}.embeddings"
    weights = {
        "cls_token": tensors.take(f"{embeddings}.cls_token"),
        "pos_embed": tensors.take(f"{embeddings}.position_embeddings"),
    }
    if dino:  # registers come between class token and patches, so the class token's position is added here
        weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    if shape.distillation_token:
        weights["dist_token"] = tensors.take(f"{embeddings}.distillation_token")
    if shape.registers:
        weights["reg_token"] = tensors.take(f"{embeddings}.register_tokens")
    tensors.ignore(f"{embeddings}.mask_token")
    names = {f"{embeddings}.patch_embeddings.projection": "patch_embed.proj", f"{prefix}.layernorm": "norm"}
    if shape.distillation_head:
        names |= {"cls_classifier": "head", "distillation_classifier": "head_dist"}
    else:
        names["classifier"] = "head"
    weights |= _pairs(tensors, names)
    block_names = _SWIGLU_BLOCK if shape.swiglu else _DINO_BLOCK if dino else _VIT_BLOCK
    for index in range(shape.depth):
        weights |= _block(tensors, shape, f"{prefix}.encoder.layer.{index}", f"blocks.{index}", block_names)
    tensors.expect_nothing_more()
    return weights


def _block(tensors: Tensors, shape: ViTConfig, theirs: str, ours: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    weights = _pairs(tensors, {f"{theirs}.{name}": f"{ours}.{our}" for name, our in names.items()})
    weights |= _pairs(tensors, {f"{theirs}.attention.output.dense": f"{ours}.attn.proj"})
    for part in ("weight", "bias") if shape.qkv_bias else ("weight",):
        qkv = [tensors.take(f"{theirs}.attention.attention.{name}.{part}") for name in ("query", "key", "value")]
        weights[f"{ours}.attn.qkv.{part}"] = torch.cat(qkv)
    if shape.layer_scale:
        for number in (1, 2):
            weights[f"{ours}.ls{number}.gamma"] = tensors.take(f"{theirs}.layer_scale{number}.lambda1")
    return weights


def _pairs(tensors: Tensors, names: Mapping[str, str]) -> dict[str, Tensor]:
    return {
        f"{ours}.{part}": tensors.take(f"{theirs}.{part}")
        for theirs, ours in names.items()
        for part in ("weight", "bias")
    }


def _labels(config: Mapping[str, Any], classes: int) -> tuple[str, ...] | None:
    """id2label, unless it is the library's default for unnamed classes."""
    named = config.get("id2label")
    if not isinstance(named, dict) or named == {str(index): f"LABEL_{index}" for index in range(classes)}:
        return None
    try:
        return tuple(str(named[str(index)]) for index in range(classes))
    except KeyError as error:
        raise CheckpointError(
            f"id2label has {len(named)} labels and lacks {error}; the model has {classes} classes"
        ) from error


def preprocessing(preprocessor: Mapping[str, Any]) -> Preprocessing:
    """``size`` is the size after the resize, of both sides or of the shorter one. ``crop_size`` is the center crop's.

    Raises CheckpointError.
    """
    squash, resized, image_size = _sizes(preprocessor)
    resample = preprocessor.get("resample", 2)
    if resample not in _RESAMPLE:
        raise CheckpointError(f"unsupported resample {resample!r}; supported are {_RESAMPLE}")
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if preprocessor.get("do_normalize", True):
        mean, std = _triple(preprocessor, "image_mean"), _triple(preprocessor, "image_std")
    crop = image_size / resized
    if math.floor(image_size / crop) != resized:  # rounding; half a pixel more gives the same size
        crop = image_size / (resized + 0.5)
    return Preprocessing(image_size, crop, _RESAMPLE[resample], mean, std, squash=squash, floor_crop=True)


def _sizes(preprocessor: Mapping[str, Any]) -> tuple[bool, int, int]:
    """Whether both sides are resized alike, the size after the resize, and the image size after the crop."""
    size = preprocessor.get("size")
    if isinstance(size, dict) and "shortest_edge" in size:
        squash, resized = False, int(size["shortest_edge"])
    else:
        squash, resized = True, _square(size, "size")
    if not preprocessor.get("do_center_crop", False):
        if not squash:
            raise CheckpointError(
                "the preprocessor resizes the shorter side without a center crop; only square images are supported"
            )
        return squash, resized, resized
    crop_size = _square(preprocessor.get("crop_size"), "crop_size")
    if crop_size > resized:
        raise CheckpointError(f"crop_size is {crop_size}, but the image is resized to {resized} pixels")
    return squash, resized, crop_size


def _triple(preprocessor: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    values = preprocessor.get(name)
    if not isinstance(values, list) or len(values) != 3:
        raise CheckpointError(f"the preprocessor's {name} must be three numbers, not {values!r}")
    red, green, blue = map(float, values)
    return red, green, blue


def _square(size: Any, name: str) -> int:
    if isinstance(size, int):
        return size
    if not isinstance(size, dict) or not {"height", "width"} <= size.keys():
        raise CheckpointError(f"the preprocessor's {name} must have height and width, not {size!r}")
    if size["height"] != size["width"]:
        raise CheckpointError(
            f"unsupported {name} {size['width']} × {size['height']}: only square images are supported"
        )
    return int(size["height"])


def _side(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if isinstance(value, list) and len(value) == 2:
        if value[0] != value[1]:
            raise CheckpointError(f"unsupported {name} {value[1]} × {value[0]}: only square images are supported")
        return int(value[0])
    return _number(config, name)


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int):
        raise CheckpointError(f"{name} in config.json must be an integer, not {value!r}")
    return value
