"""Image classifiers of transformers: ViT, DeiT (with or without teacher), DINOv2 (with or without registers).

Tensors (optional ones in parentheses), with the prefix vit., deit., dinov2. or dinov2_with_registers.:

    embeddings: cls_token, position_embeddings, patch_embeddings.projection.*, (distillation_token), (register_tokens)
    layers.N (encoder.layer.N in DINOv2): attention.{q,k,v,o}_proj.*, norms and MLP
    layernorm.*

and without a prefix: classifier.*, or cls_classifier.* and distillation_classifier.*

These are the names of transformers 5. It saves the older ones (huggingface_names.py), and reads both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitserve.export.checkpoint.configuration import Configuration
from vitserve.export.checkpoint.errors import CheckpointError, UnsupportedError
from vitserve.export.checkpoint.formats import huggingface_names as names
from vitserve.export.checkpoint.formats.source import Source, rename_head
from vitserve.export.checkpoint.labels import labels_of
from vitserve.export.checkpoint.library import transformers_network
from vitserve.export.checkpoint.library.owner import Owner
from vitserve.export.checkpoint.position_embeddings import TRANSFORMERS, TRANSFORMERS_REGISTERS
from vitserve.export.checkpoint.state_dict import Tensors
from vitserve.model.arrays import Activation
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import Activation as MlpActivation
from vitserve.model.config import ViTConfig

KINDS = ("vit", "deit", "dinov2", "dinov2_with_registers")
_ACTIVATIONS: dict[str, MlpActivation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


MARK = "embeddings.cls_token"  # a tensor that every network of these kinds has, after model_type and a dot


def read(
    tensors: Tensors,
    config: Configuration,
    settings: Mapping[str, Any],
    preprocessing: Preprocessing,
    ignored: tuple[str, ...],
) -> Source:
    """``config`` is config.json without its model_type, and ``settings`` is all of it.

    ``ignored`` are keys that the user states to have no effect.

    Raises CheckpointError.
    """
    kind: str = settings["model_type"]
    named = tensors.copy()
    names.modernize(tensors, kind)
    names.check_architecture(config.take("architectures"), names.has_teacher(tensors))
    if not names.has_teacher(tensors):
        rename_head(tensors, "classifier", "classifier")
    shape = _shape(tensors, config, kind)
    labels, activation = _labels(config, shape.classes), activation_of(config)
    config.ignore(*names.WITHOUT_EFFECT)
    config.require(names.ONLY)
    notes = config.reject_others(ignored)
    weights = _weights(tensors, shape, kind)
    interpolation = TRANSFORMERS_REGISTERS if kind == "dinov2_with_registers" else TRANSFORMERS
    safe = transformers_network.without_code(settings)
    owner = Owner("transformers", lambda size: transformers_network.create(safe, named, size))
    return Source(shape, weights, preprocessing, labels, activation, interpolation, (*tensors.notes, *notes), owner)


def kind_of(config: Configuration) -> str:
    """Takes the model_type. Raises CheckpointError for an unsupported one."""
    kind = config.text("model_type", "")
    if kind not in KINDS:
        raise CheckpointError(
            f"unsupported model_type {kind!r} in {config.name}; supported are {', '.join(KINDS)}, and timm_wrapper"
        )
    return kind


def _shape(tensors: Tensors, config: Configuration, kind: str) -> ViTConfig:
    dino, registers, teacher = kind.startswith("dinov2"), kind.endswith("registers"), names.has_teacher(tensors)
    width, heads = config.integer("hidden_size", 768), config.integer("num_attention_heads", 12)
    depth = config.integer("num_hidden_layers", 12)
    layers = tensors.count(f"{names.block(kind)}.attention.q_proj.weight")
    if layers != depth:
        raise CheckpointError(f"num_hidden_layers in {config.name} is {depth}, but the weights have {layers} layers")
    swiglu = config.flag("use_swiglu_ffn", False) if dino else False
    if swiglu is not names.is_gated(tensors):
        raise CheckpointError(
            f"use_swiglu_ffn in {config.name} is {str(swiglu).lower()}, but the weights are of another MLP"
        )
    config.require({"num_channels": 3, "head_dim": width // heads})
    return ViTConfig(
        image_size=config.side("image_size", 224),
        patch_size=config.side("patch_size", 14 if kind == "dinov2" else 16),
        width=width,
        depth=depth,
        heads=heads,
        mlp_width=_mlp_width(config, width, dino, swiglu),
        classes=tensors.shape_of("cls_classifier.weight" if teacher else "classifier.weight", 2)[0],
        pool="token+mean" if dino else "token",
        distillation_token=kind == "deit",
        distillation_head=teacher,
        registers=config.integer("num_register_tokens", 4) if registers else 0,
        prefix_positions=not dino,
        norm_epsilon=config.number("layer_norm_eps", 1e-6 if dino else 1e-12),
        qkv_bias=config.flag("qkv_bias", True),
        layer_scale=dino,
        swiglu=swiglu,
        activation=_mlp_activation(config, swiglu),
    )


def _mlp_width(config: Configuration, width: int, dino: bool, swiglu: bool) -> int:
    if not dino:
        return config.integer("intermediate_size", 3072)
    hidden = int(width * config.number("mlp_ratio", 4))
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if swiglu else hidden  # as Dinov2SwiGLUFFN computes it


def _mlp_activation(config: Configuration, swiglu: bool) -> MlpActivation:
    named = config.text("hidden_act", "gelu")
    if swiglu:  # which always has SiLU
        return "gelu"
    if named not in _ACTIVATIONS:
        raise UnsupportedError(f"unsupported hidden_act {named!r}; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[named]


def activation_of(config: Configuration) -> Activation | None:
    """As in transformers' pipeline for image classification."""
    kind = config.take("problem_type")
    if kind not in (None, "single_label_classification", "multi_label_classification"):
        raise CheckpointError(
            f"unsupported problem_type {kind!r} in {config.name}: the outputs of such a model are not probabilities"
            " of classes"
        )
    return None if kind is None else "sigmoid" if kind == "multi_label_classification" else "softmax"


def labels_and_activation(config: Configuration, classes: int) -> tuple[tuple[str, ...] | None, Activation | None]:
    """Of any image classifier. Raises CheckpointError."""
    return _labels(config, classes), activation_of(config)


def _labels(config: Configuration, classes: int) -> tuple[str, ...] | None:
    """id2label, unless it is the library's default for unnamed classes."""
    named: Any = config.take("id2label")
    if named == {str(index): f"LABEL_{index}" for index in range(classes)}:
        return None
    return labels_of(named, classes, f"id2label in {config.name}")


def _weights(tensors: Tensors, shape: ViTConfig, kind: str) -> dict[str, Tensor]:
    dino, embeddings = kind.startswith("dinov2"), f"{kind}.embeddings"
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
    pairs = {f"{embeddings}.patch_embeddings.projection": "patch_embed.proj", f"{kind}.layernorm": "norm"}
    pairs |= {"cls_classifier": "head", "distillation_classifier": "head_dist"}
    if not shape.distillation_head:
        pairs = {source: target for source, target in pairs.items() if "_classifier" not in source} | {
            "classifier": "head"
        }
    weights |= _pairs(tensors, pairs)
    for index in range(shape.depth):
        weights |= _block(tensors, shape, names.block(kind).format(index), f"blocks.{index}", names.PARTS[dino])
    tensors.ignore(f"{embeddings}.mask_token")
    tensors.ignore_others("the classifier has no such tensors, so transformers ignores them too")
    return weights


def _block(tensors: Tensors, shape: ViTConfig, source: str, target: str, parts: Mapping[str, str]) -> dict[str, Tensor]:
    weights = _pairs(tensors, {f"{source}.{part}": f"{target}.{target_part}" for part, target_part in parts.items()})
    if shape.swiglu:
        weights |= _pairs(tensors, {f"{source}.mlp.down_proj": f"{target}.mlp.fc2"})
        joined = f"{source}.mlp.weights_in" if f"{source}.mlp.weights_in.weight" in tensors else ""  # of older versions
        parts_in = [joined] if joined else [f"{source}.mlp.{name}_proj" for name in ("gate", "up")]
        weights |= _joined(tensors, parts_in, f"{target}.mlp.fc1")
    else:
        weights |= _pairs(tensors, {f"{source}.mlp.fc{number}": f"{target}.mlp.fc{number}" for number in (1, 2)})
    qkv = [f"{source}.attention.{name}_proj" for name in ("q", "k", "v")]
    weights |= _joined(tensors, qkv, f"{target}.attn.qkv", bias=shape.qkv_bias)
    if shape.layer_scale:
        for number in (1, 2):
            weights[f"{target}.ls{number}.gamma"] = tensors.take(f"{source}.layer_scale{number}.lambda1")
    return weights


def _pairs(tensors: Tensors, names: Mapping[str, str]) -> dict[str, Tensor]:
    return {
        f"{target}.{part}": tensors.take(f"{source}.{part}")
        for source, target in names.items()
        for part in ("weight", "bias")
    }


def _joined(tensors: Tensors, sources: list[str], target: str, bias: bool = True) -> dict[str, Tensor]:
    """Several linear layers with the same input as one."""
    joined = {}
    for part in ("weight", "bias") if bias else ("weight",):
        parts = [tensors.take(f"{name}.{part}") for name in sources]
        if len({tensor.shape for tensor in parts}) > 1:
            shapes = [list(tensor.shape) for tensor in parts]
            raise CheckpointError(f"the shapes of {', '.join(sources)} differ: {shapes}")
        joined[f"{target}.{part}"] = torch.cat(parts)
    return joined
