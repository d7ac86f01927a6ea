"""A bundle holds only artifacts that match the source, and a failed export writes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from tests.support.bundles import artifact_in, random_images
from tests.support.images import encoded, random_image
from tests.support.networks import TINY, checkpoint, network
from tests.support.paths import ROOT
from vitserve.cli.main import app
from vitserve.export import build_bundle as build_module
from vitserve.export import workspace
from vitserve.export.artifacts import ExportError
from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.load import Checkpoint, load_checkpoint
from vitserve.export.golden_images import GoldenError
from vitserve.export.graph.optimize import OptimizedNetwork
from vitserve.export.graph.trace import trace
from vitserve.model.arrays import Outputs, Precision
from vitserve.model.bundle.bundle import Bundle, open_bundle
from vitserve.model.bundle.parity import TOLERANCE, compare
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ResNetConfig, ViTConfig
from vitserve.model.network.resnet import ResNet
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import Engine, EngineOptions, EngineUnavailableError
from vitserve.service.engines.selection import open_engine


def test_reference_graph_has_the_documented_form(bundle: Bundle) -> None:
    """uint8 pixels in, float32 logits and embedding out, only the batch is dynamic, one Attention per block."""
    model = onnx.load(bundle.path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain: opset.version for opset in model.opset_import}[""] == 23

    def described(value: onnx.ValueInfoProto) -> tuple[str, list[int | str], int]:
        tensor = value.type.tensor_type
        return value.name, [dim.dim_param or dim.dim_value for dim in tensor.shape.dim], tensor.elem_type

    (pixels,), (logits, embedding) = model.graph.input, model.graph.output
    assert described(pixels) == ("pixels", ["n", 16, 16, 3], onnx.TensorProto.UINT8)
    assert described(logits) == ("logits", ["n", 7], onnx.TensorProto.FLOAT)
    assert described(embedding) == ("embedding", ["n", 32], onnx.TensorProto.FLOAT)
    assert [node.op_type for node in model.graph.node].count("Attention") == TINY.depth
    assert not any(node.metadata_props for node in model.graph.node), "source paths in the metadata"


@pytest.mark.parametrize(
    "config",
    [
        replace(TINY, pool="mean", class_token=False, norm_after_pool=True),
        replace(TINY, representation_width=24),
        replace(TINY, stem=(8, 16, 24)),
    ],
    ids=["mean", "representation", "hybrid"],
)
def test_every_variant_is_exported_and_verified(config: ViTConfig, tmp_path: Path) -> None:
    exported = build_bundle(checkpoint(config), tmp_path / "bundle", name="variant")
    for artifact in exported.manifest.artifacts:
        assert artifact.parity.logits <= TOLERANCE[artifact.precision]


def test_resnet_is_exported_and_verified(tmp_path: Path) -> None:
    torch.manual_seed(0)
    resnet = ResNet(ResNetConfig(32, (1, 1), 1, 5)).eval()
    torch.nn.init.normal_(resnet.head.fc.weight)
    exported = build_bundle(Checkpoint(resnet, tuple("abcde"), Preprocessing(32)), tmp_path / "bundle", name="resnet")
    assert open_bundle(tmp_path / "bundle").manifest.config == exported.manifest.config == resnet.config
    assert exported.golden().reference.embedding.shape[1] == resnet.config.embedding_width


def test_golden_outputs_are_those_of_the_torch_network(bundle: Bundle) -> None:
    golden, source = bundle.golden(), checkpoint()
    images = (torch.from_numpy(golden.pixels).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        logits, embedding = source.network(images.permute(0, 3, 1, 2))
    parity = compare(Outputs(logits.numpy(), embedding.numpy()), golden.reference)
    assert parity.failure("fp32") is None
    assert len(np.unique(golden.reference.logits.argmax(1))) > 1, "images of one class would verify little"


def test_images_of_the_domain_become_golden_images_on_request(bundle: Bundle, tmp_path: Path) -> None:
    """They are the owner's to give away. Calibrated precisions are judged on them."""
    assert (len(bundle.golden().pixels), bundle.golden().domain_images) == (16, 0)
    images = random_images(10, TINY.image_size)
    with_images = build_bundle(
        checkpoint(),
        tmp_path / "with images",
        name="tiny",
        evaluation_images=images,
        golden_images=3,
        precisions=["int8"],
        max_loss=50,
    )
    golden = open_bundle(with_images.path).golden()
    assert golden.domain_images == 3
    assert np.array_equal(golden.pixels[16:], images.pixels[:3])
    reference, count = golden.reference, golden.domain_images
    wrong = Outputs(reference.logits.copy(), reference.embedding.copy())
    wrong.logits[:16] += 100
    assert compare(wrong, reference, domain_images=count).typical == 0
    wrong.logits[16:] += 100
    assert compare(wrong, reference, domain_images=count).typical > 1
    opened = open_engine(with_images, EngineOptions(precision="int8"))
    opened.engine.close()
    assert opened.parity.typical <= TOLERANCE["int8"]


def test_a_network_that_overflows_is_named(tmp_path: Path) -> None:
    """Its weights are finite, but not its outputs."""
    source = checkpoint()
    with torch.no_grad():
        source.network.head.weight.fill_(3e38)
    with pytest.raises(GoldenError, match="the source network itself computes NaN or infinity"):
        build_bundle(source, tmp_path / "bundle", name="tiny")
    assert list(tmp_path.iterdir()) == []


def test_mismatch_is_reported_and_no_bundle_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trace_another_network(source: OptimizedNetwork, image_size: int, path: Path) -> None:
        trace(OptimizedNetwork(network(TINY, seed=1), checkpoint().preprocessing).eval(), image_size, path)

    monkeypatch.setattr(build_module, "trace", trace_another_network)
    message = r"openvino in fp32 does not match the source network: logits differ by .* fp32 .* 1e-04"
    with pytest.raises(ExportError, match=message):
        build_bundle(checkpoint(), tmp_path / "bundle", name="wrong")
    assert list(tmp_path.iterdir()) == []


def test_without_any_engine_no_bundle_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_nothing(name: str, *_: object) -> Engine:
        raise EngineUnavailableError(f"{name} is not installed")

    monkeypatch.setattr(workspace, "construct_engine", open_nothing)
    with pytest.raises(ExportError, match="openvino is not installed; onnxruntime is not installed"):
        build_bundle(checkpoint(), tmp_path / "bundle", name="none")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("absent", "present"), [("openvino", "onnxruntime"), ("onnxruntime", "openvino")])
def test_one_installed_cpu_engine_is_enough(
    absent: str, present: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.delitem(sys.modules, f"vitserve.service.engines.{absent}_engine", raising=False)
    steps: list[str] = []
    images = random_images(10, TINY.image_size)
    exported = build_bundle(
        checkpoint(), tmp_path / "bundle", name="tiny", evaluation_images=images, max_loss=20, progress=steps.append
    )
    float32 = [artifact.engine for artifact in exported.manifest.artifacts if artifact.precision == "fp32"]
    assert float32 == [present]
    assert any(step.startswith(f"skipped: {absent} is not installed") for step in steps)
    assert f"running {present} in float32 on 10 evaluation images" in steps
    assert artifact_in(exported, "bf16").evaluation is not None


@pytest.mark.parametrize(("precision", "message"), [("int8", "int8 without images"), ("fp8", "calibrating fp8")])
def test_missing_onnxruntime_is_reported_with_the_command(
    precision: Precision, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnxruntime", "onnxruntime.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "vitserve.service.engines.onnxruntime_engine", raising=False)
    images = random_images(4, TINY.image_size) if precision == "fp8" else None
    with pytest.raises(ExportError, match=rf"{message} needs onnxruntime .*pip install 'vitserve\[export\]'"):
        build_bundle(checkpoint(), tmp_path / "bundle", name="tiny", precisions=[precision], calibration_images=images)
    assert list(tmp_path.iterdir()) == []


def save(path: Path, drop: str = "") -> Path:
    metadata = {
        "config": json.dumps(TINY.__dict__),
        "labels": json.dumps(list("abcdefg")),
        "mean": "[0.5, 0.5, 0.5]",
        "std": "[0.5, 0.5, 0.5]",
    }
    weights = {name: tensor.contiguous() for name, tensor in network(TINY).state_dict().items() if name != drop}
    save_file(weights, path, metadata)
    return path


def test_command_exports_a_checkpoint(tmp_path: Path) -> None:
    source = save(tmp_path / "weights.safetensors")
    result = CliRunner().invoke(app, ["export", str(source), "-o", str(tmp_path / "bundle"), "--name", "letters"])
    assert result.exit_code == 0, result.output
    exported = open_bundle(tmp_path / "bundle")
    assert exported.labels == tuple("abcdefg")
    assert f"letters {exported.manifest.version}" in result.output
    assert len(exported.manifest.version) == 12


def test_command_calibrates_and_evaluates_on_images(tmp_path: Path) -> None:
    for seed in range(12):
        (tmp_path / f"{seed}.png").write_bytes(encoded(random_image(seed=seed)))
    source, output = save(tmp_path / "weights.safetensors"), tmp_path / "bundle"
    command = ["export", str(source), "-o", str(output), "--images", str(tmp_path), "--max-loss", "50"]
    result = CliRunner().invoke(app, [*command, "--calibration-images", "4", "--evaluation-images", "5"])
    assert result.exit_code == 0, result.output
    evaluation = artifact_in(open_bundle(output), "bf16").evaluation
    assert evaluation is not None
    assert evaluation.images == 5


def test_invalid_checkpoint_is_rejected_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv\.weight"):
        load_checkpoint(save(tmp_path / "weights.safetensors", drop="blocks.0.attn.qkv.weight"))
    (tmp_path / "noise").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="neither a safetensors file nor a torch file"):
        load_checkpoint(tmp_path / "noise")
    save_file({"a": torch.zeros(1)}, tmp_path / "bare")
    with pytest.raises(CheckpointError, match=str(tmp_path / "bare")):
        load_checkpoint(tmp_path / "bare")


def test_engine_is_closed_when_verification_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, closed = list[str](), list[str]()

    def open_wrong(*arguments: object) -> Engine:
        engine = construct_engine(*arguments)  # type: ignore[arg-type]
        opened.append(engine.name)
        zeros = Outputs(np.zeros((16, 7), np.float32), np.zeros((16, 32), np.float32))
        monkeypatch.setattr(engine, "run", lambda stream, pixels: zeros)
        monkeypatch.setattr(engine, "close", lambda: closed.append(engine.name))
        return engine

    monkeypatch.setattr(workspace, "construct_engine", open_wrong)
    with pytest.raises(ExportError):
        build_bundle(checkpoint(), tmp_path / "bundle", name="wrong")
    assert closed == opened == ["openvino"]


def test_fp16_is_rejected_before_the_export_starts(tmp_path: Path) -> None:
    steps: list[str] = []
    with pytest.raises(ExportError, match="fp16 cannot be exported"):
        build_bundle(checkpoint(), tmp_path / "bundle", name="tiny", precisions=["fp16"], progress=steps.append)
    assert steps == []


def test_export_imports_no_engine() -> None:
    script = "import sys, vitserve.export.build_bundle\nprint({'onnxruntime', 'openvino', 'nncf'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
