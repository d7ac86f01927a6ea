"""Limits that keep the code readable: sizes of files, classes, functions and directories, and complete annotations."""

from __future__ import annotations

import ast
import statistics
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SOURCE = ("model", "export", "service", "bench", "benchmarks", "vitserve/cli", "vitserve/client")
MOST_LINES_IN_A_FILE = 300
MOST_LINES_IN_A_CLASS = 220
MEDIAN_LINES_IN_A_FUNCTION = 7
MOST_FILES_IN_A_DIRECTORY = 14
PRONOUNS = {"again", "each", "either", "every", "found", "here", "it", "its", "one"}
PRONOUNS |= {"other", "others", "ours", "own", "theirs", "them", "there", "they"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*directories: str) -> list[Path]:
    return [path for directory in directories for path in sorted((ROOT / directory).rglob("*.py"))]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions(path: Path) -> list[Function]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, Function)]


def variables(function: ast.AST) -> set[str]:
    """The names of arguments and variables in a function, those of comprehensions and exceptions included."""
    nodes = list(ast.walk(function))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
    return stored | arguments | {str(node.name) for node in nodes if isinstance(node, ast.ExceptHandler)}


def lines_of(node: ast.ClassDef | Function) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_no_file_is_too_long() -> None:
    sizes = {str(path): len(path.read_text().splitlines()) for path in python_files(*SOURCE, "tests")}
    assert not {path: size for path, size in sizes.items() if size > MOST_LINES_IN_A_FILE}


def test_no_class_is_too_long() -> None:
    classes = [(path, node) for path in python_files(*SOURCE, "tests") for node in ast.walk(tree(path))]
    sizes = {f"{path}:{node.name}": lines_of(node) for path, node in classes if isinstance(node, ast.ClassDef)}
    assert not {name: size for name, size in sizes.items() if size > MOST_LINES_IN_A_CLASS}


def test_functions_are_short() -> None:
    sizes = [lines_of(function) for path in python_files(*SOURCE) for function in functions(path)]
    assert statistics.median(sizes) <= MEDIAN_LINES_IN_A_FUNCTION


@pytest.mark.parametrize("directory", ["export", "model", "vitserve/cli"])
def test_variables_are_nouns(directory: str) -> None:
    named = {path: set().union(*map(variables, functions(path))) for path in python_files(directory)}
    assert not {str(path): names & PRONOUNS for path, names in named.items() if names & PRONOUNS}


def test_no_directory_is_crowded() -> None:
    """Hidden files and the empty __init__.py do not count. Tests and documents are apart."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [Path(name) for name in listed.stdout.splitlines() if not name.startswith(("tests/", "docs/"))]
    visible = [path for path in paths if not path.name.startswith(".") and path.name != "__init__.py"]
    counts = Counter(str(path.parent) for path in visible)
    assert not {directory: count for directory, count in counts.items() if count > MOST_FILES_IN_A_DIRECTORY}


def test_every_function_is_typed() -> None:
    untyped = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
        for path in python_files(*SOURCE, "tests")
        for function in functions(path)
        if not is_typed(function)
    ]
    assert not untyped


def is_typed(function: Function) -> bool:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    arguments += [extra for extra in (function.args.vararg, function.args.kwarg) if extra is not None]
    named = [argument for argument in arguments if argument.arg not in ("self", "cls")]
    return function.returns is not None and all(argument.annotation is not None for argument in named)
