"""Small networks with random weights, and checkpoints made of them."""

from __future__ import annotations

import torch

from vitserve.export.checkpoint.load import Checkpoint
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ViTConfig
from vitserve.model.network.vit import ViT

TINY = ViTConfig(image_size=16, patch_size=8, width=32, depth=2, heads=2, mlp_width=64, classes=7)


def network(config: ViTConfig, seed: int = 0) -> ViT:
    """Random weights large enough that logits differ from image to image."""
    torch.manual_seed(seed)
    made = ViT(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def checkpoint(config: ViTConfig = TINY, seed: int = 0) -> Checkpoint:
    labels = tuple(f"class {index}" for index in range(config.classes))
    return Checkpoint(network(config, seed), labels, Preprocessing(config.image_size))
