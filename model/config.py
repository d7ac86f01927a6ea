"""The shape of a Vision Transformer as plain numbers, and the table of named variants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Pool = Literal["token", "mean", "token+mean"]
AttentionKind = Literal["global", "axial", "local"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]


@dataclass(frozen=True)
class ResNetConfig:
    """A pre-activation ResNet with group norm and weight standardization: BiT (arXiv:1912.11370), the ViT paper's baseline."""

    image_size: int  # pixels, side of the square the model sees
    blocks: tuple[int, ...]  # of each stage; every stage but the first halves the map
    width_factor: int
    classes: int

    @property
    def embedding_width(self) -> int:
        return int(256 * self.width_factor * 2 ** (len(self.blocks) - 1))


@dataclass(frozen=True)
class ViTConfig:
    """What a ViT is made of, in the terms of "An Image is Worth 16x16 Words" (arXiv:2010.11929), section 3.1, with its relatives as options.

    Raises ValueError, naming both numbers, for sizes that do not divide and options that exclude one another.
    """

    image_size: int  # pixels, side of the square the model sees
    patch_size: int  # pixels, side of a patch of the image
    width: int  # D, length of a token
    depth: int  # L, number of blocks
    heads: int
    mlp_width: int  # between the MLP's two matrices; of SwiGLU, after its gate
    classes: int
    pool: Pool = "token"  # what becomes the embedding: the class token, the mean of the patch tokens, or both (DINOv2's classifier)
    representation_width: int | None = None  # width of the tanh layer before the head (the paper's pre-training head)
    stem: tuple[int, ...] | None = None  # channels of a convolutional stem; its feature map becomes the tokens (hybrid)
    stem_convolutions: int = 1  # of each of its residual branches
    resnet: tuple[int, ...] | None = (
        None  # blocks per stage of a ResNet in its place (the paper's hybrid, R50 less its last stage: 3, 4, 9)
    )
    class_token: bool = True
    distillation_token: bool = False  # a second token after the class token (DeiT, arXiv:2012.12877)
    distillation_head: bool = False  # a second head, for that token; logits are the mean of both
    registers: int = 0  # tokens that only hold what the network likes to put down (arXiv:2309.16588)
    prefix_positions: bool = True  # class token and the like have positions too; otherwise they are put before the patches once those have theirs
    pre_norm: bool = False  # a norm before the first block, and patches projected without bias (CLIP)
    norm_after_pool: bool = False  # the last norm acts on the mean instead of on each token
    norm_epsilon: float = 1e-6  # the paper's released code and timm
    qkv_bias: bool = True
    qk_norm: bool = False  # layer norm of each head's queries and keys (arXiv:2302.05442)
    layer_scale: bool = False  # each branch's output times a learned vector (arXiv:2103.17239)
    swiglu: bool = False  # gated MLP (arXiv:2002.05202); its activation is SiLU
    activation: Activation = "gelu"  # the MLP's
    # Which patches a patch attends to: all; those of its row, in every other block of its column (arXiv:1912.12180, in the paper's appendix D.6);
    # or those of a square around it. Tokens before the patches attend to all and are attended to by all.
    attention: AttentionKind = "global"
    window: int = 0  # patches, side of that square; odd

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image size {self.image_size} is not a multiple of patch size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")
        if self.patch_size % self.stem_reduction:
            raise ValueError(
                f"patch size {self.patch_size} is not a multiple of the stem's reduction {self.stem_reduction}"
            )
        if self.stem is not None and self.resnet is not None:
            raise ValueError("stem and resnet exclude one another: both make the map whose pixels become tokens")
        if "token" in self.pool and not self.class_token:
            raise ValueError(f"pool is {self.pool!r}, but there is no class token")
        if self.distillation_head and not self.distillation_token:
            raise ValueError("a distillation head needs a distillation token")
        if (self.attention == "local") is not (self.window > 0) or (self.window and self.window % 2 == 0):
            raise ValueError(
                f"attention is {self.attention!r} and window {self.window}; local attention wants an odd window, any other none"
            )
        if self.norm_after_pool and self.pool != "mean":
            raise ValueError(f"norm_after_pool is of the mean; pool is {self.pool!r}")

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def stem_reduction(self) -> int:
        """Pixels of the image per pixel of the stem's feature map: every stage after the first halves it, and a ResNet begins at a quarter."""
        if self.resnet is not None:
            return int(4 * 2 ** (len(self.resnet) - 1))
        return 1 if self.stem is None else int(2 ** (len(self.stem) - 1))

    @property
    def prefix(self) -> int:
        """Tokens before the patches'."""
        return self.class_token + self.distillation_token + self.registers

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.prefix + self.grid**2

    @property
    def embedding_width(self) -> int:
        """Length of the feature that the head sees before any representation layer."""
        return 2 * self.width if self.pool == "token+mean" else self.width


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


VARIANTS: dict[str, ViTConfig] = {
    f"{size}/{patch}": _imagenet(size, patch) for size in _SIZES for patch in (8, 14, 16, 32)
} | {
    # For 32-pixel images on a CPU's budget: a plain compact ViT, and the hybrid that is served by default.
    "compact/4": ViTConfig(32, 4, 192, 6, 3, 768, classes=10),
    # So small that the server around it is what is timed.
    "one-block/4": ViTConfig(32, 4, 32, 1, 1, 64, classes=10),
    "compact-hybrid/4": ViTConfig(32, 4, 192, 4, 3, 768, classes=10, stem=(32, 64, 192)),
    "compact-hybrid-deep/4": ViTConfig(32, 4, 192, 3, 3, 768, classes=10, stem=(48, 96, 160), stem_convolutions=2),
    # The paper's comparisons at that size and about that cost.
    "compact-mean/4": ViTConfig(
        32, 4, 192, 6, 3, 768, classes=10, pool="mean", class_token=False, norm_after_pool=True
    ),
    "compact-axial/4": ViTConfig(32, 4, 192, 6, 3, 768, classes=10, attention="axial"),
    "compact-local/4": ViTConfig(32, 4, 192, 6, 3, 768, classes=10, attention="local", window=3),
    # The hybrid of the paper's released models: a ResNet-50 without its last stage, one token for each pixel of its 14 × 14 map.
    "R50+B/16": replace(_imagenet("B", 16), resnet=(3, 4, 9)),
}


# The paper's baseline: BiT's names, R and the layers that have weights, x the width factor.
RESNETS: dict[str, ResNetConfig] = {
    "R50x1": ResNetConfig(224, (3, 4, 6, 3), 1, classes=1000),
    "R101x1": ResNetConfig(224, (3, 4, 23, 3), 1, classes=1000),
    "compact-resnet": ResNetConfig(32, (1, 1, 1), 1, classes=10),
}


def any_variant(name: str) -> ViTConfig | ResNetConfig:
    """Of either family. Raises ValueError for a name that is in neither table."""
    if name in RESNETS:
        return RESNETS[name]
    if name not in VARIANTS:
        raise ValueError(f"there is no variant {name!r}; known: {', '.join([*VARIANTS, *RESNETS])}")
    return VARIANTS[name]


def variant(name: str, **changes: int | str | None) -> ViTConfig:
    """The named variant with fields changed: ``variant("B/16", classes=10)``.

    Raises ValueError for a name that is not in VARIANTS.
    """
    if name not in VARIANTS:
        raise ValueError(f"there is no variant {name!r}; known: {', '.join(VARIANTS)}")
    return replace(VARIANTS[name], **changes)  # type: ignore[arg-type]  # replace() checks the names, __post_init__ the values


def variant_of(config: ViTConfig | ResNetConfig) -> str:
    """The name in VARIANTS of a configuration, whatever its image size and number of classes; "custom" if it has none."""
    for name, known in (VARIANTS | RESNETS).items():
        if type(config) is type(known) and replace(config, image_size=known.image_size, classes=known.classes) == known:
            return name
    return "custom"
