"""At another image size, position embeddings are interpolated as the library of the checkpoint does it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import (
    SMALL_TIMM,
    SMALL_TRANSFORMERS,
    SQUASH,
    assert_same_logits,
    randomized,
    save_with_timm,
    save_with_transformers,
)
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.load import load_checkpoint
from vitserve.export.checkpoint.position_embeddings import GOOGLE, at_image_size
from vitserve.model.config import ViTConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # of the other libraries

SIZES = (16, 24, 48, 72)  # from 32 pixels: smaller ones show whether it is with antialiasing
KINDS = {
    "ViT": ("ViTConfig", "ViTForImageClassification", {"intermediate_size": 96}),
    "DeiT": ("DeiTConfig", "DeiTForImageClassification", {"intermediate_size": 96}),
    "DINOv2": ("Dinov2Config", "Dinov2ForImageClassification", {}),
    "DINOv2 with registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification", {}),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers(kind: str, size: int, transformers: ModuleType, tmp_path: Path) -> None:
    """The size is the preprocessor's, as of DINOv2's published classifiers, or the option's."""
    config, network, arguments = KINDS[kind]
    source: Any = save_with_transformers(transformers, tmp_path, config, network, SMALL_TRANSFORMERS | arguments)
    always = {} if kind.startswith("DINO") else {"interpolate_pos_encoding": True}

    def logits(images: Tensor) -> Tensor:
        result: Tensor = source(images, **always).logits
        return result

    assert_same_logits(load_checkpoint(tmp_path, image_size=size), logits)
    preprocessor = SQUASH | {"size": {"height": size, "width": size}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.network.config.image_size == checkpoint.preprocessing.image_size == size
    assert_same_logits(checkpoint, logits)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", ["option", "pretrained_cfg", "model_args"])
def test_timm(place: str, size: int, timm: ModuleType, tmp_path: Path) -> None:
    """timm interpolates when it loads weights for the size in the configuration."""
    source: Any = save_with_timm(timm, tmp_path, "vit_base_patch16_224", SMALL_TIMM | {"num_heads": 12})
    config = json.loads((tmp_path / "config.json").read_text())
    if place == "pretrained_cfg":
        config["pretrained_cfg"]["input_size"] = [3, size, size]
        del config["model_args"]["img_size"]
    elif place == "model_args":
        config["model_args"]["img_size"] = [size, size]
    (tmp_path / "config.json").write_text(json.dumps(config))
    if place == "option":
        source.set_input_size((size, size))
    else:
        source = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_same_logits(load_checkpoint(tmp_path, image_size=size if place == "option" else None), source)


@pytest.mark.parametrize("size", SIZES)
def test_torchvision(size: int, timm: ModuleType, tmp_path: Path) -> None:
    from torchvision.models.vision_transformer import (  # type: ignore[import-untyped]  # has no types
        VisionTransformer,
        interpolate_embeddings,
    )

    small = {"patch_size": 8, "num_layers": 1, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 96, "num_classes": 5}
    weights = randomized(VisionTransformer(image_size=32, **small)).state_dict()
    torch.save(weights, tmp_path / "vit.pth")
    source = VisionTransformer(image_size=size, **small).eval()
    source.load_state_dict(interpolate_embeddings(size, 8, weights))
    assert_same_logits(load_checkpoint(tmp_path / "vit.pth", image_size=size), source)


@pytest.mark.parametrize("size", SIZES)
def test_google(size: int) -> None:
    """As vit_jax/checkpoint.py does it (github.com/google-research/vision_transformer)."""
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed")
    config = ViTConfig(image_size=32, patch_size=8, width=6, depth=1, heads=2, mlp_width=8, classes=2)
    positions = torch.randn(1, 1 + 16, 6)
    _, weights = at_image_size(config, {"pos_embed": positions}, size, GOOGLE)
    ratio = size / 32
    expected = ndimage.zoom(positions[0, 1:].reshape(4, 4, 6).numpy(), (ratio, ratio, 1), order=1)
    np.testing.assert_allclose(weights["pos_embed"][0, 1:].reshape(expected.shape), expected, atol=1e-5)
    torch.testing.assert_close(weights["pos_embed"][:, :1], positions[:, :1])


def test_an_excessive_image_size_is_rejected(timm: ModuleType, tmp_path: Path) -> None:
    save_with_timm(timm, tmp_path, "vit_base_patch16_224", SMALL_TIMM | {"num_heads": 12})
    with pytest.raises(CheckpointError, match="unsupported image size 80000: at most 4096 pixels"):
        load_checkpoint(tmp_path, image_size=80000)


@pytest.mark.parametrize("arguments", [{"img_size": 96}, {"img_size": 32, "patch_size": 4}, {"img_size": 384}])
def test_a_state_dict_keeps_the_image_size_that_it_was_trained_with(
    arguments: dict[str, int], timm: ModuleType, tmp_path: Path
) -> None:
    """timm's table has another size for the name."""
    source = randomized(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=5, **arguments))
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    size = arguments["img_size"]
    for options in ({}, {"image_size": size}):
        checkpoint = load_checkpoint(tmp_path / "weights.pth", architecture="vit_tiny_patch16_224", **options)
        assert checkpoint.preprocessing.image_size == size
        assert_same_logits(checkpoint, source)
    assert any(f"are for {size} pixels, so images are resized to {size} pixels" in note for note in checkpoint.notes)
