"""Labels come from every place that the libraries write them to, with any characters, one for each class."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.checkpoints import SMALL_TRANSFORMERS, save_with_timm, save_with_transformers
from tests.support.networks import TINY, checkpoint
from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.labels import read_label_file
from vitserve.export.checkpoint.load import load_checkpoint
from vitserve.model.bundle.bundle import Bundle, open_bundle, write_bundle
from vitserve.model.bundle.labels import write_labels

pytestmark = pytest.mark.filterwarnings("ignore")  # of the other libraries

NAMES = ["circle", "Größe", "三角", "a\u2028b", "tab\there"]
# Characters that Python, editors or terminals take for the end of a line, and others that formats treat specially.
AWKWARD = ("a\nb", "ends\n", "\r\n", "\u2028\u2029\x0b\x0c\x1c\x85", "", "😀 " * 3)


def save_timm(timm: ModuleType, directory: Path) -> dict[str, Any]:
    save_with_timm(timm, directory, "vit_tiny_patch16_224", {"depth": 1, "num_classes": len(NAMES)})
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


BY_INDEX = {str(index): name for index, name in enumerate(NAMES)}
DESCRIPTIONS = {name: f"a {name}" for name in NAMES}


@pytest.mark.parametrize(
    ("root", "pretrained"),
    [
        ({"label_names": NAMES}, {}),
        ({"label_names": BY_INDEX}, {}),
        ({}, {"label_names": NAMES}),
        ({}, {"labels": NAMES}),
        ({"label_names": NAMES}, {"label_names": ["stale"] * 1000}),
        ({"label_names": NAMES, "label_descriptions": DESCRIPTIONS}, {}),
        ({"label_names": NAMES}, {"label_names": None, "label_descriptions": DESCRIPTIONS}),
    ],
)
def test_places_of_timm(root: dict[str, Any], pretrained: dict[str, Any], timm: ModuleType, tmp_path: Path) -> None:
    config = save_timm(timm, tmp_path)
    config["pretrained_cfg"] |= pretrained
    (tmp_path / "config.json").write_text(json.dumps(config | root))
    assert load_checkpoint(tmp_path).labels == tuple(NAMES)


def test_what_timm_itself_writes(timm: ModuleType, tmp_path: Path) -> None:
    from timm.models import save_for_hf

    network = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=len(NAMES))
    save_for_hf(network, str(tmp_path), model_config={"label_names": NAMES}, safe_serialization=True)
    assert load_checkpoint(tmp_path).labels == tuple(NAMES)


def test_timms_single_configuration_of_old_versions(timm: ModuleType, tmp_path: Path) -> None:
    config = save_timm(timm, tmp_path)
    single = config["pretrained_cfg"] | {"architecture": "vit_tiny_patch16_224", "num_features": 192, "labels": NAMES}
    (tmp_path / "config.json").write_text(json.dumps(single))
    assert load_checkpoint(tmp_path).labels == tuple(NAMES)


def test_descriptions_without_names_are_noted(timm: ModuleType, tmp_path: Path) -> None:
    """They are by name, so that their order is unknown."""
    config = save_timm(timm, tmp_path) | {"label_descriptions": DESCRIPTIONS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.labels[0] == "class 0"
    assert any("label_descriptions in config.json are not used" in note for note in checkpoint.notes)


@pytest.mark.parametrize("where", ["label_names", "pretrained_cfg", "id2label", "--labels"])
@pytest.mark.parametrize("count", [1, 4, 6])
def test_another_number_of_labels_is_rejected(
    count: int, where: str, timm: ModuleType, transformers: ModuleType, tmp_path: Path
) -> None:
    names: list[str] | None = None
    if where == "id2label":
        arguments = SMALL_TRANSFORMERS | {"intermediate_size": 96}
        save_with_transformers(transformers, tmp_path, "ViTConfig", "ViTForImageClassification", arguments)
        config = json.loads((tmp_path / "config.json").read_text())
        config[where] = {str(index): f"label {index}" for index in range(count)}
    else:
        config = save_timm(timm, tmp_path)
        labels = {"label_names": [f"label {index}" for index in range(count)]}
        if where == "pretrained_cfg":
            config[where] |= labels
        elif where == "label_names":
            config |= labels
        else:
            names = labels["label_names"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{where}.* has {count} labels.*; the model has 5 classes"):
        load_checkpoint(tmp_path, labels=names)


def test_a_gap_in_the_indices_is_named(transformers: ModuleType, tmp_path: Path) -> None:
    arguments = SMALL_TRANSFORMERS | {"intermediate_size": 96}
    save_with_transformers(transformers, tmp_path, "ViTConfig", "ViTForImageClassification", arguments)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {str(index): "x" for index in (0, 1, 2, 4, 5)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has 5 labels, none for class 3; the model has 5 classes"):
        load_checkpoint(tmp_path)


TEXT = "circle\r\nGröße\r\n三角\r\n"


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.replace("\r\n", "\n").encode(),
        TEXT.replace("\r\n", "\r").encode(),
        TEXT.strip().encode(),
        (TEXT + "\r\n  \r\n").encode(),
    ],
)
def test_a_label_file_may_have_any_encoding_and_line_ending(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes(content)
    assert read_label_file(tmp_path / "labels.txt") == ("circle", "Größe", "三角")


def test_other_encodings_are_stated(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes("Größe\nÄpfel\n".encode("cp1252"))
    with pytest.raises(CheckpointError, match=r"labels\.txt is not text in utf-8: .*--labels-encoding"):
        read_label_file(path)
    assert read_label_file(path, "cp1252") == ("Größe", "Äpfel")
    with pytest.raises(CheckpointError, match="unknown encoding 'klingon'"):
        read_label_file(path, "klingon")
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"labels\.txt is a Git LFS pointer"):
        read_label_file(path)
    with pytest.raises(CheckpointError, match=r"missing\.txt: No such file"):
        read_label_file(tmp_path / "missing.txt")


@pytest.mark.parametrize("named", [list(AWKWARD), {str(index): label for index, label in enumerate(AWKWARD)}])
def test_a_json_file_holds_labels_with_line_breaks(named: Any, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps(named))
    assert read_label_file(tmp_path / "labels.json") == AWKWARD


@pytest.mark.parametrize("content", ["{", '"text"', "3", '{"0": "a", "2": "b"}'])
def test_a_wrong_json_file_is_rejected(content: str, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"labels\.json"):
        read_label_file(tmp_path / "labels.json")


def rewritten(bundle: Bundle, labels: Sequence[str], path: Path) -> Bundle:
    """The bundle with other labels, at ``path``."""
    contents = Path(shutil.copytree(bundle.path, path.with_name("contents"), dirs_exist_ok=True))
    (contents / "bundle.json").unlink()
    manifest = replace(bundle.manifest, labels=write_labels(contents, labels))
    write_bundle(path, manifest, contents)
    return open_bundle(path)


@pytest.mark.parametrize("extra", ["x", "a\nb"])
def test_a_bundle_keeps_every_character(extra: str, bundle: Bundle, tmp_path: Path) -> None:
    """labels.txt has one line for each label, whatever the labels are."""
    labels = (*[label for label in AWKWARD if extra == "a\nb" or "\n" not in label], *[extra] * 7)[:7]
    changed = rewritten(bundle, labels, tmp_path / "bundle")
    assert changed.labels == labels
    assert (changed.path / "labels.txt").read_bytes().count(b"\n") == 7
    assert (changed.manifest.labels is None) is (extra == "x")


@pytest.mark.parametrize("labels", [("a",) * 6, ("a",) * 8, ("a",) * 6 + ("\ud83d",)])
def test_labels_are_checked_before_the_work(labels: tuple[str, ...], tmp_path: Path) -> None:
    steps: list[str] = []
    source = replace(checkpoint(TINY), labels=labels)
    with pytest.raises(CheckpointError, match=r"labels; the model has 7 classes|is not valid text"):
        build_bundle(source, tmp_path / "bundle", name="tiny", progress=steps.append)
    assert steps == []
