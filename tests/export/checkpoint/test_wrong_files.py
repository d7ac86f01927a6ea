"""A file or directory that is no checkpoint is rejected with what it is and what to do."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import SMALL_TRANSFORMERS, SQUASH, save_with_timm, save_with_transformers
from tests.support.networks import save_checkpoint
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.load import load_checkpoint

VIT = {"config.json": '{"model_type": "vit"}', "preprocessor_config.json": "{}"}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 346293852\n"


def torchscript() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def exported_program() -> bytes:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), buffer)
    return buffer.getvalue()


def onnx_model() -> bytes:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, 1, [2]) for name in "xy"]
    content: bytes = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", values[:1], values[1:]), producer_name="pytorch"
    ).SerializeToString()
    return content


def tar_archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights"))
    return buffer.getvalue()


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "an LFS pointer": (lambda: POINTER, r"is a Git LFS pointer.*run `git lfs pull`"),
    "an HTML page": (lambda: b"\n<!DOCTYPE html><html><body>Sign in</body>", r"is an HTML or XML page.*download"),
    "nothing": (lambda: b"", r"is empty: its download or copy was interrupted"),
    "JSON": (lambda: b'{"error": "Repository not found"}', r"is JSON, not weights"),
    "gzip": (lambda: gzip.compress(b"weights"), r"is compressed by gzip; decompress it"),
    "tar": (tar_archive, r"is a tar archive; extract it"),
    "Keras": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), r"is an HDF5 file, as Keras writes them; vitserve exports"),
    "TensorFlow Lite": (lambda: b"\x1c\0\0\0TFL3" + bytes(100), r"is a TensorFlow Lite model; vitserve exports"),
    "ONNX": (onnx_model, r"is an ONNX model; vitserve exports the weights of the framework"),
    "TorchScript": (torchscript, r"is a TorchScript archive.*torch\.save\(model\.state_dict\(\), FILE\)"),
    "torch.export": (exported_program, r"is a program that torch\.export saved; vitserve exports"),
    "a photo": (lambda: b"\xff\xd8\xff\xe0" + bytes(100), r"is a JPEG image, not weights"),
    "a pickle of protocol 4": (
        lambda: pickle.dumps({"a": 1}, 4),
        r"is pickled with a protocol that the safe loader does not",
    ),
    "torch's pickle of protocol 4": (
        lambda: saved({"a": torch.zeros(1)}, pickle_protocol=4),
        r"is pickled with a protocol that the safe loader does not read.*save it again with torch\.save\(\)",
    ),
    "a whole network": (
        lambda: saved(torch.nn.Linear(2, 2)),
        r"contains torch\.nn\.modules\.linear\.Linear, which is not loaded.*torch\.save\(model\.state_dict\(\), FILE\)",
    ),
    "a state dict without tensors": (lambda: saved({"epoch": 3}), r"has no state dict, a mapping of names to tensors"),
    "one tensor": (lambda: saved(torch.zeros(3)), r"has no state dict"),
}


@pytest.mark.filterwarnings("ignore")  # torch deprecates TorchScript
@pytest.mark.parametrize(
    ("kind", "name"),
    [*itertools.product(FILES, ("weights.pth", "model.safetensors")), ("ONNX", "x.onnx"), ("an LFS pointer", "x.onnx")],
)
def test_a_wrong_file_is_recognized_whatever_its_name(kind: str, name: str, tmp_path: Path) -> None:
    content, message = FILES[kind]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(CheckpointError, match=rf"{name} {message}") as rejection:
        load_checkpoint(tmp_path / name)
    assert "weights_only" not in str(rejection.value), "never advise unsafe loading"
    assert "\n" not in str(rejection.value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_in_a_directory_is_recognized(name: str, tmp_path: Path) -> None:
    for file, content in VIT.items():
        (tmp_path / file).write_text(content)
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"has no config\.json$"),
        (
            {"checkpoint-500/config.json": "{}"},
            r"has no config\.json; these directories in it have one: checkpoint-500",
        ),
        ({"bundle.json": "{}"}, r"has no config\.json; it is a bundle already"),
        ({"adapter_config.json": "{}"}, r"it is an adapter: merge it into its base model first"),
        ({"config.json": "[]"}, r"config\.json is not a JSON object"),
        ({"config.json": "{"}, r"config\.json is not JSON"),
        ({"config.json": POINTER.decode()}, r"config\.json is a Git LFS pointer"),
        ({"config.json": "<html>"}, r"config\.json is an HTML or XML page"),
        ({"config.json": "{}"}, r"unsupported model_type '' in config\.json"),
        ({"config.json": "[" * 100_000}, r"config\.json is not JSON"),
        (VIT | {"tf_model.h5": "x"}, r"other frameworks are not read: tf_model\.h5"),
        (VIT | {"model.safetensors.index.json": "{}"}, r"is not an index of weights"),
        (VIT | {"model.safetensors.index.json": '{"weight_map": null}'}, r"weight_map must map"),
        (VIT | {"pytorch_model.bin.index.json": '{"weight_map": {"a": 1}}'}, r"weight_map must map"),
    ],
)
def test_a_wrong_directory_is_explained(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def save_vit(transformers: ModuleType, directory: Path, network: str = "ViTForImageClassification") -> None:
    arguments = SMALL_TRANSFORMERS | {"intermediate_size": 96}
    save_with_transformers(transformers, directory, "ViTConfig", network, arguments)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_damaged_weights_are_named(value: str, transformers: ModuleType, tmp_path: Path) -> None:
    save_vit(transformers, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["vit.layernorm.weight"][3] = float(value)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of the 48 values of vit\.layernorm\.weight are NaN or infinite"):
        load_checkpoint(tmp_path)


def test_quantized_weights_are_rejected(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "weights.safetensors")
    weights = load_file(tmp_path / "weights.safetensors") | {"norm.weight": torch.ones(32, dtype=torch.int8)}
    torch.save(weights, tmp_path / "weights.pth")
    given = squash_file(tmp_path)
    with pytest.raises(CheckpointError, match=r"norm\.weight holds int8; quantized"):
        load_checkpoint(
            tmp_path / "weights.pth", architecture="vit_tiny_patch8_16", preprocessor=given, model_args={"num_heads": 2}
        )


def squash_file(directory: Path) -> str:
    (directory / "preprocessor_config.json").write_text(json.dumps(SQUASH))
    return str(directory)


@pytest.mark.filterwarnings("ignore")
def test_a_missing_preprocessor_is_explained_and_can_be_given(transformers: ModuleType, tmp_path: Path) -> None:
    save_vit(transformers, tmp_path / "model")
    complete = load_checkpoint(tmp_path / "model").preprocessing
    (tmp_path / "model" / "preprocessor_config.json").rename(tmp_path / "preprocessor_config.json")
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json.*Trainer.*--preprocessor FILE"):
        load_checkpoint(tmp_path / "model")
    for given in (tmp_path, tmp_path / "preprocessor_config.json"):
        assert load_checkpoint(tmp_path / "model", preprocessor=str(given)).preprocessing == complete
    nested = json.dumps({"image_processor": json.loads((tmp_path / "preprocessor_config.json").read_text())})
    (tmp_path / "processor_config.json").write_text(nested)
    (tmp_path / "preprocessor_config.json").unlink()
    assert load_checkpoint(tmp_path / "model", preprocessor=str(tmp_path)).preprocessing == complete
    with pytest.raises(CheckpointError, match="No such file"):
        load_checkpoint(tmp_path / "model", preprocessor=str(tmp_path / "missing.json"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_norm_eps": None}, "layer_norm_eps in config.json must be a number, not null"),
        ({"hidden_size": None}, "hidden_size in config.json must be an integer"),
        ({"hidden_size": True}, "hidden_size in config.json must be an integer"),
        ({"num_hidden_layers": -1}, "num_hidden_layers in config.json must be an integer"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers in config.json must be an integer"),
        ({"image_size": [32, None]}, "image_size in config.json must be a positive integer"),
        ({"image_size": 0}, "image_size in config.json must be a positive integer"),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps in config.json must be a number"),
        ({"id2label": [1, 2]}, "id2label in config.json has 2 labels; the model has 5 classes"),
        ({"id2label": "cats"}, "id2label in config.json must be a list or an object"),
        ({"model_type": None}, "model_type in config.json must be a string, not null"),
    ],
)
def test_nulls_and_other_types_are_named(
    change: dict[str, Any], message: str, transformers: ModuleType, tmp_path: Path
) -> None:
    save_vit(transformers, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_nulls_of_timm_are_its_defaults(timm: ModuleType, tmp_path: Path) -> None:
    save_with_timm(timm, tmp_path, "vit_tiny_patch16_224", {"depth": 1, "num_classes": 5})
    config = json.loads((tmp_path / "config.json").read_text())
    keys = ("crop_pct", "crop_mode", "interpolation", "mean", "std", "input_size")
    config["pretrained_cfg"] |= dict.fromkeys(keys)
    (tmp_path / "config.json").write_text(json.dumps(config))
    preprocessing = load_checkpoint(tmp_path).preprocessing
    expected = timm.data.resolve_data_config({}, pretrained_cfg=config["pretrained_cfg"])
    assert (preprocessing.crop, preprocessing.interpolation) == (expected["crop_pct"], expected["interpolation"])
    assert (preprocessing.mean, preprocessing.std) == (expected["mean"], expected["std"])
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": None}))
    assert "depth is 1 instead of 12" in load_checkpoint(tmp_path).notes[0]


@pytest.mark.filterwarnings("ignore")
def test_a_key_without_effect_can_be_ignored(transformers: ModuleType, tmp_path: Path) -> None:
    save_vit(transformers, tmp_path)
    for name in ("config.json", "preprocessor_config.json"):
        keys = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(keys | {"our_dataset": "pets"}))
        with pytest.raises(CheckpointError, match=rf'{name} has keys .*: our_dataset "pets"; .* --ignore-key'):
            load_checkpoint(tmp_path, network="ours")
        assert "our_dataset" in load_checkpoint(tmp_path).notes[-1], "the library's network is exported, with a note"
        notes = load_checkpoint(tmp_path, ignored_keys=("our_dataset",)).notes
        assert f'our_dataset "pets" in {name} is ignored as requested' in notes
        (tmp_path / name).write_text(json.dumps(keys))


@pytest.mark.filterwarnings("ignore")
def test_options_of_other_libraries_are_rejected(transformers: ModuleType, timm: ModuleType, tmp_path: Path) -> None:
    save_vit(transformers, tmp_path / "vit")
    with pytest.raises(CheckpointError, match="--architecture is for a state dict of timm"):
        load_checkpoint(tmp_path / "vit", architecture="vit_tiny_patch16_224")
    with pytest.raises(CheckpointError, match="--model-arg is for networks of timm"):
        load_checkpoint(tmp_path / "vit", model_args={"num_heads": 3})
    with pytest.raises(CheckpointError, match=r"It is in a directory with config\.json: export the directory"):
        load_checkpoint(tmp_path / "vit" / "model.safetensors")
    (tmp_path / "vit" / "model.safetensors").rename(tmp_path / "vit.safetensors")
    with pytest.raises(CheckpointError, match=r"a state dict of transformers: export a directory that also has config"):
        load_checkpoint(tmp_path / "vit.safetensors")
