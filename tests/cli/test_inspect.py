"""`vitserve inspect` shows what a bundle holds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from tests.support.networks import TINY
from vitserve.cli.main import app
from vitserve.model.bundle.bundle import Bundle, Quantization, write_bundle


def test_inspect_shows_the_artifacts_of_a_bundle(bundle: Bundle) -> None:
    result = CliRunner().invoke(app, ["inspect", str(bundle.path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert f"{TINY.depth} × com.microsoft.MultiHeadAttention; separate softmax layers: 0" in result.output
    plain: dict[str, Any] = json.loads(CliRunner().invoke(app, ["inspect", str(bundle.path), "--json"]).output)
    assert plain["name"] == "tiny"


def test_inspect_shows_the_share_of_quantized_layers(bundle: Bundle, tmp_path: Path) -> None:
    artifacts = [
        replace(artifact, quantization=Quantization(3, 11)) if artifact.precision == "fp32" else artifact
        for artifact in bundle.manifest.artifacts
    ]
    contents = shutil.copytree(bundle.path, tmp_path / "contents")
    (contents / "bundle.json").unlink()
    changed = write_bundle(tmp_path / "bundle", replace(bundle.manifest, artifacts=tuple(artifacts)), contents)
    shown = CliRunner().invoke(app, ["inspect", str(changed.path)], env={"COLUMNS": "200"}).output
    assert shown.count("3/11 layers") == 2
    assert "classes: 7, softmax" in shown
    plain = json.loads(CliRunner().invoke(app, ["inspect", str(changed.path), "--json"]).output)
    assert {"layers": 3, "of": 11} in [artifact["quantization"] for artifact in plain["artifacts"]]


def test_inspect_of_another_directory_is_a_usage_error(bundle: Bundle) -> None:
    assert CliRunner().invoke(app, ["inspect", str(bundle.path.parent)]).exit_code == 2
