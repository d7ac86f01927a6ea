"""Networks without classifier: their embeddings are those of their library, and heads make them classifiers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.checkpoints import save_with_timm, save_with_transformers
from tests.support.images import encoded, random_image
from tests.support.processes import serving
from tests.support.server import Server
from tests.support.waiting import eventually
from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.load import load_checkpoint
from vitserve.model.arrays import Outputs
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.evaluation import Images, evaluate
from vitserve.model.bundle.head import Head, backbone_of, write_head
from vitserve.model.bundle.parity import compare

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
NETWORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT": ("ViTConfig", "ViTModel", SMALL | {"patch_size": 8}),
    "DINOv2": ("Dinov2Config", "Dinov2Model", SMALL | {"patch_size": 8, "mlp_ratio": 2}),
    "CLIP": ("CLIPVisionConfig", "CLIPVisionModel", SMALL | {"patch_size": 8}),
    "Swin": (
        "SwinConfig",
        "SwinModel",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    ),
}
IMAGES = [encoded(random_image(40, 32, seed=seed), "PNG") for seed in range(6)]


def saved(name: str, directory: Path, transformers: ModuleType) -> nn.Module:
    config, network, arguments = NETWORKS[name]
    return save_with_transformers(transformers, directory, config, network, arguments)


def pooled(network: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda images: network(images).pooler_output


def assert_equal_embeddings(bundle: Bundle, embed: Callable[[Tensor], Tensor]) -> None:
    golden, preprocessing = bundle.golden(), bundle.manifest.preprocessing
    mean, std = (np.array(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    images = ((golden.pixels.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    with torch.inference_mode():
        expected = embed(torch.from_numpy(images)).flatten(1).numpy()
    actual = golden.reference.embedding
    cosines = (actual * expected).sum(1) / np.linalg.norm(actual, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() >= 0.9999
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "name", [name if name in ("ViT", "DINOv2") else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_embeddings_are_those_of_transformers(tmp_path: Path, transformers: ModuleType, name: str) -> None:
    network = saved(name, tmp_path / "checkpoint", transformers)
    bundle = build_bundle(load_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", name="headless", precisions=[])
    assert (bundle.labels, bundle.manifest.config.classes, bundle.manifest.activation) == ((), 0, "none")
    assert_equal_embeddings(bundle, pooled(network))


@pytest.mark.parametrize(
    "architecture", ["vit_tiny_patch16_224", pytest.param("convnext_atto", marks=pytest.mark.slow)]
)
def test_embeddings_are_those_of_timm(tmp_path: Path, timm: ModuleType, architecture: str) -> None:
    arguments: dict[str, Any] = {"num_classes": 0}
    if architecture.startswith("vit"):
        arguments |= {"img_size": 32, "depth": 2}
    network = save_with_timm(timm, tmp_path / "checkpoint", architecture, arguments)
    bundle = build_bundle(load_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", name="headless", precisions=[])
    assert bundle.manifest.config.classes == 0
    assert_equal_embeddings(bundle, network)


def test_reduced_precisions_are_judged_by_the_cosine_of_embeddings() -> None:
    expected = np.random.default_rng(0).standard_normal((10, 64)).astype(np.float32)
    actual = expected * 2  # the same direction
    actual[7:] += np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    images = Images(np.zeros((10, 8, 8, 3), np.uint8), None)
    reference, outputs = Outputs(expected, expected), Outputs(actual, actual)
    assert evaluate(lambda _: outputs, reference, images, "none").top1_agreement == pytest.approx(0.7)
    assert compare(outputs, reference, "none").top1_agreement == pytest.approx(0.7)


def test_options_of_classifiers_are_rejected(tmp_path: Path, transformers: ModuleType) -> None:
    saved("ViT", tmp_path, transformers)
    with pytest.raises(CheckpointError, match="no classifier, so --activation has no effect"):
        load_checkpoint(tmp_path, activation="sigmoid")
    with pytest.raises(CheckpointError, match="--labels has 1 labels; the model has 0 classes"):
        load_checkpoint(tmp_path, labels=("a",))


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory, transformers: ModuleType) -> Bundle:
    directory = tmp_path_factory.mktemp("headless")
    saved("DINOv2", directory / "checkpoint", transformers)
    return build_bundle(load_checkpoint(directory / "checkpoint"), directory / "bundle", name="headless", precisions=[])


@pytest.fixture(scope="module")
def client(headless: Bundle) -> Iterator[httpx.Client]:
    running: Server
    with (
        serving("--bundle", str(headless.path)) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        yield client


def test_a_service_embeds_and_does_not_classify(client: httpx.Client, headless: Bundle) -> None:
    [result] = client.post("/v1/embed", content=IMAGES[0]).json()["results"]
    assert len(result["embedding"]) == headless.golden().reference.embedding.shape[1]
    rejected = client.post("/v1/classify", content=IMAGES[0])
    assert rejected.status_code == 400
    assert "the model has no classifier: send the image to /v1/embed" in rejected.json()["detail"]
    assert [output["name"] for output in client.get("/v2/models/headless").json()["outputs"]] == ["embedding"]
    assert client.get("/openapi.json").status_code == 200


def test_a_head_makes_it_a_classifier(client: httpx.Client, headless: Bundle) -> None:
    width = headless.golden().reference.embedding.shape[1]
    weight = np.random.default_rng(0).standard_normal((3, width)).astype(np.float32)
    backbone = backbone_of(headless.manifest.files)
    write_head(headless.path, Head("colors", ("red", "green", "blue"), weight, np.zeros(3, np.float32), backbone))
    eventually(lambda: client.get("/v1/model").json()["heads"], "the head is served")
    [result] = client.post("/v1/classify", params={"head": "colors"}, content=IMAGES[0]).json()["results"]
    assert {each["label"] for each in result["predictions"]} == {"red", "green", "blue"}
