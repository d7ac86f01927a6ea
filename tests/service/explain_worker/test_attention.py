"""Attention rollout equals a computation in torch, and networks without token attention are recognized."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.images import encoded, random_image
from tests.support.library_networks import SMALL
from tests.support.paths import ROOT
from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.load import Checkpoint, load_checkpoint, random_checkpoint
from vitserve.export.graph.reference import ReferenceNetwork
from vitserve.model.arrays import Floats, Pixels
from vitserve.model.bundle.bundle import Bundle, open_bundle, sha256
from vitserve.model.bundle.preprocess import Decoder
from vitserve.model.config import ViTConfig
from vitserve.service.explain_worker.attention import NotExplainableError, grid_of, on_grid, rollout
from vitserve.service.explain_worker.main import Explainer
from vitserve.service.explain_worker.network import ExplainableNetwork
from vitserve.service.settings import DEFAULT_BUNDLE

VARIANTS = ["compact-hybrid-deep/4", "compact-mean/4", pytest.param("B/16", marks=pytest.mark.slow)]


def torch_attentions(checkpoint: Checkpoint, pixels: Pixels, monkeypatch: pytest.MonkeyPatch) -> list[Floats]:
    """softmax(Q Kᵀ / √d) of every layer of our network in torch, [heads, tokens, tokens]."""
    found = list[Floats]()

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        found.append(weights[0].numpy())
        mixed: Tensor = weights @ value
        return mixed

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    with torch.inference_mode():
        ReferenceNetwork(checkpoint.network, checkpoint.preprocessing).eval()(torch.from_numpy(pixels[None].copy()))
    monkeypatch.undo()
    return found


def torch_rollout(attentions: list[Floats], class_token: bool) -> Floats:
    """Figure 6 of "An Image is Worth 16x16 Words", in torch."""
    joint = torch.eye(attentions[0].shape[-1])
    for attention in attentions:
        step = torch.from_numpy(attention).mean(0) + torch.eye(len(joint))
        joint = step / step.sum(-1, keepdim=True) @ joint
    row: Floats = (joint[0] if class_token else joint.mean(0)).numpy()
    return row


@pytest.mark.parametrize("variant", VARIANTS)
def test_rollout_equals_torch(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = random_checkpoint(variant)
    bundle = build_bundle(checkpoint, tmp_path / "bundle", name="x", precisions=[])
    assert_same_rollout(bundle, checkpoint, bundle.golden().pixels[0], monkeypatch)


def test_rollout_of_the_default_model_equals_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its trained weights, on a sample image."""
    bundle = open_bundle(DEFAULT_BUNDLE)
    checkpoint = load_checkpoint(ROOT / "checkpoints" / "default" / "weights.safetensors")
    image = (ROOT / "examples" / "images" / "cat.jpg").read_bytes()
    assert_same_rollout(bundle, checkpoint, Decoder(bundle.manifest.preprocessing).decode(image), monkeypatch)


def assert_same_rollout(
    bundle: Bundle, checkpoint: Checkpoint, pixels: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = ExplainableNetwork(bundle)
    actual, expected = network.attentions(pixels), torch_attentions(checkpoint, pixels, monkeypatch)
    config = checkpoint.network.config
    class_token = isinstance(config, ViTConfig) and config.class_token
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs[:, : ours.shape[1]], atol=1e-4)
    others = grid_of(pixels.shape[0], pixels.shape[1], actual[0].shape[-1])[2]
    assert others == class_token
    np.testing.assert_allclose(rollout(actual, others)[-1], torch_rollout(expected, bool(others)), atol=1e-3)


@pytest.mark.parametrize(
    ("height", "width", "tokens", "expected"),
    [
        (224, 224, 197, (14, 14, 1)),
        (224, 224, 196, (14, 14, 0)),
        (224, 224, 198, (14, 14, 2)),
        (518, 518, 1374, (37, 37, 5)),
        (224, 112, 98, (14, 7, 0)),
    ],
)
def test_tokens_are_a_grid(height: int, width: int, tokens: int, expected: tuple[int, int, int]) -> None:
    assert grid_of(height, width, tokens) == expected


def test_other_tokens_are_no_grid() -> None:
    with pytest.raises(NotExplainableError, match="are no grid of patches"):
        grid_of(224, 224, 250)


def test_the_largest_value_of_a_map_is_one() -> None:
    grid = on_grid(np.arange(17, dtype=np.float32), (4, 4, 1))
    assert grid.shape == (4, 4)
    assert grid.max() == 1


def options(**values: object) -> dict[str, object]:
    return {"method": "auto", "layer": None, "head": None, "class": None} | values


def test_a_bundle_that_has_changed_is_not_explained(bundle: Bundle) -> None:
    """It would explain another model than the one that is served."""
    explainer, image = Explainer(bundle), encoded(random_image(64, 64))
    identity = sha256(bundle.path / "bundle.json")
    assert len(explainer.answer(options(identity=identity), image)) == 3
    kind, text = explainer.answer(options(identity="0" * 64), image)
    assert kind == b"NotExplainableError"
    assert b"the bundle has changed since the model was loaded" in text


def test_a_network_with_windows_is_explained_by_occlusion(
    tmp_path: Path, timm: ModuleType, transformers: ModuleType
) -> None:
    SMALL["Swin of timm"].save(timm, transformers, tmp_path / "source")
    bundle: Bundle = build_bundle(load_checkpoint(tmp_path / "source"), tmp_path / "bundle", name="x", precisions=[])
    explainer, image = Explainer(bundle), encoded(random_image(64, 64))
    assert b'"occlusion"' in explainer.answer(options(), image)[0]
    assert explainer.answer(options(method="rollout"), image)[0] == b"NotExplainableError"
