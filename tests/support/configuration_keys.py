"""Every key of other libraries' configurations, each with values other than its default."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

# Values of keys whose meaning the type does not show. Some fit the tiny networks of the tests, some do not.
_CHOSEN: dict[str, list[Any]] = {
    "architectures": [["ViTModel"]],
    "crop_mode": ["squash", "border"],
    "crop_pct": [0.5, 1.0, 0.3, 1.5],
    "crop_size": [24, {"height": 24, "width": 24}, [24, 24], {"height": 24, "width": 32}, {"shortest_edge": 24}],
    "data_format": ["channels_last"],
    "dtype": ["float16"],
    "fc_norm": [True, False],
    "global_pool": ["avg", "max", "map", "avgmax"],
    "hidden_size": [48],
    "id2label": [{"0": "a", "1": "b", "2": "c"}],
    "image_mean": [0.3, [0.1, 0.2, 0.3], [0.4]],
    "image_size": [24, [24, 24], [24, 32]],
    "image_std": [0.3, [0.1, 0.2, 0.3], [0.4]],
    "img_size": [24, [24, 24], [24, 32]],
    "input_size": [[3, 24, 24], [3, 24, 32], [1, 32, 32]],
    "interpolation": ["bilinear", "nearest", "lanczos", "box", "hamming", "random"],
    "label2id": [{"a": 0, "b": 1, "c": 2}],
    "label_names": [["a", "b", "c"], {"0": "a", "1": "b", "2": "c"}],
    "mean": [[0.1, 0.2, 0.3], [0.4]],
    "mlp_ratio": [2, 3],
    "norm_layer": ["rmsnorm", "layernorm2d"],
    "num_attention_heads": [3],
    "num_classes": [5],
    "num_heads": [3],
    "embed_dim": [48],
    "pad_size": [{"height": 40, "width": 40}],
    "patch_size": [4, 16],
    "pos_embed": ["none"],
    "problem_type": ["multi_label_classification", "single_label_classification", "regression"],
    "resample": [0, 1, 2, 3, 4, 5],
    "rescale_factor": [1 / 127.5, 1.0, 0.5],
    "size": [24, [24, 24], {"height": 24, "width": 24}, {"height": 40, "width": 32}, {"shortest_edge": 40},
             {"shortest_edge": 40, "longest_edge": 44}, {"longest_edge": 40}, {"max_height": 40, "max_width": 40}],
    "std": [[0.1, 0.2, 0.3], [0.4]],
    "weight_init": ["jax", "skip"],
}  # fmt: skip
# Attributes that transformers reads or read from a configuration without declaring them.
_UNDECLARED: dict[str, list[Any]] = {
    "head_dim": [16],
    "is_causal": [True],
    "is_decoder": [True],
    "add_cross_attention": [True],
    "per_layer_config": [{"0": {"hidden_act": "relu"}}, {"0": {"layer_norm_eps": 0.3}}],
    "pruned_heads": [{"0": [1]}],
    "attn_implementation": ["eager", "sdpa"],
    "output_attentions": [True],
    "torch_dtype": ["float16"],
    "num_labels": [5],
    "quantization_config": [{"load_in_8bit": True}],
    "auto_map": [{"AutoModelForImageClassification": "modeling.Network"}],
    "id2label": [{"0": "a", "1": "b"}],
    "a_key_of_the_future": [1],
}


# Of timm.create_model() itself: which network, and where its weights are.
_NOT_ARGUMENTS = {"self", "model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"}


def other_values(key: str, default: Any) -> list[Any]:
    """Values other than the default, of its type."""
    if key in _CHOSEN:
        return [value for value in _CHOSEN[key] if value != default]
    match default:
        case bool():
            return [not default]
        case int():
            return [default + 1]
        case float():
            return [default * 1.5 + 0.1]
        case str():
            return ["relu"]
    return [0.5, True, "text"]


def transformers_model_keys(config: type[Any]) -> Iterator[tuple[str, Any]]:
    """Keys of config.json: the fields of the class and of its base, and undeclared ones."""
    for field in dataclasses.fields(config):
        for value in other_values(field.name, field.default):
            yield field.name, value
    for key, values in _UNDECLARED.items():
        yield from ((key, value) for value in values)


def transformers_processor_keys(transformers: ModuleType, processor: type[Any]) -> Iterator[tuple[str, Any]]:
    """Keys of preprocessor_config.json. The default is that of the class."""
    for key in transformers.processing_utils.ImagesKwargs.__annotations__:
        for value in other_values(key, getattr(processor, key, None)):
            yield key, value
    yield from (("auto_map", {"AutoImageProcessor": "x.Y"}), ("offset", True), ("crop_pct", 0.9), ("do_flip", True))


def timm_pretrained_keys(timm: ModuleType) -> Iterator[tuple[str, Any]]:
    """Keys of pretrained_cfg."""
    for field in dataclasses.fields(timm.models.PretrainedCfg):
        default = None if field.default is dataclasses.MISSING else field.default
        for value in other_values(field.name, default):
            yield field.name, value
    yield "a_key_of_the_future", 1


def timm_arguments(timm: ModuleType) -> Iterator[tuple[str, Any]]:
    """Keys of model_args: the arguments of the network, and of the function that creates it."""
    for function in (timm.models.VisionTransformer.__init__, timm.create_model):
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD or parameter.name in _NOT_ARGUMENTS:
                continue
            default = None if parameter.default is parameter.empty else parameter.default
            for value in other_values(parameter.name, default):
                yield parameter.name, value
    yield from (("features_only", True), ("use_naflex", True), ("out_indices", [0]), ("a_key_of_the_future", 1))
