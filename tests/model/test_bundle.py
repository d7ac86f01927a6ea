"""Writing and opening bundles: damaged files, wrong manifests and other schemas are rejected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vitserve.model.bundle.bundle import Bundle, BundleError, check_destination, open_bundle, write_bundle


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.path, tmp_path / "copy"))


def test_a_bundle_opens_as_it_was_written(bundle: Bundle) -> None:
    opened = open_bundle(bundle.path)
    assert opened == bundle
    assert opened.manifest.config.classes == len(opened.labels) == 7
    artifacts = {(artifact.engine, artifact.precision) for artifact in opened.manifest.artifacts}
    assert artifacts >= {("onnxruntime", "fp32"), ("openvino", "fp32")}


@pytest.mark.parametrize("name", ["labels.txt", "golden.npz"])
def test_a_changed_byte_is_rejected(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name} has sha256"):
        open_bundle(copy)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "model.onnxruntime.onnx"])
def test_a_changed_byte_of_an_artifact_is_listed(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    opened = open_bundle(copy)
    assert list(opened.damaged_files) == [name]
    assert f"{name} has sha256" in opened.damaged_files[name]


def test_a_missing_file_is_rejected(copy: Path) -> None:
    (copy / "labels.txt").unlink()
    with pytest.raises(BundleError, match=r"labels\.txt: No such file"):
        open_bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "bundle schema 99, but this version of vitserve reads 2"),
        ({"surprise": 1}, "surprise"),
        ({"files": {"../../etc/passwd": "0"}}, "outside the bundle"),
        ({"config": {"image_size": 17}}, "not a valid manifest"),
    ],
)
def test_a_wrong_manifest_is_rejected(copy: Path, change: dict[str, object], message: str) -> None:
    manifest = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(manifest | change))
    with pytest.raises(BundleError, match=message):
        open_bundle(copy)


def test_a_schema_1_bundle_must_be_exported_again(copy: Path) -> None:
    """Its manifest has other keys, which the message does not mention."""
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest |= {"schema_version": 1, "parts": manifest.pop("artifacts")}
    (copy / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError) as rejection:
        open_bundle(copy)
    message = "has bundle schema 1, but this version of vitserve reads 2; export the model again with `vitserve export`"
    assert str(rejection.value) == f"{copy} {message}"


@pytest.mark.parametrize("text", ["", "[]", '"text"', "null", "{}", "\udcff"])
def test_a_file_that_is_no_manifest_is_rejected(copy: Path, text: str) -> None:
    (copy / "bundle.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BundleError, match=r"bundle\.json is not a valid manifest"):
        open_bundle(copy)


def test_a_bundle_has_the_default_permissions(tmp_path: Path, bundle: Bundle) -> None:
    contents = Path(shutil.copytree(bundle.path, tmp_path / "contents"))
    (contents / "bundle.json").unlink()
    contents.chmod(0o700)
    (tmp_path / "default").mkdir()
    written = write_bundle(tmp_path / "written", bundle.manifest, contents)
    assert written.path.stat().st_mode == (tmp_path / "default").stat().st_mode


def test_another_directory_is_neither_opened_nor_overwritten(tmp_path: Path, bundle: Bundle) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="choose another directory"):
        write_bundle(tmp_path, bundle.manifest, bundle.path)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_a_destination_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "precious.txt").write_text("mine")
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "mounted")
    for name, message in (
        ("file", "exists and is not a directory; choose another path"),
        ("directory", "exists and is not a bundle; choose another directory"),
        ("mounted", "is a mount point, which cannot be replaced; choose a directory in it"),
        ("file/bundle", "file is not a directory in which you may create files"),
    ):
        with pytest.raises(BundleError, match=message):
            check_destination(tmp_path / name)


def test_an_empty_directory_and_a_bundle_are_destinations(bundle: Bundle, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "new" / "bundle", bundle.path):
        check_destination(path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("failing", ["copy", "open", "replace"])
def test_a_failed_write_leaves_the_existing_bundle(
    failing: str, bundle: Bundle, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever step fails: the disk is full, the new bundle cannot be opened, or it cannot take the place."""
    contents = Path(shutil.copytree(bundle.path, tmp_path / "contents"))
    (contents / "bundle.json").unlink()
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    manifest = bundle.manifest
    if failing == "copy":
        monkeypatch.setattr(shutil, "copy2", fail)
    elif failing == "open":
        (contents / "labels.txt").write_text("too\nfew\n")
    else:
        rename = Path.rename

        def rename_old_only(path: Path, target: Path) -> Path:
            return fail() if path.name == "bundle" else rename(path, target)

        monkeypatch.setattr(Path, "rename", rename_old_only)
    with pytest.raises((OSError, BundleError)):
        write_bundle(copy, manifest, contents)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert open_bundle(copy).labels == bundle.labels
    assert sorted(path.name for path in tmp_path.iterdir()) == ["contents", "copy"]


def fail(*_: object) -> Path:
    raise OSError(28, "No space left on device")
