"""The head's activation is that of transformers' pipeline, in the checkpoint, the bundle, and every comparison."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.bundles import random_images
from tests.support.checkpoints import SMALL_TRANSFORMERS, logits_of_image, save_with_timm, save_with_transformers
from tests.support.images import random_image
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.load import load_checkpoint
from vitserve.model.arrays import Activation, Outputs, agreement, sigmoid, to_predictions, to_probabilities
from vitserve.model.bundle.bundle import Bundle, open_bundle, write_bundle
from vitserve.model.bundle.evaluation import Images, evaluate
from vitserve.model.bundle.parity import compare
from vitserve.service.engine_worker.startup import describe
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.engines.selection import open_engine
from vitserve.service.ipc.model_info import ModelInfo


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize(
    ("classes", "problem", "activation"),
    [
        (1, None, "sigmoid"),
        (2, None, "softmax"),
        (5, "single_label_classification", "softmax"),
        (5, "multi_label_classification", "sigmoid"),
        (1, "multi_label_classification", "sigmoid"),
    ],
)
def test_probabilities_are_those_of_transformers_pipeline(
    classes: int, problem: str | None, activation: Activation, transformers: ModuleType, tmp_path: Path
) -> None:
    names = {index: f"label {index}" for index in range(classes)}
    arguments = SMALL_TRANSFORMERS | {"intermediate_size": 96, "id2label": names, "problem_type": problem}
    del arguments["num_labels"]
    save_with_transformers(transformers, tmp_path, "ViTConfig", "ViTForImageClassification", arguments)
    read, image = load_checkpoint(tmp_path), random_image(40, 30, seed=5)
    assert read.activation == activation
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pipeline = transformers.pipeline("image-classification", model=str(tmp_path), image_processor=processor)
    expected = {result["label"]: result["score"] for result in pipeline(image, top_k=classes)}
    actual = to_probabilities(logits_of_image(read, image)[None], read.activation)[0]
    assert dict(zip(read.labels, actual.tolist(), strict=True)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_regression_is_rejected(transformers: ModuleType, tmp_path: Path) -> None:
    arguments = SMALL_TRANSFORMERS | {"intermediate_size": 96, "problem_type": "regression"}
    save_with_transformers(transformers, tmp_path, "ViTConfig", "ViTForImageClassification", arguments)
    with pytest.raises(CheckpointError, match=r"unsupported problem_type 'regression' in config\.json"):
        load_checkpoint(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_one_logit_of_any_library_is_a_sigmoid_and_others_can_be_stated(timm: ModuleType, tmp_path: Path) -> None:
    for classes, stated, activation in ((1, None, "sigmoid"), (3, None, "softmax"), (3, "sigmoid", "sigmoid")):
        save_with_timm(timm, tmp_path, "vit_tiny_patch16_224", {"depth": 1, "num_classes": classes})
        assert load_checkpoint(tmp_path, activation=stated).activation == activation
    save_with_timm(timm, tmp_path, "vit_tiny_patch16_224", {"depth": 1, "num_classes": 1})
    with pytest.raises(CheckpointError, match="one logit, whose softmax is always 1"):
        load_checkpoint(tmp_path, activation="softmax")


def test_sigmoid_neither_overflows_nor_loses_small_values() -> None:
    logits = np.array([[1000, -1000, 0, -60, 3]], np.float32)
    expected = [[1, 0, 0.5, np.exp(-60.0), 1 / (1 + np.exp(-3.0))]]
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_allclose(sigmoid(logits), expected, rtol=1e-6)
    assert sigmoid(logits).dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(sigmoid(logits)), torch.from_numpy(logits).sigmoid())


def test_the_activation_reaches_the_workers(bundle: Bundle, tmp_path: Path) -> None:
    contents = Path(shutil.copytree(bundle.path, tmp_path / "contents"))
    (contents / "bundle.json").unlink()
    write_bundle(tmp_path / "bundle", replace(bundle.manifest, activation="sigmoid"), contents)
    changed = open_bundle(tmp_path / "bundle")
    opened = open_engine(changed, EngineOptions(precision="fp32"))
    opened.engine.close()
    info = ModelInfo.from_json(describe(changed, opened, threads=1).to_json())
    assert (info.activation, info.details["activation"]) == ("sigmoid", "sigmoid")


def test_a_bundle_that_does_not_state_it_has_a_softmax(bundle: Bundle, tmp_path: Path) -> None:
    path = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    manifest: dict[str, Any] = json.loads((path / "bundle.json").read_text())
    for key in ("activation", "labels"):
        del manifest[key]
    for artifact in manifest["artifacts"]:
        del artifact["quantization"]
    (path / "bundle.json").write_text(json.dumps(manifest))
    assert open_bundle(path).manifest.activation == "softmax"


def test_predictions_of_a_sigmoid_are_compared_class_by_class() -> None:
    """The most probable class says nothing about one logit, and too little about several."""
    reference = Outputs(np.array([[2.0], [-1.0], [0.5], [-3.0]], np.float32), np.zeros((4, 1), np.float32))
    changed = Outputs(np.array([[2.0], [1.0], [0.5], [-3.0]], np.float32), reference.embedding)
    images = Images(random_images(4).pixels, np.zeros(4, np.int64))
    assert compare(changed, reference, "softmax").top1_agreement == 1
    assert compare(changed, reference, "sigmoid").top1_agreement == 0.75
    evaluation = evaluate(lambda _: changed, reference, images, "sigmoid")
    assert (evaluation.top1_agreement, evaluation.accuracy) == (0.75, None)
    assert evaluation.loss == pytest.approx(12.5), "half of the changed predictions"
    assert evaluation.probability == pytest.approx(1 / (1 + np.exp(-1)) - 1 / (1 + np.exp(1)))
    half = np.array([[3, 1, -1], [-3, -2, -1]], np.float32)
    assert agreement(half > 0, np.array([[3, -1, -1], [-3, -2, -1]]) > 0) == 0.75, "one of two classes, and none"
    several = np.array([[3, 1, -1], [3, -2, -1]], np.float32)
    assert to_predictions(several, "sigmoid").tolist() == [[True, True, False], [True, False, False]]
    assert to_predictions(several, "softmax").tolist() == [[True, False, False], [True, False, False]]
