"""``vitserve train``: from a directory to a bundle, fine-tuning included, and rejected options."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.support.checkpoints import SMALL_TIMM, SMALL_TRANSFORMERS, save_with_timm, save_with_transformers
from tests.support.images import encoded
from tests.support.library_networks import SMALL
from vitserve.cli.main import app
from vitserve.export.checkpoint.load import Checkpoint, load_checkpoint
from vitserve.export.fine_tuning import start_from
from vitserve.model.network.vit import ViT

TRAIN = ("--epochs", 3, "--learning-rate", 0.01, "--batch-size", 8, "--device", "cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark and bright images of different sizes."""
    directory, random = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for label, least in (("dark", 0), ("bright", 150)):
        (directory / label).mkdir()
        for number in range(30):
            pixels = random.integers(least, least + 100, (*random.integers(20, 70, 2), 3), np.uint8)
            (directory / label / f"{number}.png").write_bytes(encoded(Image.fromarray(pixels)))
    return directory


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})


def trained(images: Path, output: Path, *options: object) -> Checkpoint:
    result = run("train", images, "--output", output, *TRAIN, *options)
    assert result.exit_code == 0, result.output
    return load_checkpoint(output / "weights.safetensors")


def test_a_directory_becomes_a_bundle(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    checkpoint = trained(images, output, "--variant", "one-block/4", "--image-size", 16)
    assert checkpoint.labels == ("bright", "dark")
    assert (checkpoint.network.config.classes, checkpoint.preprocessing.image_size) == (2, 16)
    report = json.loads((output / "training.json").read_text())
    assert report["test_accuracy"] > 0.9
    card = (output / "MODEL_CARD.md").read_text()
    assert "48 training images and 6 validation images of 2 classes" in card
    assert card.count("| **dark** |") == 1
    assert (output / "curves.svg").read_text().startswith("<?xml")
    again = run("train", images, "--output", output, *TRAIN, "--variant", "one-block/4", "--image-size", 32)
    assert again.exit_code == 2
    assert "image_size was 16 and is 32" in again.output
    exported = run("export", output / "weights.safetensors", "-o", tmp_path / "bundle", "--precision", "fp32")
    assert exported.exit_code == 0, exported.output
    predicted = run("predict", images, "--bundle", tmp_path / "bundle", "-o", tmp_path / "out.csv")
    assert "accuracy 100" in predicted.output or "accuracy 9" in predicted.output, predicted.output


def test_a_checkpoint_of_transformers_is_fine_tuned_at_another_image_size(
    images: Path, transformers: ModuleType, tmp_path: Path
) -> None:
    """With the checkpoint's own normalization, resampling and crop."""
    kind = "ViTConfig", "ViTForImageClassification"
    save_with_transformers(transformers, tmp_path / "source", *kind, SMALL_TRANSFORMERS)
    source = load_checkpoint(tmp_path / "source", image_size=48)
    checkpoint = trained(images, tmp_path / "run", "--from", tmp_path / "source", "--image-size", 48)
    assert checkpoint.preprocessing == source.preprocessing
    assert checkpoint.preprocessing.mean == (0.5, 0.4, 0.3)
    assert checkpoint.labels == ("bright", "dark")
    assert isinstance(checkpoint.network, ViT)
    assert checkpoint.network.config.image_size == 48
    assert json.loads((tmp_path / "run" / "training.json").read_text())["test_accuracy"] > 0.9


def test_a_frozen_network_keeps_its_weights(images: Path, timm: ModuleType, tmp_path: Path) -> None:
    save_with_timm(timm, tmp_path / "source", "vit_base_patch16_224", {**SMALL_TIMM, "num_heads": 3})
    before = load_checkpoint(tmp_path / "source").network.state_dict()
    after = trained(images, tmp_path / "run", "--from", tmp_path / "source", "--freeze").network.state_dict()
    changed = {
        name
        for name, tensor in before.items()
        if tensor.shape != after[name].shape or not tensor.half().equal(after[name].half())
    }
    assert changed == {"head.weight", "head.bias"}


def test_networks_of_other_libraries_are_not_trained(
    timm: ModuleType, transformers: ModuleType, tmp_path: Path
) -> None:
    SMALL["CaiT"].save(timm, transformers, tmp_path / "source")
    with pytest.raises(ValueError, match=r"is cait_xxs24_224 of timm .* can be exported but not trained here"):
        start_from(str(tmp_path / "source"), ("a", "b"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--freeze",), "--freeze needs --from"),
        (("--from", "random:one-block/4", "--variant", "one-block/4"), "--variant has no effect with --from"),
        (("--variant", "nosuch"), "unknown variant 'nosuch'"),
        (("--image-size", "33"), "image size 33 is not a multiple of patch size 4"),
    ],
)
def test_conflicting_options_are_rejected(images: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = run("train", images, "--output", tmp_path / "run", *options)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "run").exists()
