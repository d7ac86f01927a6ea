"""Training: the network learns, a run can be resumed, and the stored weights are the tested ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.images import encoded
from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.load import load_checkpoint
from vitserve.model.bundle.preprocess import Decoder, Preprocessing
from vitserve.model.config import ResNetConfig, ViTConfig
from vitserve.model.training import train as train_module
from vitserve.model.training.augment import augment, cutmix, mixup, recolor, warp
from vitserve.model.training.data import Decoded, Labeled, decode
from vitserve.model.training.device import select_device
from vitserve.model.training.epoch import train_epoch, train_step
from vitserve.model.training.recipe import LONG, Recipe
from vitserve.model.training.samples import Sample, hold_out, read_data_set
from vitserve.model.training.start import Start
from vitserve.model.training.state import TrainingState, initial_state
from vitserve.model.training.train import evaluate
from vitserve.model.training.train import train as run_training
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.engines.selection import open_engine

CONFIG = ViTConfig(image_size=16, patch_size=8, width=32, depth=1, heads=2, mlp_width=64, classes=2, stem=(8, 16))
RECIPE = Recipe(epochs=3, batch_size=16, validation_images=16)
PREPROCESSING = Preprocessing(16)


def start_of(config: ViTConfig | ResNetConfig) -> Start:
    return Start(config, Preprocessing(config.image_size))


def train(config: ViTConfig | ResNetConfig, recipe: Recipe, source: Path, run: Path) -> dict[str, Any]:
    data = read_data_set(source, recipe.validation_images, recipe.share, recipe.seed)
    return run_training(start_of(config), recipe, data, run)


def decoded_test_set(source: Path, directory: Path) -> Labeled:
    return decode(read_data_set(source, 16, 1.0, 0).test, Decoder(PREPROCESSING), directory).images


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of reddish and of greenish noise."""
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {"classes": np.array(["red", "green"])}
    for split, count in (("train", 176), ("test", 32)):
        labels = random.integers(0, 2, count).astype(np.uint8)
        images = []
        for label in labels:
            pixels = random.integers(0, 160, (16, 16, 3), np.uint8)
            pixels[..., label] += 60
            images.append(encoded(Image.fromarray(pixels), "JPEG"))
        arrays |= {
            f"{split}_jpeg": np.frombuffer(b"".join(images), np.uint8),
            f"{split}_offsets": np.cumsum([0] + [len(image) for image in images]),
            f"{split}_labels": labels,
        }
    path = tmp_path_factory.mktemp("data") / "colors.npz"
    np.savez(path, **arrays)
    return path


def test_a_network_learns_and_the_tested_weights_are_stored(archive: Path, tmp_path: Path) -> None:
    report = train(CONFIG, RECIPE, archive, tmp_path)
    assert report["test_accuracy"] > 0.9
    assert [epoch["epoch"] for epoch in report["history"]] == [1, 2, 3]
    assert np.sum(report["confusion"]) == report["test_images"] == 32
    assert np.trace(report["confusion"]) / 32 == pytest.approx(report["test_accuracy"])
    assert json.loads((tmp_path / "training.json").read_text()) == json.loads(json.dumps(report))
    stored = load_checkpoint(tmp_path / "weights.safetensors")
    assert stored.labels == ("red", "green")
    assert evaluate(stored.network, decoded_test_set(archive, tmp_path), PREPROCESSING)[0] == report["test_accuracy"]


class InterruptedRunError(Exception):
    pass


def test_a_resumed_run_ends_like_an_uninterrupted_one(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = TrainingState.save

    def save_and_interrupt(self: TrainingState, path: Path) -> None:
        save(self, path)
        raise InterruptedRunError

    whole = train(CONFIG, RECIPE, archive, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "save", save_and_interrupt)
        for _ in range(2):
            with pytest.raises(InterruptedRunError):
                train(CONFIG, RECIPE, archive, tmp_path / "parts")
    parts = train(CONFIG, RECIPE, archive, tmp_path / "parts")
    assert [epoch["loss"] for epoch in parts["history"]] == [epoch["loss"] for epoch in whole["history"]]
    assert parts["confusion"] == whole["confusion"]


def test_an_interrupted_save_keeps_the_previous_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = initial_state(start_of(CONFIG), RECIPE, steps=10)
    state.save(tmp_path / "state.pt")
    saved = (tmp_path / "state.pt").read_bytes()

    def interrupt(state: object, path: Path) -> None:
        path.write_bytes(b"incomplete")
        raise InterruptedRunError

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(InterruptedRunError):
        state.save(tmp_path / "state.pt")
    assert (tmp_path / "state.pt").read_bytes() == saved


def test_the_test_set_is_read_only_at_the_end(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def record_decoding(samples: list[Sample], decoder: Decoder, directory: Path) -> Decoded:
        order.append(samples[0].name.split()[0])
        return decode(samples, decoder, directory)

    def record_epoch(*arguments: Any) -> float:
        order.append("epoch")
        return train_epoch(*arguments)

    monkeypatch.setattr(train_module, "decode", record_decoding)
    monkeypatch.setattr(train_module, "train_epoch", record_epoch)
    train(CONFIG, RECIPE, archive, tmp_path)
    assert order == ["train", "train", "epoch", "epoch", "epoch", "test"]


def test_validation_images_are_held_out() -> None:
    everything = [Sample(str(number), number, bytes) for number in range(100)]
    training, validation = hold_out(everything, 30, seed=0)
    assert len(training) == 70
    assert len(validation) == 30
    assert sorted(sample.label for sample in training + validation) == list(range(100))


def test_augmentation_shifts_and_mirrors_images() -> None:
    image = torch.arange(64.0).view(1, 1, 8, 8).expand(2000, 3, 8, 8)
    shifted = augment(image, 2, torch.Generator().manual_seed(0))
    assert shifted.shape == image.shape
    centers = {(int(pixels[0, 4, 3]), int(pixels[0, 4, 4])) for pixels in shifted}
    assert {abs(left - right) for left, right in centers} == {1}, "neighbors stay neighbors"
    assert {left < right for left, right in centers} == {True, False}, "half are mirrored"
    assert len(centers) == 2 * 5 * 5
    assert torch.equal(augment(image, 0, torch.Generator().manual_seed(0))[0].sort().values, image[0].sort().values)


def test_mixup_blends_images_and_targets_in_the_same_share() -> None:
    images, targets = torch.eye(4).view(4, 4, 1, 1), torch.eye(4)
    mixed, blended = mixup(images, targets, 0.5, torch.Generator().manual_seed(3))
    torch.testing.assert_close(mixed.view(4, 4), blended)
    torch.testing.assert_close(blended.sum(1), torch.ones(4))


def test_cutmix_blends_the_targets_by_area() -> None:
    """Each image has one color, which shows where a pixel comes from."""
    images, targets = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8), torch.eye(4)
    for seed in range(20):
        mixed, blended = cutmix(images, targets, torch.Generator().manual_seed(seed))
        shares = torch.stack([(mixed[:, 0] == source).float().mean((1, 2)) for source in range(4)], 1)
        torch.testing.assert_close(shares, blended)
    assert torch.equal(images, torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)), "the batch is not modified"


@pytest.mark.parametrize("change", [warp, recolor])
def test_a_stronger_augmentation_changes_images_more(
    change: Callable[[torch.Tensor, float, torch.Generator], torch.Tensor],
) -> None:
    smooth = torch.linspace(-1, 1, 16).view(1, 1, 1, 16) * torch.tensor([1.0, 0.5, -1.0]).view(1, 3, 1, 1)
    images = smooth.expand(50, 3, 16, 16)

    def mean_change(strength: float) -> float:
        changed = change(images, strength, torch.Generator().manual_seed(0))
        assert changed.shape == images.shape
        return float((changed - images).abs().mean())

    assert mean_change(0.0) < 1e-6
    assert 0.001 < mean_change(0.05) < mean_change(0.3) < 0.5


def test_an_unknown_or_unavailable_device_is_rejected() -> None:
    with pytest.raises(ValueError, match="unknown device 'tpu'; known: auto, cpu, cuda"):
        select_device("tpu")
    if not torch.cuda.is_available():
        assert select_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="device cuda is not available: torch finds no GPU"):
            select_device("cuda")


def test_the_long_recipe_learns(archive: Path, tmp_path: Path) -> None:
    """With all of its augmentations, in a few steps."""
    recipe = replace(
        LONG, epochs=12, batch_size=16, validation_images=16, ema_decay=0.9, bf16=False, optimizer="adamw", recolor=0.05
    )
    assert train(CONFIG, recipe, archive, tmp_path)["test_accuracy"] > 0.8


FAMILIES = {
    "class token": replace(CONFIG, stem=None),
    "mean": replace(CONFIG, stem=None, pool="mean", class_token=False, norm_after_pool=True),
    "axial": replace(CONFIG, stem=None, attention="axial"),
    "local": replace(CONFIG, stem=None, attention="local", window=1),
    "hybrid of a ResNet": replace(CONFIG, stem=None, resnet=(1,)),
    "ResNet": ResNetConfig(image_size=16, blocks=(1,), width_factor=1, classes=2),
}


# The exporter is tested with every family in tests/export and in tests/service/engines/test_torch_engine.py.
EXPORTED = [
    pytest.param(config, id=name, marks=() if name == "class token" else pytest.mark.slow)
    for name, config in FAMILIES.items()
]


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_family_trains(config: ViTConfig | ResNetConfig, archive: Path, tmp_path: Path) -> None:
    report = train(config, replace(RECIPE, epochs=4, mixup_share=0.0), archive, tmp_path)
    stored = load_checkpoint(tmp_path / "weights.safetensors").network
    assert stored.config == config
    assert evaluate(stored, decoded_test_set(archive, tmp_path), PREPROCESSING)[0] == report["test_accuracy"] > 0.8


@pytest.mark.parametrize("config", EXPORTED)
def test_every_family_trains_exports_and_runs(config: ViTConfig | ResNetConfig, archive: Path, tmp_path: Path) -> None:
    """The exported bundle, opened as the service opens it, classifies the test images."""
    train(config, replace(RECIPE, epochs=4, mixup_share=0.0), archive, tmp_path)
    bundle = build_bundle(
        load_checkpoint(tmp_path / "weights.safetensors"), tmp_path / "bundle", name="family", precisions=[]
    )
    assert bundle.manifest.config == config
    test = decoded_test_set(archive, tmp_path)
    pixels = np.ascontiguousarray(test.pixels.numpy().transpose(0, 2, 3, 1))
    engine = open_engine(bundle, EngineOptions(max_batch=8)).engine
    predicted = np.concatenate([engine.run(0, part).logits.argmax(1) for part in np.split(pixels, 4)])
    engine.close()
    assert (predicted == test.classes.numpy()).mean() > 0.8


def test_a_smaller_share_is_part_of_a_larger_one(archive: Path) -> None:
    tenth, half = (read_data_set(archive, 16, share, seed=0) for share in (0.1, 0.5))
    assert (len(tenth.training), len(half.training)) == (16, 80)
    names = [[sample.name for sample in data.training] for data in (tenth, half)]
    assert names[0] == names[1][:16]
    assert [sample.name for sample in tenth.validation] == [sample.name for sample in half.validation]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_both_optimizers_change_every_weight(optimizer: Literal["muon", "adamw"]) -> None:
    recipe = replace(RECIPE, optimizer=optimizer)
    state = initial_state(start_of(CONFIG), recipe, steps=10)
    before = {name: weight.detach().clone() for name, weight in state.network.named_parameters()}
    batch = Labeled(torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8), torch.randint(0, 2, (16,)))
    for _ in range(2):  # the head is initially zero, so that the first step changes nothing before it
        train_step(state, state.network, batch, recipe, mix=False)
    assert [name for name, weight in state.network.named_parameters() if torch.equal(weight, before[name])] == []
