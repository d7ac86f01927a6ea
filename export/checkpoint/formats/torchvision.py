"""torchvision's vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14: a state dict.

Tensors (optional ones in parentheses):

    class_token, conv_proj.{weight,bias}, encoder.pos_embedding, encoder.ln.*, heads.head.*, (heads.pre_logits.*)
    encoder.layers.encoder_layer_N:
        ln_1.*, self_attention.in_proj_{weight,bias}, self_attention.out_proj.*, ln_2.*,
        mlp.{0,3}.* or mlp.linear_{1,2}.*

The preprocessing is not in the file. Each of torchvision's published weights has its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.formats.source import Source, heads_of, rename_head
from vitserve.export.checkpoint.library import torchvision_network
from vitserve.export.checkpoint.library.owner import Owner
from vitserve.export.checkpoint.position_embeddings import TORCHVISION, square_side
from vitserve.export.checkpoint.state_dict import Tensors
from vitserve.model.bundle.preprocess import Interpolation, Preprocessing
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


@dataclass(frozen=True)
class Published:
    """The transforms of published weights: torchvision.transforms._presets.ImageClassification."""

    name: str
    file: str  # its name at download.pytorch.org, without .pth
    patch_size: int
    width: int
    crop_size: int
    resize_size: int = 256
    interpolation: Interpolation = "bilinear"

    @property
    def preprocessing(self) -> Preprocessing:
        crop = self.crop_size / self.resize_size
        if int(self.crop_size / crop) != self.resize_size:  # rounding; half a pixel more gives the same size
            crop = self.crop_size / (self.resize_size + 0.5)
        return Preprocessing(self.crop_size, crop, self.interpolation, _IMAGENET_MEAN, _IMAGENET_STD)


def _swag(name: str, file: str, patch_size: int, width: int, size: int) -> Published:
    return Published(name, file, patch_size, width, size, size, "bicubic")


# torchvision/models/vision_transformer.py. For each network, the weights that torchvision trained come first.
PUBLISHED = (
    Published("ViT_B_16_Weights.IMAGENET1K_V1", "vit_b_16-c867db91", 16, 768, 224),
    _swag("ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1", "vit_b_16_swag-9ac1b537", 16, 768, 384),
    _swag("ViT_B_16_Weights.IMAGENET1K_SWAG_LINEAR_V1", "vit_b_16_lc_swag-4e70ced5", 16, 768, 224),
    Published("ViT_B_32_Weights.IMAGENET1K_V1", "vit_b_32-d86f8d99", 32, 768, 224),
    Published("ViT_L_16_Weights.IMAGENET1K_V1", "vit_l_16-852ce7e3", 16, 1024, 224, 242),
    _swag("ViT_L_16_Weights.IMAGENET1K_SWAG_E2E_V1", "vit_l_16_swag-4f3808c9", 16, 1024, 512),
    _swag("ViT_L_16_Weights.IMAGENET1K_SWAG_LINEAR_V1", "vit_l_16_lc_swag-4d563306", 16, 1024, 224),
    Published("ViT_L_32_Weights.IMAGENET1K_V1", "vit_l_32-c7638314", 32, 1024, 224),
    _swag("ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1", "vit_h_14_swag-80465313", 14, 1280, 518),
    _swag("ViT_H_14_Weights.IMAGENET1K_SWAG_LINEAR_V1", "vit_h_14_lc_swag-c1eb923e", 14, 1280, 224),
)


def read(tensors: Tensors, path: Path) -> Source:
    """Raises CheckpointError."""
    rename_head(tensors, "heads", "heads.head")
    width, _, patch_size, _ = tensors.shape_of("conv_proj.weight", 4)
    fc1, fc2 = ("mlp.0", "mlp.3") if f"{_BLOCK.format(0)}.mlp.0.weight" in tensors else ("mlp.linear_1", "mlp.linear_2")
    representation = tensors.shape("heads.pre_logits.weight")[0] if "heads.pre_logits.weight" in tensors else None
    named = tensors.copy()
    config = ViTConfig(
        image_size=square_side(tensors.shape_of(MARK, 3)[1] - 1) * patch_size,
        patch_size=patch_size,
        width=width,
        depth=tensors.count(_BLOCK + ".ln_1.weight"),
        heads=heads_of(width),
        mlp_width=tensors.shape(f"{_BLOCK.format(0)}.{fc1}.weight")[0],
        classes=tensors.shape_of("heads.head.weight", 2)[0],
        representation_width=representation,
    )
    weights = _weights(tensors, config, _BLOCK_NAMES | {f"{fc1}.": "mlp.fc1.", f"{fc2}.": "mlp.fc2."})
    preprocessing, note = _preprocessing(config, path.stem)
    notes = (*tensors.notes, note) if note else tuple(tensors.notes)
    owner = Owner("torchvision", lambda size: torchvision_network.create(config, named, size))
    return Source(config, weights, preprocessing, interpolation=TORCHVISION, notes=notes, owner=owner)


def preprocessing_of(name: str) -> Preprocessing:
    """That of the published weights: ViT_L_16_Weights.IMAGENET1K_V1. Raises CheckpointError for another name."""
    for published in PUBLISHED:
        if published.name == name:
            return published.preprocessing
    known = ", ".join(published.name for published in PUBLISHED)
    raise CheckpointError(f"torchvision has no weights {name!r}; known: {known}")


def _preprocessing(config: ViTConfig, stem: str) -> tuple[Preprocessing, str]:
    """That of the published file, or of the published weights with the same network and image size; with a note.

    384, 512 and 518 pixels are SWAG's sizes for every network: images are resized to the crop itself. For another size
    it is ImageClassification's default, 256 pixels for a crop of 224.
    """
    same_size = [published for published in PUBLISHED if published.crop_size == config.image_size]
    if file := [published for published in same_size if published.file == stem]:
        return file[0].preprocessing, ""
    network = (config.patch_size, config.width)
    matching = [published for published in same_size if (published.patch_size, published.width) == network]
    if not matching and config.image_size != 224:
        matching = same_size[:1]
    default = Published("", "", *network, config.image_size, round(config.image_size / 0.875))
    return (matching or [default])[0].preprocessing, _note(matching or [default])


def _note(candidates: list[Published]) -> str:
    taken, *alternatives = candidates
    like = f", as for {taken.name}" if taken.name else ""
    choices = " or ".join(f"torchvision:{weights.name}" for weights in alternatives) or "torchvision:WEIGHTS or a file"
    return (
        f"the file does not have its preprocessing: images are resized to {taken.resize_size} pixels"
        f" ({taken.interpolation}) and cropped to {taken.crop_size}{like}; if that is wrong: --preprocessor {choices}"
    )


def _weights(tensors: Tensors, config: ViTConfig, block_names: Mapping[str, str]) -> dict[str, Tensor]:
    weights = {"cls_token": tensors.take("class_token"), "pos_embed": tensors.take(MARK)}
    names = {"conv_proj.": "patch_embed.proj.", "encoder.ln.": "norm.", "heads.head.": "head."}
    if config.representation_width is not None:
        names["heads.pre_logits."] = "pre_logits.fc."
    for index in range(config.depth):
        names |= {
            f"{_BLOCK.format(index)}.{source}": f"blocks.{index}.{target}" for source, target in block_names.items()
        }
    for part in ("weight", "bias"):
        weights |= {f"{target}{part}": tensors.take(f"{source}{part}") for source, target in names.items()}
    tensors.expect_nothing_more()
    return weights
