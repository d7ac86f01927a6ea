"""``vitserve head``: layers of several libraries, and a head that is fitted on images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

from tests.support.paths import CIFAR10
from vitserve.cli.main import app
from vitserve.export.heads.fit import fit_head
from vitserve.export.heads.weights import read_layer
from vitserve.model.bundle.bundle import Bundle, open_bundle
from vitserve.model.bundle.head import Head, HeadError, backbone_of, read_head, write_head
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.settings import DEFAULT_BUNDLE

LABELS = open_bundle(DEFAULT_BUNDLE).labels


@pytest.fixture
def own_bundle(bundle: Bundle, tmp_path: Path) -> Bundle:
    return open_bundle(Path(shutil.copytree(bundle.path, tmp_path / "bundle")))


def width(bundle: Bundle) -> int:
    return int(bundle.golden().reference.embedding.shape[1])


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["head", *map(str, arguments)], env={"COLUMNS": "300"})


@pytest.mark.parametrize("prefix", ["", "head.", "classifier.", "model.fc."])
def test_a_linear_layer_of_torch_is_read(tmp_path: Path, prefix: str) -> None:
    layer = torch.nn.Linear(6, 3)
    tensors = {f"{prefix}{name}": tensor for name, tensor in layer.state_dict().items()}
    save_file(tensors, tmp_path / "layer.safetensors")
    weight, bias = read_layer(tmp_path / "layer.safetensors")
    inputs = torch.randn(4, 6)
    np.testing.assert_allclose(inputs.numpy() @ weight.T + bias, layer(inputs).detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_layer_of_scikit_learn_is_read(tmp_path: Path, classes: int) -> None:
    random = np.random.default_rng(0)
    inputs, targets = random.standard_normal((60, 5)), np.arange(60) % classes
    fitted = LogisticRegression().fit(inputs, targets)
    np.savez(tmp_path / "layer.npz", coef_=fitted.coef_, intercept_=fitted.intercept_)
    head = Head("x", tuple("abc"[:classes]), *read_layer(tmp_path / "layer.npz"), backbone="")
    for values, expected in zip(inputs.astype(np.float32), fitted.predict_proba(inputs), strict=True):
        np.testing.assert_allclose(head.probabilities(values), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "it has: none"),
        ({"a.weight": torch.ones(2, 3), "b.weight": torch.ones(2, 3)}, "it has: a.weight, b.weight"),
        ({"weight": torch.ones(2, 3, 4)}, "it has: none"),
    ],
)
def test_files_without_one_layer_are_rejected(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    save_file(tensors, tmp_path / "layer.safetensors")
    with pytest.raises(HeadError, match=message):
        read_layer(tmp_path / "layer.safetensors")


@pytest.mark.parametrize("name", ["none", "", "A", "a/b", "..", "x" * 65])
def test_names_are_checked(name: str) -> None:
    with pytest.raises(HeadError, match="is no name of a head"):
        Head(name, ("a", "b"), np.zeros((2, 3), np.float32), np.zeros(2, np.float32), "")


def test_a_head_is_added_listed_and_removed(own_bundle: Bundle, tmp_path: Path) -> None:
    save_file(torch.nn.Linear(width(own_bundle), 2).state_dict(), tmp_path / "layer.safetensors")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    arguments = own_bundle.path, "pets", tmp_path / "layer.safetensors", "--labels", tmp_path / "labels.txt"
    added = run("add", *arguments)
    assert added.exit_code == 0, added.output
    assert read_head(own_bundle.path / "heads/pets.npz").labels == ("cat", "dog")
    open_bundle(own_bundle.path)  # the bundle is valid, and has the same manifest
    assert "pets: version" in run("list", own_bundle.path).output
    assert run("remove", own_bundle.path, "pets").exit_code == 0
    assert "it has: none" in run("remove", own_bundle.path, "pets").output


def test_a_layer_of_another_width_is_rejected(own_bundle: Bundle, tmp_path: Path) -> None:
    save_file(torch.nn.Linear(width(own_bundle) + 1, 2).state_dict(), tmp_path / "layer.safetensors")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    added = run("add", own_bundle.path, "x", tmp_path / "layer.safetensors", "--labels", tmp_path / "labels.txt")
    assert added.exit_code == 2
    assert f"embeddings have {width(own_bundle)}" in added.output


def test_another_export_keeps_heads_and_does_not_serve_them(own_bundle: Bundle) -> None:
    """Their embeddings are others. They are not lost either."""
    from tests.support.networks import TINY, checkpoint
    from vitserve.export.build_bundle import build_bundle

    labels, bias = ("a", "b"), np.zeros(2, np.float32)
    weight = np.ones((2, width(own_bundle)), np.float32)
    write_head(own_bundle.path, Head("kept", labels, weight, bias, backbone_of(own_bundle.manifest.files)))
    torch.manual_seed(1)
    build_bundle(checkpoint(TINY), own_bundle.path, name="tiny", precisions=[])
    assert read_head(own_bundle.path / "heads/kept.npz").labels == labels
    listed = run("list", own_bundle.path).output
    assert "kept" in listed


def test_a_head_that_is_fitted_on_three_classes_recognizes_them(tmp_path: Path) -> None:
    """500 images of CIFAR-10, with the default model."""
    if not CIFAR10.exists():
        pytest.skip("TEST_CIFAR10 does not name the archive")
    names = ("bird", "dog", "ship")
    for name in names:
        (tmp_path / "images" / name).mkdir(parents=True)
    with np.load(CIFAR10) as arrays:
        encoded, offsets, classes = (arrays[f"test_{name}"] for name in ("jpeg", "offsets", "labels"))
    chosen = [index for index, number in enumerate(classes) if LABELS[number] in names][:500]
    for index in chosen:
        path = tmp_path / "images" / LABELS[classes[index]] / f"{index}.jpg"
        path.write_bytes(encoded[offsets[index] : offsets[index + 1]].tobytes())
    copy = open_bundle(Path(shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle")))
    fitted = fit_head(copy, "animals", tmp_path / "images", EngineOptions())
    assert fitted.head.labels == names
    assert (fitted.images, fitted.held_out) == (500, 100)
    assert fitted.head.accuracy is not None
    assert fitted.head.accuracy >= 0.9
