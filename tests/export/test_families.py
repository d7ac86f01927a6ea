"""Every network of the table in docs/models.md is exported with the outputs of its library, or rejected as stated."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.models.families import FAMILIES, Family
from benchmarks.models.measure import save
from vitserve.export.artifacts import ExportError
from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.library.network import LibraryNetwork
from vitserve.export.checkpoint.library.owner import Reversed
from vitserve.export.checkpoint.load import load_checkpoint
from vitserve.model.bundle.bundle import Bundle
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import EngineOptions

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the libraries' own warnings

TOLERANCE = 1e-4  # relative to the largest logit
NAMES = [f"{family.library}, {family.name}" for family in FAMILIES]


@pytest.fixture
def directory() -> Iterator[Path]:
    """Deleted at once, because all bundles together have gigabytes."""
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_a_family_has_the_logits_of_its_library(
    family: Family, directory: Path, timm: ModuleType, transformers: ModuleType
) -> None:
    if family.rejection:
        with pytest.raises((CheckpointError, ExportError, ImportError), match=family.rejection):
            exported(family, directory)
        return
    network, bundle, is_reversed = exported(family, directory)
    pixels = bundle.golden().pixels
    expected = library_logits(network, bundle, is_reversed)
    scale = np.abs(expected).max()
    for artifact in bundle.manifest.artifacts:
        engine = construct_engine(artifact.engine, "fp32", bundle.path / artifact.path, EngineOptions(max_batch=16))
        difference = np.abs(engine.run(0, pixels).logits - expected).max() / scale
        engine.close()
        assert difference < TOLERANCE, artifact.engine


def exported(family: Family, directory: Path) -> tuple[nn.Module, Bundle, bool]:
    """The library's network, the bundle made of its checkpoint, and whether the network takes BGR."""
    network = save(family, directory / "source")
    checkpoint = load_checkpoint(directory / "source")
    own = checkpoint.network
    is_reversed = isinstance(own, LibraryNetwork) and isinstance(own.logits, Reversed)
    bundle = build_bundle(checkpoint, directory / "bundle", name="family", precisions=["fp32"])
    return network, bundle, is_reversed


def library_logits(network: nn.Module, bundle: Bundle, is_reversed: bool) -> np.ndarray:
    """Of the golden images, [n, classes]."""
    preprocessing = bundle.manifest.preprocessing
    images = torch.from_numpy(bundle.golden().pixels) / 255
    images = ((images - torch.tensor(preprocessing.mean)) / torch.tensor(preprocessing.std)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        output = network(images.flip(1) if is_reversed else images)
    logits: np.ndarray = (output if isinstance(output, torch.Tensor) else output.logits).numpy()
    return logits
