"""Networks of other libraries are exported as the library computes them, and ours are compared with the library's."""

from __future__ import annotations

import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.checkpoints import SMALL_TIMM, relative_difference, save_with_timm
from tests.support.library_networks import SMALL
from tests.support.paths import ROOT
from vitserve.export import torch_model
from vitserve.export.artifacts import ExportError
from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.library.owner import missing
from vitserve.export.checkpoint.load import load_checkpoint
from vitserve.export.graph.optimize import OptimizedNetwork
from vitserve.export.graph.trace import trace
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.config import LibraryConfig, ViTConfig
from vitserve.model.network.vit import ViT
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import EngineOptions

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

# Of another kind than the others, or with a sibling of the other library among them.
SLOW = ("MLP-Mixer", "ResNet of transformers", "Swin of timm", "BEiT of timm", "SigLIP of transformers")
TINY_TIMM = SMALL_TIMM | {"num_heads": 12, "depth": 1}


def library_logits(source: nn.Module, bundle: Bundle) -> np.ndarray:
    """The library's own logits of the golden images."""
    preprocessing = bundle.manifest.preprocessing
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    images = (torch.from_numpy(bundle.golden().pixels) / 255 - mean) / std
    with torch.inference_mode():
        output = source(images.permute(0, 3, 1, 2))
    logits: np.ndarray = (output if isinstance(output, torch.Tensor) else output.logits).numpy()
    return logits


@pytest.mark.parametrize(
    "family", [name if name not in SLOW else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
def test_a_family_that_has_no_network_here_is_exported(
    family: str, timm: ModuleType, transformers: ModuleType, tmp_path: Path
) -> None:
    small = SMALL[family]
    torch.manual_seed(0)
    source = small.save(timm, transformers, tmp_path / "source")
    checkpoint = load_checkpoint(tmp_path / "source")
    bundle = build_bundle(checkpoint, tmp_path / "bundle", name="small", precisions=["fp32"])
    config, golden = bundle.manifest.config, bundle.golden()
    assert isinstance(config, LibraryConfig)
    assert config.library.startswith("timm" if small.of_timm else "transformers")
    assert (config.height, config.width, config.channels) == golden.pixels.shape[1:]
    expected = library_logits(source, bundle)
    assert relative_difference(golden.reference.logits, expected) < 1e-5
    assert np.ptp(expected, axis=0).max() > 0.01 * np.abs(expected).max(), "the logits hardly depend on the image"
    for artifact in bundle.manifest.artifacts:
        engine = construct_engine(artifact.engine, "fp32", bundle.path / artifact.path, EngineOptions(max_batch=16))
        assert relative_difference(engine.run(0, golden.pixels).logits, expected) < 1e-4
        engine.close()
    (openvino,) = (artifact for artifact in bundle.manifest.artifacts if artifact.engine == "openvino")
    assert openvino.attention is not None
    assert openvino.attention.fused >= small.attention


def test_golden_outputs_are_the_librarys(timm: ModuleType, tmp_path: Path) -> None:
    source = save_with_timm(timm, tmp_path / "source", "vit_base_patch16_224", TINY_TIMM)
    bundle = build_bundle(load_checkpoint(tmp_path / "source"), tmp_path / "bundle", name="a", precisions=["fp32"])
    assert isinstance(bundle.manifest.config, ViTConfig)
    assert bundle.manifest.reference == f"timm {timm.__version__}"
    assert relative_difference(bundle.golden().reference.logits, library_logits(source, bundle)) < 1e-5


def test_our_network_is_replaced_by_the_librarys_if_it_differs(timm: ModuleType, tmp_path: Path) -> None:
    """As if the reader had overlooked an argument that the tensors do not show."""
    source = save_with_timm(timm, tmp_path / "source", "vit_base_patch16_224", TINY_TIMM)
    checkpoint, steps = load_checkpoint(tmp_path / "source"), list[str]()
    assert isinstance(checkpoint.network, ViT)
    for norm in checkpoint.network.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.eps = 0.5
    with pytest.raises(CheckpointError, match="--network ours: vitserve's form of custom differs from timm"):
        replace(checkpoint, choice="ours").source_model(steps.append)
    bundle = build_bundle(checkpoint, tmp_path / "bundle", name="a", precisions=["fp32"], progress=steps.append)
    assert isinstance(bundle.manifest.config, LibraryConfig)
    assert any(step.startswith("warning: vitserve's form of custom differs from timm") for step in steps)
    assert relative_difference(bundle.golden().reference.logits, library_logits(source, bundle)) < 1e-5


def test_the_librarys_network_is_offered_if_an_engine_does_not_match_ours(
    timm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace_scaled(network: OptimizedNetwork, shape: int | tuple[int, int, int], path: Path) -> None:
        with torch.no_grad():
            network.network.head.weight.mul_(2)
        trace(network, shape, path)

    save_with_timm(timm, tmp_path / "source", "vit_base_patch16_224", TINY_TIMM)
    monkeypatch.setattr(torch_model, "trace", trace_scaled)
    offer = rf"openvino in fp32 does not match .*; --network library exports the network as timm {timm.__version__}"
    with pytest.raises(ExportError, match=offer):
        build_bundle(load_checkpoint(tmp_path / "source"), tmp_path / "bundle", name="a", precisions=["fp32"])


def test_without_the_library_the_bundle_says_that_it_is_compared_with_ours(
    timm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_with_timm(timm, tmp_path / "source", "vit_base_patch16_224", TINY_TIMM)
    monkeypatch.setitem(sys.modules, "timm", None)
    steps = list[str]()
    source = load_checkpoint(tmp_path / "source").source_model(steps.append)
    assert source.reference == "vitserve"
    (note,) = steps
    assert note.startswith(
        "note: the artifacts are compared with vitserve's form of the network only: timm is required"
    )


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_a_missing_library_is_named_with_an_extra_that_exists(library: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.search(r"pip install 'vitserve\[(\w+)\]'", str(missing(library, ImportError(library))))
    assert named is not None
    assert any(re.match(rf"{library}\b", requirement) for requirement in extras[named[1]])
