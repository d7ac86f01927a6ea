"""Training recipes: all hyperparameters, and the defaults for a CPU and for a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch


def _cpu_multiplies_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()


@dataclass(frozen=True)
class Recipe:
    """The defaults are for two CPU cores.

    torch's Muon computes in bf16. Without hardware bf16 it takes as long as the rest of the step, so that AdamW is the
    default there.
    """

    epochs: int = 6
    batch_size: int = 192
    learning_rate: float = 2e-3  # maximum of the one-cycle schedule; Muon's is scaled to match AdamW's update
    warm_up_share: float = 0.2  # of all steps: the rate rises, then falls linearly to zero
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    mixup_alpha: float = 0.2
    cutmix_share: float = 0.0  # of the mixed steps: CutMix instead of mixup
    mixup_share: float = 0.75  # of all steps: mixed; the last steps see unmixed images
    shift_pixels: int = 3
    warp: float = 0.0  # radians, and share of the side
    recolor: float = 0.0
    ema_decay: float = 0.997
    validation_images: int = 2500  # held out of the training set
    seed: int = 0
    share: float = 1.0  # of the training set: used for training, chosen by the seed
    bf16: bool = field(default_factory=_cpu_multiplies_bf16)
    optimizer: Literal["muon", "adamw"] = field(default_factory=lambda: "muon" if _cpu_multiplies_bf16() else "adamw")
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


QUICK = Recipe()
# For a GPU: many more epochs. Warped, recolored and CutMix images keep the network from memorizing the training set.
LONG = Recipe(
    epochs=100,
    batch_size=512,
    learning_rate=3e-3,
    warm_up_share=0.1,
    mixup_alpha=0.4,
    cutmix_share=0.5,
    mixup_share=0.95,
    shift_pixels=4,
    warp=0.15,
    recolor=0.3,
    ema_decay=0.999,
    bf16=True,
    optimizer="muon",
)
