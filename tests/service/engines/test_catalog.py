"""The catalog is the only list of engines: everything else follows from it."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from tests.support.paths import ROOT
from vitserve.model.arrays import Precision
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.plan import PlanReport
from vitserve.service.engines import catalog, selection
from vitserve.service.engines.catalog import ENGINES, PRECISIONS, EngineKind, wants_gpu_workers
from vitserve.service.engines.construct import construct_engine, not_installed
from vitserve.service.engines.engine import Engine, EngineOptions, EngineUnavailableError
from vitserve.service.engines.openvino_engine import OpenVinoEngine
from vitserve.service.engines.selection import NoEngineError, open_engine, runs_on_gpu
from vitserve.service.settings import Settings

EDITS = {"service/engines/catalog.py", "service/engines/construct.py"}  # what a new engine edits, beside its own file


def strings(path: Path) -> set[str]:
    return {
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def own_names(path: Path) -> set[str]:
    """The engines that the classes of this file implement: ``name = "openvino"``."""
    return {
        statement.value.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
        if isinstance(statement.value.value, str)
    }


def test_a_new_engine_needs_two_edits_besides_its_own_file() -> None:
    """Only the catalog, the constructor and the engine itself name an engine as a string."""
    named = {
        str(path.relative_to(ROOT)): names
        for path in sorted((ROOT / "service").rglob("*.py"))
        if (names := (strings(path) & ENGINES.keys()) - own_names(path))
    }
    assert named.keys() >= EDITS
    assert {path: names for path, names in named.items() if path not in EDITS} == {
        "service/engines/tensorrt/provider.py": {"tensorrt"},  # the module of that name
        "service/settings.py": {"torch"},  # for torch_compile
        "service/http_worker/openapi/examples.py": {"openvino"},  # an example of a response
    }


class Npu(OpenVinoEngine):
    name = "npu"


NPU = EngineKind("npu_runtime", "npu", cpu=("bf16", "fp32"))


def test_a_row_and_a_case_add_an_engine(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its row, the new engine is selected. With its case too, it serves."""
    monkeypatch.setitem(ENGINES, "npu", NPU)
    artifact = dataclasses.replace(bundle.manifest.artifacts[0], engine="npu", precision="fp32")
    with_npu = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, artifacts=(artifact,)))
    with pytest.raises(NoEngineError, match="npu in fp32: unknown engine: npu"):
        open_engine(with_npu, EngineOptions())
    assert not_installed("npu", ImportError()).args[0].endswith("pip install 'vitserve[npu]'")
    assert not runs_on_gpu(artifact)
    assert not wants_gpu_workers("npu")

    def construct(
        name: str, precision: Precision, graph: Path, options: EngineOptions, plan: PlanReport | None
    ) -> Engine:
        return Npu(graph, precision, options.streams, 1, options.max_batch)

    monkeypatch.setattr(selection, "construct_engine", construct)
    opened = open_engine(with_npu, EngineOptions())
    opened.engine.close()
    assert (opened.engine.name, opened.rejected) == ("npu", ())


def test_a_row_adds_an_engine_to_the_settings() -> None:
    program = """
from vitserve.service.engines.catalog import ENGINES, EngineKind
ENGINES["npu"] = EngineKind("npu_runtime", "npu", cpu=("bf16", "fp32"))
from vitserve.service.settings import Settings, SettingsError
assert "npu" in Settings.__dataclass_fields__["engine"].metadata["help"]
Settings(engine="npu", precision="bf16")
try:
    Settings(engine="npu", precision="int8")
except SettingsError as error:
    print(error)
"""
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "engine npu does not support int8; it supports bf16, fp32"


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_has_a_case_in_the_constructor(name: str, bundle: Bundle) -> None:
    reason = ""
    try:
        construct_engine(name, "fp32", bundle.path / "model.onnx", EngineOptions()).close()
    except EngineUnavailableError as error:
        reason = str(error)
    assert "unknown engine" not in reason


def test_every_precision_is_in_the_catalog() -> None:
    assert set(PRECISIONS) == set(get_args(Precision))
    assert {precision for kind in ENGINES.values() for precision in kind.precisions} == set(PRECISIONS)


def test_engines_of_the_bundle_prefer_the_fastest_precision() -> None:
    for kind in ENGINES.values():
        if kind.artifact == "bundle":
            assert list(kind.cpu) == sorted(kind.cpu, key=PRECISIONS.index)


def test_every_extra_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {kind.extra for kind in ENGINES.values() if kind.extra} <= project["optional-dependencies"].keys()


def test_help_texts_name_every_engine_and_precision() -> None:
    texts = {setting.name: setting.metadata["help"] for setting in dataclasses.fields(Settings)}
    assert texts["engine"].startswith(f"auto, {', '.join(ENGINES)}.")
    assert texts["precision"].startswith(f"auto, {', '.join(PRECISIONS)}.")


@pytest.mark.parametrize(
    ("engine", "device"), [("tensorrt", "gpu"), ("onnxruntime-cuda", "gpu"), ("torch", "either"), ("openvino", "cpu")]
)
def test_the_device_follows_from_the_precisions(engine: str, device: str) -> None:
    assert ENGINES[engine].device == device


@pytest.mark.parametrize(
    ("installed", "expected"), [([], False), (["torch"], True), (["cuda"], True), (["openvino"], False)]
)
def test_auto_wants_gpu_workers_if_a_gpu_engine_is_installed(
    monkeypatch: pytest.MonkeyPatch, installed: list[str], expected: bool
) -> None:
    monkeypatch.setattr(catalog, "find_spec", lambda package: object() if package in installed else None)
    assert wants_gpu_workers("auto") is expected
    assert wants_gpu_workers("tensorrt")
    assert not wants_gpu_workers("openvino")
