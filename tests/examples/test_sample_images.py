"""The sample images: the README's predictions are the default model's, and draw.py draws the images."""

from __future__ import annotations

import re
import runpy
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from tests.support.paths import ROOT
from vitserve.model.arrays import Precision, softmax
from vitserve.model.bundle.bundle import open_bundle
from vitserve.model.bundle.preprocess import Decoder
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.engines.selection import NoEngineError, open_engine
from vitserve.service.settings import DEFAULT_BUNDLE

DIRECTORY = ROOT / "examples" / "images"
ROW = re.compile(r"^\| (\S+\.jpg) \| [^|]+ \| (\w+) \| (0\.\d\d) \|$", re.MULTILINE)


@dataclass(frozen=True)
class Prediction:
    label: str
    probability: float


def stated_predictions() -> dict[str, Prediction]:
    rows = ROW.findall((DIRECTORY / "README.md").read_text())
    return {file: Prediction(label, float(probability)) for file, label, probability in rows}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.006), ("bf16", 0.03), ("int8", 0.03)])
def test_the_default_model_gives_the_stated_predictions(precision: Precision, tolerance: float) -> None:
    bundle = open_bundle(DEFAULT_BUNDLE)
    try:
        engine = open_engine(bundle, EngineOptions(precision=precision, max_batch=1)).engine
    except NoEngineError as error:  # a CPU without bf16
        pytest.skip(str(error))
    decoder = Decoder(bundle.manifest.preprocessing)
    for file, stated in stated_predictions().items():
        pixels = decoder.decode((DIRECTORY / file).read_bytes())
        probabilities = softmax(engine.run(0, pixels[None]).logits)[0]
        assert bundle.labels[probabilities.argmax()] == stated.label, file
        assert probabilities.max() == pytest.approx(stated.probability, abs=tolerance), file
    engine.close()


def test_the_readme_lists_every_image_and_class() -> None:
    predictions = stated_predictions()
    assert sorted(predictions) == sorted(file.name for file in DIRECTORY.glob("*.jpg"))
    assert len(predictions) == 12
    assert {stated.label for stated in predictions.values()} == set(open_bundle(DEFAULT_BUNDLE).labels)


def test_the_script_draws_the_images() -> None:
    """Pixels may differ slightly, because JPEG encoders do."""
    script = runpy.run_path(str(DIRECTORY / "draw.py"))
    drawings = {f"{name}.jpg": script["textured"](draw(), seed) for name, (draw, seed) in script["DRAWINGS"].items()}
    assert set(drawings) == set(stated_predictions()) - {"cat.jpg"}
    for file, drawing in drawings.items():
        committed = np.asarray(Image.open(DIRECTORY / file)).astype(float)
        assert np.abs(committed - np.asarray(drawing)).mean() < 3, file
