"""The bundle: what was written is what is opened, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vitserve.model.bundle.bundle import Bundle, BundleError, open_bundle, write_bundle


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.path, tmp_path / "copy"))


def test_a_bundle_opens_as_it_was_written(bundle: Bundle) -> None:
    again = open_bundle(bundle.path)
    assert again == bundle
    assert again.manifest.config.classes == len(again.labels) == 7
    assert {(each.engine, each.precision) for each in again.manifest.artifacts} >= {
        ("onnxruntime", "fp32"),
        ("openvino", "fp32"),
    }


@pytest.mark.parametrize("name", ["labels.txt", "golden.npz"])
def test_a_changed_byte_is_refused(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name} has sha256"):
        open_bundle(copy)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "model.onnxruntime.onnx"])
def test_a_changed_byte_of_an_artifact_is_noted(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    opened = open_bundle(copy)
    assert list(opened.damaged) == [name]
    assert f"{name} has sha256" in opened.damaged[name]


def test_a_missing_file_is_refused(copy: Path) -> None:
    (copy / "labels.txt").unlink()
    with pytest.raises(BundleError, match=r"labels\.txt: No such file"):
        open_bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99; this vitserve reads 1"),
        ({"surprise": 1}, "surprise"),
        ({"files": {"../../etc/passwd": "0"}}, "outside the bundle"),
        ({"config": {"image_size": 17}}, "not a manifest"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused(copy: Path, change: dict[str, object], message: str) -> None:
    manifest = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(manifest | change))
    with pytest.raises(BundleError, match=message):
        open_bundle(copy)


def test_others_can_read_what_was_made_where_nobody_else_may_look(tmp_path: Path, bundle: Bundle) -> None:
    contents = Path(shutil.copytree(bundle.path, tmp_path / "contents"))
    (contents / "bundle.json").unlink()
    contents.chmod(0o700)
    (tmp_path / "usual").mkdir()
    made = write_bundle(tmp_path / "made", bundle.manifest, contents)
    assert made.path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_folder_that_is_no_bundle_is_neither_opened_nor_overwritten(tmp_path: Path, bundle: Bundle) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="left alone"):
        write_bundle(tmp_path, bundle.manifest, bundle.path)
    assert (tmp_path / "precious.txt").read_text() == "mine"
