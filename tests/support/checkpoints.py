"""Checkpoints of other libraries with random weights, and the comparison of their logits with ours."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tests.support.images import encoded
from vitserve.export.checkpoint.load import Checkpoint
from vitserve.export.graph.reference import ReferenceNetwork
from vitserve.export.graph.trace import trace
from vitserve.model.arrays import Pixels
from vitserve.model.bundle.preprocess import Decoder
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import EngineOptions

log = logging.getLogger("parity")  # docs/models.md has the command that shows it

TORCH_TOLERANCE, SERVED_TOLERANCE = 1e-4, 1e-3  # relative to the largest logit

SMALL_TIMM: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_classes": 5}
SMALL_TRANSFORMERS: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
SQUASH: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 32, "width": 32},
    "resample": 2,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
    "do_normalize": True,
}


def randomized(network: nn.Module) -> nn.Module:
    """Weights so large that every part affects the logits; initial layer scales and heads would hide the rest."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif "gamma" in name or "lambda" in name:
                parameter.uniform_(0.2, 0.8)
            else:
                parameter.normal_(std=1.0 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1)
    return network.eval()


def random_pixels(side: int, count: int = 2) -> Pixels:
    """Images of different colors, so that the mean over the patches differs too."""
    random = np.random.default_rng(0)
    noise, colors = random.integers(0, 128, (count, side, side, 3)), random.integers(0, 128, (count, 1, 1, 3))
    return (noise + colors).astype(np.uint8)


def assert_same_logits(
    checkpoint: Checkpoint, source: Callable[[Tensor], Tensor], directory: Path | None = None, count: int = 2
) -> None:
    """Compares our torch network with the source network, and with a ``directory`` also the graph in ONNX Runtime."""
    pixels = random_pixels(checkpoint.preprocessing.image_size, count)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (checkpoint.preprocessing.mean, checkpoint.preprocessing.std)
    )
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.inference_mode():
        expected, actual = source(images), checkpoint.network(images)[0]
    scale = expected.abs().max()
    assert scale > 1e-3
    assert (expected[0] - expected[-1]).abs().max() > 0.01 * scale, "the logits hardly depend on the image"
    difference = float((actual - expected).abs().max() / scale)
    log.info("torch: %.1e of the largest logit", difference)
    assert difference <= TORCH_TOLERANCE
    if directory is None:
        return
    difference = float(np.abs(_served_logits(checkpoint, pixels, directory) - expected.numpy()).max() / scale)
    log.info("ONNX Runtime: %.1e of the largest logit", difference)
    assert difference <= SERVED_TOLERANCE


def logits_of_image(checkpoint: Checkpoint, image: Image.Image) -> np.ndarray:
    """Our logits of an image, from its encoded bytes on: [classes]."""
    pixels = Decoder(checkpoint.preprocessing, mode="exact").decode(encoded(image))
    network = ReferenceNetwork(checkpoint.network, checkpoint.preprocessing).eval()
    with torch.inference_mode():
        logits: np.ndarray = network(torch.from_numpy(pixels.copy())[None])[0][0].numpy()
    return logits


def relative_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest expected value. Infinite for other shapes."""
    if actual.shape != expected.shape:
        return float("inf")
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def _served_logits(checkpoint: Checkpoint, pixels: Pixels, directory: Path) -> np.ndarray:
    graph = directory / "model.onnx"
    trace(
        ReferenceNetwork(checkpoint.network, checkpoint.preprocessing).eval(),
        checkpoint.preprocessing.image_size,
        graph,
    )
    engine = construct_engine("onnxruntime", "fp32", graph, EngineOptions(max_batch=len(pixels)))
    logits = engine.run(0, pixels).logits
    engine.close()
    return logits


def save_with_timm(timm: ModuleType, directory: Path, architecture: str, arguments: dict[str, Any]) -> nn.Module:
    """Writes config.json and model.safetensors with timm's save_for_hf; returns the network."""
    side = arguments.get("img_size")
    overlay: dict[str, Any] = {"input_size": (3, side, side)} if side else {}
    if architecture == "resnetv2_50x1_bit":
        overlay = {"input_size": (3, 64, 64), "fixed_input_size": False}
    arguments = {"num_classes": 1000} | arguments
    network = randomized(timm.create_model(architecture, **arguments, pretrained_cfg_overlay=overlay))
    from timm.models import save_for_hf

    save_for_hf(network, str(directory), safe_serialization=True)
    return network


def save_with_transformers(
    transformers: ModuleType,
    directory: Path,
    config: str,
    network: str,
    arguments: dict[str, Any],
    preprocessor: dict[str, Any] = SQUASH,
) -> nn.Module:
    """Writes config.json, model.safetensors and preprocessor_config.json; returns the network."""
    created = randomized(getattr(transformers, network)(getattr(transformers, config)(**arguments)))
    save_pretrained: Callable[[Path], None] = getattr(created, "save_pretrained")  # noqa: B009  # unknown to nn.Module
    save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return created


def logits_of(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The logits of a transformers network as a function of the images."""

    def logits(images: Tensor) -> Tensor:
        result: Tensor = network(images).logits
        return result

    return logits
