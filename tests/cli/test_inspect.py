"""`vitserve inspect` shows what a bundle holds."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from tests.support.networks import TINY
from vitserve.cli.main import app
from vitserve.model.bundle.bundle import Bundle


def test_inspect_shows_the_artifacts_of_a_bundle(bundle: Bundle) -> None:
    result = CliRunner().invoke(app, ["inspect", str(bundle.path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert f"{TINY.depth} × com.microsoft.MultiHeadAttention; separate softmax layers: 0" in result.output
    plain: dict[str, Any] = json.loads(CliRunner().invoke(app, ["inspect", str(bundle.path), "--json"]).output)
    assert plain["name"] == "tiny"


def test_inspect_of_another_directory_is_a_usage_error(bundle: Bundle) -> None:
    assert CliRunner().invoke(app, ["inspect", str(bundle.path.parent)]).exit_code == 2
