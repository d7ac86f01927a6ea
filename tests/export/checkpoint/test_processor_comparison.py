"""The difference from the image processors of transformers 5: none with Pillow, and a bounded one with torchvision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.support.checkpoints import SMALL_TRANSFORMERS, SQUASH, save_with_transformers
from vitserve.cli.main import app
from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.library.processor_comparison import compare_processor
from vitserve.export.checkpoint.load import Checkpoint, load_checkpoint
from vitserve.export.report.model_card import model_card
from vitserve.model.bundle.preprocess import Decoder, Interpolation, Preprocessing

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

# Interpolation → Pillow's number, and the largest and the mean difference of a photo, in levels of 255. Measured on 48
# photos at 224 and 384 pixels: at most 1, 10, 20, and 150.
BOUNDS: dict[Interpolation, tuple[int, int, float]] = {
    "bilinear": (2, 1, 0.5),
    "bicubic": (3, 12, 0.5),
    "lanczos": (1, 24, 0.5),
    "nearest": (0, 255, 3.0),
}


@pytest.mark.parametrize(
    ("size", "every"),
    [(224, 3), pytest.param(224, 1, marks=pytest.mark.slow), pytest.param(384, 1, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("backend", ["pil", "torchvision"])
@pytest.mark.parametrize("interpolation", BOUNDS)
def test_photos(
    interpolation: Interpolation, backend: str, size: int, every: int, photos: list[Path], transformers: ModuleType
) -> None:
    resample, largest, mean = BOUNDS[interpolation] if backend == "torchvision" else (BOUNDS[interpolation][0], 0, 0)
    kind = getattr(transformers, "ViTImageProcessor" + ("Pil" if backend == "pil" else ""))
    processor = kind(size={"height": size, "width": size}, resample=resample, do_rescale=False, do_normalize=False)
    decoder = Decoder(Preprocessing(size, interpolation=interpolation, squash=True), mode="exact")
    for photo in photos[::every]:
        theirs = processor(Image.open(photo).convert("RGB"), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        levels = np.abs(theirs - decoder.decode(photo.read_bytes()).astype(np.float64))
        assert levels.max() <= largest, photo.name
        assert levels.mean() <= mean, photo.name


@pytest.fixture
def save(transformers: ModuleType, tmp_path: Path) -> Callable[..., Path]:
    def saved(**preprocessor: Any) -> Path:
        arguments = SMALL_TRANSFORMERS | {"intermediate_size": 96, "num_hidden_layers": 1}
        save_with_transformers(
            transformers, tmp_path, "ViTConfig", "ViTForImageClassification", arguments, SQUASH | preprocessor
        )
        return tmp_path

    return saved


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("ViTImageProcessor", "torchvision"), ("ViTImageProcessorFast", "torchvision"), ("ViTImageProcessorPil", "pil")],
)
def test_the_processor_is_the_one_that_the_checkpoint_names(
    kind: str, backend: str, save: Callable[..., Path], transformers: ModuleType
) -> None:
    checkpoint = load_checkpoint(save(image_processor_type=kind, resample=3))
    assert checkpoint.processor is not None
    comparison = compare_processor(checkpoint.processor, checkpoint.source_model(lambda step: None), lambda step: None)
    assert comparison is not None
    assert f"transformers {transformers.__version__} (backend {backend})" in comparison.processor
    if backend == "pil":
        assert (comparison.levels, comparison.mean_levels, comparison.logits) == (0, 0, 0)
        assert str(comparison).startswith("equal to ViTImageProcessorPil")
    else:
        assert 1 <= comparison.levels <= 12
        assert 0 < comparison.mean_levels < 0.1
        assert 0 < comparison.logits < 0.02
        assert str(comparison).startswith(f"differs from ViTImageProcessor of transformers {transformers.__version__}")


def test_the_bundle_states_the_difference(save: Callable[..., Path], tmp_path: Path) -> None:
    steps = list[str]()
    bundle = build_bundle(
        load_checkpoint(save(resample=3)), tmp_path / "bundle", name="a", precisions=["fp32"], progress=steps.append
    )
    comparison = bundle.manifest.processor
    assert comparison is not None
    assert f"preprocessing: {comparison}" in steps
    assert json.loads((bundle.path / "bundle.json").read_text())["processor"]["levels"] == comparison.levels
    result = CliRunner().invoke(app, ["inspect", str(bundle.path)])
    assert f"preprocessing: {comparison}" in result.output.replace("\n", " ")


def test_a_model_card_states_the_difference(save: Callable[..., Path]) -> None:
    checkpoint = load_checkpoint(save())
    comparison = compare_processor(save(), checkpoint.source_model(lambda step: None), lambda step: None)
    recipe = {"epochs": 1, "validation_images": 1}
    record = {"labels": ["a"], "recipe": recipe, "test_accuracy": 1, "test_images": 1, "training_images": 1}
    record |= {"seconds": 1, "machine": "a machine", "config": {"blocks": []}, "confusion": [[1]], "history": []}
    assert f"- **Preprocessing**: {comparison}." in model_card("a", "a", record, (), comparison).splitlines()
    assert "Preprocessing" not in model_card("a", "a", record)


@pytest.mark.parametrize("options", [{"image_size": 48}, {"squash": False}, {"mean": (0.1, 0.2, 0.3)}])
def test_a_preprocessing_that_an_option_states_is_not_compared(
    options: dict[str, Any], save: Callable[..., Path]
) -> None:
    directory = save()
    assert load_checkpoint(directory).processor == directory
    assert load_checkpoint(directory, **options).processor is None


def test_a_processor_that_cannot_be_made_is_reported(save: Callable[..., Path]) -> None:
    checkpoint: Checkpoint = load_checkpoint(save())
    directory = save(size={"height": 48, "width": 48})
    steps = list[str]()
    assert compare_processor(directory, checkpoint.source_model(lambda step: None), steps.append) is None
    (step,) = steps
    assert step.startswith("note: the pixels are not compared with the checkpoint's image processor: it makes arrays")
