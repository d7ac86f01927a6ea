"""`vitserve export model.onnx`: the bundle computes what ONNX Runtime computes for the file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from torch import nn

from tests.support.checkpoints import relative_difference
from tests.support.onnx_files import CLASSES, SIDE, Classifier, write
from tests.support.paths import ROOT
from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.overrides import Overrides
from vitserve.export.onnx_file.load import load_onnx
from vitserve.export.onnx_file.model import OnnxModel
from vitserve.model.arrays import to_probabilities
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.evaluation import Images
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import EngineOptions

NORMALIZED: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


def own_answer(path: Path, pixels: np.ndarray) -> np.ndarray:
    """ONNX Runtime's output of the file itself, images one by one, [n, classes]."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (value,) = session.get_inputs()
    images = pixels / np.float32(255)
    images = ((images - np.float32(NORMALIZED["mean"])) / np.float32(NORMALIZED["std"])).astype(np.float32)
    if value.shape[3] != 3:
        images = images.transpose(0, 3, 1, 2)
    answers = [session.run(None, {value.name: image[None]})[0][0] for image in images]
    result: np.ndarray = np.stack(answers)
    return result


def exported(path: Path, directory: Path, **options: Any) -> Bundle:
    checkpoint = load_onnx(path, Overrides(**NORMALIZED | options))
    return build_bundle(checkpoint, directory / "bundle", name="file", precisions=["fp32"])


def served(bundle: Bundle, engine: str) -> np.ndarray:
    """Logits of the golden images, [16, classes]."""
    (artifact,) = (each for each in bundle.manifest.artifacts if each.engine == engine)
    opened = construct_engine(engine, "fp32", bundle.path / artifact.path, EngineOptions(max_batch=16))
    logits: np.ndarray = opened.run(0, bundle.golden().pixels).logits
    opened.close()
    return logits


@pytest.mark.parametrize("opset", [13, pytest.param(17, marks=pytest.mark.slow), 20, 23])
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fixed", "any batch"])
def test_a_file_of_torch_is_served_as_onnxruntime_runs_it(opset: int, dynamic: bool, tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", opset, dynamic)
    bundle = exported(tmp_path / "model.onnx", tmp_path)
    expected = own_answer(tmp_path / "model.onnx", bundle.golden().pixels)
    assert np.ptp(expected, axis=0).max() > 0.1
    for engine in ("onnxruntime", "openvino"):
        assert relative_difference(served(bundle, engine), expected) < 1e-5
    assert bundle.manifest.reference == f"model.onnx in onnxruntime {onnxruntime.__version__}"


def test_a_graph_of_channels_last_is_recognized(tmp_path: Path) -> None:
    """tf2onnx writes such graphs: float NHWC, and a softmax at the end."""
    write(tmp_path / "model.onnx", dynamic=True, network=Classifier(nn.Softmax(-1), channels_last=True))
    bundle = exported(tmp_path / "model.onnx", tmp_path)
    expected = own_answer(tmp_path / "model.onnx", bundle.golden().pixels)
    probabilities = to_probabilities(served(bundle, "onnxruntime"), bundle.manifest.activation)
    assert relative_difference(probabilities, expected) < 1e-5


def test_dynamic_axes_are_named_as_optimum_does(tmp_path: Path) -> None:
    axes = {0: "batch_size", 1: "num_channels", 2: "height", 3: "width"}
    write(tmp_path / "model.onnx", 17, True, names=("pixel_values", "logits"), axes=axes)
    with pytest.raises(CheckpointError, match="its image size must be stated: --image-size"):
        load_onnx(tmp_path / "model.onnx", Overrides(**NORMALIZED))
    bundle = exported(tmp_path / "model.onnx", tmp_path, image_size=SIDE)
    expected = own_answer(tmp_path / "model.onnx", bundle.golden().pixels)
    assert relative_difference(served(bundle, "onnxruntime"), expected) < 1e-5


@pytest.mark.parametrize(
    ("last", "stated", "activation"),
    [
        (nn.Identity(), None, "softmax"),
        (nn.Softmax(-1), None, "softmax"),
        (nn.Sigmoid(), None, "sigmoid"),
        (nn.Softmax(-1), "probabilities", "softmax"),
        (nn.Softmax(-1), "logits", "softmax"),
    ],
)
def test_logits_and_probabilities_differ(last: nn.Module, stated: Any, activation: Any, tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", dynamic=True, network=Classifier(last))
    checkpoint = load_onnx(tmp_path / "model.onnx", Overrides(**NORMALIZED, outputs=stated))
    assert checkpoint.activation == activation
    model = checkpoint.source_model(lambda step: None)
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    answer = own_answer(tmp_path / "model.onnx", pixels)
    logits = model.run(pixels).logits
    computed = logits if isinstance(last, nn.Identity) or stated == "logits" else to_probabilities(logits, activation)
    assert relative_difference(computed, answer) < 1e-5
    assert model.run(pixels).embedding.shape == (3, 5 if stated == "logits" else 24)


class Probabilities(nn.Module):
    """Probabilities that the graph does not show to be of a softmax or sigmoid."""

    def __init__(self, half: bool = False) -> None:
        super().__init__()
        self.half_precision = half

    def forward(self, logits: Any) -> Any:
        values = logits.softmax(-1).clamp(1e-6, 0.999)
        return values.half() if self.half_precision else values


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_probabilities_are_served_with_the_stated_activation(activation: Any, half: bool, tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", 17, network=Classifier(Probabilities(half)))
    checkpoint = load_onnx(
        tmp_path / "model.onnx", Overrides(**NORMALIZED, outputs="probabilities", activation=activation)
    )
    model = checkpoint.source_model(lambda step: None)
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    answer = own_answer(tmp_path / "model.onnx", pixels)
    model.write_graph(tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixels": pixels})
    for computed in (model.run(pixels).logits, logits):
        assert relative_difference(to_probabilities(computed, checkpoint.activation), answer) < 2e-3


@pytest.mark.parametrize("opset", [11, 17])
def test_bf16_is_simulated_in_the_graph(opset: int, tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", opset, dynamic=True)
    model = load_onnx(tmp_path / "model.onnx", Overrides(**NORMALIZED)).source_model(lambda step: None)
    assert isinstance(model, OnnxModel)
    pixels = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), np.uint8)
    difference = relative_difference(model.run_bf16(pixels).logits, model.run(pixels).logits)
    assert 1e-4 < difference < 6e-2


def test_external_weights_must_be_beside_the_file(tmp_path: Path) -> None:
    write(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.save(model, tmp_path / "split.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert load_onnx(tmp_path / "split.onnx", Overrides(**NORMALIZED)).config.classes == CLASSES
    (tmp_path / "weights.bin").rename(tmp_path / "elsewhere.bin")
    with pytest.raises(CheckpointError, match=r"external weights that cannot be read: weights\.bin"):
        load_onnx(tmp_path / "split.onnx", Overrides(**NORMALIZED))
    (tmp_path / "inner").mkdir()
    split = onnx.load(tmp_path / "split.onnx", load_external_data=False)
    for tensor in split.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere.bin"
    (tmp_path / "inner" / "model.onnx").write_bytes(split.SerializeToString())
    with pytest.raises(CheckpointError, match=r"weights outside of its directory: \.\./elsewhere\.bin"):
        load_onnx(tmp_path / "inner" / "model.onnx", Overrides(**NORMALIZED))


@pytest.mark.parametrize("place", ["initializer", "constant", "link"])
def test_external_weights_anywhere_in_the_file_are_checked(place: str, tmp_path: Path) -> None:
    directory = tmp_path / "inner"
    directory.mkdir()
    write(directory / "model.onnx")
    (tmp_path / "outside.bin").write_bytes(bytes(4096))
    model = onnx.load(directory / "model.onnx")
    tensor = onnx.helper.make_tensor("extra", onnx.TensorProto.FLOAT, [4], bytes(16), raw=True)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="link.bin" if place == "link" else "../outside.bin")
    (directory / "link.bin").symlink_to(tmp_path / "outside.bin")
    if place == "constant":
        model.graph.node.append(onnx.helper.make_node("Constant", [], ["extra_value"], value=tensor))
    else:
        model.graph.initializer.append(tensor)
    (directory / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="weights outside of its directory"):
        load_onnx(directory / "model.onnx", Overrides(**NORMALIZED))


def test_files_that_cannot_be_served_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write(path)
    with pytest.raises(CheckpointError, match="does not say how images are prepared: give --preprocessor"):
        load_onnx(path, Overrides())
    with pytest.raises(CheckpointError, match=r"--image-size 48: the input of .* is fixed to"):
        load_onnx(path, Overrides(**NORMALIZED, image_size=48))
    with pytest.raises(CheckpointError, match=r"--layout nhwc: the input of .* which has 32 channels"):
        load_onnx(path, Overrides(**NORMALIZED, layout="nhwc"))
    with pytest.raises(CheckpointError, match="--labels has 1 labels; the model has 5 classes"):
        load_onnx(path, Overrides(**NORMALIZED, labels=["a"]))
    model = onnx.load(path)
    model.opset_import[0].version = 99
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="has opset 99; supported are 7 to"):
        load_onnx(path, Overrides(**NORMALIZED))
    path.write_bytes(b"\x08\x07no model")
    with pytest.raises(CheckpointError, match="is not an ONNX model, or it is damaged"):
        load_onnx(path, Overrides(**NORMALIZED))


def test_a_fixed_batch_that_cannot_be_changed_is_rejected_with_the_reason(tmp_path: Path) -> None:
    """The images of a batch are mixed, so one image alone has no answer."""

    class Mixing(Classifier):
        def forward(self, images: Any) -> Any:
            logits = super().forward(images)
            return logits - logits.mean(0, keepdim=True) * 0.5

    write(tmp_path / "model.onnx", network=Mixing(), batch=2)
    with pytest.raises(CheckpointError, match="has a fixed batch of 2, and cannot be made to take any batch"):
        exported(tmp_path / "model.onnx", tmp_path)


@pytest.mark.slow
def test_int8_is_calibrated_with_images(tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", dynamic=True)
    images = Images(np.random.default_rng(0).integers(0, 256, (24, SIDE, SIDE, 3), np.uint8), None)
    bundle = build_bundle(
        load_onnx(tmp_path / "model.onnx", Overrides(**NORMALIZED)),
        tmp_path / "bundle",
        name="file",
        precisions=["int8"],
        calibration_images=images,
        evaluation_images=images,
        max_loss=50,
    )
    (artifact,) = (each for each in bundle.manifest.artifacts if each.precision == "int8")
    assert artifact.quantization is not None
    assert artifact.quantization.layers > 0


def test_torch_is_not_imported_for_an_onnx_file(tmp_path: Path) -> None:
    write(tmp_path / "model.onnx")
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\ne\n")
    script = (
        "import sys\nsys.modules['torch'] = None\nfrom vitserve.cli.main import app\n"
        f"app(['export', {str(tmp_path / 'model.onnx')!r}, '-o', {str(tmp_path / 'bundle')!r}, '--mean', '0.5',"
        f" '--std', '0.5', '--labels', {str(tmp_path / 'labels.txt')!r}, '--precision', 'fp32'])"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "bundle" / "labels.txt").read_text() == "a\nb\nc\nd\ne\n"
