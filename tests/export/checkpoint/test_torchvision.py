"""State dicts that torchvision writes with random weights have the same logits here, in torch and as served."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support.checkpoints import assert_same_logits, randomized
from vitserve.export.checkpoint.load import load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # torchvision's own


@pytest.mark.parametrize(
    "arguments", [{"hidden_dim": 192}, {"hidden_dim": 192, "representation_size": 40}], ids=["plain", "representation"]
)
def test_a_torchvision_state_dict_has_the_same_logits(
    arguments: dict[str, Any], timm: ModuleType, tmp_path: Path
) -> None:
    from torchvision.models.vision_transformer import VisionTransformer  # type: ignore[import-untyped]  # has no types

    small = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "mlp_dim": 96, "num_classes": 5}
    source = randomized(VisionTransformer(**small | arguments))
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    assert_same_logits(load_checkpoint(tmp_path / "vit.pth"), source)


@pytest.mark.slow
def test_a_full_size_torchvision_state_dict_has_the_same_logits(timm: ModuleType, tmp_path: Path) -> None:
    from torchvision.models import vit_b_16  # type: ignore[import-untyped]  # has no types

    source = randomized(vit_b_16())
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    assert_same_logits(load_checkpoint(tmp_path / "vit.pth"), source, tmp_path)
