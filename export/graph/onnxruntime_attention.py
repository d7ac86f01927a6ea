"""The reference graph with the attention operator for which ONNX Runtime has the fastest CPU kernel.

ONNX Runtime's CPU provider computes the Attention operator of opset 23 step by step. It has one flash-attention kernel
for com.microsoft's MultiHeadAttention. OpenVINO and TensorRT fuse the standard operator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase


class _ToMultiHeadAttention(RewriteRuleClassBase):
    """Matches Attention on [n, tokens, width] without a mask, a scale or any attribute besides the number of heads."""

    def pattern(self, op: Any, query: Any, key: Any, value: Any) -> Any:
        return op.Attention(query, key, value, _allow_other_attributes=True, _outputs=["mixed"])

    def check(self, context: Any, query: Any, key: Any, value: Any, mixed: Any, **_: Any) -> MatchResult:  # type: ignore[override]
        attributes = mixed.producer().attributes
        result = MatchResult()
        if (
            set(attributes) != {"q_num_heads", "kv_num_heads"}
            or attributes["q_num_heads"].value != attributes["kv_num_heads"].value
        ):
            return result.fail(f"MultiHeadAttention cannot express the attributes {sorted(attributes)}")
        return result

    def rewrite(self, op: Any, query: Any, key: Any, value: Any, mixed: Any) -> Any:
        heads = mixed.producer().attributes["q_num_heads"].value
        return op.MultiHeadAttention(query, key, value, num_heads=heads, _domain="com.microsoft", _version=1)


def write_onnxruntime_graph(reference_graph: Path, path: Path) -> None:
    """Writes ONNX Runtime's form of ``reference_graph`` to ``path``, in the same directory. Both share the weights."""
    model = rewrite(ir.load(reference_graph), pattern_rewrite_rules=[_ToMultiHeadAttention.rule()])  # type: ignore[no-untyped-call]
    ir.save(model, path)
