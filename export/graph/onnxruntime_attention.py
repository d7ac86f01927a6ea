"""The reference graph in the words that a runtime has the fastest kernels for.

ONNX Runtime's CPU provider computes opset 23's Attention step by step, and com.microsoft's MultiHeadAttention in one flash kernel. OpenVINO and TensorRT
fuse the reference operator as it is.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnxscript.rewriter import pattern, rewrite


class _ToMultiHeadAttention(pattern.RewriteRuleClassBase):
    """Attention on [n, tokens, width] without mask, scale or anything else that is not said with the number of heads."""

    def pattern(self, op, query, key, value):  # type: ignore[no-untyped-def]  # noqa: ANN001
        return op.Attention(query, key, value, _allow_other_attributes=True, _outputs=["mixed"])

    def check(self, context, query, key, value, mixed, **_):  # type: ignore[no-untyped-def,override]  # noqa: ANN001
        attributes = mixed.producer().attributes
        result = pattern.MatchResult()
        if (
            set(attributes) != {"q_num_heads", "kv_num_heads"}
            or attributes["q_num_heads"].value != attributes["kv_num_heads"].value
        ):
            return result.fail(f"it has attributes {sorted(attributes)}")
        return result

    def rewrite(self, op, query, key, value, mixed):  # type: ignore[no-untyped-def]  # noqa: ANN001
        heads = mixed.producer().attributes["q_num_heads"].value
        return op.MultiHeadAttention(query, key, value, num_heads=heads, _domain="com.microsoft", _version=1)


def for_onnxruntime(reference_graph: Path, path: Path) -> None:
    """Writes the graph at ``reference`` to ``path``, in the same directory: the weights that lie beside the one are the other's too."""
    model = rewrite(ir.load(reference_graph), pattern_rewrite_rules=[_ToMultiHeadAttention.rule()])  # type: ignore[no-untyped-call]
    ir.save(model, path)
