"""The network is found in whatever a training script saved around it, and every decision is noted."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support.checkpoints import (
    SMALL_TRANSFORMERS,
    assert_same_logits,
    logits_of,
    randomized,
    save_with_timm,
    save_with_transformers,
)
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.load import Checkpoint, load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # of the other libraries

NAME = "vit_tiny_patch16_224"
ARGUMENTS = {"img_size": 32, "patch_size": 8, "depth": 1, "num_classes": 5}

Weights = dict[str, Tensor]


@pytest.fixture
def network(timm: ModuleType) -> nn.Module:
    return randomized(timm.create_model(NAME, **ARGUMENTS))


def load(saved: Any, path: Path, **overrides: Any) -> Checkpoint:
    torch.save(saved, path)
    return load_checkpoint(path, architecture=NAME, **overrides)


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        "model.",
        "module.",
        "_orig_mod.",
        "model._orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.model.",
        "net.",
        "backbone.",
        "encoder.vit.",
        "timm_model.",
    ],
)
def test_any_prefix_is_found(prefix: str, network: nn.Module, tmp_path: Path) -> None:
    """Lightning's, DDP's, torch.compile's, in any combination, and those of own modules."""
    checkpoint = load(prefixed(prefix, network.state_dict()), tmp_path / "weights.pth")
    assert_same_logits(checkpoint, network)
    assert f"the weights are those under '{prefix.rstrip('.')}'" in checkpoint.notes


@pytest.mark.parametrize(
    ("path", "others"),
    [
        (("state_dict",), {"epoch": 3, "hyper_parameters": {"lr": 1e-3}, "optimizer_states": [{"state": {}}]}),
        (("model_state_dict",), {"optimizer_state_dict": {"state": {0: {"step": torch.ones(1)}}}, "loss": 0.1}),
        (("net",), {"acc": np.float64(90.1)}),
        (("model",), {"args": argparse.Namespace(lr=np.float32(0.1), output=Path("runs")), "scaler": {}}),
        (("checkpoint", "network"), {}),
        (("a_name_of_its_own",), {}),
        ((0,), {1: {"lr": 0.1}}),
    ],
)
def test_any_wrapper_is_found(path: tuple[Any, ...], others: Any, network: nn.Module, tmp_path: Path) -> None:
    saved: Any = OrderedDict(network.state_dict())
    for key in reversed(path):
        saved = [saved, *others.values()] if key == 0 else {key: saved, **others}
    checkpoint = load(saved, tmp_path / "weights.pth")
    assert_same_logits(checkpoint, network)
    assert f"the weights are those under {'.'.join(map(str, path))!r}" in checkpoint.notes


def test_prefix_and_wrapper_combine(network: nn.Module, tmp_path: Path) -> None:
    checkpoint = load({"state_dict": prefixed("model.module.", network.state_dict())}, tmp_path / "a.ckpt")
    assert_same_logits(checkpoint, network)
    assert "the weights are those under 'state_dict.model.module'" in checkpoint.notes


def averaged_and_raw(raw: Weights, averaged: Weights) -> dict[str, Any]:
    """How training scripts save averaged weights beside the raw ones."""
    return {
        "timm": {"state_dict": raw, "state_dict_ema": averaged, "epoch": 1},
        "torchvision": {"model": raw, "model_ema": {"n_averaged": torch.ones(()), **prefixed("module.", averaged)}},
        "one state dict": {"state_dict": prefixed("model.", raw) | prefixed("ema_model.", averaged)},
        "without a prefix": raw | prefixed("ema.", averaged),
    }


@pytest.mark.parametrize("kind", ["timm", "torchvision", "one state dict", "without a prefix"])
def test_averaged_weights_are_taken_and_raw_ones_on_request(kind: str, network: nn.Module, tmp_path: Path) -> None:
    averaged = network.state_dict()
    raw = {name: tensor * 1.5 for name, tensor in averaged.items()}
    saved = averaged_and_raw(raw, averaged)[kind]
    checkpoint = load(saved, tmp_path / "weights.pth")
    assert_same_logits(checkpoint, network)
    assert any("the averaged ones are taken, as in timm; --weights raw" in note for note in checkpoint.notes)
    explicit = load(saved, tmp_path / "weights.pth", weights="averaged")
    assert_same_logits(explicit, network)
    network.load_state_dict(raw)
    assert_same_logits(load(saved, tmp_path / "weights.pth", weights="raw"), network)


def test_several_networks_must_be_chosen_from(network: nn.Module, tmp_path: Path) -> None:
    teacher = network.state_dict()
    student = {name: tensor * 0 for name, tensor in teacher.items()}
    saved, path = {"student": student, "teacher": prefixed("module.", teacher)}, tmp_path / "dino.pth"
    with pytest.raises(CheckpointError, match=r"holds several networks: student, teacher\.module; .* --weights"):
        load(saved, path)
    with pytest.raises(
        CheckpointError, match=r"has no network under 'head' \(--weights\); it has student, teacher\.module"
    ):
        load(saved, path, weights="head")
    for chosen in ("teacher", "teacher.module", "module."):
        assert_same_logits(load(saved, path, weights=chosen), network)


def test_tensors_of_the_training_are_ignored_and_others_are_not(network: nn.Module, tmp_path: Path) -> None:
    path, weights = tmp_path / "weights.pth", prefixed("model.", network.state_dict())
    checkpoint = load(weights | {"criterion.weight": torch.ones(5), "train_loss.sum": torch.ones(1)}, path)
    assert "ignored tensors: criterion.weight, train_loss.sum: no network reads them" in checkpoint.notes
    another = weights | {"classifier.weight": torch.ones(5, 192)}
    with pytest.raises(CheckpointError, match=r"classifier\.weight \[5, 192\], beside the network under 'model'"):
        load(another, path)
    assert_same_logits(load(another, path, weights="model"), network)


def test_the_architecture_that_timms_script_records_is_used(network: nn.Module, tmp_path: Path) -> None:
    saved = {"arch": NAME, "state_dict": network.state_dict(), "args": argparse.Namespace(model=NAME)}
    torch.save(saved, tmp_path / "last.pth.tar")
    checkpoint = load_checkpoint(tmp_path / "last.pth.tar")
    assert_same_logits(checkpoint, network)
    assert f"the architecture is {NAME}, as the file records it" in checkpoint.notes


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod."])
def test_names_of_transformers_4_and_5_and_prefixes(
    prefix: str, modern: bool, transformers: ModuleType, tmp_path: Path
) -> None:
    """save_pretrained() writes the names of transformers 4; torch.save(network.state_dict()) those of 5."""
    for config, network, arguments in (
        ("ViTConfig", "ViTForImageClassification", {"intermediate_size": 96}),
        ("DeiTConfig", "DeiTForImageClassificationWithTeacher", {"intermediate_size": 96}),
        ("Dinov2Config", "Dinov2ForImageClassification", {"use_swiglu_ffn": True}),
    ):
        directory = tmp_path / network
        source = save_with_transformers(transformers, directory, config, network, SMALL_TRANSFORMERS | arguments)
        weights = source.state_dict() if modern else load_file(directory / "model.safetensors")
        assert any("q_proj" in name for name in weights) is modern
        (directory / "model.safetensors").unlink()
        torch.save(prefixed(prefix, weights), directory / "pytorch_model.bin")
        assert_same_logits(load_checkpoint(directory), logits_of(source))


def test_timm_networks_that_transformers_saved(transformers: ModuleType, timm: ModuleType, tmp_path: Path) -> None:
    arguments = {name: value for name, value in ARGUMENTS.items() if name != "num_classes"}
    created = timm.create_model(NAME, **arguments)
    labels = {"id2label": dict(enumerate("abcde")), "label2id": {name: index for index, name in enumerate("abcde")}}
    config = transformers.TimmWrapperConfig(
        architecture=NAME, pretrained_cfg=created.pretrained_cfg, model_args=arguments, num_labels=5, **labels
    )
    source = randomized(transformers.TimmWrapperForImageClassification(config))
    source.save_pretrained(tmp_path)  # type: ignore[operator]  # a method of transformers
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.labels == tuple("abcde")
    assert_same_logits(checkpoint, logits_of(source))


def test_shards_of_pickles_and_of_safetensors(transformers: ModuleType, tmp_path: Path) -> None:
    arguments = SMALL_TRANSFORMERS | {"intermediate_size": 96}
    source = save_with_transformers(transformers, tmp_path, "ViTConfig", "ViTForImageClassification", arguments)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for index, save in (("pytorch_model.bin", torch.save), ("model.safetensors", save_file)):
        stem, suffix = index.split(".")
        shards = {name: f"{stem}-{number % 2}.{suffix}" for number, name in enumerate(weights)}
        for shard in set(shards.values()):
            save({name: weights[name] for name in weights if shards[name] == shard}, tmp_path / shard)
        (tmp_path / f"{index}.index.json").write_text('{"weight_map": ' + str(shards).replace("'", '"') + "}")
        assert_same_logits(load_checkpoint(tmp_path), logits_of(source))
        (tmp_path / f"{stem}-1.{suffix}").unlink()
        with pytest.raises(CheckpointError, match=rf"names {stem}-1\.{suffix}, which does not exist"):
            load_checkpoint(tmp_path)
        (tmp_path / f"{index}.index.json").unlink()


def test_the_prefix_of_a_timm_directory(timm: ModuleType, tmp_path: Path) -> None:
    source = save_with_timm(timm, tmp_path, NAME, ARGUMENTS)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(prefixed("module.", weights), tmp_path / "model.safetensors")
    assert_same_logits(load_checkpoint(tmp_path), source)
