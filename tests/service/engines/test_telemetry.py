"""Nothing reports to the makers of OpenVINO and NNCF."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SOURCES = [
    path
    for directory in ("service", "export", "model", "bench", "benchmarks", "vitserve/cli")
    for path in sorted((ROOT / directory).rglob("*.py"))
    if "peers" not in path.parts  # other servers run in virtual environments of their own
]


def unprotected(source: str) -> list[int]:
    """Lines that import openvino or nncf without a call of disable_telemetry() before them in the same function."""
    return [line for scope in scopes(ast.parse(source)) for line in unprotected_in(scope)]


def scopes(tree: ast.Module) -> Iterator[list[ast.stmt]]:
    yield tree.body
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.body


def unprotected_in(body: list[ast.stmt]) -> list[int]:
    lines, disabled = list[int](), False
    for node in statements(body):
        match node:
            case ast.Expr(ast.Call(ast.Name("disable_telemetry"))):
                disabled = True
            case ast.Import(names) if any(alias.name.split(".")[0] in ("openvino", "nncf") for alias in names):
                lines += [] if disabled else [node.lineno]
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in ("openvino", "nncf"):
                lines += [] if disabled else [node.lineno]
    return lines


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """In order, with those of nested blocks, without those of nested functions and of ``if TYPE_CHECKING``."""
    for node in body:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, field, []))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_telemetry_is_disabled_before_every_import(path: Path) -> None:
    assert unprotected(path.read_text()) == []


def test_an_unprotected_import_is_found() -> None:
    program = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import openvino
def protected():
    disable_telemetry()
    with quiet():
        import nncf
def unprotected():
    try:
        from openvino import opset13
    except ImportError:
        pass
    disable_telemetry()
def other():
    import nncf.quantization
"""
    assert unprotected(program) == [11, 16]
