"""Small networks with random weights, and checkpoints of them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from vitserve.export.checkpoint.load import Checkpoint
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ViTConfig
from vitserve.model.network.vit import ViT

TINY = ViTConfig(image_size=16, patch_size=8, width=32, depth=2, heads=2, mlp_width=64, classes=7)

# Two networks that use most of the options of ViTConfig.
DISTILLED = replace(TINY, distillation_token=True, distillation_head=True, layer_scale=True, qk_norm=True)
HYBRID_AXIAL_MEAN = replace(
    TINY,
    image_size=32,
    stem=(8, 16),
    attention="axial",
    pool="mean",
    class_token=False,
    norm_after_pool=True,
    swiglu=True,
)


def network(config: ViTConfig, seed: int = 0) -> ViT:
    """Random weights so large that the logits differ from image to image."""
    torch.manual_seed(seed)
    vit = ViT(config).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return vit


def checkpoint(config: ViTConfig = TINY, seed: int = 0) -> Checkpoint:
    labels = tuple(f"class {index}" for index in range(config.classes))
    return Checkpoint(network(config, seed), labels, Preprocessing(config.image_size))


def save_checkpoint(path: Path, config: ViTConfig = TINY, seed: int = 0) -> None:
    """Writes a file in the format of `vitserve train`."""
    saved = checkpoint(config, seed)
    metadata = {
        "config": asdict(config),
        "labels": saved.labels,
        "mean": saved.preprocessing.mean,
        "std": saved.preprocessing.std,
    }
    save_file(saved.network.state_dict(), path, {name: json.dumps(value) for name, value in metadata.items()})
