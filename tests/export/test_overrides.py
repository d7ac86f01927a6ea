"""Options of `vitserve export`: those without effect on a source are rejected, and all others are accepted."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from tests.support.networks import save_checkpoint
from vitserve.cli.main import app
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.load import load_checkpoint
from vitserve.export.checkpoint.overrides import OPTIONS, Overrides, SourceKind, check_overrides

ONNX = "an ONNX file or an exported program"
TRAINED = "weights of `vitserve train`"


def test_every_override_is_an_option() -> None:
    command: Any = get_command(app)
    options = {option for parameter in command.commands["export"].params for option in parameter.opts}
    assert set(OPTIONS) <= options
    assert sorted(OPTIONS.values()) == sorted(field.name for field in fields(Overrides))


@pytest.mark.parametrize(
    ("source", "options", "kind"),
    [
        ("random:S/16", {"--labels": "labels.txt", "--activation": "sigmoid"}, "random weights"),
        (
            "model.onnx",
            {"--architecture": "a", "--weights": "b", "--prompt": "c"},
            ONNX,
        ),
        ("model.onnx", {"--ignore-key": "a"}, ONNX),
        ("trained.safetensors", {"--model-arg": "depth=1", "--weights": "raw", "--outputs": "logits"}, TRAINED),
        ("model.npz", {"--layout": "nchw", "--outputs": "logits", "--prompt": "a {}"}, "another file of weights"),
        (".", {"--layout": "nchw", "--outputs": "logits"}, "a directory"),
    ],
)
def test_options_without_effect_are_rejected(
    source: str, options: dict[str, str], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.txt").write_text("a")
    save_checkpoint(tmp_path / "trained.safetensors")
    for name in ("model.onnx", "model.npz"):
        (tmp_path / name).touch()
    stated = [text for option in options.items() for text in option]
    result = CliRunner().invoke(app, ["export", source, "-o", "bundle", *stated], env={"COLUMNS": "500"})
    assert result.exit_code == 2
    assert f"no effect on {kind}: {', '.join(options)}; the options for it are: " in result.output


@pytest.mark.parametrize(
    ("kind", "stated"),
    [
        ("random weights", {"network": "auto", "weights": "", "prompts": ()}),
        (
            ONNX,
            {"network": "auto", "mean": (0.5,), "layout": "nchw", "activation": "softmax"},
        ),
        (ONNX, {"preprocessor": "preprocessor_config.json", "ignored_keys": ("a",)}),
        (TRAINED, {"preprocessor": "preprocessor_config.json", "ignored_keys": ("a",), "network": "ours"}),
        ("another file of weights", {"architecture": "a", "model_args": {"b": 1}, "weights": "ema", "labels": ["c"]}),
        ("a directory", {"prompts": ("a {}",), "labels": ["b"], "network": "library", "image_size": 32}),
    ],
)
def test_options_with_effect_and_defaults_are_accepted(kind: SourceKind, stated: dict[str, Any]) -> None:
    check_overrides(kind, Overrides(**stated))


def test_a_network_that_no_library_has_is_not_exported_as_a_librarys(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model.safetensors")
    checkpoint = load_checkpoint(tmp_path / "model.safetensors", network="library")
    with pytest.raises(CheckpointError, match="--network library: no library has the network of this checkpoint"):
        checkpoint.source_model(lambda step: None)
