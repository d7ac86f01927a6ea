"""The network of a configuration, of whichever family it is. Imported by train.py and export/checkpoint.py."""

from __future__ import annotations

from model.config import ResNetConfig, ViTConfig
from model.resnet import ResNet
from model.vit import ViT

Network = ViT | ResNet


def network_of(config: ViTConfig | ResNetConfig) -> Network:
    return ResNet(config) if isinstance(config, ResNetConfig) else ViT(config)
