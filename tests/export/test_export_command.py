"""`vitserve export` and `vitserve serve` with a source on the command line."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from tests.support.checkpoints import SMALL_TIMM, save_with_timm
from vitserve.cli.main import app
from vitserve.model.bundle.bundle import open_bundle


@pytest.mark.filterwarnings("ignore")  # timm's own
def test_a_directory_is_exported_at_another_size_with_other_labels(timm: ModuleType, tmp_path: Path) -> None:
    save_with_timm(timm, tmp_path / "model", "vit_base_patch16_224", SMALL_TIMM | {"num_heads": 12})
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\ne\n")
    command = ["export", str(tmp_path / "model"), "-o", str(tmp_path / "bundle")]
    command += ["--image-size", "48", "--labels", str(tmp_path / "labels.txt")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.labels == tuple("abcde")
    assert (bundle.manifest.name, bundle.manifest.preprocessing.image_size) == ("model", 48)
    rejected = CliRunner().invoke(app, [*command, "--image-size", "50"])
    assert rejected.exit_code == 2
    assert "image size 50 is not a multiple of patch size 8" in rejected.output


def test_a_source_and_a_bundle_conflict(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(tmp_path), "--bundle", "elsewhere"])
    assert result.exit_code == 2
    assert "are both given" in result.output
