"""Builds the network of a configuration."""

from __future__ import annotations

from vitserve.model.config import ResNetConfig, ViTConfig
from vitserve.model.network.resnet import ResNet
from vitserve.model.network.vit import ViT

Network = ViT | ResNet


def network_of(config: ViTConfig | ResNetConfig) -> Network:
    return ResNet(config) if isinstance(config, ResNetConfig) else ViT(config)
