"""Optimizations of a traced graph of any architecture. Each one is exact up to rounding.

They need the operators of the graph alone, where export/graph/optimize.py needs to know the network:

- Pixel normalization becomes part of the first convolution, unless it pads.
- A constant factor after a projection, such as layer scale, becomes part of the projection.
- Attention on [n, heads, tokens, width of a head] becomes Attention on [n, tokens, width], which splits the heads
  itself. ONNX Runtime then has a fused kernel for it, and OpenVINO fuses it too.
- If only the first token is read at the end, the last layers do not compute the others (token_pass.py).
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vitserve.export.graph.initializers import add_initializer
from vitserve.export.graph.token_pass import skip_unread_tokens

Array = npt.NDArray[Any]
log = logging.getLogger(__name__)


def optimize_verified(path: Path, is_equal: Callable[[Path], bool]) -> bool:
    """Applies the passes, and keeps the result only if ``is_equal``. Returns whether it was kept.

    A result that a pass or ``is_equal`` cannot compute or run is dropped too.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        optimized = Path(temporary) / path.name
        for name in (path.name, f"{path.name}.data"):
            if (path.parent / name).exists():
                shutil.copyfile(path.parent / name, Path(temporary) / name)
        try:
            if not any(optimize_graph(optimized).values()) or not is_equal(optimized):
                return False
        except Exception:  # ONNX Runtime's errors have no common base class
            log.warning("the graph is not optimized", exc_info=True)
            return False
        for file in Path(temporary).iterdir():
            shutil.move(file, path.parent / file.name)
    return True


def optimize_graph(path: Path) -> dict[str, int]:
    """Applies the passes to the graph at ``path``, whose weights are in ``path``.data.

    Returns how often each pass matched.
    """
    model = ir.load(path)
    passes: dict[str, Callable[[ir.Graph], int]] = {
        "normalization": fold_normalization,
        "scale": fold_scale,
        "attention": join_heads,
        "tokens": skip_unread_tokens,
    }
    counts = dict[str, int]()
    for name, apply in passes.items():
        counts[name] = apply(model.graph)
        model.graph.sort()
        RemoveUnusedNodesPass()(model)  # the next pass looks at the users of a value
    if any(counts.values()):
        save_graph(model, path)
    return counts


def save_graph(model: ir.Model, path: Path) -> None:
    """Writes the graph to ``path`` and its weights to ``path``.data, which the graph may have been loaded from."""
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        fresh = Path(temporary) / path.name
        ir.save(model, fresh, external_data=f"{path.name}.data")
        for file in sorted(Path(temporary).iterdir()):
            shutil.move(file, path.parent / file.name)


def fold_normalization(graph: ir.Graph) -> int:
    """Cast → Mul → Add → Transpose → Conv without padding: Cast → Transpose → Conv with other weights."""
    for conv in list(graph):
        chain = _producers(conv, "Transpose", "Add", "Mul")
        if conv.op_type != "Conv" or chain is None or any(_values(conv, "pads")) or _text(conv, "auto_pad") != "NOTSET":
            continue
        transpose, add, mul = chain
        if len(transpose.outputs[0].uses()) > 1 or len(add.outputs[0].uses()) > 1:
            continue  # another operator reads the normalized image
        scale, shift, weight = constant(mul.inputs[1]), constant(add.inputs[1]), constant(conv.inputs[1])
        if scale is None or shift is None or weight is None or weight.shape[1] != scale.size:
            continue
        kernel = weight.astype(np.float64)
        bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 else np.zeros(len(kernel))
        if bias is None:
            continue
        bias = bias + (kernel * shift.reshape(1, -1, 1, 1)).sum((1, 2, 3))
        kernel = kernel * scale.reshape(1, -1, 1, 1)
        conv.replace_input_with(1, add_initializer(graph, "folded_weight", kernel.astype(np.float32)))
        if len(conv.inputs) < 3:
            conv.resize_inputs(3)
        conv.replace_input_with(2, add_initializer(graph, "folded_bias", bias.astype(np.float32)))
        transpose.replace_input_with(0, mul.inputs[0])
        return 1
    return 0


def fold_scale(graph: ir.Graph) -> int:
    """Mul by a constant vector after MatMul + Add, or after MatMul: into the weights."""
    folded = 0
    for mul in [node for node in graph if node.op_type == "Mul"]:
        for index in (0, 1):
            scale, scaled = constant(mul.inputs[index]), mul.inputs[1 - index]
            if scale is not None and scale.ndim == 1 and scaled is not None and _fold_into(graph, mul, scale, scaled):
                folded += 1
                break
    return folded


def _fold_into(graph: ir.Graph, mul: ir.Node, scale: Array, scaled: ir.Value) -> bool:
    last = scaled.producer()
    add = last if last is not None and last.op_type == "Add" else None
    matmul = (
        last
        if add is None
        else next(
            (value.producer() for value in add.inputs if value is not None and _is(value.producer(), "MatMul")), None
        )
    )
    if matmul is None or matmul.op_type != "MatMul" or len(scaled.uses()) != 1 or scaled.is_graph_output():
        return False
    weight = constant(matmul.inputs[1])
    if weight is None or weight.ndim != 2 or weight.shape[1] != scale.size:
        return False
    if add is not None:
        index = next(index for index in (0, 1) if add.inputs[index] is not matmul.outputs[0])
        bias = constant(add.inputs[index])
        if bias is None or bias.shape != scale.shape or len(matmul.outputs[0].uses()) != 1:
            return False
        add.replace_input_with(index, add_initializer(graph, f"{mul.outputs[0].name}_bias", bias * scale))
    matmul.replace_input_with(1, add_initializer(graph, f"{mul.outputs[0].name}_weight", weight * scale))
    replace_uses(mul.outputs[0], scaled)
    return True


def join_heads(graph: ir.Graph) -> int:
    """Attention whose inputs come from [n, tokens, width], and whose output is reshaped to it again."""
    joined = 0
    for node in [node for node in graph if node.op_type == "Attention"]:
        shape, output = node.inputs[0].shape if node.inputs[0] is not None else None, _joined_output(node)
        if (
            shape is None
            or len(shape) != 4
            or output is None
            or not all(_masks_nothing(value) for value in node.inputs[3:])
        ):
            continue
        heads, width = shape[1], shape[3]
        if not isinstance(heads, int) or not isinstance(width, int) or not _is_plain(node, width):
            continue
        sources = [_joined_input(graph, value, node) for value in node.inputs[:3]]
        if any(source is None for source in sources):
            continue
        fused = ir.node("Attention", sources, {"q_num_heads": heads, "kv_num_heads": heads}, name=f"{node.name}_joined")
        like(fused.outputs[0], output, f"{node.outputs[0].name}_joined")
        graph.insert_before(node, fused)
        replace_uses(output, fused.outputs[0])
        joined += 1
    return joined


def _is_plain(node: ir.Node, width: int) -> bool:
    """Without a causal mask, a cap, or a scale other than the usual one."""
    scale = node.attributes["scale"].as_float() if "scale" in node.attributes else width**-0.5
    flags = [node.attributes[name].value for name in ("is_causal", "softcap") if name in node.attributes]
    return abs(scale - width**-0.5) < 1e-6 and not any(flags)


def _masks_nothing(mask: ir.Value | None) -> bool:
    """Whether there is no mask, or one that is true everywhere, which transformers makes."""
    producer = None if mask is None else mask.producer()
    values = constant(producer.inputs[0] if producer is not None and producer.op_type == "Expand" else mask)
    return mask is None or (values is not None and values.dtype == np.bool_ and bool(values.all()))


def _joined_output(node: ir.Node) -> ir.Value | None:
    """Attention → Transpose → Reshape: the result of the Reshape."""
    transpose = _only_user(node.outputs[0], "Transpose")
    if transpose is None or _values(transpose, "perm") != [0, 2, 1, 3]:
        return None
    reshape = _only_user(transpose.outputs[0], "Reshape")
    return reshape.outputs[0] if reshape is not None and len(reshape.outputs[0].shape or ()) == 3 else None


def _joined_input(graph: ir.Graph, value: ir.Value | None, before: ir.Node) -> ir.Value | None:
    """[n, tokens, width], of which ``value`` is the form [n, heads, tokens, width of a head]."""
    node = None if value is None else value.producer()
    if node is None or value is None:
        return None
    if node.op_type == "Transpose" and _values(node, "perm") == [0, 2, 1, 3]:
        reshape = node.inputs[0].producer() if node.inputs[0] is not None else None
        source = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
        return source if source is not None and len(source.shape or ()) == 3 else None
    chain = _producers(node, "Slice", "Transpose", "Reshape") if node.op_type == "Squeeze" else None
    if chain is None or _values(chain[1], "perm") != [2, 0, 3, 1, 4]:  # one projection for several of the three
        return None
    start, source = constant(chain[0].inputs[1]), chain[2].inputs[0]
    if start is None or source is None or source.shape is None or len(source.shape) != 3:
        return None
    batch, tokens, width = source.shape
    parts = chain[1].outputs[0].shape[0] if chain[1].outputs[0].shape is not None else None
    if not isinstance(width, int) or not isinstance(parts, int):
        return None
    size = width // parts
    bounds = (int(start[0]) * size, (int(start[0]) + 1) * size, 2)
    limits = [
        add_initializer(graph, f"{value.name}_{bound}_{at}", np.array([bound])) for at, bound in enumerate(bounds)
    ]
    part = ir.node("Slice", [source, *limits], name=f"{value.name}_part")
    part.outputs[0].name, part.outputs[0].type = f"{value.name}_flat", source.type
    part.outputs[0].shape = ir.Shape([batch, tokens, size])
    graph.insert_before(before, part)
    return part.outputs[0]


def constant(value: ir.Value | None) -> Array | None:
    tensor = None if value is None else value.const_value
    return None if tensor is None else tensor.numpy()


def replace_uses(old: ir.Value, new: ir.Value) -> None:
    for user, index in tuple(old.uses()):
        user.replace_input_with(index, new)


def like(value: ir.Value, template: ir.Value, name: str) -> None:
    """Gives a new value the type and shape of another one."""
    value.name, value.type, value.shape = name, template.type, template.shape


def _producers(node: ir.Node, *kinds: str) -> list[ir.Node] | None:
    """The nodes before ``node``, along first inputs, if they are of these kinds."""
    chain = list[ir.Node]()
    for kind in kinds:
        before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if before is None or before.op_type != kind:
            return None
        chain.append(before)
        node = before
    return chain


def _only_user(value: ir.Value, kind: str) -> ir.Node | None:
    users = [user for user, _ in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == kind and not value.is_graph_output() else None


def _is(node: ir.Node | None, kind: str) -> bool:
    return node is not None and node.op_type == kind


def _values(node: ir.Node, name: str) -> list[int]:
    return list(node.attributes[name].as_ints()) if name in node.attributes else []


def _text(node: ir.Node, name: str) -> str:
    return node.attributes[name].as_string() if name in node.attributes else "NOTSET"
