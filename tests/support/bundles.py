"""Random images, and bundles in reduced precision made from them."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tests.support.images import random_image
from tests.support.networks import TINY, checkpoint, network
from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.load import Checkpoint
from vitserve.model.bundle.bundle import Artifact, Bundle, open_bundle
from vitserve.model.bundle.evaluation import Images
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ViTConfig
from vitserve.model.network.vit import ViT

SLOW = ViTConfig(image_size=448, patch_size=16, width=256, depth=2, heads=4, mlp_width=1024, classes=7)
SMALL = ViTConfig(image_size=32, patch_size=8, width=64, depth=3, heads=2, mlp_width=128, classes=5)


def random_images(count: int, size: int = SMALL.image_size, seed: int = 0) -> Images:
    """Images without labels, [count, size, size, 3]."""
    pixels = [np.asarray(random_image(size, size, seed + index)) for index in range(count)]
    return Images(np.stack(pixels), None)


def confident_checkpoint(config: ViTConfig = SMALL) -> Checkpoint:
    """A network with large logits, like a trained one, so that rounding changes few predictions."""
    confident = network(config)
    with torch.no_grad():
        confident.head.weight.mul_(4)
    labels = tuple(f"class {index}" for index in range(config.classes))
    return Checkpoint(confident, labels, Preprocessing(config.image_size))


def slow_bundle(path: Path) -> Bundle:
    """Only float32, of a network that takes tens of milliseconds per image on one core."""
    torch.manual_seed(0)
    labels = tuple(f"class {index}" for index in range(SLOW.classes))
    source = Checkpoint(ViT(SLOW).eval(), labels, Preprocessing(SLOW.image_size))
    return build_bundle(source, path, name="slow", precisions=[])


def built_once(path: Path, build: Callable[[Path], Bundle]) -> Bundle:
    """Processes of one run that need the same bundle wait for the first of them to build it. Do not change it."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            build(path)
    return open_bundle(path)


def int8_bundle(path: Path) -> Bundle:
    """With float32 and calibrated int8, evaluated on 100 images. Needs nncf."""
    return build_bundle(
        confident_checkpoint(),
        path,
        name="small",
        precisions=["int8"],
        calibration_images=random_images(32),
        evaluation_images=random_images(100, seed=1000),
        max_loss=3,
    )


def fp8_bundle(path: Path) -> Bundle:
    """With float32 and fp8, evaluated on 40 images."""
    return build_bundle(
        checkpoint(),
        path,
        name="tiny",
        precisions=["fp8"],
        calibration_images=random_images(20, TINY.image_size),
        evaluation_images=random_images(40, TINY.image_size, seed=20),
        max_loss=20,
    )


def artifact_in(bundle: Bundle, precision: str) -> Artifact:
    """The only artifact in this precision."""
    (artifact,) = [artifact for artifact in bundle.manifest.artifacts if artifact.precision == precision]
    return artifact
