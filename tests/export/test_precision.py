"""Dialects and precisions: each verified, judged on images, and rejected where it loses too much or was tampered with."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from typer.testing import CliRunner

from tests.support.images import encoded, random_image
from tests.support.networks import TINY, checkpoint, network
from tests.support.server import start_server
from vitserve.cli.main import app
from vitserve.export.build_bundle import ExportError, build_bundle
from vitserve.export.checkpoint.load import Checkpoint
from vitserve.export.graph.optimize import OptimizedNetwork
from vitserve.export.graph.trace import Servable, trace
from vitserve.export.quantize import int8
from vitserve.export.quantize.bf16_simulation import simulated
from vitserve.model.arrays import Outputs
from vitserve.model.bundle.bundle import Bundle, Evaluation, open_bundle, sha256
from vitserve.model.bundle.evaluation import Images, evaluate, read_images
from vitserve.model.bundle.parity import compare
from vitserve.model.bundle.preprocess import Decoder, Preprocessing
from vitserve.model.config import ViTConfig
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.engines.selection import open_engine

SMALL = ViTConfig(image_size=32, patch_size=8, width=64, depth=3, heads=2, mlp_width=128, classes=5)


def sure(config: ViTConfig = SMALL) -> Checkpoint:
    """A network that is sure of what it says, as trained ones are, so that rounding does not decide."""
    made = network(config)
    with torch.no_grad():
        made.head.weight.mul_(4)
    return Checkpoint(
        made, tuple(f"class {index}" for index in range(config.classes)), Preprocessing(config.image_size)
    )


def pictures(count: int, seed: int = 0) -> Images:
    return Images(np.stack([np.asarray(random_image(32, 32, seed + index)) for index in range(count)]), None)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With fp32 and calibrated int8, judged on a hundred pictures."""
    pytest.importorskip("nncf", reason="nncf is not installed")
    path = tmp_path_factory.mktemp("int8") / "bundle"
    return build_bundle(
        sure(),
        path,
        name="small",
        precisions=["int8"],
        calibration=pictures(32),
        evaluation_images=pictures(100, 1000),
        max_loss=3,
    )


# -- dialects


def test_onnxruntime_gets_its_own_attention_and_shares_the_weights(bundle: Bundle) -> None:
    reference_graph, onnxruntime_graph = (
        onnx.load(bundle.path / name, load_external_data=False) for name in ("model.onnx", "model.onnxruntime.onnx")
    )
    assert Counter(node.op_type for node in reference_graph.graph.node)["Attention"] == TINY.depth
    kinds = Counter((node.domain, node.op_type) for node in onnxruntime_graph.graph.node)
    assert kinds["com.microsoft", "MultiHeadAttention"] == TINY.depth
    assert kinds["", "Attention"] == 0
    outside = [each for each in onnxruntime_graph.graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL]
    assert {entry.value for each in outside for entry in each.external_data if entry.key == "location"} == {
        "model.onnx.data"
    }
    assert (bundle.path / "model.onnxruntime.onnx").stat().st_size < 200_000
    pixels = bundle.golden().pixels
    ours, theirs = (
        onnxruntime.InferenceSession(bundle.path / f).run(None, {"pixels": pixels})
        for f in ("model.onnxruntime.onnx", "model.onnx")
    )
    assert compare(Outputs(*ours), Outputs(*theirs)).logits < 1e-5


def test_attention_with_a_mask_stays_the_canonical_operator(tmp_path: Path) -> None:
    """MultiHeadAttention takes no boolean mask; what is not rewritten is still verified."""
    made = build_bundle(
        checkpoint(replace(TINY, image_size=32, attention="axial")), tmp_path / "bundle", name="axial", precisions=[]
    )
    kinds = Counter(
        node.op_type for node in onnx.load(made.path / "model.onnxruntime.onnx", load_external_data=False).graph.node
    )
    assert (kinds["Attention"], kinds["MultiHeadAttention"]) == (TINY.depth, 0)


def test_the_bundle_says_which_kernels_run_the_attention(bundle: Bundle) -> None:
    for artifact in bundle.manifest.artifacts:
        if artifact.simulated:
            continue
        assert artifact.attention is not None
        assert artifact.attention.fused == TINY.depth, artifact
        assert artifact.attention.softmax_layers == 0


def test_attention_that_is_not_fused_is_not_counted(tmp_path: Path) -> None:
    from openvino import opset8 as ops

    from vitserve.export.attention_report import of_openvino

    x = ops.parameter([1, 2, 4, 8], np.float32)
    mixed = ops.matmul(ops.softmax(ops.matmul(x, x, False, True), 3), x, False, False)
    compiled = openvino.Core().compile_model(
        openvino.Model([ops.relu(mixed)], [x]), "CPU", {"SNIPPETS_MODE": "DISABLE"}
    )
    assert (of_openvino(compiled).fused, of_openvino(compiled).softmax_layers) == (0, 1)


# -- bf16


def test_simulated_bf16_rounds_and_no_more(tmp_path: Path) -> None:
    source = Servable(network(SMALL), Preprocessing(32)).eval()
    with torch.inference_mode():
        (ours, _), (theirs, _) = (each(torch.from_numpy(pictures(16).pixels)) for each in (simulated(source), source))
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    assert 1e-4 < difference < 6e-2
    for parameter in simulated(source).parameters():
        if parameter.ndim > 1 and parameter.shape[0] != 1:
            assert torch.equal(parameter, parameter.bfloat16().float())


def test_bf16_is_in_the_bundle_wherever_it_was_made(bundle: Bundle) -> None:
    artifact = next(each for each in bundle.manifest.artifacts if each.precision == "bf16")
    assert artifact.simulated == ("BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    assert 1e-5 < artifact.parity.logits < 6e-2


# -- int8


def test_calibrated_int8_is_int8_and_judged(quantized: Bundle) -> None:
    artifact = next(each for each in quantized.manifest.artifacts if each.precision == "int8")
    assert (artifact.engine, artifact.weights) == ("openvino", artifact.path.replace(".xml", ".bin"))
    assert artifact.evaluation is not None
    assert artifact.evaluation.images == 100
    assert artifact.evaluation.accuracy is None
    assert artifact.evaluation.loss <= 3
    compiled = openvino.Core().compile_model(quantized.path / artifact.path, "CPU")
    kinds = Counter(
        (info["layerType"], info["runtimePrecision"])
        for info in (node.get_rt_info() for node in compiled.get_runtime_model().get_ops())
    )
    assert kinds["FullyConnected", "i8"] + kinds["FullyConnected", "u8"] >= 4 * SMALL.depth - 2
    assert {each.name for each in quantized.path.iterdir() if "int8" in each.name} == set(artifact.files), (
        "the loser of SmoothQuant on and off is gone"
    )


def test_biases_behind_a_convolution_survive_int8(tmp_path: Path) -> None:
    """Those that batch norms become: quantized, OpenVINO loses them unless they are constants of the right rank, and 6 % of the classes changed."""
    pytest.importorskip("nncf", reason="nncf is not installed")
    config = replace(SMALL, patch_size=4, stem=(16, 32, 64))
    made = network(config)
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]  # it has statistics
                module.bias.uniform_(-1, 1)
    trace(OptimizedNetwork(made, Preprocessing(32)).eval(), 32, tmp_path / "model.onnx")
    images = pictures(48).pixels
    model = int8.calibrated(tmp_path / "model.onnx", images[:32], smooth=True)
    run, source = openvino.compile_model(model, "CPU"), onnxruntime.InferenceSession(tmp_path / "model.onnx")
    ours, theirs = run(images)["embedding"], source.run(["embedding"], {"pixels": images})[0]
    noise = ((ours - theirs) ** 2).sum() / (theirs**2).sum()
    assert noise < 0.01


def test_smoothing_becomes_part_of_the_norm_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nncf", reason="nncf is not installed")
    trace(OptimizedNetwork(network(SMALL), Preprocessing(32)).eval(), 32, tmp_path / "model.onnx")
    images, folded = pictures(24).pixels, list[int]()
    fold, outputs = int8.fold_smoothing, []
    for each in (fold, lambda model: 0):
        monkeypatch.setattr(int8, "fold_smoothing", lambda model, each=each: folded.append(each(model)))
        compiled = openvino.compile_model(
            int8.calibrated(tmp_path / "model.onnx", images, smooth=True), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        outputs.append(compiled(images)["logits"].copy())
    assert folded[0] >= 2 * SMALL.depth - 2, "of each block's two norms, less those that more than one product reads"
    assert np.abs(outputs[0] - outputs[1]).max() <= 1e-5 * np.abs(outputs[1]).max()


def test_int8_without_calibration(tmp_path: Path) -> None:
    made = build_bundle(sure(), tmp_path / "bundle", name="small", precisions=["int8"], max_loss=10)
    artifact = next(each for each in made.manifest.artifacts if each.precision == "int8")
    assert artifact.engine == "onnxruntime"
    kinds = Counter(node.op_type for node in onnx.load(made.path / artifact.path).graph.node)
    assert kinds["MatMulInteger"] + kinds["DynamicQuantizeMatMul"] >= 4 * SMALL.depth
    opened = open_engine(made, EngineOptions(precision="int8"))
    opened.engine.close()
    assert opened.engine.precision == "int8"


def test_what_loses_too_much_is_refused_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(ExportError, match=r"onnxruntime in int8 loses .* points; at most -1 are allowed"):
        build_bundle(checkpoint(), tmp_path / "asked", name="tiny", precisions=["int8"], max_loss=-1)
    assert not (tmp_path / "asked").exists()
    made = build_bundle(checkpoint(), tmp_path / "unasked", name="tiny", max_loss=-1, progress=said.append)
    assert {each.precision for each in made.manifest.artifacts} == {"fp32"}
    assert any("in bf16 loses" in each for each in said)


@pytest.mark.slow
def test_layers_that_cost_too_much_stay_in_float(tmp_path: Path) -> None:
    pytest.importorskip("nncf", reason="nncf is not installed")
    evaluation_images = pictures(1000, 1000)
    plain = build_bundle(
        sure(),
        tmp_path / "plain",
        name="small",
        precisions=["int8"],
        calibration=pictures(32),
        evaluation_images=evaluation_images,
        max_loss=100,
    )
    lost = next(each for each in plain.manifest.artifacts if each.precision == "int8").evaluation
    assert lost is not None
    assert lost.loss > 0
    made = build_bundle(
        sure(),
        tmp_path / "less",
        name="small",
        precisions=["int8"],
        calibration=pictures(32),
        evaluation_images=evaluation_images,
        max_loss=lost.loss / 2,
    )
    artifact = next(each for each in made.manifest.artifacts if each.precision == "int8")
    assert artifact.path == "int8-partial.xml"
    assert artifact.evaluation is not None
    assert artifact.evaluation.loss <= lost.loss / 2


def test_smoothquant_that_is_refused_leaves_the_plain_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nncf", reason="nncf is not installed")
    genuine, another = int8.calibrated, sure()
    with torch.no_grad():
        another.network.head.weight.neg_()  # type: ignore[operator, union-attr]
    trace(OptimizedNetwork(another.network, another.preprocessing).eval(), SMALL.image_size, tmp_path / "another.onnx")
    monkeypatch.setattr(
        "vitserve.export.quantize.int8.calibrated",
        lambda graph, images, smooth: genuine(tmp_path / "another.onnx" if smooth else graph, images, smooth=smooth),
    )
    made = build_bundle(
        sure(),
        tmp_path / "bundle",
        name="small",
        precisions=["int8"],
        calibration=pictures(32),
        evaluation_images=pictures(40, 1),
        max_loss=100,
    )
    assert [each.path for each in made.manifest.artifacts if each.precision == "int8"] == ["int8-plain.xml"]
    assert not (made.path / "int8-smooth.xml").exists()


def tampered(quantized: Bundle, path: Path, row: int) -> Path:
    """The bundle with one quantized layer's scales doubled, and a manifest that vouches for it."""
    import shutil

    copy = Path(shutil.copytree(quantized.path, path))
    artifact = next(each for each in quantized.manifest.artifacts if each.precision == "int8")
    model = openvino.Core().read_model(copy / artifact.path)
    layers = [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "MatMul" and len(node.input_value(1).get_shape()) == 2
    ]
    node = layers[row].input_value(1).get_node()
    while node.get_type_name() != "Multiply":
        node = node.input_value(0).get_node()
    scale = node.input_value(1).get_node()
    doubled = openvino.op.Constant(scale.get_data() * 2)
    node.input(1).replace_source_output(doubled.output(0))
    for name in ("xml", "bin"):
        (copy / artifact.path).with_suffix(f".{name}").unlink()
    openvino.save_model(model, copy / artifact.path, compress_to_fp16=False)
    manifest = json.loads((copy / "bundle.json").read_text())
    for name in artifact.files:
        manifest["files"][name] = sha256(copy / name)
    (copy / "bundle.json").write_text(json.dumps(manifest))
    return copy


def test_a_layer_whose_scale_is_doubled_is_refused(quantized: Bundle, tmp_path: Path) -> None:
    """First and last, attention and MLP; not the last block's query, which one token asks once: doubling it changes less than int8 itself does."""
    opened = open_engine(quantized, EngineOptions(precision="int8"))
    opened.engine.close()
    for row in (0, 3, 5, 4 * SMALL.depth - 3, 4 * SMALL.depth - 1):
        broken = open_bundle(tampered(quantized, tmp_path / str(row), row))
        assert broken.damaged_files == {}
        opened = open_engine(broken, EngineOptions(), first=("openvino", "int8"))
        opened.engine.close()
        assert opened.engine.precision != "int8", f"layer {row}"
        assert opened.rejected[0].cause == "golden_check"


def test_the_service_starts_with_the_next_engine_and_says_so(
    quantized: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = tampered(quantized, tmp_path / "broken", 5)
    tune_to("openvino", "int8", broken)
    running = start_server("--bundle", str(broken))
    with httpx.Client(base_url=running.url) as client:
        ready = client.get("/readyz")
        assert ready.status_code == 200
        assert {"engine": "openvino", "precision": "int8", "cause": "golden_check"}.items() <= ready.json()["rejected"][
            0
        ].items()
        assert "golden images" in ready.json()["rejected"][0]["reason"]
        assert (
            'vitserve_engine_rejected{cause="golden_check",engine="openvino",precision="int8"} 1.0'
            in client.get("/metrics").text
        )
        assert client.post("/v1/classify", content=encoded(random_image())).status_code == 200
        assert client.get("/v1/model").json()["serving"]["precision"] == "fp32"
    assert running.stop() == 0


# -- images to judge on


def test_images_of_a_folder_with_classes(tmp_path: Path) -> None:
    for index in range(20):
        directory = tmp_path / ("cat" if index % 2 else "dog")
        directory.mkdir(exist_ok=True)
        (directory / f"{index}.png").write_bytes(encoded(random_image(seed=index)))
    calibration, evaluation_images = read_images(
        tmp_path, Preprocessing(16), ["cat", "dog"], calibration=5, evaluation=100
    )
    assert (calibration.pixels.shape, evaluation_images.pixels.shape) == ((5, 16, 16, 3), (15, 16, 16, 3))
    assert calibration.classes is not None
    assert evaluation_images.classes is not None
    assert Counter([*calibration.classes, *evaluation_images.classes]) == {0: 10, 1: 10}
    decoded = {
        Decoder(Preprocessing(16)).decode(each.read_bytes()).tobytes(): each.parent.name
        for each in tmp_path.rglob("*.png")
    }
    assert all(
        decoded[pixels.tobytes()] == ["cat", "dog"][label]
        for pixels, label in zip(evaluation_images.pixels, evaluation_images.classes, strict=True)
    )
    assert read_images(tmp_path, Preprocessing(16), ["cat", "mouse"], 5, 100)[1].classes is None


def test_images_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contains 0 images; at least 2"):
        read_images(tmp_path, Preprocessing(16), [], 5, 5)
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"\.png: not an image"):
        read_images(tmp_path, Preprocessing(16), [], 5, 5)


def test_loss_counts_points() -> None:
    logits = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]]
    reference = Outputs(logits, logits)
    changed = Outputs(np.concatenate([logits[:8], logits[:2] * -1]), logits)
    images = Images(np.zeros((10, 1, 1, 3), np.uint8), np.array([0, 1, 2, 3, 0, 1, 2, 3, 0, 1]))
    said = evaluate(lambda _: changed, reference, images)
    assert (said.top1_agreement, said.accuracy, said.source_accuracy) == (0.8, 0.8, 1.0)
    assert said.loss == pytest.approx(20)
    assert evaluate(lambda _: changed, reference, replace(images, classes=None)).loss == pytest.approx(10), (
        "half of 20 points of disagreement"
    )
    assert Evaluation(1, 1.0, 0.0).loss == 0


# -- which one serves


def tune_to(engine: str, precision: str, path: Path) -> None:
    from vitserve.service.engine_worker.tuning_cache import TuningResult, save_tuning_result

    save_tuning_result(sha256(path / "bundle.json"), TuningResult(engine, precision, 1, 1, 1.0))  # type: ignore[arg-type]


def test_tune_measures_remembers_and_is_heeded(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = CliRunner().invoke(
        app, ["tune", str(bundle.path), "--max-batch", "2", "--seconds", "0.02"], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    (written,) = (tmp_path / "vitserve" / "tuned").iterdir()
    choice = json.loads(written.read_text())
    assert f"fastest: {choice['engine']} in {choice['precision']}, {choice['streams']} ×" in result.output
    tune_to("onnxruntime", "fp32", bundle.path)
    running = start_server("--bundle", str(bundle.path))
    assert httpx.get(f"{running.url}/v1/model").json()["serving"]["engine"] == "onnxruntime"
    assert running.stop() == 0
    written.write_text("{")
    running = start_server("--bundle", str(bundle.path))
    assert "is not a choice of `vitserve tune`" in "".join(running.log)
    assert running.stop() == 0


def test_the_choice_is_the_fastest_and_among_equals_the_simplest() -> None:
    from vitserve.bench.tune import Measurement, choose, sizes, splits

    def measured(engine: str, streams: int, rate: float, size: int = 1) -> Measurement:
        return Measurement(engine, "fp32", streams, 4 // streams, size, rate, 0.1)

    near = choose([measured("a", 1, 99), measured("a", 4, 100), measured("b", 2, 99.5), measured("c", 1, 50)])
    assert (near.engine, near.streams) == ("a", 1)
    far = choose([measured("a", 1, 50, 1), measured("a", 1, 80, 8), measured("b", 2, 100, 8)])
    assert (far.engine, far.streams, far.images_per_second) == ("b", 2, 100)
    with pytest.raises(ValueError, match="nothing to choose"):
        choose([])
    assert (splits(1), splits(6), splits(8)) == ([1], [1, 2, 6], [1, 2, 4, 8])
    assert (sizes(1), sizes(6), sizes(8)) == ([1], [1, 2, 4, 6], [1, 2, 4, 8])


def test_inspect_shows_what_was_proven(bundle: Bundle) -> None:
    result = CliRunner().invoke(app, ["inspect", str(bundle.path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert f"{TINY.depth} × com.microsoft.MultiHeadAttention; 0 softmax layers beside" in result.output
    plain: dict[str, Any] = json.loads(CliRunner().invoke(app, ["inspect", str(bundle.path), "--json"]).output)
    assert plain["name"] == "tiny"
    assert CliRunner().invoke(app, ["inspect", str(bundle.path.parent)]).exit_code == 2
