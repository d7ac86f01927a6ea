"""Networks of other libraries are served and replaced by each other, also of another geometry."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import httpx
import numpy as np
import pytest
import torch

from tests.support.http import classify
from tests.support.images import encoded, random_image
from tests.support.library_networks import SMALL
from tests.support.load import Load, expectations
from tests.support.processes import ADMIN_KEY, LONG_TIMEOUT, BundleLink, reload, serving
from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.load import load_checkpoint
from vitserve.model.arrays import to_probabilities
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.preprocess import Decoder
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import EngineOptions


def bundle_of(family: str, timm: ModuleType, transformers: ModuleType, directory: Path) -> Bundle:
    torch.manual_seed(0)
    SMALL[family].save(timm, transformers, directory / f"{family} source")
    checkpoint = load_checkpoint(directory / f"{family} source")
    return build_bundle(checkpoint, directory / family, name=family, precisions=["fp32"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_swin_and_siglip_replace_each_other_under_load(
    timm: ModuleType, transformers: ModuleType, tmp_path: Path
) -> None:
    swin = bundle_of("Swin of timm", timm, transformers, tmp_path)
    siglip = bundle_of("SigLIP of transformers", timm, transformers, tmp_path)
    expected = expectations(swin, siglip)
    link = BundleLink(tmp_path, swin.path)
    with (
        serving("--bundle", str(link.path), *LONG_TIMEOUT, "--admin-key", ADMIN_KEY) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        with Load(running.url, expected) as load:
            for target in (siglip, swin, siglip):
                load.wait_for(50)
                link.point_to(target.path)
                assert reload(client).json()["model"] == target.manifest.name
            load.wait_for(50)
        assert set(load.counts) == {"200"}, load.complaints[:3]
        assert set(load.versions) == set(expected), "both models were served"
        assert running.stop() == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_gray_images_that_are_not_square_are_served(timm: ModuleType, transformers: ModuleType, tmp_path: Path) -> None:
    bundle = bundle_of("ViT, gray, not square, average and maximum", timm, transformers, tmp_path)
    image = encoded(random_image(90, 70))
    pixels = Decoder(bundle.manifest.preprocessing).decode(image)[None]
    assert pixels.shape == (1, 32, 48, 1)
    engine = construct_engine("onnxruntime", "fp32", bundle.path / "model.onnx", EngineOptions(max_batch=1))
    probabilities = to_probabilities(engine.run(0, pixels).logits, "softmax")[0]
    with (
        serving("--bundle", str(bundle.path), *LONG_TIMEOUT) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        assert client.get("/v1/model").json()["input"] == {"height": 32, "width": 48, "channels": 1}
        (result,) = classify(client, image).json()["results"]
        served = {prediction["index"]: prediction["probability"] for prediction in result["predictions"]}
        assert np.allclose([served[index] for index in range(5)], probabilities, atol=1e-5)
        assert running.stop() == 0
