"""The networks of the table in docs/models.md: one small member of each family, with random weights.

Depth is cut where the family allows it, and nothing else: widths, image sizes, and kinds of layers are the published
ones, except where a comment says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Family:
    name: str  # of the family, in the table
    library: str  # timm or transformers
    architecture: str  # timm's name, or the class of transformers
    arguments: dict[str, Any] = field(default_factory=dict)
    processor: str = "ViTImageProcessor"  # of transformers
    image_size: int = 224  # of the processor
    rejection: str = ""  # part of the message, if the network cannot be exported


def _timm(name: str, architecture: str, **arguments: Any) -> Family:
    return Family(name, "timm", architecture, arguments)


def _transformers(
    name: str,
    architecture: str,
    processor: str = "ViTImageProcessor",
    image_size: int = 224,
    **arguments: Any,
) -> Family:
    return Family(name, "transformers", architecture, arguments, processor, image_size)


def _rejected(family: Family, message: str) -> Family:
    return replace(family, rejection=message)


_CUT = {"depth": 2}
_TOWER: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 224,
    "patch_size": 16,
}
_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
_ENCODER: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": 224,
    "patch_size": 16,
}
_DINO = {key: value for key, value in _ENCODER.items() if key != "intermediate_size"}

# timm/models/vision_transformer.py: one of each style of configuration.
_VIT = (
    _timm("ViT", "vit_tiny_patch16_224", **_CUT),
    _timm("ViT, patch 14", "vit_large_patch14_224", **_CUT),
    _timm("ViT, patch 32", "vit_small_patch32_224", **_CUT),
    _timm("ViT, patch 8", "vit_small_patch8_224", num_classes=1000, **_CUT),
    _timm("ViT, mean", "vit_base_patch16_gap_224", **_CUT),
    _timm("ViT, no q, k, v bias", "vit_base_patch16_224_miil", **_CUT),
    _timm("ViT, relative norms (RPN)", "vit_base_patch16_rpn_224", **_CUT),
    _timm("ViT, layer scale, mean", "vit_medium_patch16_gap_240", **_CUT),
    _timm("ViT, parallel blocks", "vit_small_patch16_18x2_224", **_CUT),
    _timm("ViT, 36 layers", "vit_small_patch16_36x1_224", **_CUT),
    _timm("ViT, registers, mean", "vit_medium_patch16_reg1_gap_256", **_CUT),
    _timm("ViT, wee", "vit_wee_patch16_reg1_gap_256", **_CUT),
    _timm("ViT, little", "vit_little_patch16_reg1_gap_256", **_CUT),
    _timm("ViT, betwixt", "vit_betwixt_patch16_reg1_gap_256", **_CUT),
    _timm("ViT, mediumd", "vit_mediumd_patch16_reg4_gap_256", **_CUT),
    _timm("ViT, pwee (parallel scaling)", "vit_pwee_patch16_reg1_gap_256", **_CUT),
    _timm("ViT, dpwee (differential)", "vit_dpwee_patch16_reg1_gap_256", **_CUT),
    _timm("ViT, dlittle (differential)", "vit_dlittle_patch16_reg1_gap_256", **_CUT),
    _timm("ViT, so150m", "vit_so150m_patch16_reg4_gap_256", **_CUT),
    _timm("ViT, so150m, map", "vit_so150m_patch16_reg4_map_256", **_CUT),
    _timm("ViT, so150m2", "vit_so150m2_patch16_reg1_gap_256", **_CUT),
    _timm("ViT, xp", "vit_base_patch32_plus_256", **_CUT),
    _timm("FlexiViT", "flexivit_small", **_CUT),
    _timm("EVA (plain)", "eva_large_patch14_196", **_CUT),
    _timm("CLIP", "vit_base_patch32_clip_224", **_CUT),
    _timm("CLIP, quick GELU", "vit_base_patch16_clip_quickgelu_224", **_CUT),
    _timm("SigLIP", "vit_base_patch16_siglip_224", num_classes=1000, **_CUT),
    _timm("SigLIP, mean", "vit_base_patch16_siglip_gap_224", num_classes=1000, **_CUT),
    _timm("SigLIP 2", "vit_base_patch32_siglip_256", num_classes=1000, **_CUT),
    _timm("DINOv2", "vit_small_patch14_dinov2", img_size=224, num_classes=1000, **_CUT),
    _timm("DINOv2, registers", "vit_small_patch14_reg4_dinov2", img_size=224, num_classes=1000, **_CUT),
    _timm("DINOv2, SwiGLU", "vit_giant_patch14_reg4_dinov2", img_size=224, num_classes=1000, depth=1),
    _timm("DeiT, distilled", "deit_tiny_distilled_patch16_224", **_CUT),
    _timm("DeiT III", "deit3_small_patch16_224", **_CUT),
)
_TIMM = (
    _timm("Hybrid R26+S/32", "vit_small_r26_s32_224", **_CUT),
    _rejected(_timm("BiT ResNetV2", "resnetv2_50x1_bit"), "does not match the source network: embedding differ by"),
    _timm("Swin", "swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)),
    _timm("Swin V2", "swinv2_tiny_window8_256", depths=(1, 1, 1, 1)),
    _timm("ConvNeXt", "convnext_atto"),
    _timm("ConvNeXt V2", "convnextv2_atto"),
    _timm("BEiT", "beit_base_patch16_224", **_CUT),
    _timm("BEiT v2", "beitv2_base_patch16_224", **_CUT),
    _timm("EVA-02", "eva02_tiny_patch14_224", num_classes=1000, **_CUT),
    _timm("EVA-02 CLIP", "eva02_base_patch16_clip_224", **_CUT),
    _timm("DINOv3", "vit_small_patch16_dinov3", num_classes=1000, **_CUT),
    _timm("RoPE ViT", "vit_base_patch16_rope_224", **_CUT),
    _timm("Relative positions", "vit_relpos_small_patch16_224", **_CUT),
    _timm("CaiT", "cait_xxs24_224", **_CUT),
    _timm("LeViT", "levit_128s"),
    _timm("TinyViT", "tiny_vit_5m_224"),
    _timm("MobileViT", "mobilevit_xxs"),
    _timm("MobileViT v2", "mobilevitv2_050"),
    _timm("EfficientViT (MIT)", "efficientvit_b0"),
    _timm("EfficientViT (MSRA)", "efficientvit_m0"),
    _timm("Hiera", "hiera_tiny_224"),
    _timm("ViTamin", "vitamin_small_224"),
    _timm("MLP-Mixer", "mixer_s32_224"),
    _timm("NaFlexViT, fixed size", "naflexvit_base_patch16_gap", **_CUT),
    _timm("SAM's ViT", "samvit_base_patch16_224", **_CUT),
    _timm("MaxViT", "maxvit_pico_rw_256"),
    _timm("CoAtNet", "coatnet_nano_rw_224"),
    _timm("MViTv2", "mvitv2_tiny"),
    _timm("VOLO", "volo_d1_224"),
    _timm("XCiT", "xcit_nano_12_p16_224", **_CUT),
    _timm("PVT v2", "pvt_v2_b0"),
    _timm("PiT", "pit_ti_224"),
    _timm("ConViT", "convit_tiny"),
    _timm("FastViT", "fastvit_t8"),
    _timm("FocalNet", "focalnet_tiny_srf"),
    _timm("PoolFormer", "poolformer_s12"),
    _timm("RepViT", "repvit_m0_9"),
    _timm("ResNet", "resnet18"),
    _timm("EfficientNet", "efficientnet_b0"),
    _timm("MobileNet v3", "mobilenetv3_small_050"),
)
# The auto classes of transformers for image classification. Those whose configuration allows it are small.
_TRANSFORMERS = (
    _transformers("ViT", "ViTForImageClassification", **_ENCODER),
    _transformers("DeiT", "DeiTForImageClassification", "DeiTImageProcessor", **_ENCODER),
    _transformers("DeiT, teacher", "DeiTForImageClassificationWithTeacher", "DeiTImageProcessor", **_ENCODER),
    _transformers("BEiT", "BeitForImageClassification", "BeitImageProcessor", **_ENCODER),
    _transformers("Data2Vec", "Data2VecVisionForImageClassification", "BeitImageProcessor", **_ENCODER),
    _transformers("DINOv2", "Dinov2ForImageClassification", "BitImageProcessor", **_DINO | {"patch_size": 14}),
    _transformers(
        "DINOv2, registers",
        "Dinov2WithRegistersForImageClassification",
        "BitImageProcessor",
        **_DINO | {"patch_size": 14},
    ),
    _transformers("SigLIP", "SiglipForImageClassification", "SiglipImageProcessor", vision_config=_TOWER),
    _rejected(
        _transformers(
            "SigLIP 2, NaFlex",
            "Siglip2ForImageClassification",
            "Siglip2ImageProcessor",
            vision_config={"num_hidden_layers": 1},
        ),
        "unsupported model_type 'siglip2': it is a NaFlex network",
    ),
    _transformers("CLIP", "CLIPForImageClassification", "CLIPImageProcessor", vision_config=_TOWER, text_config=_TEXT),
    _transformers(
        "MetaCLIP 2", "MetaClip2ForImageClassification", "CLIPImageProcessor", vision_config=_TOWER, text_config=_TEXT
    ),
    _transformers("ViT-MSN", "ViTMSNForImageClassification", **_ENCODER),
    _transformers("I-JEPA", "IJepaForImageClassification", **_ENCODER),
    _transformers("Swin", "SwinForImageClassification", depths=[1, 1, 1, 1]),
    _transformers("Swin V2", "Swinv2ForImageClassification", depths=[1, 1, 1, 1]),
    _transformers("Donut's Swin", "DonutSwinForImageClassification", depths=[1, 1, 1, 1]),
    _transformers("ConvNeXt", "ConvNextForImageClassification", "ConvNextImageProcessor", depths=[1, 1, 1, 1]),
    _transformers("ConvNeXt V2", "ConvNextV2ForImageClassification", "ConvNextImageProcessor", depths=[1, 1, 1, 1]),
    _transformers("CvT", "CvtForImageClassification", "ConvNextImageProcessor"),
    _rejected(_transformers("DiNAT", "DinatForImageClassification"), "requires the natten library"),
    _transformers(
        "EfficientNet", "EfficientNetForImageClassification", "EfficientNetImageProcessor", 346, depth_coefficient=1.0
    ),
    _transformers("FocalNet", "FocalNetForImageClassification", "BitImageProcessor", depths=[1, 1, 1, 1]),
    _transformers("HGNet v2", "HGNetV2ForImageClassification"),
    _transformers("Hiera", "HieraForImageClassification", "BitImageProcessor", depths=[1, 1, 2, 1]),
    _rejected(
        _transformers("ImageGPT", "ImageGPTForImageClassification", n_layer=1), "it reads sequences of color clusters"
    ),
    _transformers("LeViT", "LevitForImageClassification", "LevitImageProcessor"),
    _transformers("LeViT, teacher", "LevitForImageClassificationWithTeacher", "LevitImageProcessor"),
    _transformers("MobileNet v1", "MobileNetV1ForImageClassification", "MobileNetV1ImageProcessor"),
    _transformers("MobileNet v2", "MobileNetV2ForImageClassification", "MobileNetV2ImageProcessor"),
    _transformers("MobileViT", "MobileViTForImageClassification", "MobileViTImageProcessor", 256),
    _transformers("MobileViT v2", "MobileViTV2ForImageClassification", "MobileViTImageProcessor", 256),
    _transformers("PoolFormer", "PoolFormerForImageClassification", "PoolFormerImageProcessor"),
    _rejected(
        _transformers("PP-LCNet", "PPLCNetForImageClassification", "PPLCNetImageProcessor"),
        "unsupported PPLCNetImageProcessor: no resize, crop and normalization gives its output",
    ),
    _transformers("PVT", "PvtForImageClassification", "PvtImageProcessor"),
    _transformers("PVT v2", "PvtV2ForImageClassification", "PvtImageProcessor"),
    _transformers("RegNet", "RegNetForImageClassification", "ConvNextImageProcessor", depths=[1, 1, 2, 1]),
    _transformers("ResNet", "ResNetForImageClassification", "ConvNextImageProcessor", depths=[1, 1, 1, 1]),
    _transformers("BiT", "BitForImageClassification", "BitImageProcessor", depths=[1, 1, 1, 1]),
    _transformers("SegFormer", "SegformerForImageClassification", "SegformerImageProcessor", depths=[1, 1, 1, 1]),
    _transformers("SwiftFormer", "SwiftFormerForImageClassification"),
    _rejected(
        _transformers("TextNet", "TextNetForImageClassification", "TextNetImageProcessor"),
        "unsupported TextNetImageProcessor: it makes arrays of the shapes",
    ),
)
FAMILIES = (*_VIT, *_TIMM, *_TRANSFORMERS)
