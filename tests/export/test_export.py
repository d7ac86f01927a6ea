"""Export: what is written is equal to its source, and what is not is not written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import vitserve.export.build_bundle
from tests.support.networks import TINY, checkpoint, network
from vitserve.cli.main import app
from vitserve.export.build_bundle import ExportError, build_bundle
from vitserve.export.checkpoint.load import Checkpoint, CheckpointError, load_checkpoint
from vitserve.export.graph.optimize import OptimizedNetwork
from vitserve.model.arrays import Outputs
from vitserve.model.bundle.bundle import Bundle, open_bundle
from vitserve.model.bundle.parity import TOLERANCE, compare
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ResNetConfig
from vitserve.model.network.resnet import ResNet
from vitserve.service.engines.engine import Engine, EngineUnavailableError


def test_the_graph_is_canonical(bundle: Bundle) -> None:
    """uint8 pixels in, float32 logits and embedding out, the batch the only free axis, one Attention a block."""
    graph = onnx.load(bundle.path / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert {each.domain: each.version for each in graph.opset_import}[""] == 23

    def shape(value: onnx.ValueInfoProto) -> list[int | str]:
        return [each.dim_param or each.dim_value for each in value.type.tensor_type.shape.dim]

    (pixels,), (logits, embedding) = graph.graph.input, graph.graph.output
    assert (pixels.name, shape(pixels), pixels.type.tensor_type.elem_type) == (
        "pixels",
        ["n", 16, 16, 3],
        onnx.TensorProto.UINT8,
    )
    assert (logits.name, shape(logits), logits.type.tensor_type.elem_type) == (
        "logits",
        ["n", 7],
        onnx.TensorProto.FLOAT,
    )
    assert (embedding.name, shape(embedding), embedding.type.tensor_type.elem_type) == (
        "embedding",
        ["n", 32],
        onnx.TensorProto.FLOAT,
    )
    assert [node.op_type for node in graph.graph.node].count("Attention") == TINY.depth
    assert not any(node.metadata_props for node in graph.graph.node), "it says nothing of where it was made"


@pytest.mark.parametrize(
    "change",
    [
        {"pool": "mean", "class_token": False, "norm_after_pool": True},
        {"representation_width": 24},
        {"stem": (8, 16, 24)},
    ],
    ids=["mean", "representation", "hybrid"],
)
def test_every_relative_exports_and_is_proven(change: dict[str, object], tmp_path: Path) -> None:
    made = build_bundle(checkpoint(replace(TINY, **change)), tmp_path / "bundle", name="relative")
    for artifact in made.manifest.artifacts:
        assert artifact.parity.logits <= TOLERANCE[artifact.precision]


def test_a_resnet_exports_and_is_proven(tmp_path: Path) -> None:
    torch.manual_seed(0)
    resnet = ResNet(ResNetConfig(32, (1, 1), 1, 5)).eval()
    torch.nn.init.normal_(resnet.head.fc.weight)
    made = build_bundle(Checkpoint(resnet, tuple("abcde"), Preprocessing(32)), tmp_path / "bundle", name="resnet")
    assert open_bundle(tmp_path / "bundle").manifest.config == made.manifest.config == resnet.config
    assert made.golden().reference.embedding.shape[1] == resnet.config.embedding_width


def test_golden_outputs_are_the_torch_networks(bundle: Bundle) -> None:
    golden, source = bundle.golden(), checkpoint()
    images = (torch.from_numpy(golden.pixels).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        logits, embedding = source.network(images.permute(0, 3, 1, 2))
    parity = compare(Outputs(logits.numpy(), embedding.numpy()), golden.reference)
    assert parity.failure("fp32") is None
    assert len(np.unique(golden.reference.logits.argmax(1))) > 1, (
        "golden images that all look alike would verify little"
    )


def test_a_failed_proof_leaves_no_bundle_and_says_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def traces_another_network(network_: OptimizedNetwork, image_size: int, path: Path) -> None:
        genuine(OptimizedNetwork(network(TINY, seed=1), checkpoint().preprocessing).eval(), image_size, path)

    genuine = vitserve.export.build_bundle.trace
    monkeypatch.setattr(vitserve.export.build_bundle, "trace", traces_another_network)
    with pytest.raises(
        ExportError, match=r"openvino in fp32 is not equal to its source: logits differ by .* fp32 allows 1e-04"
    ):
        build_bundle(checkpoint(), tmp_path / "bundle", name="wrong")
    assert list(tmp_path.iterdir()) == []


def test_without_any_engine_nothing_is_proven_and_no_bundle_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str, *_: object) -> Engine:
        raise EngineUnavailableError(f"{name} is not installed")

    monkeypatch.setattr(vitserve.export.build_bundle, "construct_engine", absent)
    with pytest.raises(ExportError, match="openvino is not installed; onnxruntime is not installed"):
        build_bundle(checkpoint(), tmp_path / "bundle", name="none")
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


def test_the_command_exports_a_checkpoint(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app,
        ["export", str(save(tmp_path / "weights.safetensors")), "-o", str(tmp_path / "bundle"), "--name", "letters"],
    )
    assert result.exit_code == 0, result.output
    made = open_bundle(tmp_path / "bundle")
    assert made.labels == tuple("abcdefg")
    assert f"letters {made.manifest.version}" in result.output
    assert len(made.manifest.version) == 12


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv\.weight"):
        load_checkpoint(save(tmp_path / "weights.safetensors", drop="blocks.0.attn.qkv.weight"))
    (tmp_path / "noise").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_checkpoint(tmp_path / "noise")
    save_file({"a": torch.zeros(1)}, tmp_path / "bare")
    with pytest.raises(CheckpointError, match="unrecognized checkpoint layout"):
        load_checkpoint(tmp_path / "bare")


def test_engines_are_closed_when_their_proof_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, closed = list[str](), list[str]()
    genuine = vitserve.export.build_bundle.construct_engine

    def opens(*arguments: object) -> Engine:
        engine = genuine(*arguments)  # type: ignore[arg-type]
        opened.append(engine.name)
        monkeypatch.setattr(
            engine, "run", lambda stream, pixels: Outputs(np.zeros((16, 7), np.float32), np.zeros((16, 32), np.float32))
        )
        monkeypatch.setattr(engine, "close", lambda: closed.append(engine.name))
        return engine

    monkeypatch.setattr(vitserve.export.build_bundle, "construct_engine", opens)
    with pytest.raises(ExportError):
        build_bundle(checkpoint(), tmp_path / "bundle", name="wrong")
    assert closed == opened == ["openvino"]
