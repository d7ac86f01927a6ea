"""The reference graph with the attention operator for which ONNX Runtime has the fastest CPU kernel.

ONNX Runtime's CPU provider computes the Attention operator of opset 23 step by step. It has one flash-attention kernel
for com.microsoft's MultiHeadAttention. OpenVINO and TensorRT fuse the standard operator.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnxscript.rewriter import pattern, rewrite


class _ToMultiHeadAttention(pattern.RewriteRuleClassBase):
    """Matches Attention on [n, tokens, width] without a mask, a scale or any attribute besides the number of heads."""

    def pattern(self, op, query, key, value):  # type: ignore[no-untyped-def]  # noqa: ANN001
        return op.Attention(query, key, value, _allow_other_attributes=True, _outputs=["mixed"])

    def check(self, context, query, key, value, mixed, **_):  # type: ignore[no-untyped-def,override]  # noqa: ANN001
        attributes = mixed.producer().attributes
        result = pattern.MatchResult()
        if (
            set(attributes) != {"q_num_heads", "kv_num_heads"}
            or attributes["q_num_heads"].value != attributes["kv_num_heads"].value
        ):
            return result.fail(f"MultiHeadAttention cannot express the attributes {sorted(attributes)}")
        return result

    def rewrite(self, op, query, key, value, mixed):  # type: ignore[no-untyped-def]  # noqa: ANN001
        heads = mixed.producer().attributes["q_num_heads"].value
        return op.MultiHeadAttention(query, key, value, num_heads=heads, _domain="com.microsoft", _version=1)


def write_onnxruntime_graph(reference_graph: Path, path: Path) -> None:
    """Writes ONNX Runtime's form of ``reference_graph`` to ``path``, in the same directory. Both share the weights."""
    model = rewrite(ir.load(reference_graph), pattern_rewrite_rules=[_ToMultiHeadAttention.rule()])  # type: ignore[no-untyped-call]
    ir.save(model, path)
