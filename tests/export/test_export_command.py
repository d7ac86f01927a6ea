"""`vitserve export` and `vitserve serve` with a source on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.support.checkpoints import SMALL_TIMM, SMALL_TRANSFORMERS, save_with_timm, save_with_transformers
from tests.support.images import encoded, random_image
from vitserve.cli.main import app
from vitserve.cli.sources import training_record
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


@pytest.fixture
def vit(transformers: ModuleType, tmp_path: Path) -> Path:
    torch.manual_seed(0)  # the same network for each test, which is then traced once
    arguments = SMALL_TRANSFORMERS | {"intermediate_size": 96}
    save_with_transformers(transformers, tmp_path / "vit", "ViTConfig", "ViTForImageClassification", arguments)
    return tmp_path / "vit"


def test_the_output_is_checked_first(tmp_path: Path) -> None:
    """Before the source is read, which may be a download of gigabytes."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").touch()
    result = CliRunner().invoke(app, ["export", "hf:owner/name", "-o", str(tmp_path / "mine")])
    assert result.exit_code == 2
    assert "mine exists and is not a bundle; choose another directory" in result.output.replace("\n", "")


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_notes_are_printed_and_options_are_passed(vit: Path, tmp_path: Path) -> None:
    weights = load_file(vit / "model.safetensors") | {"loss_fct.weight": torch.ones(5)}
    save_file({f"module.{name}": tensor for name, tensor in weights.items()}, vit / "model.safetensors")
    (vit / "preprocessor_config.json").rename(tmp_path / "given.json")
    (tmp_path / "labels.txt").write_bytes("Größe\r\nb\r\nc\r\nd\r\ne\r\n\r\n".encode("utf-16"))
    command = ["export", str(vit), "-o", str(tmp_path / "bundle"), "--activation", "sigmoid"]
    command += ["--preprocessor", str(tmp_path / "given.json"), "--labels", str(tmp_path / "labels.txt")]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert "note: the weights are those under 'module'" in result.output
    assert "note: ignored tensors: loss_fct.weight: " in result.output
    bundle = open_bundle(tmp_path / "bundle")
    assert (bundle.labels[0], bundle.manifest.activation) == ("Größe", "sigmoid")


@pytest.mark.filterwarnings("ignore")
def test_a_failed_export_leaves_the_existing_bundle(vit: Path, tmp_path: Path) -> None:
    command = ["export", str(vit), "-o", str(tmp_path / "bundle"), "--precision", "fp32"]
    assert CliRunner().invoke(app, command).exit_code == 0
    before = open_bundle(tmp_path / "bundle")
    assert {artifact.precision for artifact in before.manifest.artifacts} == {"fp32"}
    config = json.loads((vit / "config.json").read_text())
    (vit / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b"}}))
    assert CliRunner().invoke(app, command).exit_code == 2
    assert open_bundle(tmp_path / "bundle") == before
    (vit / "config.json").write_text(
        json.dumps(config | {"id2label": {index: f"{name}\n" for index, name in enumerate("abcde")}})
    )
    assert CliRunner().invoke(app, command).exit_code == 0
    assert open_bundle(tmp_path / "bundle").labels == ("a\n", "b\n", "c\n", "d\n", "e\n")


@pytest.mark.filterwarnings("ignore")
def test_broken_and_hidden_images_do_not_end_the_export(vit: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for seed in range(5):
        (images / f"{seed}.png").write_bytes(encoded(random_image(seed=seed)))
    (images / "._1.png").write_bytes(b"Mac OS X")
    (images / "broken.jpg").write_bytes(b"?")
    command = ["export", str(vit), "-o", str(tmp_path / "bundle"), "--images", str(images), "--golden-images", "2"]
    result = CliRunner().invoke(app, [*command, "--max-loss", "100"], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert "note: skipped 1 images of" in result.output
    assert "broken.jpg: not an image" in result.output
    assert open_bundle(tmp_path / "bundle").golden().domain_images == 2
    without = CliRunner().invoke(app, ["export", str(vit), "-o", str(tmp_path / "other"), "--golden-images", "2"])
    assert (without.exit_code, "--golden-images needs --images" in without.output) == (2, True)


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("google/vit-base-patch16-224", "write hf:google/vit-base-patch16-224"),
        ("owner/name@main", "write hf:owner/name@main"),
        ("https://huggingface.co/owner/name", "write hf:owner/name"),
        ("https://huggingface.co/owner/name/tree/main", "write hf:owner/name"),
        ("hf-hub:timm/vit_tiny_patch16_224", "write hf:timm/vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224.augreg_in21k", "write timm:vit_tiny_patch16_224.augreg_in21k"),
        ("./missing", "a model on the hub is written hf:owner/name"),
        ("/a/b/c", "a model on the hub is written hf:owner/name"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "export"])
def test_a_source_without_its_scheme_is_explained(command: str, source: str, hint: str, tmp_path: Path) -> None:
    output = ["-o", str(tmp_path / "bundle")] if command == "export" else []
    result = CliRunner().invoke(app, [command, source, *output])
    assert result.exit_code == 2
    assert hint in result.output
    assert "exporting" not in result.output


def test_the_known_sources_are_listed() -> None:
    result = CliRunner().invoke(app, ["export", "--list"])
    assert result.exit_code == 0, result.output
    for source in ("FILE.onnx", "clip, metaclip_2, siglip", "timm's network"):
        assert source in result.output


@pytest.mark.parametrize(
    ("name", "record"), [("weights.safetensors", {"epochs": 1}), ("model.onnx", None), (".", None), ("b.npz", None)]
)
def test_only_the_weights_of_a_run_have_its_record(
    name: str, record: dict[str, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "training.json").write_text('{"epochs": 1}')
    assert training_record(name) == record


def test_a_source_and_a_bundle_conflict(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(tmp_path), "--bundle", "elsewhere"])
    assert result.exit_code == 2
    assert "are both given" in result.output
