"""The smallest networks of families for which vitserve has no network, as their libraries save them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from tests.support.checkpoints import SQUASH, save_with_timm, save_with_transformers

TOWER: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 16,
}
TEXT: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 99,
}
_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 5}


@dataclass(frozen=True)
class Small:
    architecture: str  # timm's name, or the class of transformers
    arguments: dict[str, Any] = field(default_factory=dict)
    attention: int = 0  # fused kernels that OpenVINO must have

    @property
    def of_timm(self) -> bool:
        return self.architecture.islower()

    def save(self, timm: ModuleType, transformers: ModuleType, directory: Path) -> nn.Module:
        if self.of_timm:
            return save_with_timm(timm, directory, self.architecture, self.arguments)
        config = getattr(transformers, self.architecture).config_class.__name__
        return save_with_transformers(
            transformers, directory, config, self.architecture, {"num_labels": 5} | self.arguments, SQUASH
        )


SMALL: dict[str, Small] = {
    "SigLIP, attention pooling": Small("vit_base_patch16_siglip_224", _VIT, 2),
    "ViT, gray, not square, average and maximum": Small(
        "vit_base_patch16_224", _VIT | {"in_chans": 1, "img_size": (32, 48), "global_pool": "avgmax"}, 1
    ),
    "EVA-02": Small("eva02_tiny_patch14_224", _VIT),
    "DINOv3": Small("vit_small_patch16_dinov3", _VIT),
    "BEiT of timm": Small("beit_base_patch16_224", _VIT),
    "CaiT": Small("cait_xxs24_224", _VIT),
    "Swin of timm": Small(
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (1,), "num_heads": (2,), "num_classes": 5},
    ),
    "ConvNeXt of timm": Small("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "num_classes": 5}),
    "MLP-Mixer": Small("mixer_s32_224", {"img_size": 32, "num_classes": 5}),
    "BEiT of transformers": Small("BeitForImageClassification", TOWER, 1),
    "SigLIP of transformers": Small("SiglipForImageClassification", {"vision_config": TOWER}, 1),
    "CLIP of transformers": Small("CLIPForImageClassification", {"vision_config": TOWER}, 1),
    "Swin of transformers": Small(
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [1], "num_heads": [2], "window_size": 4},
        1,
    ),
    "ResNet of transformers": Small(
        "ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    ),
}
