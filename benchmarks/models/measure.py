"""Makes a checkpoint of a family with random weights, exports it, and measures the bundle."""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.models.families import Family
from vitserve.export.artifacts import ExportError
from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.load import load_checkpoint
from vitserve.export.golden_images import textures
from vitserve.export.quantize import int8
from vitserve.model.arrays import Precision
from vitserve.model.bundle.bundle import GRAPH, Bundle
from vitserve.model.config import LibraryConfig
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import EngineOptions

BATCH = 8
_LEAST_LOGIT = 1e-3  # of a random network; below it, differences say nothing
_CALIBRATION = 4  # generated images, to measure the speed of int8; its accuracy on random weights means nothing


@dataclass(frozen=True)
class Result:
    family: str
    library: str
    architecture: str
    path: str = ""  # "ours" or "library"
    parity: float | None = None  # the greater of the CPU engines' differences of logits in fp32
    fused: int = 0  # attention kernels of OpenVINO
    softmax: int = 0  # softmax layers outside of them
    attention: int = 0  # attention operators in the graph
    fp32: float | None = None  # images/s
    int8: float | None = None
    message: str = ""  # why it was rejected
    seconds: float = 0.0  # of the export


def declare_torchvision_operators() -> torch.library.Library | None:
    """timm imports torchvision, whose compiled operators a CPU build of torch may not have. Keep the result alive."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchvision  # type: ignore[import-untyped]  # noqa: F401
    except (ImportError, RuntimeError):
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        return library
    return None


def save(family: Family, directory: Path) -> nn.Module:
    """Writes the checkpoint as the library does, with random weights from a fixed seed. Returns the network."""
    torch.manual_seed(0)
    if family.library == "timm":
        import timm
        from timm.models import save_for_hf

        created = _random(timm.create_model(family.architecture, **family.arguments))
        save_for_hf(created, str(directory))
        return created
    import transformers

    kind = getattr(transformers, family.architecture)
    network: Any = _random(kind(kind.config_class(**{"num_labels": 1000} | family.arguments)))
    _keep_logits(network, family.image_size)
    network.save_pretrained(directory)
    processor: Any = getattr(transformers, family.processor)
    side, sizes = family.image_size, dict[str, Any]()
    if "size" in processor.__dict__ or hasattr(processor, "size"):
        square = {"height": side, "width": side}
        sizes["size"] = {"shortest_edge": side} if "shortest_edge" in (processor.size or {}) else square
        sizes["crop_size"] = square
    settings = {"image_processor_type": family.processor} | sizes
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    saved: nn.Module = network
    return saved


def _random(network: nn.Module) -> nn.Module:
    """Zeros, tiny layer scales, and vanishing activations would hide parts of the network."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "gamma" in name or "lambda" in name:
                parameter.uniform_(0.2, 0.8)
            elif parameter.ndim == 4:  # convolutions, which some libraries initialize so that the logits vanish
                nn.init.kaiming_normal_(parameter)
            elif parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)
        heads = [layer for layer in network.modules() if isinstance(layer, nn.Linear) and layer.out_features == 1000]
        for head in heads:
            nn.init.trunc_normal_(head.weight, std=0.02)
    return network.eval()


def _keep_logits(network: nn.Module, side: int) -> None:
    """If the logits vanish over many batch norms, these get the statistics of random images."""
    norms = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    images = torch.randn(4, 3, side, side)
    with torch.no_grad():
        if not norms or network(images)[0].abs().max() > _LEAST_LOGIT:  # by its place: PP-LCNet names it otherwise
            return
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
            norm.train()
        network(images)
    network.eval()


def export(family: Family, path: Path) -> Result:
    """Exports to ``path``. A rejection is a result too."""
    start = time.perf_counter()
    row = Result(family.name, family.library, family.architecture)
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as temporary:
            warnings.simplefilter("ignore")
            save(family, Path(temporary))
            checkpoint = load_checkpoint(Path(temporary))
            bundle = build_bundle(checkpoint, path, name=family.architecture, precisions=["fp32"])
    except (CheckpointError, ExportError) as error:
        return replace(row, message=str(error), seconds=time.perf_counter() - start)
    except Exception as error:  # the library cannot even make the network here
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = f"{type(error).__name__}: {lines[0] if lines else ''}"
        return replace(row, message=message, seconds=time.perf_counter() - start)
    return _described(bundle, row, time.perf_counter() - start)


def _described(bundle: Bundle, row: Result, seconds: float) -> Result:
    config, artifacts = bundle.manifest.config, bundle.manifest.artifacts
    float32 = [artifact for artifact in artifacts if artifact.precision == "fp32"]
    kernels = next((artifact.attention for artifact in float32 if artifact.engine == "openvino"), None)
    return replace(
        row,
        path="library" if isinstance(config, LibraryConfig) else "ours",
        parity=max(artifact.parity.logits for artifact in float32),
        fused=kernels.fused if kernels else 0,
        softmax=kernels.softmax_layers if kernels else 0,
        attention=config.attention_layers if isinstance(config, LibraryConfig) else getattr(config, "depth", 0),
        seconds=seconds,
    )


def write_int8(bundle: Bundle) -> Path:
    """Quantizes the graph for a measurement of speed. The bundle's own int8 would also be checked for accuracy."""
    path = bundle.path.with_name(f"{bundle.path.name}-int8.xml")
    if not path.exists():
        images = textures(bundle.manifest.preprocessing.shape, _CALIBRATION, seed=1)
        int8.save(int8.quantize(bundle.path / GRAPH, images, smooth=False), path)
    return path


def images_per_second(bundle: Bundle, path: Path, precision: Precision, seconds: float = 1.0) -> float:
    """Of batches of 8 in OpenVINO, after a warm-up."""
    engine = construct_engine("openvino", precision, path, EngineOptions(max_batch=BATCH))
    pixels = np.concatenate([bundle.golden().pixels] * BATCH)[:BATCH]
    try:
        _run_for(engine, pixels, seconds / 3)
        return _run_for(engine, pixels, seconds)
    finally:
        engine.close()


def _run_for(engine: Any, pixels: np.ndarray, seconds: float) -> float:
    images, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        engine.run(0, pixels)
        images += len(pixels)
    return images / elapsed


def to_json(result: Result) -> dict[str, Any]:
    return asdict(result)
