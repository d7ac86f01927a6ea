"""int8 artifacts: quantized, evaluated on images, and rejected if they lose too much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch

from tests.support import bundles
from tests.support.bundles import SMALL, artifact_in, confident_checkpoint, random_images
from tests.support.networks import checkpoint, network
from tests.support.traces import traced as traced_graph
from vitserve.export.artifacts import ExportError
from vitserve.export.build_bundle import build_bundle
from vitserve.export.quantize import int8
from vitserve.export.quantize.coverage import of_onnx, of_openvino
from vitserve.model.arrays import Pixels
from vitserve.model.bundle.bundle import Artifact, Bundle, Quantization
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.network.build import Network
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.engines.selection import open_engine


@pytest.fixture
def nncf() -> None:
    pytest.importorskip("nncf", reason="nncf is not installed")


def traced(source: Network, directory: Path) -> Path:
    return traced_graph(source, Preprocessing(32), directory / "model.onnx")


def test_calibrated_int8_is_quantized_and_evaluated(int8_bundle: Bundle) -> None:
    bundle, artifact = int8_bundle, artifact_in(int8_bundle, "int8")
    assert (artifact.engine, artifact.weights) == ("openvino", artifact.path.replace(".xml", ".bin"))
    assert artifact.evaluation is not None
    assert artifact.evaluation.images == 100
    assert artifact.evaluation.accuracy is None
    assert artifact.evaluation.loss <= 3
    compiled = openvino.Core().compile_model(bundle.path / artifact.path, "CPU")
    layers = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kinds = Counter((info["layerType"], info["runtimePrecision"]) for info in layers)
    assert kinds["FullyConnected", "i8"] + kinds["FullyConnected", "u8"] >= 4 * SMALL.depth - 2
    int8_files = {path.name for path in bundle.path.iterdir() if "int8" in path.name}
    assert int8_files == set(artifact.files), "files of the rejected candidate are left"


@pytest.mark.usefixtures("nncf")
def test_convolution_biases_are_kept_in_int8(tmp_path: Path) -> None:
    """OpenVINO drops a bias that it has to reshape; this changed 6% of the predictions."""
    hybrid = network(replace(SMALL, patch_size=4, stem=(16, 32, 64)))
    with torch.no_grad():
        for module in hybrid.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                assert module.running_mean is not None
                module.running_mean.uniform_(-1, 1)
                module.bias.uniform_(-1, 1)
    graph, images = traced(hybrid, tmp_path), random_images(48).pixels
    model = int8.quantize(graph, images[:32], smooth=True)
    quantized = openvino.compile_model(model, "CPU")(images)["embedding"]
    (exact,) = onnxruntime.InferenceSession(graph).run(["embedding"], {"pixels": images})
    noise = ((quantized - exact) ** 2).sum() / (exact**2).sum()
    assert noise < 0.01


@pytest.mark.usefixtures("nncf")
def test_smoothquant_factors_are_folded_into_the_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, images = traced(network(SMALL), tmp_path), random_images(24).pixels
    folded: list[int] = []
    fold = int8.fold_smoothing

    def logits(folding: Callable[[Any], int]) -> np.ndarray[Any, Any]:
        monkeypatch.setattr(int8, "fold_smoothing", lambda model: folded.append(folding(model)))
        model = int8.quantize(graph, images, smooth=True)
        compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return np.array(compiled(images)["logits"])

    with_folding, without = logits(fold), logits(lambda model: 0)
    assert folded[0] >= 2 * SMALL.depth - 2, "two norms per block, except those that several products read"
    assert np.abs(with_folding - without).max() <= 1e-5 * np.abs(without).max()


def test_int8_without_images_is_for_onnxruntime(tmp_path: Path) -> None:
    bundle = build_bundle(confident_checkpoint(), tmp_path / "bundle", name="small", precisions=["int8"], max_loss=10)
    artifact = artifact_in(bundle, "int8")
    assert artifact.engine == "onnxruntime"
    kinds = Counter(node.op_type for node in onnx.load(bundle.path / artifact.path).graph.node)
    assert kinds["MatMulInteger"] + kinds["DynamicQuantizeMatMul"] >= 4 * SMALL.depth
    layers = 4 * SMALL.depth + 3
    assert artifact.quantization == Quantization(layers - 1, layers), "the convolution of the patches is not"
    opened = open_engine(bundle, EngineOptions(precision="int8"))
    opened.engine.close()
    assert opened.engine.precision == "int8"


def test_quantized_layers_are_counted(int8_bundle: Bundle) -> None:
    """The patch projection, four layers in each block, of which the last has one more, and the head."""
    layers, bundle = 4 * SMALL.depth + 3, int8_bundle
    assert artifact_in(bundle, "int8").quantization == Quantization(layers, layers)
    assert {artifact.quantization for artifact in bundle.manifest.artifacts if artifact.precision == "fp32"} == {None}
    compiled = openvino.compile_model(bundle.path / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert of_openvino(compiled) == Quantization(0, layers)
    assert of_onnx(bundle.path / "model.onnx") == Quantization(0, layers)


@pytest.mark.usefixtures("nncf")
def test_an_artifact_without_a_quantized_layer_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the search for an allowed loss keeps every layer in float32. It would be float32 under another name."""
    monkeypatch.setattr(int8, "quantize", lambda graph, images, smooth: openvino.Core().read_model(graph))
    message = rf"openvino in int8 has none of its {4 * SMALL.depth + 3} layers with weights quantized"
    with pytest.raises(ExportError, match=message):
        bundles.int8_bundle(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("nncf")
def test_a_search_that_keeps_every_layer_in_float32_is_rejected(tmp_path: Path) -> None:
    steps: list[str] = []
    with pytest.raises(ExportError, match="openvino in int8"):
        build_bundle(
            confident_checkpoint(),
            tmp_path / "bundle",
            name="small",
            precisions=["int8"],
            calibration_images=random_images(32),
            evaluation_images=random_images(300, seed=1000),
            max_loss=0,
            progress=steps.append,
        )
    assert any("none of its 15 layers with weights quantized" in step for step in steps)


def test_required_precision_that_loses_too_much_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"onnxruntime in int8 loses .* percentage points; at most -1 are allowed"):
        build_bundle(checkpoint(), tmp_path / "bundle", name="tiny", precisions=["int8"], max_loss=-1)
    assert not (tmp_path / "bundle").exists()


def test_default_precision_that_loses_too_much_is_skipped(tmp_path: Path) -> None:
    steps: list[str] = []
    bundle = build_bundle(checkpoint(), tmp_path / "bundle", name="tiny", max_loss=-1, progress=steps.append)
    assert {artifact.precision for artifact in bundle.manifest.artifacts} == {"fp32"}
    assert any(step.startswith("skipped: openvino in bf16 loses") for step in steps)


@pytest.mark.slow
@pytest.mark.usefixtures("nncf")
def test_layers_that_lose_most_stay_in_float32(tmp_path: Path) -> None:
    def int8_within(max_loss: float) -> Artifact:
        bundle = build_bundle(
            confident_checkpoint(),
            tmp_path / str(max_loss),
            name="small",
            precisions=["int8"],
            calibration_images=random_images(32),
            evaluation_images=random_images(1000, seed=1000),
            max_loss=max_loss,
        )
        return artifact_in(bundle, "int8")

    complete = int8_within(100)
    assert complete.evaluation is not None
    limit = 0.9 * complete.evaluation.loss
    partial = int8_within(limit)
    assert partial.path == "int8-partial.xml"
    assert partial.evaluation is not None
    assert 0 < partial.evaluation.loss <= limit
    assert partial.quantization is not None
    assert 0 < partial.quantization.layers < partial.quantization.of


@pytest.mark.slow
@pytest.mark.usefixtures("nncf")
def test_int8_without_smoothquant_is_used_if_smoothquant_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    another = network(SMALL)
    with torch.no_grad():
        another.head.weight.neg_()
    another_graph, quantize = traced(another, tmp_path), int8.quantize

    def quantize_another(graph: Path, images: Pixels, smooth: bool) -> openvino.Model:
        return quantize(another_graph if smooth else graph, images, smooth=smooth)

    monkeypatch.setattr(int8, "quantize", quantize_another)
    bundle = build_bundle(
        confident_checkpoint(),
        tmp_path / "bundle",
        name="small",
        precisions=["int8"],
        calibration_images=random_images(32),
        evaluation_images=random_images(40, seed=1),
        max_loss=100,
    )
    assert artifact_in(bundle, "int8").path == "int8-plain.xml"
    assert not (bundle.path / "int8-smooth.xml").exists()
