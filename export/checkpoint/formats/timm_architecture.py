"""The network that timm's create_model() makes of a name and arguments, as far as it is supported.

A name with an unknown part, or an argument that is not known here, is rejected: it may compute something else with the
same tensors. tests/export/checkpoint/test_timm.py compares every accepted name with timm's own network.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from vitserve.export.checkpoint.configuration import Configuration
from vitserve.export.checkpoint.errors import CheckpointError, UnsupportedError
from vitserve.model.config import Activation

# Size → width, depth, heads, and the ratio of MLP width to width.
_SIZES = {
    "tiny": (192, 12, 3, 4.0),
    "xsmall": (256, 10, 4, 4.0),
    "small": (384, 12, 6, 4.0),
    "medium": (512, 12, 8, 4.0),
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "huge": (1280, 32, 16, 4.0),
    "giant": (1408, 40, 16, 48 / 11),
}
_GIANT_DINOV2 = (1536, 40, 24, 2.66667 * 2)
_WIDTHS = {width for width, *_ in (*_SIZES.values(), _GIANT_DINOV2)}
_STAGES = {("r26", "s32"): (2, 2, 2, 2), ("r50", "s16"): (3, 4, 9), ("r50", "s32"): (3, 4, 6, 3)}
_NAME = re.compile(r"(vit|deit|deit3)_([a-z]+)(_distilled)?((?:_[a-z0-9]+)*)")
_KNOWN_PARTS = re.compile(r"patch\d+|r\d+|s\d+|\d+|gap|reg\d|clip|quickgelu|dinov2|miil")
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Arguments that have no effect on a forward pass in evaluation mode.
_WITHOUT_EFFECT = (
    # Dropout of several kinds, and the initialization of weights.
    {"drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"},
    {"weight_init", "fix_init"},
    # How the network is built or loaded.
    {"scriptable", "exportable", "no_jit", "cache_dir", "checkpoint_path", "pretrained", "device", "dtype"},
    # Checks and padding of image sizes other than the network's. Served images have its size.
    {"dynamic_img_size", "dynamic_img_pad", "strict_img_size"},
)
# Arguments that must have these values, timm's defaults.
_ONLY: dict[str, Any] = {
    "in_chans": 3,
    "proj_bias": True,
    "scale_attn_norm": False,
    "scale_mlp_norm": False,
    "pos_embed": "learn",
    "final_norm": True,
    "pool_include_prefix": False,
    "use_naflex": False,
    "features_only": False,
}
# Arguments → field of Structure, and the reader of the value.
_OF_STRUCTURE: dict[str, tuple[str, Callable[[Configuration, str], Any]]] = {
    "embed_dim": ("width", lambda keys, key: keys.integer(key)),
    "depth": ("depth", lambda keys, key: keys.integer(key)),
    "patch_size": ("patch_size", lambda keys, key: keys.side(key, None)),
    "class_token": ("class_token", lambda keys, key: keys.flag(key, True)),
    "reg_tokens": ("registers", lambda keys, key: keys.integer(key, least=0)),
    "no_embed_class": ("prefix_positions", lambda keys, key: not keys.flag(key, False)),
    "pre_norm": ("pre_norm", lambda keys, key: keys.flag(key, False)),
    "init_values": ("layer_scale", lambda keys, key: bool(keys.number(key, 0))),
    "qkv_bias": ("qkv_bias", lambda keys, key: keys.flag(key, True)),
    "qk_norm": ("qk_norm", lambda keys, key: keys.flag(key, False)),
}
# The tensors show these sizes, so they may differ from those of a name whose arguments are not known.
_SIZE_FIELDS = {"width", "depth", "mlp_width", "patch_size"}


@dataclass(frozen=True)
class Structure:
    """The properties that both the tensors and the name or the arguments show."""

    width: int
    depth: int
    mlp_width: int
    patch_size: int  # in pixels; a hybrid's is the reduction of its ResNet
    class_token: bool = True
    distillation_token: bool = False
    registers: int = 0
    prefix_positions: bool = True
    pre_norm: bool = False
    norm_after_pool: bool = False
    layer_scale: bool = False
    qkv_bias: bool = True
    qk_norm: bool = False
    swiglu: bool = False
    resnet: tuple[int, ...] = ()


@dataclass(frozen=True)
class Architecture:
    name: str
    structure: Structure
    heads: int
    mlp_ratio: float
    pool: Literal["token", "avg"] = "token"
    fc_norm: bool | None = None  # whether the norm is after the pooling; None: if the pooling is avg
    norm_epsilon: float = 1e-6
    activation: Activation = "gelu"
    image_size: int | None = None  # of the arguments
    stated: frozenset[str] = frozenset()  # by the arguments: fields of the structure, and "heads"

    def check(self, shown: Structure) -> list[str]:
        """Raises CheckpointError if the tensors are those of another network. Returns notes about other sizes."""
        expected, actual = asdict(self.structure), asdict(shown)
        differing = [key for key in expected if actual[key] != expected[key]]
        listed = ", ".join(f"{key} is {actual[key]} instead of {expected[key]}" for key in differing)
        own_width = shown.width == self.structure.width or shown.width not in _WIDTHS
        if not set(differing) <= _SIZE_FIELDS - self.stated or not own_width:
            raise CheckpointError(
                f"the tensors are not those of {self.name}: {listed}. Name the architecture that was trained"
                " (--architecture); if it was created with other arguments, give them (--model-arg, or model_args in"
                " config.json)"
            )
        if not differing:
            return []
        heads = ""
        if "width" in differing and "heads" not in self.stated:
            heads = f"; its {self.heads} heads are taken from the name (otherwise: --model-arg num_heads=N)"
        return [f"the network has other sizes than {self.name}: {listed}{heads}"]


def named(name: str) -> Architecture:
    """``name`` without the tag after a dot. Raises CheckpointError for an unknown name."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in _SIZES:
        raise UnsupportedError(f"unsupported architecture {name!r}: not a known size of ViT or DeiT")
    family, size, options = match[1], match[2], match[4].split("_")[1:]
    unknown = [option for option in options if not _KNOWN_PARTS.fullmatch(option)]
    if unknown:
        raise UnsupportedError(f"unsupported architecture {name!r}: unknown part {', '.join(unknown)}")
    dinov2, clip, gap = "dinov2" in options, "clip" in options, "gap" in options
    width, depth, heads, ratio = _GIANT_DINOV2 if size == "giant" and dinov2 else _SIZES[size]
    registers, swiglu = (
        sum(int(option[3:]) for option in options if option.startswith("reg")),
        size == "giant" and dinov2,
    )
    structure = Structure(
        width,
        depth,
        _mlp_width(width, ratio, swiglu),
        _patch_size(name, options),
        class_token=not gap,
        distillation_token=match[3] is not None,
        registers=registers,
        prefix_positions=not (family == "deit3" or registers),
        pre_norm=clip,
        norm_after_pool=gap and registers > 0,
        layer_scale=family == "deit3" or dinov2 or (size == "medium" and gap),
        qkv_bias="miil" not in options and not (size == "medium" and gap and not registers),
        swiglu=swiglu,
        resnet=_STAGES.get((options[0], options[1]), ()) if len(options) > 1 else (),
    )
    return Architecture(
        name,
        structure,
        heads=16 if name == "vit_base_patch16_gap_224" else heads,  # I-JEPA's
        mlp_ratio=ratio,
        pool="avg" if gap else "token",
        fc_norm=False if gap and not registers else None,
        norm_epsilon=1e-5 if clip else 1e-6,
        activation="quick_gelu" if "quickgelu" in options else "gelu",
    )


def with_arguments(architecture: Architecture, arguments: Configuration, ignored: tuple[str, ...]) -> Architecture:
    """The network that timm makes with these arguments, which override those of the name.

    Raises CheckpointError naming the arguments that are not supported, except those in ``ignored``.
    """
    heads_stated, ratio_stated = "num_heads" in arguments, "mlp_ratio" in arguments
    changes = {field: read(arguments, key) for key, (field, read) in _OF_STRUCTURE.items() if key in arguments}
    ratio = arguments.number("mlp_ratio", architecture.mlp_ratio)
    if ratio_stated or "width" in changes:
        width = changes.get("width", architecture.structure.width)
        changes["mlp_width"] = _mlp_width(width, ratio, architecture.structure.swiglu)
    pool, norm_after_pool = _pool(architecture, arguments)
    changed = replace(
        architecture,
        structure=replace(architecture.structure, norm_after_pool=norm_after_pool, **changes),
        heads=arguments.integer("num_heads", architecture.heads),
        pool=pool,
        activation=_activation(architecture, arguments),
        image_size=arguments.side("img_size", None) if "img_size" in arguments else None,
        stated=frozenset({*changes, *({"heads"} if heads_stated else ())}),
    )
    arguments.ignore(*_WITHOUT_EFFECT)
    arguments.require(_ONLY)
    arguments.reject_others(ignored)
    return changed


def _mlp_width(width: int, ratio: float, swiglu: bool) -> int:
    """timm's swiglu has one matrix for gate and value, of which half remains."""
    return int(width * ratio) // (2 if swiglu else 1)


def _patch_size(name: str, options: list[str]) -> int:
    for option in options:
        if re.fullmatch(r"patch\d+|s\d+", option):
            return int(option.removeprefix("patch").removeprefix("s"))
    raise UnsupportedError(f"unsupported architecture {name!r}: it has no patch size")


def _pool(architecture: Architecture, arguments: Configuration) -> tuple[Literal["token", "avg"], bool]:
    """The pooling, and whether the norm is after it."""
    pool = arguments.text("global_pool", architecture.pool)
    if pool not in ("token", "avg"):
        raise UnsupportedError(f"unsupported global_pool {pool!r} in {arguments.name}; supported are token and avg")
    after = arguments.take("fc_norm", architecture.fc_norm)
    after = pool == "avg" if after is None else after
    if after not in (True, False) or (after and pool == "token"):
        raise UnsupportedError(f"unsupported fc_norm {after!r} in {arguments.name} with global_pool {pool!r}")
    return ("avg" if pool == "avg" else "token"), bool(after)


def _activation(architecture: Architecture, arguments: Configuration) -> Activation:
    if "act_layer" not in arguments:
        return architecture.activation
    layer = arguments.text("act_layer")
    if layer not in _ACTIVATIONS or architecture.structure.swiglu:
        raise UnsupportedError(
            f"unsupported act_layer {layer!r} in {arguments.name}; supported are {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[layer]
