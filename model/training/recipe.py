"""Training recipes: all hyperparameters, and the defaults for a CPU and for a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from vitserve.model.config import ResNetConfig, ViTConfig

DEEP = 12  # blocks of a network whose early blocks are fine-tuned more slowly


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
    shift: float = 3 / 32  # of the side: images are shifted by up to this share
    warp: float = 0.0  # radians, and share of the side
    recolor: float = 0.0
    ema_decay: float = 0.997
    validation_images: int = 2500  # held out of the training set, at most
    seed: int = 0
    share: float = 1.0  # of the training set: used for training, chosen by the seed
    # Each block learns more slowly than the next one, by this factor: fine-tuning changes early blocks little
    # (BEiT, arXiv:2106.08254, appendix H). 1: all learn equally fast.
    layer_decay: float = 1.0
    frozen: bool = False  # only the head learns
    patience: int = 0  # epochs without a better validation accuracy after which the training ends; 0: all epochs
    bf16: bool = field(default_factory=_cpu_multiplies_bf16)
    optimizer: Literal["muon", "adamw"] = field(default_factory=lambda: "muon" if _cpu_multiplies_bf16() else "adamw")


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
    shift=4 / 32,
    warp=0.15,
    recolor=0.3,
    ema_decay=0.999,
    bf16=True,
    optimizer="muon",
)


def fine_tuning(recipe: Recipe, config: ViTConfig | ResNetConfig) -> Recipe:
    """For weights that are trained already: smaller steps; in a deep network, most of all in the early blocks.

    A compact network learns other classes better if all of its layers do: docs/models.md.
    """
    if isinstance(config, ViTConfig) and config.depth >= DEEP:
        return replace(recipe, learning_rate=recipe.learning_rate / 4, layer_decay=0.75)
    return replace(recipe, learning_rate=recipe.learning_rate / 2)
