"""Serving a checkpoint: the source and the cache are checked before torch is imported, and an export happens once."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import httpx
import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from tests.support.checkpoints import SMALL_TRANSFORMERS, SQUASH, save_with_transformers
from tests.support.images import encoded, random_image
from tests.support.networks import save_checkpoint
from tests.support.onnx_files import write
from tests.support.paths import ROOT
from tests.support.server import start_server
from vitserve.export.cache import cached_bundle
from vitserve.export.checkpoint.errors import CheckpointError, OptionNeededError
from vitserve.export.onnx_file.external import external_files
from vitserve.export.requirements import EXPORT_PACKAGES
from vitserve.model.bundle.bundle import open_bundle

# Prints the bundle's directory. The named modules cannot be imported, as if they were not installed.
SCRIPT = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[2].split(",")))
from vitserve.export.cache import cached_bundle
try:
    print(cached_bundle(sys.argv[1], "1"))
except (ValueError, RuntimeError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vitserve"


def cached_bundle_without(modules: str, source: str) -> tuple[str, str]:
    """Standard output and the last line of standard error of an environment without the modules."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, source, modules],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return result.stdout.strip(), result.stderr.strip()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "missing/model",
            "CheckpointError: missing/model: no such file or directory; for the model on the Hugging Face hub, write",
        ),
        ("hub:owner/name", "CheckpointError: unknown source 'hub:owner/name': use a path, hf:owner/name, timm:NAME, "),
        ("random:B/17", "ValueError: unknown variant 'B/17'; known: "),
        ("hf:name", "HubError: 'name' is not a model on the hub: write owner/name or owner/name@revision"),
    ],
)
def test_a_wrong_source_is_rejected_without_torch(source: str, message: str, cache: Path) -> None:
    output, error = cached_bundle_without("torch,onnx", source)
    assert output == ""
    assert error.startswith(message)
    assert "\n" not in error


def test_a_cached_bundle_is_found_without_torch(cache: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model.safetensors")
    bundle = cached_bundle(str(tmp_path / "model.safetensors"), "1")
    packages = ",".join(EXPORT_PACKAGES)
    assert cached_bundle_without(packages, str(tmp_path / "model.safetensors")) == (str(bundle), "")


@pytest.mark.parametrize("package", EXPORT_PACKAGES)
def test_a_missing_package_is_named_with_the_command(package: str, cache: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model.safetensors")
    output, error = cached_bundle_without(package, str(tmp_path / "model.safetensors"))
    assert output == ""
    command = "pip install 'vitserve[export]'"
    assert error == f"MissingPackageError: reading a checkpoint requires {package}; install with: {command}"


def test_a_hub_model_requires_huggingface_hub(cache: Path) -> None:
    _, error = cached_bundle_without("huggingface_hub", "hf:owner/name")
    assert error.startswith("MissingPackageError: reading a checkpoint requires huggingface_hub;")


def test_importing_the_cache_does_not_import_torch() -> None:
    script = f"import sys, vitserve.export.cache; assert not {set(EXPORT_PACKAGES)} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


def test_a_changed_checkpoint_or_version_is_exported_again(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    save_checkpoint(source)
    steps: list[str] = []
    first = cached_bundle(str(source), "1", steps.append)
    assert steps[0] == f"exporting {source} to {first}"
    steps.clear()
    assert cached_bundle(str(source), "1", steps.append) == first
    assert not steps
    save_checkpoint(source, seed=1)
    changed = cached_bundle(str(source), "1", steps.append)
    assert changed != first
    assert open_bundle(changed).manifest.name == "model.safetensors"


def write_onnx(path: Path, weights: np.ndarray) -> None:
    """The means of three channels of raw pixels as logits; ``weights``, a factor for each, are in weights.bin."""
    nodes = [
        onnx.helper.make_node("Cast", ["pixels"], ["images"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("GlobalAveragePool", ["images"], ["means"]),
        onnx.helper.make_node("Flatten", ["means"], ["features"]),
        onnx.helper.make_node("MatMul", ["features", "weights"], ["logits"]),
    ]
    pixels = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ["batch", 3, 8, 8])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 3])
    initializers = [onnx.numpy_helper.from_array(np.diag(weights).astype(np.float32), "weights")]
    graph = onnx.helper.make_graph(nodes, "means", [pixels], [logits], initializers)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)


def test_changed_external_weights_of_an_onnx_file_are_exported_again(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    write_onnx(source, np.array([0.1, 0.2, 0.3]))
    assert external_files(source) == [tmp_path / "weights.bin"]
    first, file = cached_bundle(str(source), "1"), source.read_bytes()
    (tmp_path / "weights.bin").unlink()
    write_onnx(source, np.array([0.3, 0.2, 0.1]))
    assert source.read_bytes() == file
    second = cached_bundle(str(source), "1")
    assert second != first
    packages = ",".join(EXPORT_PACKAGES)
    assert cached_bundle_without(packages, str(source)) == (str(second), "")


@pytest.mark.parametrize("name", ["w.bin", "a/" + "w" * 126 + ".bin", "größe.bin"])
def test_external_files_are_found_without_a_parser(name: str, tmp_path: Path) -> None:
    """Also where the length of the name has two bytes."""
    tensor = onnx.TensorProto(name="weights", data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=name)
    tensor.external_data.add(key="location", value="missing.bin")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    (tmp_path / "model.onnx").write_bytes(tensor.SerializeToString())
    assert external_files(tmp_path / "model.onnx") == [tmp_path / name]
    (tmp_path / "empty.onnx").touch()
    assert external_files(tmp_path / "empty.onnx") == []


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("kind", ["onnx", "clip", "timm"])
def test_a_source_that_needs_options_is_to_be_exported_first(
    kind: str, transformers: ModuleType, cache: Path, tmp_path: Path
) -> None:
    source = tmp_path / {"onnx": "model.onnx", "clip": "clip", "timm": "vit.pth"}[kind]
    if kind == "onnx":
        write(source)
    elif kind == "clip":
        source.mkdir()
        (source / "config.json").write_text(json.dumps({"model_type": "clip", "architectures": ["CLIPModel"]}))
        (source / "preprocessor_config.json").write_text(json.dumps(SQUASH))
        torch.save({"logit_scale": torch.ones(())}, source / "pytorch_model.bin")
    else:
        torch.save({"patch_embed.proj.weight": torch.ones(4, 3, 8, 8)}, source)
    with pytest.raises(OptionNeededError, match=rf"export it first: vitserve export {source} --output BUNDLE$"):
        cached_bundle(str(source), "1")


def test_a_damaged_cached_bundle_is_exported_again(cache: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model.safetensors")
    bundle = cached_bundle(str(tmp_path / "model.safetensors"), "1")
    (bundle / "labels.txt").write_text("damaged\n")
    assert cached_bundle(str(tmp_path / "model.safetensors"), "1") == bundle
    assert len(open_bundle(bundle).labels) == 7


@pytest.mark.slow
def test_a_source_is_served_and_exported_once(transformers: ModuleType, tmp_path: Path, cache: Path) -> None:
    arguments = SMALL_TRANSFORMERS | {"intermediate_size": 96, "id2label": dict(enumerate("abcde"))}
    source = save_with_transformers(
        transformers, tmp_path / "model", "ViTConfig", "ViTForImageClassification", arguments
    )
    image = encoded(random_image(50, 40))
    with torch.inference_mode():
        expected = source(normalized(image)).logits.softmax(-1)[0]
    for run in range(2):
        server = start_server(str(tmp_path / "model"), "--precision", "fp32")
        with httpx.Client(base_url=server.url, timeout=60) as client:
            response = client.post("/v1/classify", content=image, headers={"content-type": "image/png"}).json()
        assert server.stop() == 0
        for prediction in response["results"][0]["predictions"]:
            assert prediction["label"] == "abcde"[prediction["index"]]
            assert prediction["probability"] == pytest.approx(float(expected[prediction["index"]]), abs=1e-4)
        assert ("exporting" in "".join(server.log)) is (run == 0)
    assert len(list(cache.glob("model-*"))) == 1


def normalized(image: bytes) -> torch.Tensor:
    """The image as the preprocessor SQUASH prepares it: float32 [1, 3, 32, 32]."""
    resized = Image.open(io.BytesIO(image)).resize((32, 32), Image.Resampling.BILINEAR)
    pixels = np.asarray(resized).astype(np.float32) / 255
    mean, std = np.array(SQUASH["image_mean"], np.float32), np.array(SQUASH["image_std"], np.float32)
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)[None]


def test_unreadable_sources_raise_checkpoint_errors(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        cached_bundle(str(tmp_path / "missing"), "1")
    assert not cache.exists()
