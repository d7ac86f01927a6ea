"""The shape of a Vision Transformer as plain numbers, and the table of named variants.

Imported by every stage; imports nothing heavy, so that serving can read a bundle's shape without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Pool = Literal["token", "mean"]


@dataclass(frozen=True)
class ViTConfig:
    """What a ViT is made of, in the terms of "An Image is Worth 16x16 Words" (arXiv:2010.11929), section 3.1.

    Raises ValueError, naming both numbers, for sizes that do not divide.
    """

    image_size: int  # pixels, side of the square the model sees
    patch_size: int  # pixels, side of a patch of the image
    width: int  # D, length of a token
    depth: int  # L, number of blocks
    heads: int
    mlp_width: int
    classes: int
    pool: Pool = "token"  # what becomes the embedding: the class token, or the mean of the patch tokens (no class token then)
    representation_width: int | None = None  # width of the tanh layer before the head (the paper's pre-training head)
    stem: tuple[int, ...] | None = None  # channels of a convolutional stem; its feature map becomes the tokens (hybrid)

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image size {self.image_size} is not a multiple of patch size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")
        if self.stem is not None and self.patch_size % self.stem_reduction:
            raise ValueError(f"patch size {self.patch_size} is not a multiple of the stem's reduction {self.stem_reduction}")

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def stem_reduction(self) -> int:
        """Pixels of the image per pixel of the stem's feature map: every stage after the first halves it."""
        return 1 if self.stem is None else 2 ** (len(self.stem) - 1)

    @property
    def tokens(self) -> int:
        """Length of the sequence, class token included."""
        return self.grid**2 + (self.pool == "token")

    @property
    def embedding_width(self) -> int:
        """Length of the feature that the head sees before any representation layer."""
        return self.width


# Ti and S: DeiT (arXiv:2012.12877), table 1. B, L and H: the ViT paper, table 1. (width, depth, heads, mlp width)
_SIZES = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}


def _imagenet(size: str, patch_size: int) -> ViTConfig:
    width, depth, heads, mlp_width = _SIZES[size]
    return ViTConfig(224, patch_size, width, depth, heads, mlp_width, classes=1000)


VARIANTS: dict[str, ViTConfig] = {f"{size}/{patch}": _imagenet(size, patch) for size in _SIZES for patch in (8, 14, 16, 32)} | {
    # For 32-pixel images on a CPU's budget: a plain compact ViT, and the hybrid that is served by default.
    "compact/4": ViTConfig(32, 4, 192, 6, 3, 768, classes=10),
    # So small that the server around it is what is timed.
    "one-block/4": ViTConfig(32, 4, 32, 1, 1, 64, classes=10),
    "compact-hybrid/4": ViTConfig(32, 4, 192, 4, 3, 768, classes=10, stem=(32, 64, 192)),
}


def variant(name: str, **changes: int | str | None) -> ViTConfig:
    """The named variant with fields changed: ``variant("B/16", classes=10)``.

    Raises ValueError for a name that is not in VARIANTS.
    """
    if name not in VARIANTS:
        raise ValueError(f"there is no variant {name!r}; known: {', '.join(VARIANTS)}")
    return replace(VARIANTS[name], **changes)  # type: ignore[arg-type]  # replace() checks the names, __post_init__ the values


def variant_of(config: ViTConfig) -> str:
    """The name in VARIANTS of a configuration, whatever its image size and number of classes; "custom" if it has none."""
    for name, known in VARIANTS.items():
        if replace(config, image_size=known.image_size, classes=known.classes) == known:
            return name
    return "custom"
