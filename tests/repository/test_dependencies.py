"""pyproject.toml declares every third-party package that the source imports."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.support.paths import ROOT

WHEEL = ("service", "model", "export", "bench", "vitserve")
PEERS = ROOT / "benchmarks" / "peers"  # run in environments of their own
# Packages that a declared dependency documents as part of its own interface.
PART_OF = {"pydantic-core": "pydantic", "starlette": "fastapi", "triton": "torch", "uvloop": "uvicorn"}
# Imported only if the user has it, to export its networks; the error message names the extra.
OPTIONAL = {"timm", "torchvision", "transformers"}
OURS = {"vitserve", "benchmarks", "_typeshed"}  # mypy has _typeshed


def sources(*directories: str) -> list[Path]:
    paths = [path for directory in directories for path in sorted((ROOT / directory).rglob("*.py"))]
    return [path for path in paths if PEERS not in path.parents]


def imported_packages(source: str) -> set[str]:
    """The top-level names of all absolute imports, wherever they are in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def distribution_names(requirements: list[str]) -> set[str]:
    return {normalized(re.split(r"[\s\[<>=!~;]", requirement)[0]) for requirement in requirements}


@cache
def installed() -> Mapping[str, list[str]]:
    return packages_distributions()


@cache
def distributions_of(package: str) -> set[str]:
    """The distributions that install a package; for one that is not installed, its own name."""
    names = {normalized(name) for name in installed().get(package, [package])}
    return {PART_OF.get(name, name) for name in names}


def undeclared(packages: set[str], declared: set[str]) -> set[str]:
    third_party = packages - sys.stdlib_module_names - OURS - OPTIONAL
    return {package for package in third_party if not distributions_of(package) & declared}


@pytest.fixture(scope="module")
def declared() -> dict[str, set[str]]:
    """The declared distributions of the base dependencies, under "", and of each extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    return {
        name: distribution_names(requirements) for name, requirements in {"": project["dependencies"], **extras}.items()
    }


def test_imports_of_the_wheel_are_declared(declared: dict[str, set[str]]) -> None:
    users = set().union(*(names for extra, names in declared.items() if extra != "dev"))
    missing = {str(path): undeclared(imported_packages(path.read_text()), users) for path in sources(*WHEEL)}
    assert {path: packages for path, packages in missing.items() if packages} == {}


def test_imports_of_the_benchmarks_are_declared(declared: dict[str, set[str]]) -> None:
    packages = set().union(*(imported_packages(path.read_text()) for path in sources("benchmarks")))
    assert not undeclared(packages, set().union(*declared.values()))


def test_imports_of_export_are_declared_by_its_extras(declared: dict[str, set[str]]) -> None:
    """export/tensorrt/builder.py needs the extra ``tensorrt`` or ``tensorrt-rtx``."""
    paths = [path for path in sources("export") if path != ROOT / "export" / "tensorrt" / "builder.py"]
    packages = set().union(*(imported_packages(path.read_text()) for path in paths))
    extras = set().union(*(declared.get(extra, set()) for extra in ("", "export", "heads", "int8", "onnxruntime")))
    assert not undeclared(packages, extras)


def test_undeclared_import_is_noticed(declared: dict[str, set[str]]) -> None:
    source = "import numpy\ndef late():\n    from hypothesis.strategies import text\n"
    assert undeclared(imported_packages(source), declared[""]) == {"hypothesis"}
