"""Archives in the layout of Google's release have the same logits here."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.checkpoints import assert_same_logits, randomized
from vitserve.export.checkpoint.load import load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # timm's own

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (
        "vit_base_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5},
    ),
    "hybrid": (
        "vit_base_r50_s16_224",
        {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5},
    ),
}


class GoogleLayout:
    """Converts a timm network to the arrays of Google's .npz."""

    def __init__(self, network: nn.Module, depth: int, heads: int) -> None:
        self.weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
        self.heads = heads
        self.arrays: dict[str, np.ndarray] = {
            "cls": self.weights["cls_token"],
            "Transformer/posembed_input/pos_embedding": self.weights["pos_embed"],
            "embedding/bias": self.weights["patch_embed.proj.bias"],
        }
        self._filters("embedding", "patch_embed.proj")
        self._norm("Transformer/encoder_norm", "norm")
        self._dense("head", "head")
        for index in range(depth):
            self._block(f"Transformer/encoderblock_{index}", f"blocks.{index}")
        self._resnet()

    def _dense(self, theirs: str, ours: str) -> None:
        self.arrays[f"{theirs}/kernel"] = self.weights[f"{ours}.weight"].T
        self.arrays[f"{theirs}/bias"] = self.weights[f"{ours}.bias"]

    def _norm(self, theirs: str, ours: str) -> None:
        self.arrays[f"{theirs}/scale"] = self.weights[f"{ours}.weight"]
        self.arrays[f"{theirs}/bias"] = self.weights[f"{ours}.bias"]

    def _filters(self, theirs: str, ours: str) -> None:
        self.arrays[f"{theirs}/kernel"] = self.weights[f"{ours}.weight"].transpose(2, 3, 1, 0)

    def _block(self, theirs: str, ours: str) -> None:
        self._norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1")
        self._norm(f"{theirs}/LayerNorm_2", f"{ours}.norm2")
        self._dense(f"{theirs}/MlpBlock_3/Dense_0", f"{ours}.mlp.fc1")
        self._dense(f"{theirs}/MlpBlock_3/Dense_1", f"{ours}.mlp.fc2")
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        weight, bias = self.weights[f"{ours}.attn.qkv.weight"], self.weights[f"{ours}.attn.qkv.bias"]
        width = weight.shape[1]
        for number, name in enumerate(("query", "key", "value")):
            rows = slice(number * width, (number + 1) * width)
            self.arrays[f"{attention}/{name}/kernel"] = weight[rows].T.reshape(width, self.heads, -1)
            self.arrays[f"{attention}/{name}/bias"] = bias[rows].reshape(self.heads, -1)
        projection = self.weights[f"{ours}.attn.proj.weight"]
        self.arrays[f"{attention}/out/kernel"] = projection.T.reshape(self.heads, -1, width)
        self.arrays[f"{attention}/out/bias"] = self.weights[f"{ours}.attn.proj.bias"]

    def _resnet(self) -> None:
        prefix = "patch_embed.backbone."
        for name in [name.removesuffix(".weight") for name in self.weights if name.endswith(".weight")]:
            if not name.startswith(prefix):
                continue
            *_, layer = parts = name.removeprefix(prefix).split(".")
            if parts[0] == "stem":
                theirs = "conv_root" if layer == "conv" else "gn_root"
            else:
                kind = {"conv": "conv", "norm": "gn"}[layer.rstrip("123")]
                suffix = "_proj" if parts[4] == "downsample" else layer[-1]
                theirs = f"block{int(parts[1]) + 1}/unit{int(parts[3]) + 1}/{kind}{suffix}"
            (self._filters if layer.startswith("conv") else self._norm)(theirs, name)


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_a_google_archive_has_the_same_logits(kind: str, timm: ModuleType, tmp_path: Path) -> None:
    """timm's own reader of the release accepts the archive and gives timm's network back."""
    name, arguments = SMALL[kind]
    source = randomized(timm.create_model(name, **arguments))
    arrays: dict[str, Any] = GoogleLayout(source, depth=arguments["depth"], heads=arguments["num_heads"]).arrays
    np.savez(tmp_path / "release.npz", **arrays)
    read_back = timm.create_model(name, **arguments).eval()
    read_back.load_pretrained(str(tmp_path / "release.npz"))
    images = torch.randn(1, 3, arguments["img_size"], arguments["img_size"])
    with torch.inference_mode():
        torch.testing.assert_close(read_back(images), source(images))
    assert_same_logits(load_checkpoint(tmp_path / "release.npz"), source)
