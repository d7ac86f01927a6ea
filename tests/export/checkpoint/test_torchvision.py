"""State dicts that torchvision writes with random weights have the same logits here, in torch and as served."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.support.checkpoints import (
    SMALL_TRANSFORMERS,
    assert_same_logits,
    logits_of,
    randomized,
    save_with_transformers,
)
from tests.support.images import encoded, random_image
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.formats.torchvision import PUBLISHED, preprocessing_of
from vitserve.export.checkpoint.load import load_checkpoint
from vitserve.model.arrays import Pixels
from vitserve.model.bundle.preprocess import Decoder
from vitserve.model.config import LibraryConfig

SMALL = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "mlp_dim": 96, "num_classes": 5}
pytestmark = pytest.mark.filterwarnings("ignore")  # torchvision's own


@pytest.mark.parametrize(
    "arguments", [{"hidden_dim": 192}, {"hidden_dim": 192, "representation_size": 40}], ids=["plain", "representation"]
)
def test_a_torchvision_state_dict_has_the_same_logits(
    arguments: dict[str, Any], timm: ModuleType, tmp_path: Path
) -> None:
    from torchvision.models.vision_transformer import VisionTransformer  # type: ignore[import-untyped]  # has no types

    source = randomized(VisionTransformer(**SMALL | arguments))
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    assert_same_logits(load_checkpoint(tmp_path / "vit.pth"), source)
    chosen = load_checkpoint(tmp_path / "vit.pth", network="library").source_model(lambda step: None)
    assert isinstance(chosen.config, LibraryConfig)


@pytest.mark.slow
def test_a_full_size_torchvision_state_dict_has_the_same_logits(timm: ModuleType, tmp_path: Path) -> None:
    from torchvision.models import vit_b_16  # type: ignore[import-untyped]  # has no types

    source = randomized(vit_b_16())
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    assert_same_logits(load_checkpoint(tmp_path / "vit.pth"), source, tmp_path)


def published() -> dict[str, Any]:
    """torchvision's own weights of every Vision Transformer, by name."""
    from torchvision.models import vision_transformer as module

    names = [name for name in dir(module) if name.startswith("ViT_") and name.endswith("_Weights")]
    return {str(weights): weights for name in names for weights in getattr(module, name)}


def pixels_of(transforms: Any, image: Image.Image) -> Pixels:
    """What torchvision's transforms give the network, before the normalization."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (transforms.mean, transforms.std))
    restored: Pixels = ((transforms(image) * std + mean) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    return restored


def test_every_published_preprocessing_is_torchvisions(timm: ModuleType) -> None:
    image = random_image(300, 400, seed=2)
    assert {each.name for each in PUBLISHED} == published().keys()
    for name, weights in published().items():
        decoder = Decoder(preprocessing_of(name), mode="exact")
        assert np.array_equal(decoder.decode(encoded(image)), pixels_of(weights.transforms(), image)), name
        assert weights.url.endswith(f"/{next(each.file for each in PUBLISHED if each.name == name)}.pth")
    with pytest.raises(
        CheckpointError, match=r"no weights 'ViT_B_16_Weights\.DEFAULT'; known: ViT_B_16_Weights\.IMAGENET"
    ):
        preprocessing_of("ViT_B_16_Weights.DEFAULT")


@pytest.mark.parametrize(
    ("size", "patch_size", "width", "expected", "alternative"),
    [
        (384, 16, 768, "ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1", ""),
        (384, 16, 192, "ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1", ""),
        (512, 16, 1024, "ViT_L_16_Weights.IMAGENET1K_SWAG_E2E_V1", ""),
        (518, 14, 1280, "ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1", ""),
        (224, 14, 1280, "ViT_H_14_Weights.IMAGENET1K_SWAG_LINEAR_V1", ""),
        (224, 16, 1024, "ViT_L_16_Weights.IMAGENET1K_V1", "ViT_L_16_Weights.IMAGENET1K_SWAG_LINEAR_V1"),
        (224, 16, 768, "ViT_B_16_Weights.IMAGENET1K_V1", "ViT_B_16_Weights.IMAGENET1K_SWAG_LINEAR_V1"),
        (224, 32, 768, "ViT_B_32_Weights.IMAGENET1K_V1", ""),
        (224, 16, 192, "ViT_B_32_Weights.IMAGENET1K_V1", ""),
    ],
)
def test_the_preprocessing_is_that_of_the_published_weights_of_this_size(
    size: int, patch_size: int, width: int, expected: str, alternative: str, timm: ModuleType, tmp_path: Path
) -> None:
    """What is not clear from the file is noted, and can be stated."""
    from torchvision.models.vision_transformer import VisionTransformer

    shape = {
        "image_size": size,
        "patch_size": patch_size,
        "hidden_dim": width,
        "mlp_dim": 8,
        "num_layers": 1,
        "num_heads": 1,
    }
    weights = VisionTransformer(**SMALL | shape).state_dict()
    torch.save(weights, tmp_path / "vit.pth")
    checkpoint = load_checkpoint(tmp_path / "vit.pth")
    assert checkpoint.preprocessing == preprocessing_of(expected)
    (note,) = checkpoint.notes
    assert "the file does not have its preprocessing" in note
    assert alternative in note
    stated = load_checkpoint(tmp_path / "vit.pth", preprocessor=f"torchvision:{alternative or expected}")
    assert stated.preprocessing == preprocessing_of(alternative or expected)
    file = next(each.file for each in PUBLISHED if each.name == (alternative or expected))
    torch.save(weights, tmp_path / f"{file}.pth")
    downloaded = load_checkpoint(tmp_path / f"{file}.pth")
    if width != 192:
        assert (downloaded.preprocessing, downloaded.notes) == (preprocessing_of(alternative or expected), ())


def heads(kind: str, width: int) -> nn.Module:
    """As tutorials replace a head."""
    linear = nn.Linear(width, 5)
    return {
        "linear": linear,
        "dropout": nn.Sequential(nn.Dropout(0.2), linear),
        "in order": nn.Sequential(linear),
        "nested": nn.Sequential(nn.Identity(), nn.Sequential(nn.Dropout(0.5), linear)),
    }[kind]


@pytest.mark.parametrize("kind", ["linear", "dropout", "in order", "nested"])
@pytest.mark.parametrize("library", ["torchvision", "torchvision, inner", "timm", "transformers"])
def test_a_replaced_head_is_found(
    library: str, kind: str, timm: ModuleType, transformers: ModuleType, tmp_path: Path
) -> None:
    from torchvision.models.vision_transformer import VisionTransformer

    source: Any
    architecture = ""
    if library.startswith("torchvision"):
        source = VisionTransformer(**SMALL | {"hidden_dim": 192})
        inner = library.endswith("inner")
        setattr(source.heads if inner else source, "head" if inner else "heads", heads(kind, 192))
    elif library == "timm":
        architecture = "vit_tiny_patch16_224"
        source = timm.create_model(architecture, depth=1, num_classes=7)
        source.head = heads(kind, 192)
    else:
        arguments = SMALL_TRANSFORMERS | {"intermediate_size": 96}
        source = save_with_transformers(transformers, tmp_path, "ViTConfig", "ViTForImageClassification", arguments)
        source.classifier = heads(kind, 48)
        (tmp_path / "model.safetensors").unlink()
    randomized(source)
    path = tmp_path / "pytorch_model.bin"
    torch.save(source.state_dict(), path)
    if library == "transformers":
        assert_same_logits(load_checkpoint(tmp_path), logits_of(source))
    else:
        assert_same_logits(load_checkpoint(path, architecture=architecture), source)


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 5)),
        nn.Sequential(nn.LayerNorm(192), nn.Linear(192, 5)),
        nn.LayerNorm(192),
    ],
)
def test_a_head_of_several_layers_is_rejected(head: nn.Module, timm: ModuleType, tmp_path: Path) -> None:
    from torchvision.models.vision_transformer import VisionTransformer

    source = VisionTransformer(**SMALL | {"hidden_dim": 192})
    source.heads = head
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"unsupported head: heads\..*; supported is one linear layer"):
        load_checkpoint(tmp_path / "vit.pth")
