"""torch as an engine: the graphs of every family, fusion, and the choice of the attention kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.support.bundles import artifact_in
from tests.support.images import random_image
from tests.support.networks import DISTILLED, HYBRID_AXIAL_MEAN, TINY, network
from tests.support.traces import traced
from vitserve.export.graph.reference import ReferenceNetwork
from vitserve.model.arrays import Outputs
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.parity import compare
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ResNetConfig, ViTConfig
from vitserve.model.network.resnet import ResNet
from vitserve.service.engines.engine import EngineOptions, EngineUnavailableError
from vitserve.service.engines.selection import open_engine
from vitserve.service.engines.torch import fp8
from vitserve.service.engines.torch.engine import fastest_attention, open_torch
from vitserve.service.engines.torch.fusion import ADD_NORM, FP8_PRODUCT, LINEAR, LINEAR_GELU, Step, fuse
from vitserve.service.engines.torch.interpreter import OPERATORS, TorchGraph

FAMILIES: dict[str, ViTConfig | ResNetConfig] = {
    "distilled, layer scale": DISTILLED,
    "registers, SwiGLU": replace(TINY, registers=3, swiglu=True),
    "quick GELU, pre-logits": replace(TINY, activation="quick_gelu", representation_width=24),
    "hybrid, axial, mean": HYBRID_AXIAL_MEAN,
    "local": replace(TINY, image_size=32, attention="local", window=3),
    "R + ViT": replace(TINY, image_size=64, patch_size=16, resnet=(1, 1, 1)),
    "ResNet": ResNetConfig(64, (1, 1), 1, classes=7),
}


def outputs(tensors: tuple[torch.Tensor, torch.Tensor]) -> Outputs:
    return Outputs(*(tensor.numpy() for tensor in tensors))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_of_every_family_runs_in_torch(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]
    size = config.image_size
    source = network(config) if isinstance(config, ViTConfig) else ResNet(config).eval()
    images = torch.from_numpy(np.stack([np.asarray(random_image(size, size, seed)) for seed in range(3)]))
    with torch.inference_mode():
        ours = outputs(TorchGraph(traced(source, Preprocessing(size), tmp_path / "model.onnx")).eval()(images))
        expected = outputs(ReferenceNetwork(source, Preprocessing(size)).eval()(images))
    assert compare(ours, expected).failure("fp32") is None


def test_a_run_reads_nothing_from_the_device(tmp_path: Path) -> None:
    """A captured graph must not. Tensors on torch's meta device have no content that could be read."""
    config = FAMILIES["R + ViT"]
    assert isinstance(config, ViTConfig)
    size = config.image_size
    graph = TorchGraph(traced(network(config), Preprocessing(size), tmp_path / "model.onnx")).to("meta")
    logits, _ = graph(torch.zeros(2, size, size, 3, dtype=torch.uint8, device="meta"))
    assert logits.shape == (2, config.classes)


def test_an_unsupported_operator_is_named(bundle: Bundle, tmp_path: Path) -> None:
    model = onnx.load(bundle.path / "model.onnx")
    model.graph.node.append(onnx.helper.make_node("NonZero", ["logits"], ["where"]))
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(EngineUnavailableError, match=r"torch cannot run the operators NonZero of odd\.onnx"):
        TorchGraph(tmp_path / "odd.onnx")


def step(operator: str, inputs: list[str | None], output: str) -> Step:
    return Step(operator, inputs, {}, [output])


WEIGHTS = {"w": 2, "b": 1, "scale": 1, "positions": 3}  # name → dimensions
PRODUCT, BIASED, ACTIVE = step("MatMul", ["x", "w"], "p"), step("Add", ["p", "b"], "l"), step("Gelu", ["l"], "g")
TOTAL, NORM = step("Add", ["y", "z"], "t"), step("LayerNormalization", ["t", "scale", "b"], "n")
OTHER_READER = step("Sqrt", ["p"], "s")
NOT_A_BIAS = step("Add", ["p", "positions"], "l")
BRANCH = step("Mul", ["z", "z"], "m")
SECOND_NORM = NORM._replace(outputs=["k"])
BROADCAST = step("Add", ["y", "positions"], "t")
QUANTIZED = step("QuantizeLinear", ["x", "xs", "zero"], "q"), step("DequantizeLinear", ["q", "xs", "zero"], "r")
QUANTIZED_W = step("QuantizeLinear", ["w", "ws", "zero"], "v"), step("DequantizeLinear", ["v", "ws", "zero"], "u")
QUANTIZE_X = QUANTIZED[0]._replace(inputs=["x", "xs"])
RESTORED_PRODUCT = step("MatMul", ["r", "u"], "p")


@pytest.mark.parametrize(
    ("steps", "graph_outputs", "expected"),
    [
        ([PRODUCT, BIASED, ACTIVE], ["g"], [Step(LINEAR_GELU, ["x", "w", "b"], {}, ["g"])]),
        ([PRODUCT, BIASED, ACTIVE], ["l", "g"], [Step(LINEAR, ["x", "w", "b"], {}, ["l"]), ACTIVE]),
        ([PRODUCT, OTHER_READER, BIASED], ["l", "s"], [PRODUCT, OTHER_READER, BIASED]),
        ([PRODUCT, NOT_A_BIAS], ["l"], [PRODUCT, NOT_A_BIAS]),
        ([TOTAL, BRANCH, NORM], ["n", "m"], [Step(ADD_NORM, ["y", "z", "scale", "b"], {}, ["t", "n"]), BRANCH]),
        ([TOTAL, NORM, SECOND_NORM], ["n", "k"], [TOTAL, NORM, SECOND_NORM]),
        ([BROADCAST, NORM], ["n"], [BROADCAST, NORM]),
        (
            [*QUANTIZED, *QUANTIZED_W, RESTORED_PRODUCT, BIASED, ACTIVE],
            ["g"],
            [QUANTIZE_X, Step(FP8_PRODUCT, ["q", "xs", "w", "ws", "b"], {}, ["l"]), ACTIVE],
        ),
        (
            [*QUANTIZED, *QUANTIZED_W, RESTORED_PRODUCT, OTHER_READER],
            ["s"],
            [QUANTIZE_X, Step(FP8_PRODUCT, ["q", "xs", "w", "ws"], {}, ["p"]), OTHER_READER],
        ),
        (
            [*QUANTIZED, step("MatMul", ["r", "y"], "p")],
            ["p"],
            [QUANTIZE_X, QUANTIZED[1], step("MatMul", ["r", "y"], "p")],
        ),
    ],
    ids=[
        "product, bias and GELU",
        "a graph output is kept",
        "a product with two readers is kept",
        "only a vector is a bias",
        "a sum and its norm",
        "a sum with two norms is kept",
        "a broadcast sum is kept",
        "a quantized product and its bias",
        "a quantized product without a bias",
        "a product of two values is kept",
    ],
)
def test_steps_are_fused_if_no_other_step_reads_between(
    steps: list[Step], graph_outputs: list[str], expected: list[Step]
) -> None:
    assert fuse(steps, WEIGHTS, graph_outputs) == expected


def test_projected_patches_equal_the_convolution() -> None:
    images, weight, bias = torch.randn(2, 12, 6, 3).permute(0, 3, 1, 2), torch.randn(5, 3, 4, 2), torch.randn(5)
    attributes = {"strides": (4, 2), "dilations": (1, 1), "group": 1}
    projected = OPERATORS["Conv"]([images, weight, bias], attributes)
    torch.testing.assert_close(projected, torch.nn.functional.conv2d(images, weight, bias, (4, 2)))
    overlapping = OPERATORS["Conv"]([images, weight, bias], attributes | {"strides": (2, 2)})
    torch.testing.assert_close(overlapping, torch.nn.functional.conv2d(images, weight, bias, (2, 2)))


def test_the_fused_kernels_compute_a_sum_and_its_norm_and_quantize() -> None:
    """Triton's interpreter must be enabled before Triton is imported.

    It does not round bf16 as a GPU does; nor fp8 where rounding increases the exponent (then the mantissa is 0) or
    where two values are equally near, which random float32 values are not.
    """
    pytest.importorskip("triton", reason="Triton is installed with torch for CUDA")
    program = """
import torch
from vitserve.service.engines.torch import fp8
from vitserve.service.engines.torch.kernels import add_norm, quantize
for kind in (torch.float32, torch.float16):
    x, y, weight, bias = (torch.randn(*shape).to(kind) for shape in ((2, 5, 96), (2, 5, 96), (96,), (96,)))
    total, normed = add_norm(x, y, weight, bias, 1e-6)
    assert torch.equal(total, x + y)
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(x + y, (96,), weight, bias, 1e-6))
x, scale = torch.randn(7, 999) * 500, torch.tensor(0.7)
ours, expected = (result.view(torch.uint8) for result in (quantize(x, scale), fp8.quantize([x, scale], {})))
comparable = expected & 7 != 0
assert torch.equal(ours[comparable], expected[comparable]) and comparable.float().mean() > 0.8
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})


def test_torch_serves_a_bundle_on_request(bundle: Bundle) -> None:
    assert open_engine(bundle, EngineOptions()).engine.name != "torch"
    opened = open_engine(bundle, EngineOptions(engine="torch", precision="bf16"))
    assert (opened.engine.name, opened.engine.precision) == ("torch", "bf16")
    assert opened.parity.failure("bf16") is None


def test_torch_multiplies_in_fp8_on_request(fp8_bundle: Bundle) -> None:
    """The graph is the one that TensorRT builds its fp8 plan from. At export, float32 arithmetic simulated it."""
    opened = open_engine(fp8_bundle, EngineOptions(engine="torch", precision="fp8"))
    assert (opened.engine.name, opened.engine.precision) == ("torch", "fp8")
    golden, simulated = fp8_bundle.golden(), artifact_in(fp8_bundle, "fp8")
    in_fp8 = opened.engine.run(0, golden.pixels[:8])
    assert opened.parity.typical == pytest.approx(simulated.parity.typical, rel=0.5)
    in_bf16 = open_torch(fp8_bundle.path / "model.onnx", "bf16", 1, 1, 8).run(0, golden.pixels[:8])
    assert compare(in_fp8, Outputs(*(array[:8] for array in golden.reference))).typical > (
        compare(in_bf16, Outputs(*(array[:8] for array in golden.reference))).typical
    ), "no product was computed in fp8"


def test_values_beyond_the_range_of_fp8_are_its_greatest() -> None:
    values = fp8.quantize([torch.tensor([1e4, -1e4, 2.0]).bfloat16(), torch.tensor(2.0)], {})
    assert values.float().tolist() == [448, -448, 1]


def test_a_gpu_without_fp8_is_rejected(fp8_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(EngineUnavailableError, match=r"fp8 needs .* \(8, 9\); the NVIDIA A100 has \(8, 0\)"):
        open_torch(fp8_bundle.path / "fp8.onnx", "fp8", 1, 1, 4)


def test_a_gpu_that_torch_cannot_use_is_an_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitserve.service.machine.gpus", lambda: ["0"])
    with pytest.raises(EngineUnavailableError, match="has a GPU, but torch cannot use it"):
        open_torch(bundle.path / "model.onnx", "bf16", 1, 1, 4)
    with pytest.raises(EngineUnavailableError, match="torch does not support int8; it supports fp32, bf16, fp16, fp8"):
        open_torch(bundle.path / "model.onnx", "int8", 1, 1, 4)


def test_the_attention_kernel_is_one_that_runs_here(bundle: Bundle) -> None:
    graph = TorchGraph(bundle.path / "model.onnx").eval()
    backend = fastest_attention(graph, torch.from_numpy(bundle.golden().pixels[:2]))
    assert backend.name in ("FLASH_ATTENTION", "MATH"), "a CPU has no others"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler
def test_compiled_torch_computes_the_same(bundle: Bundle) -> None:
    golden = bundle.golden()
    engine = open_torch(bundle.path / "model.onnx", "fp32", 1, 1, 8, compiled=True)
    expected = Outputs(*(array[:8] for array in golden.reference))
    assert compare(engine.run(0, golden.pixels[:8]), expected).failure("fp32") is None
    engine.close()
