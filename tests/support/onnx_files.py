"""ONNX files of image classifiers as exporters write them, with random weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIDE, CLASSES = 32, 5


class Classifier(nn.Module):
    """Attention over patches with a class token, like a ViT of one block."""

    def __init__(self, head: nn.Module | None = None, channels_last: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 24, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 24))
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, CLASSES)
        nn.init.normal_(self.head.weight, std=0.5)
        self.last, self.channels_last = head or nn.Identity(), channels_last

    def forward(self, images: Tensor) -> Tensor:
        if self.channels_last:
            images = images.permute(0, 3, 1, 2)
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        q, k, v = self.qkv(self.norm(x)).reshape(x.shape[0], 17, 3, 2, 12).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = ((q @ k.transpose(-2, -1)) * 12**-0.5).softmax(-1) @ v
        x = x + self.proj(mixed.transpose(1, 2).reshape(x.shape[0], 17, 24))
        logits: Tensor = self.last(self.head(self.norm(x)[:, 0]))
        return logits


def write(
    path: Path,
    opset: int = 17,
    dynamic: bool = False,
    network: nn.Module | None = None,
    names: tuple[str, str] = ("input", "output"),
    axes: dict[int, str] | None = None,
    batch: int = 1,
) -> None:
    """As torch.onnx.export writes it; opset 23 by its newer exporter. ``axes`` names the dynamic axes of the input."""
    module = (network or Classifier()).eval()
    shape = (batch, SIDE, SIDE, 3) if getattr(module, "channels_last", False) else (batch, 3, SIDE, SIDE)
    dynamic_axes: dict[str, Any] = {}
    if dynamic:
        dynamic_axes = {names[0]: axes or {0: "batch"}, names[1]: {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if opset >= 23:
            sizes = ({0: torch.export.Dim("batch", min=1, max=64)},) if dynamic else None
            example = torch.zeros(max(batch, 2) if dynamic else batch, *shape[1:])
            torch.onnx.export(
                module,
                (example,),
                path,
                dynamo=True,
                opset_version=opset,
                input_names=[names[0]],
                output_names=[names[1]],
                dynamic_shapes=sizes,
                verbose=False,
            )
            return
        torch.onnx.export(
            module,
            (torch.zeros(shape),),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=[names[0]],
            output_names=[names[1]],
            dynamic_axes=dynamic_axes,
        )
