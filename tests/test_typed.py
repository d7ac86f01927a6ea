"""The graphs that TensorRT is given: one type throughout, as it demands, and the numbers of their source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from export.lean import Lean
from export.to_onnx import trace
from export.typed import typed
from model.bundle import Bundle
from model.config import ViTConfig
from model.parity import TOLERANCE, Outputs, compare
from model.preprocess import Preprocessing
from tests.conftest import TINY, network

FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
TYPES = {"bf16": onnx.TensorProto.BFLOAT16, "fp16": onnx.TensorProto.FLOAT16}
RELATIVES = {
    "distilled, layer scale": replace(TINY, distillation_token=True, distillation_head=True, layer_scale=True, qk_norm=True),
    "hybrid, axial, mean": replace(TINY, image_size=32, stem=(8, 16), attention="axial", pool="mean", class_token=False, norm_after_pool=True, swiglu=True),
}


@pytest.fixture(scope="module", params=RELATIVES)
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ViTConfig, Path]:
    config, path = RELATIVES[request.param], tmp_path_factory.mktemp("typed") / "model.onnx"
    trace(Lean(network(config), Preprocessing(config.image_size)).eval(), config.image_size, path)
    return config, path


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_operand_has_one_type_and_attention_stays_one_operator(traced: tuple[ViTConfig, Path], precision: Literal["bf16", "fp16"]) -> None:
    config, path = traced
    model = ir.to_proto(typed(path, precision))
    onnx.checker.check_model(model, full_check=True)
    kinds = {each.name: each.type.tensor_type.elem_type for each in [*model.graph.value_info, *model.graph.input, *model.graph.output]}
    kinds |= {each.name: each.data_type for each in model.graph.initializer}
    for node in model.graph.node:
        operands = {kinds[each] for each in [*node.input, *node.output] if each} & FLOATS
        if node.op_type != "Cast":
            assert len(operands) <= 1, f"{node.op_type} {node.name} mixes {operands}"
            inner = onnx.TensorProto.FLOAT if (node.op_type, precision) == ("LayerNormalization", "fp16") else TYPES[precision]
            assert operands <= {inner}, f"{node.op_type} {node.name} is in {operands}"
    attentions = [node for node in model.graph.node if node.op_type == "Attention"]
    assert len(attentions) == config.depth
    for node in attentions:
        attributes = {each.name: each.i for each in node.attribute}
        assert (len(node.output), attributes["q_num_heads"]) == (1, config.heads)
        assert attributes.get("softmax_precision", 0) == (onnx.TensorProto.FLOAT if precision == "fp16" else 0)
    assert not {"Softmax", "Shape"} & {node.op_type for node in model.graph.node if any(each in node.output for a in attentions for each in a.input)}
    assert [(each.name, each.type.tensor_type.elem_type) for each in model.graph.output] == [("logits", 1), ("embedding", 1)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_numbers_are_the_sources(bundle: Bundle, precision: Literal["bf16", "fp16"]) -> None:
    """By the evaluator that ONNX defines itself with: no runtime on a CPU has bf16 for all of this."""
    golden = bundle.golden()
    model = ir.to_proto(typed(bundle.path / "model.onnx", precision))
    outputs = Outputs(*(np.asarray(each) for each in ReferenceEvaluator(model).run(None, {"pixels": golden.pixels})))
    assert {each.dtype for each in outputs} == {np.dtype(np.float32)}
    parity = compare(outputs, golden.reference)
    assert parity.failure(precision) is None
    assert parity.logits > TOLERANCE["fp32"] / 10, "that is float32's accuracy: nothing was rounded"
