"""torchvision's vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14: a state dict.

Tensors (optional ones in parentheses):

    class_token, conv_proj.{weight,bias}, encoder.pos_embedding, encoder.ln.*, heads.head.*, (heads.pre_logits.*)
    encoder.layers.encoder_layer_N:
        ln_1.*, self_attention.in_proj_{weight,bias}, self_attention.out_proj.*, ln_2.*,
        mlp.{0,3}.* or mlp.linear_{1,2}.*
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vitserve.export.checkpoint.formats.source import Source, heads_of
from vitserve.export.checkpoint.position_embeddings import square_side
from vitserve.export.checkpoint.state_dict import Tensors
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ViTConfig

MARK = "encoder.pos_embedding"  # a tensor that only this format has

_BLOCK = "encoder.layers.encoder_layer_{}"
_BLOCK_NAMES = {
    "ln_1.": "norm1.",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj.": "attn.proj.",
    "ln_2.": "norm2.",
}
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read(tensors: Tensors) -> Source:
    """Raises CheckpointError."""
    width, _, patch_size, _ = tensors.shape("conv_proj.weight")
    fc1, fc2 = ("mlp.0", "mlp.3") if f"{_BLOCK.format(0)}.mlp.0.weight" in tensors else ("mlp.linear_1", "mlp.linear_2")
    representation = tensors.shape("heads.pre_logits.weight")[0] if "heads.pre_logits.weight" in tensors else None
    config = ViTConfig(
        image_size=square_side(tensors.shape(MARK)[1] - 1) * patch_size,
        patch_size=patch_size,
        width=width,
        depth=tensors.count(_BLOCK + ".ln_1.weight"),
        heads=heads_of(width),
        mlp_width=tensors.shape(f"{_BLOCK.format(0)}.{fc1}.weight")[0],
        classes=tensors.shape("heads.head.weight")[0],
        representation_width=representation,
    )
    weights = _weights(tensors, config, _BLOCK_NAMES | {f"{fc1}.": "mlp.fc1.", f"{fc2}.": "mlp.fc2."})
    # torchvision publishes these weights with ImageClassification(crop_size=224, resize_size=256), bilinear.
    preprocessing = Preprocessing(
        config.image_size, crop=0.875, interpolation="bilinear", mean=_IMAGENET_MEAN, std=_IMAGENET_STD
    )
    return Source(config, weights, preprocessing)


def _weights(tensors: Tensors, config: ViTConfig, block_names: Mapping[str, str]) -> dict[str, Tensor]:
    weights = {"cls_token": tensors.take("class_token"), "pos_embed": tensors.take(MARK)}
    names = {"conv_proj.": "patch_embed.proj.", "encoder.ln.": "norm.", "heads.head.": "head."}
    if config.representation_width is not None:
        names["heads.pre_logits."] = "pre_logits.fc."
    for index in range(config.depth):
        names |= {f"{_BLOCK.format(index)}.{theirs}": f"blocks.{index}.{ours}" for theirs, ours in block_names.items()}
    for part in ("weight", "bias"):
        weights |= {f"{ours}{part}": tensors.take(f"{theirs}{part}") for theirs, ours in names.items()}
    tensors.expect_nothing_more()
    return weights
