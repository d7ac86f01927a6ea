"""Training data in directories: classes, splits, sizes, and unusable ones. Runs start, end, and are resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.images import encoded
from vitserve.model.bundle.preprocess import Decoder, Preprocessing
from vitserve.model.config import ViTConfig
from vitserve.model.training import data as data_module
from vitserve.model.training.data import decode
from vitserve.model.training.recipe import Recipe, fine_tuning
from vitserve.model.training.samples import DataSet, TrainingDataError, read_data_set
from vitserve.model.training.start import Start, from_scratch, from_trained
from vitserve.model.training.state import ResumeError, initial_state
from vitserve.model.training.train import train

COLORS = ("blue", "green", "red")
CONFIG = ViTConfig(image_size=16, patch_size=8, width=32, depth=2, heads=2, mlp_width=64, classes=3, stem=(8, 16))
RECIPE = Recipe(epochs=4, batch_size=192, mixup_share=0.0, bf16=False, optimizer="adamw")


def write_images(directory: Path, label: str, count: int, seed: int = 0) -> None:
    """Noise in one color, of different sizes."""
    random = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        height, width = random.integers(17, 60, 2)
        pixels = random.integers(0, 120, (height, width, 3), np.uint8)
        pixels[..., ["red", "green", "blue"].index(label)] += 100
        (directory / f"{number}.jpg").write_bytes(encoded(Image.fromarray(pixels), "JPEG"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for label in COLORS:
        write_images(tmp_path / "images" / label, label, 20)
    return tmp_path / "images"


def read(directory: Path, share: float = 1.0, seed: int = 0) -> DataSet:
    return read_data_set(directory, 2500, share, seed)


def start() -> Start:
    return Start(CONFIG, Preprocessing(16))


def test_a_directory_is_split_by_class_and_every_image_is_in_one_split(directory: Path) -> None:
    data = read(directory)
    assert data.labels == COLORS
    parts = data.training, data.validation, data.test
    assert [len(part) for part in parts] == [48, 6, 6]
    names = [sample.name for part in parts for sample in part]
    assert len(set(names)) == 60
    for part in parts:
        assert {sample.label for sample in part} == {0, 1, 2}
        assert all(sample.name.startswith(COLORS[sample.label]) for sample in part)
    assert [sample.name for sample in read(directory).training] == names[:48]
    assert {sample.name for sample in read(directory, seed=1).test} != set(names[54:])
    assert {sample.label for sample in read(directory, share=0.3).training} == {0, 1, 2}


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("train", "val"), (54, 6, 30)),  # the only other split is the test: a part of train/ is held out
        (("train", "test"), (54, 6, 30)),
        (("train", "valid", "test"), (60, 30, 30)),
    ],
)
def test_a_directory_may_have_its_own_splits(
    tmp_path: Path, splits: tuple[str, ...], expected: tuple[int, int, int]
) -> None:
    for split in splits:
        for label in COLORS:
            write_images(tmp_path / split / label, label, 20 if split == "train" else 10)
    data = read(tmp_path)
    assert (len(data.training), len(data.validation), len(data.test)) == expected


def test_unusable_directories_are_rejected_with_the_reason(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match="missing does not exist"):
        read(tmp_path / "missing")
    one = tmp_path / "one"
    write_images(one / "red", "red", 5)
    with pytest.raises(TrainingDataError, match="one has 1 classes; at least 2 are needed"):
        read(one)
    write_images(one / "blue", "blue", 2)
    with pytest.raises(TrainingDataError, match="blue has 2 images; at least 3 are needed: for training, validation"):
        read(one)
    split = tmp_path / "split"
    write_images(split / "train" / "red", "red", 5)
    write_images(split / "train" / "blue", "blue", 5)
    with pytest.raises(TrainingDataError, match=r"split has train/, but no images in val/ or test/"):
        read(split)
    write_images(split / "test" / "green", "green", 5)
    with pytest.raises(TrainingDataError, match="is in 'green', which is no class of train/"):
        read(split)
    (tmp_path / "notes.txt").write_text("no archive")
    with pytest.raises(TrainingDataError, match=r"notes.txt is no directory and no archive for `vitserve train`"):
        read(tmp_path / "notes.txt")


def test_images_that_cannot_be_decoded_are_skipped_and_named(directory: Path, tmp_path: Path) -> None:
    (directory / "red" / "0.jpg").write_bytes(b"no image")
    samples = [sample for part in (read(directory).training, read(directory).test) for sample in part]
    samples += read(directory).validation
    decoded = decode(samples, Decoder(Preprocessing(16)), tmp_path)
    assert len(decoded.images) == 59
    assert decoded.images.pixels.shape == (59, 3, 16, 16)
    (fault,) = decoded.faults
    assert "red/0.jpg" in fault
    kept = [sample for sample in samples if sample.name != "red/0.jpg"]
    assert decoded.images.classes.tolist() == [sample.label for sample in kept]
    for place in (0, 30, 58):
        expected = Decoder(Preprocessing(16)).decode(kept[place].read())
        assert np.array_equal(decoded.images.pixels[place].permute(1, 2, 0).numpy(), expected)
    damaged = [sample for sample in samples if sample.name == "red/0.jpg"]
    with pytest.raises(TrainingDataError, match=r"none of 1 images can be decoded: red/0.jpg"):
        decode(damaged, Decoder(Preprocessing(16)), tmp_path)


def test_many_pixels_are_in_a_file_and_train_alike(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = train(start(), RECIPE, read(directory), directory.parent / "in_memory")
    monkeypatch.setattr(data_module, "MAPPED_BYTES", 0)
    in_file = train(start(), RECIPE, read(directory), directory.parent / "in_file")
    assert [row["loss"] for row in in_file["history"]] == [row["loss"] for row in in_memory["history"]]
    left = {path.name for path in (directory.parent / "in_file").iterdir()}
    assert left == {"state.pt", "training.json", "weights.safetensors"}, "the file disappears"


def test_a_run_is_resumed_only_with_the_same_settings(directory: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    report = train(start(), RECIPE, read(directory), run)
    assert train(start(), RECIPE, read(directory), run)["history"] == report["history"], "nothing is left to do"
    with pytest.raises(ResumeError, match="epochs was 4 and is 5; seed was 0 and is 1"):
        train(start(), replace(RECIPE, epochs=5, seed=1), read(directory), run)
    with pytest.raises(ResumeError, match="depth was 2 and is 3"):
        train(replace(start(), config=replace(CONFIG, depth=3)), RECIPE, read(directory), run)
    write_images(directory / "white", "red", 5)
    data = read(directory)
    with pytest.raises(ResumeError, match=r"classes was 3 and is 4.*labels was blue, green, red and is"):
        train(replace(start(), config=replace(CONFIG, classes=4)), RECIPE, data, run)


def test_training_ends_when_it_no_longer_improves_and_keeps_the_best_weights(directory: Path, tmp_path: Path) -> None:
    """With a rate of nearly zero nothing improves after the first epoch."""
    recipe = replace(RECIPE, epochs=50, learning_rate=1e-8, patience=2)
    report = train(start(), recipe, read(directory), tmp_path / "run")
    assert [row["epoch"] for row in report["history"]] == [1, 2, 3]
    state = initial_state(start(), recipe, 10)
    for bias, accuracy in ((1.0, 0.5), (2.0, 0.4)):
        torch.nn.init.constant_(dict(state.average.named_parameters())["head.bias"], bias)
        state.record_epoch(1.0, accuracy, recipe.patience)
    assert state.best is not None
    assert state.best["head.bias"].tolist() == [1.0] * 3


def test_early_blocks_learn_more_slowly_and_a_frozen_network_only_with_its_head() -> None:
    recipe = fine_tuning(RECIPE, replace(CONFIG, depth=12))
    assert (recipe.layer_decay, recipe.learning_rate) == (0.75, RECIPE.learning_rate / 4)
    compact = fine_tuning(RECIPE, CONFIG)
    assert (compact.layer_decay, compact.learning_rate) == (1.0, RECIPE.learning_rate / 2)
    state = initial_state(start(), recipe, 10)
    rates = {
        name: group["initial_lr"] / recipe.learning_rate
        for optimizer in state.optimizers
        for group in optimizer.param_groups
        for name, parameter in state.network.named_parameters()
        if any(parameter is member for member in group["params"])
    }
    assert rates.keys() == dict(state.network.named_parameters()).keys()
    assert rates["pos_embed"] == pytest.approx(0.75**3)
    assert rates["blocks.0.attn.qkv.weight"] == pytest.approx(0.75**2)
    assert rates["blocks.1.mlp.fc1.bias"] == pytest.approx(0.75)
    assert rates["head.weight"] == rates["norm.weight"] == 1
    frozen = initial_state(start(), replace(recipe, frozen=True), 10)
    learning = [name for name, parameter in frozen.network.named_parameters() if parameter.requires_grad]
    assert learning == ["head.weight", "head.bias"]


@pytest.mark.parametrize("representation", [None, 24])
def test_a_new_head_replaces_the_one_of_other_classes(representation: int | None) -> None:
    config = replace(CONFIG, representation_width=representation)
    network = Start(config, Preprocessing(16)).network()
    torch.nn.init.normal_(network.head.weight)
    same = from_trained(network, COLORS, COLORS, Preprocessing(16), "source").network()
    assert torch.equal(same.head.weight, network.head.weight)
    other = from_trained(network, COLORS, ("a", "b"), Preprocessing(16), "source").network()
    assert other.config == replace(CONFIG, classes=2), "without the hidden layer of the pre-training"
    assert other.head.weight.shape == (2, 32)
    assert not other.head.weight.any()
    kept = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(("head", "pre_"))}
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in kept.items())


def test_any_number_of_classes_and_any_image_size() -> None:
    begun = from_scratch("compact-hybrid/4", classes=37, image_size=64)
    assert begun.preprocessing == Preprocessing(64)
    logits, _ = begun.network()(torch.zeros(1, 3, 64, 64))
    assert logits.shape == (1, 37)
    with pytest.raises(ValueError, match="image size 30 is not a multiple of patch size 4"):
        from_scratch("compact-hybrid/4", classes=2, image_size=30)
