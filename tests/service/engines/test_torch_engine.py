"""torch as an engine: the bundle's graph, operator by operator, for every family; what torch alone decides."""

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
from torch import nn

from tests.support.images import random_image
from tests.support.networks import TINY, network
from vitserve.export.graph.optimize import OptimizedNetwork
from vitserve.export.graph.reference import ReferenceNetwork
from vitserve.export.graph.trace import trace
from vitserve.model.arrays import Outputs
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.parity import compare
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ResNetConfig, ViTConfig
from vitserve.model.network.resnet import ResNet
from vitserve.service.engines.engine import EngineOptions, EngineUnavailableError
from vitserve.service.engines.selection import open_engine
from vitserve.service.engines.torch.engine import open_torch, quickest_attention
from vitserve.service.engines.torch.fusion import ADD_NORM, LINEAR, LINEAR_GELU, Step, joined
from vitserve.service.engines.torch.interpreter import OPERATORS, TorchGraph

FAMILIES: dict[str, ViTConfig | ResNetConfig] = {
    "distilled, layer scale": replace(
        TINY, distillation_token=True, distillation_head=True, layer_scale=True, qk_norm=True
    ),
    "registers, SwiGLU": replace(TINY, registers=3, swiglu=True),
    "quick GELU, pre-logits": replace(TINY, activation="quick_gelu", representation_width=24),
    "hybrid, axial, mean": replace(
        TINY, image_size=32, stem=(8, 16), attention="axial", pool="mean", class_token=False, norm_after_pool=True
    ),
    "local": replace(TINY, image_size=32, attention="local", window=3),
    "R + ViT": replace(TINY, image_size=64, patch_size=16, resnet=(1, 1, 1)),
    "ResNet": ResNetConfig(64, (1, 1), 1, classes=7),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_of_every_family_is_what_torch_computes(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]
    made: nn.Module = network(config) if isinstance(config, ViTConfig) else ResNet(config).eval()
    trace(OptimizedNetwork(made, Preprocessing(config.image_size)).eval(), config.image_size, tmp_path / "model.onnx")  # type: ignore[arg-type]  # a Network
    images = torch.from_numpy(
        np.stack([np.asarray(random_image(config.image_size, config.image_size, seed)) for seed in range(3)])
    )
    with torch.inference_mode():
        ours = TorchGraph(tmp_path / "model.onnx").eval()(images)
        source = ReferenceNetwork(made, Preprocessing(config.image_size)).eval()(images)  # type: ignore[arg-type]
    assert (
        compare(Outputs(*(each.numpy() for each in ours)), Outputs(*(each.numpy() for each in source))).failure("fp32")
        is None
    )


def test_nothing_is_read_from_the_device_while_it_runs(tmp_path: Path) -> None:
    """What a captured graph may not do. Tensors on torch's meta device have no content that could be read."""
    config = FAMILIES["R + ViT"]
    assert isinstance(config, ViTConfig)
    trace(
        OptimizedNetwork(network(config), Preprocessing(config.image_size)).eval(),
        config.image_size,
        tmp_path / "model.onnx",
    )
    size = config.image_size
    logits, _ = TorchGraph(tmp_path / "model.onnx").to("meta")(
        torch.zeros(2, size, size, 3, dtype=torch.uint8, device="meta")
    )
    assert logits.shape == (2, config.classes)


def test_an_operator_that_is_not_known_is_named(bundle: Bundle, tmp_path: Path) -> None:
    model = onnx.load(bundle.path / "model.onnx")
    model.graph.node.append(onnx.helper.make_node("NonZero", ["logits"], ["where"]))
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(EngineUnavailableError, match=r"no torch call is known for NonZero of odd\.onnx"):
        TorchGraph(tmp_path / "odd.onnx")


def test_steps_are_joined_where_nobody_else_reads_what_is_between_them() -> None:
    def step(operator: str, inputs: list[str | None], output: str) -> Step:
        return Step(operator, inputs, {}, [output])

    product, biased, active = step("MatMul", ["x", "w"], "p"), step("Add", ["p", "b"], "l"), step("Gelu", ["l"], "g")
    weights = {"w": 2, "b": 1, "scale": 1, "positions": 3}
    assert joined([product, biased, active], weights, ["g"]) == [Step(LINEAR_GELU, ["x", "w", "b"], {}, ["g"])]
    assert joined([product, biased, active], weights, ["l", "g"]) == [
        Step(LINEAR, ["x", "w", "b"], {}, ["l"]),
        active,
    ], "the graph's output stays"
    other = step("Sqrt", ["p"], "s")
    assert joined([product, other, biased], weights, ["l", "s"]) == [product, other, biased], (
        "a product that is read twice stays"
    )
    assert joined([product, step("Add", ["p", "positions"], "l")], weights, ["l"])[0] == product, (
        "only a vector is a bias"
    )

    total, norm, branch = (
        step("Add", ["y", "z"], "t"),
        step("LayerNormalization", ["t", "scale", "b"], "n"),
        step("Mul", ["z", "z"], "m"),
    )
    assert joined([total, branch, norm], weights, ["n", "m"]) == [
        Step(ADD_NORM, ["y", "z", "scale", "b"], {}, ["t", "n"]),
        branch,
    ]
    assert joined([total, norm, norm._replace(outputs=["k"])], weights, ["n", "k"])[0] == total, (
        "the sum of two norms stays"
    )
    spread = step("Add", ["y", "positions"], "t")
    assert joined([spread, norm], weights, ["n"]) == [spread, norm], "positions are spread over the batch"


def test_patches_that_do_not_overlap_are_projected_as_a_convolution_does() -> None:
    images, weight, bias = torch.randn(2, 12, 6, 3).permute(0, 3, 1, 2), torch.randn(5, 3, 4, 2), torch.randn(5)
    attributes = {"strides": (4, 2), "dilations": (1, 1), "group": 1}
    made = OPERATORS["Conv"]([images, weight, bias], attributes)
    torch.testing.assert_close(made, torch.nn.functional.conv2d(images, weight, bias, (4, 2)))
    overlapping = OPERATORS["Conv"]([images, weight, bias], attributes | {"strides": (2, 2)})
    torch.testing.assert_close(overlapping, torch.nn.functional.conv2d(images, weight, bias, (2, 2)))


def test_the_kernel_for_a_sum_and_its_norm_computes_both() -> None:
    """By Triton's interpreter, in a process of its own, which it has to be chosen for before Triton is imported. bf16 it rounds as no GPU does."""
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    program = """
import torch
from vitserve.service.engines.torch.kernels import add_norm
for kind in (torch.float32, torch.float16):
    x, y, weight, bias = (torch.randn(*shape).to(kind) for shape in ((2, 5, 96), (2, 5, 96), (96,), (96,)))
    total, normed = add_norm(x, y, weight, bias, 1e-6)
    assert torch.equal(total, x + y)
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(x + y, (96,), weight, bias, 1e-6))
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})


def test_it_serves_a_bundle_only_when_asked_for(bundle: Bundle) -> None:
    assert open_engine(bundle, EngineOptions()).engine.name != "torch"
    opened = open_engine(bundle, EngineOptions(engine="torch", precision="bf16"))
    assert (opened.engine.name, opened.engine.precision) == ("torch", "bf16")
    assert opened.parity.failure("bf16") is None


def test_a_gpu_that_torch_does_not_see_is_not_replaced_by_the_cpu(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitserve.service.machine.gpus", lambda: ["0"])
    with pytest.raises(EngineUnavailableError, match="there is a GPU, but this torch sees none"):
        open_torch(bundle.path / "model.onnx", "bf16", 1, 1, 4)
    with pytest.raises(EngineUnavailableError, match="torch runs in fp32, bf16, fp16, not in int8"):
        open_torch(bundle.path / "model.onnx", "int8", 1, 1, 4)


def test_the_kernel_for_attention_is_chosen_among_those_that_run(bundle: Bundle) -> None:
    graph = TorchGraph(bundle.path / "model.onnx").eval()
    assert quickest_attention(graph, torch.from_numpy(bundle.golden().pixels[:2])).name in (
        "FLASH_ATTENTION",
        "MATH",
    ), "a CPU has no others"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, about torch
def test_compiled_it_computes_the_same(bundle: Bundle) -> None:
    golden = bundle.golden()
    engine = open_torch(bundle.path / "model.onnx", "fp32", 1, 1, 8, compiled=True)
    outputs = engine.run(0, golden.pixels[:8])
    assert compare(outputs, Outputs(*(each[:8] for each in golden.reference))).failure("fp32") is None
    engine.close()
