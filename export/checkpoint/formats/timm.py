"""timm's ViT, DeiT and BiT ResNetV2: a state dict with the architecture's name and pretrained_cfg, as in config.json.

Our parameters have timm's names, see model/network/vit.py and model/network/resnet.py, so that nothing is renamed.
The name and model_args say which network timm creates (timm_architecture.py). The tensors must be that network's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from vitserve.export.checkpoint.configuration import Configuration
from vitserve.export.checkpoint.errors import CheckpointError, UnsupportedError
from vitserve.export.checkpoint.formats import timm_architecture
from vitserve.export.checkpoint.formats.source import Source, rename_head
from vitserve.export.checkpoint.formats.timm_architecture import Architecture, Structure
from vitserve.export.checkpoint.formats.timm_preprocessing import check_square_rgb, preprocessing_of, reject_unknown
from vitserve.export.checkpoint.labels import timm_labels
from vitserve.export.checkpoint.library import timm_network
from vitserve.export.checkpoint.library.owner import Owner
from vitserve.export.checkpoint.position_embeddings import TIMM, square_side
from vitserve.export.checkpoint.state_dict import Tensors
from vitserve.model.arrays import Activation
from vitserve.model.config import ResNetConfig, ViTConfig

MARK = "patch_embed.proj.weight"  # a tensor that only timm's ViTs have
BIT_MARK = "head.fc.weight"  # a tensor that only timm's BiT ResNets have
WRAPPER_PREFIX = "timm_model."  # of the tensors of transformers' timm_wrapper

_BIT = re.compile(r"resnetv2_(\d+)x(\d)_bit\w*")
_BIT_STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def is_known(name: str) -> bool:
    """Whether the architecture is one of our networks, with or without a tag after a dot."""
    name = name.partition(".")[0]
    try:
        return _BIT.fullmatch(name) is not None or bool(timm_architecture.named(name))
    except CheckpointError:
        return False


def read(
    tensors: Tensors,
    config: Configuration,
    model_args: Mapping[str, Any],
    ignored: tuple[str, ...],
    activation: Activation | None,
) -> Source:
    """``config`` is config.json. ``model_args`` are added to its own, and ``ignored`` are keys to ignore.

    ``activation`` is that of the checkpoint, if it states one.

    Raises CheckpointError.
    """
    name = config.text("architecture").partition(".")[0]
    pretrained = config.section("pretrained_cfg") if "pretrained_cfg" in config else config
    arguments = config.section("model_args")
    stated = arguments.rest() | dict(model_args)
    arguments = Configuration(arguments.name, stated, null_is_default=True)
    bit = _BIT.fullmatch(name)
    rename_head(tensors, "head", "head.fc" if bit else "head")
    classes = tensors.shape(BIT_MARK if bit else "head.weight")[0]
    _check_classes(classes, config, pretrained, arguments)
    preprocessing, fixed = preprocessing_of(pretrained), pretrained.flag("fixed_input_size", False)
    check_square_rgb(preprocessing, pretrained.name)
    shape: ViTConfig | ResNetConfig
    if bit is not None:
        shape = _bit_config(tensors, int(bit[1]), int(bit[2]), preprocessing.image_size, classes)
        arguments.require({"in_chans": 3, "global_pool": "avg"})
        config.require({"global_pool": "avg"})
        arguments.ignore({"drop_rate", "drop_path_rate", "zero_init_last"})
        arguments.reject_others(ignored)
    else:
        architecture = timm_architecture.with_arguments(timm_architecture.named(name), arguments, ignored)
        architecture = _with_root_pool(architecture, config, tensors)
        shape = vit_config(tensors, architecture, classes)
        if architecture.image_size is not None and fixed:  # as timm resolves it
            preprocessing = replace(preprocessing, image_size=architecture.image_size)
    labels = timm_labels(config, pretrained, classes, tensors.notes)
    notes = reject_unknown(config, pretrained, ignored)
    owner = _owner(name, stated, shape, tensors)
    weights = tensors.take_all()
    return Source(shape, weights, preprocessing, labels, activation, TIMM, (*tensors.notes, *notes), owner)


def _owner(name: str, stated: Mapping[str, Any], shape: ViTConfig | ResNetConfig, tensors: Tensors) -> Owner:
    """timm's own network. If the tensors are not those of the stated arguments, it gets the sizes that they show.

    Properties that the tensors do not show, such as the number of heads, are timm's.
    """
    named, sizes = tensors.copy(), dict[str, Any]()
    if isinstance(shape, ViTConfig):
        sizes |= {"img_size": shape.image_size, "depth": shape.depth, "embed_dim": shape.width}
        sizes |= {} if shape.resnet else {"patch_size": shape.patch_size}
        sizes |= {"mlp_ratio": shape.mlp_width * (1 + shape.swiglu) / shape.width}
        sizes |= {"global_pool": "avg" if shape.pool == "mean" else "token"}
    arguments = {key: value for key, value in stated.items() if value is not None} | {"num_classes": shape.classes}

    def build(size: tuple[int, int]) -> nn.Module:
        fits = timm_network.fits(name, arguments, {}, named)
        return timm_network.create(name, arguments if fits else arguments | sizes, {}, named, size)

    return Owner("timm", build)


def _check_classes(classes: int, config: Configuration, pretrained: Configuration, arguments: Configuration) -> None:
    """The number of classes in config.json, which the root gives or else pretrained_cfg, must be the head's.

    timm initializes a head for another number.
    """
    at_root, original = config.take("num_classes"), pretrained.take("num_classes")
    for stated in (original if at_root is None else at_root, arguments.take("num_classes")):
        if stated is not None and stated != classes:
            raise CheckpointError(f"num_classes in {config.name} is {stated}, but the head has {classes} classes")
    if pretrained.take("label_offset"):
        raise CheckpointError(f"unsupported label_offset in {pretrained.name}: timm cuts such classes off the head")


def _with_root_pool(architecture: Architecture, config: Configuration, tensors: Tensors) -> Architecture:
    """timm writes the pooling at the root of config.json too, for information.

    Older versions did not write model_args. Then it is the only place, and the tensors must agree.
    """
    pool = config.text("global_pool", architecture.pool)
    if pool == architecture.pool:
        return architecture
    if pool == "avg" and "fc_norm.weight" in tensors and "norm_after_pool" not in architecture.stated:
        return replace(architecture, pool="avg", structure=replace(architecture.structure, norm_after_pool=True))
    raise UnsupportedError(
        f"unsupported global_pool {pool!r} in {config.name}: {architecture.name} pools by {architecture.pool!r};"
        " another pooling must be in model_args"
    )


def vit_config(tensors: Tensors, architecture: Architecture, classes: int) -> ViTConfig:
    """Of the tensors, which must be those of the architecture. Raises CheckpointError."""
    structure = _structure(tensors, architecture.structure.prefix_positions)
    tensors.notes += architecture.check(structure)
    prefix = structure.class_token + structure.distillation_token + structure.registers
    positions = tensors.shape_of("pos_embed", 3)[1]
    representation = tensors.shape("pre_logits.fc.weight")[0] if "pre_logits.fc.weight" in tensors else None
    return ViTConfig(
        image_size=square_side(positions - prefix if structure.prefix_positions else positions) * structure.patch_size,
        patch_size=structure.patch_size,
        width=structure.width,
        depth=structure.depth,
        heads=architecture.heads,
        mlp_width=structure.mlp_width,
        classes=classes,
        pool="mean" if architecture.pool == "avg" else "token",
        representation_width=representation,
        resnet=structure.resnet or None,
        class_token=structure.class_token,
        distillation_token=structure.distillation_token,
        distillation_head="head_dist.weight" in tensors,
        registers=structure.registers,
        prefix_positions=structure.prefix_positions and prefix > 0,
        pre_norm=structure.pre_norm,
        norm_after_pool=structure.norm_after_pool,
        norm_epsilon=architecture.norm_epsilon,
        qkv_bias=structure.qkv_bias,
        qk_norm=structure.qk_norm,
        layer_scale=structure.layer_scale,
        swiglu=structure.swiglu,
        activation=architecture.activation,
    )


def _structure(tensors: Tensors, prefix_positions: bool) -> Structure:
    """``prefix_positions`` is that of the name, for a number of positions that allows both."""
    width, _, patch_size, _ = tensors.shape_of(MARK, 4)
    resnet = _stages(tensors)
    if resnet:
        patch_size *= 4 * 2 ** (len(resnet) - 1)
    class_token, distilled = "cls_token" in tensors, "dist_token" in tensors
    registers = tensors.shape_of("reg_token", 3)[1] if "reg_token" in tensors else 0
    mlp_width = tensors.shape_of("blocks.0.mlp.fc2.weight", 2)[1]
    positions, prefix = tensors.shape_of("pos_embed", 3)[1], class_token + distilled + registers
    if _is_square(positions) is not _is_square(positions - prefix):
        prefix_positions = not _is_square(positions)
    return Structure(
        width,
        tensors.count("blocks.{}.norm1.weight"),
        mlp_width,
        patch_size,
        class_token=class_token,
        distillation_token=distilled,
        registers=registers,
        prefix_positions=prefix_positions,  # otherwise only patches have positions, and their number is a square
        pre_norm="norm_pre.weight" in tensors,
        norm_after_pool="fc_norm.weight" in tensors,
        layer_scale="blocks.0.ls1.gamma" in tensors,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        qk_norm="blocks.0.attn.q_norm.weight" in tensors,
        swiglu=tensors.shape("blocks.0.mlp.fc1.weight")[0] == 2 * mlp_width,
        resnet=resnet,
    )


def _bit_config(tensors: Tensors, layers: int, width_factor: int, image_size: int, classes: int) -> ResNetConfig:
    stages = _stages(tensors, "stages")
    if stages != _BIT_STAGES.get(layers):
        raise CheckpointError(
            f"the tensors have the stages {stages}, but a ResNet of {layers} layers has {_BIT_STAGES.get(layers)}"
        )
    return ResNetConfig(image_size, stages, width_factor, classes)


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
