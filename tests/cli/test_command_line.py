"""What a user sees in the first ten minutes: help, versions, and errors in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.support.paths import ROOT
from vitserve import __version__
from vitserve.cli.console import one_line_errors
from vitserve.cli.main import app

COMMANDS = ("serve", "export", "inspect", "tune", "bench", "verify", "train", "predict", "image")
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from vitserve.cli.main import app; app()"


def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process in which torch cannot be imported."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"vitserve {__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_its_defaults(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_help_keeps_brackets() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "300"}).output
    assert "hf:owner/name[@revision]" in shown
    assert "vitserve[gpu-decode]" in shown


def test_a_typo_in_an_option_is_named() -> None:
    result = CliRunner().invoke(app, ["serve", "--presicion", "int8"])
    assert result.exit_code == 2
    assert "--presicion" in result.output
    assert "--precision" in result.output


def test_a_typo_in_an_environment_variable_is_named() -> None:
    result = CliRunner().invoke(app, ["serve"], env={"VITSERVE_PRESICION": "int8"})
    assert result.exit_code == 2
    assert "VITSERVE_PRESICION is not a setting; did you mean VITSERVE_PRECISION?" in result.output


def test_variables_of_kubernetes_service_links_are_accepted() -> None:
    links = {"VITSERVE_SERVICE_HOST": "10.0.0.1", "VITSERVE_SERVICE_PORT_HTTP": "80", "VITSERVE_PORT_80_TCP": "tcp://x"}
    result = CliRunner().invoke(app, ["serve", "--bundle", "nosuch"], env=links)
    assert "nosuch is not a directory" in result.output


def test_a_directory_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", "--bundle", str(tmp_path)])
    assert result.exit_code == 2
    assert "is not a bundle: it has no bundle.json" in result.output


def test_a_bundle_that_does_not_exist_ends_with_one_line() -> None:
    command = [sys.executable, "-m", "vitserve", "serve", "--bundle", "NOSUCH"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "vitserve: NOSUCH is not a directory; a bundle is a directory made by `vitserve export`"
    ]


def test_a_source_that_does_not_exist_is_named_before_torch_is_needed() -> None:
    result = without_torch("serve", "nosuch/model")
    assert result.returncode == 2
    assert "nosuch/model" in result.stderr
    assert "torch" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["export", "random:B/16", "-o", "unwritten"], "export"),
        (["serve", "random:B/16"], "export"),
        (["train", "nosuch.npz", "-o", "unwritten"], "train"),
    ],
)
def test_a_command_that_needs_torch_names_the_extra(arguments: list[str], extra: str) -> None:
    result = without_torch(*arguments)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert f"pip install 'vitserve[{extra}]'" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"],
        ["verify", "--batch-sizes", "1", "--rounds", "1", "--seconds", "0.01"],
        ["tune", "--dry-run", "--max-batch", "1", "--seconds", "0.01"],
        ["bench", "--batch-sizes", "1", "--rounds", "1", "--seconds", "0.01"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_other_commands_run_without_torch(arguments: list[str]) -> None:
    result = without_torch(*arguments)
    assert result.returncode == 0, result.stderr


def test_a_contradiction_is_reported_in_one_line() -> None:
    result = CliRunner().invoke(app, ["serve", "--slots", "4", "--max-images", "4"])
    assert result.exit_code == 2
    assert "vitserve: slots is 4; streams × max_batch is 1 × 8 and needs at least 8 slots" in result.output


@pytest.mark.parametrize(
    ("package", "extra", "named"),
    [
        ("torch", "train", "train"),
        ("torch", "", "export"),
        ("nncf", "export", "int8"),
        ("onnx.helper", "export", "export"),
    ],
)
def test_a_missing_package_is_reported_with_the_extra_that_has_it(
    package: str, extra: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit), one_line_errors(extra):
        raise ModuleNotFoundError(name=package)
    assert f"pip install 'vitserve[{named}]'" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["vitserve.service.renamed", "numpy"])
def test_a_missing_module_without_an_extra_keeps_its_traceback(module: str) -> None:
    with pytest.raises(ModuleNotFoundError), one_line_errors("export"):
        raise ModuleNotFoundError(name=module)
