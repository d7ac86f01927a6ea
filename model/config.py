"""Configurations of Vision Transformers and ResNets, and the tables of named variants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Pool = Literal["token", "mean", "token+mean"]
AttentionKind = Literal["global", "axial", "local"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]


@dataclass(frozen=True)
class ResNetConfig:
    """A pre-activation ResNet with group norm and weight standardization: BiT (arXiv:1912.11370).

    It is the baseline of the ViT paper.
    """

    image_size: int  # pixels, side of the square input
    blocks: tuple[int, ...]  # per stage; every stage but the first halves the feature map
    width_factor: int
    classes: int

    @property
    def embedding_width(self) -> int:
        return int(256 * self.width_factor * 2 ** (len(self.blocks) - 1))


@dataclass(frozen=True)
class LibraryConfig:
    """A network of another library, or of an ONNX file, whose graph is exported as it is."""

    library: str  # its name and version; "onnx" for a file
    architecture: str
    height: int  # pixels, of the input
    width: int
    channels: int
    classes: int  # 0 for a network without classifier, whose logits are the embedding
    embedding_width: int
    attention_layers: int = 0  # Attention operators in the graph


@dataclass(frozen=True)
class ViTConfig:
    """A ViT in the terms of "An Image is Worth 16x16 Words" (arXiv:2010.11929), section 3.1; later variants as options.

    Raises ValueError for sizes that do not divide evenly, naming both, and for conflicting options.
    """

    image_size: int  # pixels, side of the square input
    patch_size: int  # pixels, side of a patch
    width: int  # D, length of a token
    depth: int  # L, number of blocks
    heads: int
    mlp_width: int  # between the MLP's two matrices; for SwiGLU, after the gate
    classes: int
    # The embedding: the class token, the mean of the patch tokens, or both (DINOv2's classifier).
    pool: Pool = "token"
    representation_width: int | None = None  # width of the tanh layer before the head (the paper's pre-training head)
    # Hybrid: channels of a convolutional stem. The pixels of its feature map become the tokens.
    stem: tuple[int, ...] | None = None
    stem_convolutions: int = 1  # per residual branch of the stem
    # Hybrid of the paper: blocks per stage of a ResNet instead of the stem. R50 without its last stage is 3, 4, 9.
    resnet: tuple[int, ...] | None = None
    class_token: bool = True
    distillation_token: bool = False  # a second token after the class token (DeiT, arXiv:2012.12877)
    distillation_head: bool = False  # a second head, for that token; the logits are the mean of both heads
    registers: int = 0  # extra tokens without a patch (arXiv:2309.16588)
    prefix_positions: bool = True  # the tokens before the patches have position embeddings too
    pre_norm: bool = False  # a norm before the first block, and a patch projection without bias (CLIP)
    norm_after_pool: bool = False  # the last norm is applied to the mean instead of to each token
    norm_epsilon: float = 1e-6  # the paper's released code and timm
    qkv_bias: bool = True
    qk_norm: bool = False  # layer norm of each head's queries and keys (arXiv:2302.05442)
    layer_scale: bool = False  # each branch's output is multiplied by a learned vector (arXiv:2103.17239)
    swiglu: bool = False  # gated MLP (arXiv:2002.05202) with SiLU
    activation: Activation = "gelu"  # of the MLP
    # The patches that a patch attends to. global: all. axial: its row in even blocks, its column in odd ones
    # (arXiv:1912.12180; the paper's appendix D.6). local: a square around it.
    # Tokens before the patches attend to all tokens, and all tokens attend to them.
    attention: AttentionKind = "global"
    window: int = 0  # local attention: patches, side of the square; odd
    merge: int = 0  # tokens that each block merges with similar ones: see network/token_merging.py

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
            raise ValueError("stem and resnet cannot be combined: either one computes the feature map")
        if "token" in self.pool and not self.class_token:
            raise ValueError(f"pool is {self.pool!r}, but there is no class token")
        if self.distillation_head and not self.distillation_token:
            raise ValueError("a distillation head needs a distillation token")
        if (self.attention == "local") is not (self.window > 0) or (self.window and self.window % 2 == 0):
            raise ValueError(
                f"attention is {self.attention!r} and window is {self.window};"
                " local attention requires an odd window, other kinds require window 0"
            )
        if self.merge < 0 or (self.merge and self.attention != "global"):
            raise ValueError(f"merge is {self.merge}; it must be 0 or more, and 0 with {self.attention!r} attention")
        if self.norm_after_pool and self.pool != "mean":
            raise ValueError(f"norm_after_pool requires pool 'mean', not {self.pool!r}")

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def stem_reduction(self) -> int:
        """Image pixels per feature-map pixel, per side. Stages after the first halve the map; a ResNet starts at 4."""
        if self.resnet is not None:
            return int(4 * 2 ** (len(self.resnet) - 1))
        return 1 if self.stem is None else int(2 ** (len(self.stem) - 1))

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches."""
        return self.class_token + self.distillation_token + self.registers

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.prefix + self.grid**2

    @property
    def tokens_of_blocks(self) -> list[int]:
        """That the attention of each block has. Half of the patches, at most, are merged in a block."""
        tokens = [self.tokens]
        for _ in range(self.depth - 1):
            tokens.append(tokens[-1] - min(self.merge, (tokens[-1] - self.prefix) // 2))
        return tokens

    @property
    def embedding_width(self) -> int:
        """Length of the embedding, before any representation layer."""
        return 2 * self.width if self.pool == "token+mean" else self.width


NetworkConfig = ViTConfig | ResNetConfig | LibraryConfig


def merges_tokens(config: NetworkConfig) -> bool:
    return isinstance(config, ViTConfig) and config.merge > 0


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
    # For 32-pixel images, small enough to train on a CPU. The default model is compact-hybrid-deep/4.
    "compact/4": ViTConfig(32, 4, 192, 6, 3, 768, classes=10),
    # A minimal network, to measure the server rather than the model.
    "one-block/4": ViTConfig(32, 4, 32, 1, 1, 64, classes=10),
    "compact-hybrid/4": ViTConfig(32, 4, 192, 4, 3, 768, classes=10, stem=(32, 64, 192)),
    "compact-hybrid-deep/4": ViTConfig(32, 4, 192, 3, 3, 768, classes=10, stem=(48, 96, 160), stem_convolutions=2),
    # The paper's alternatives, at the same size and a similar cost.
    "compact-mean/4": ViTConfig(
        32, 4, 192, 6, 3, 768, classes=10, pool="mean", class_token=False, norm_after_pool=True
    ),
    "compact-axial/4": ViTConfig(32, 4, 192, 6, 3, 768, classes=10, attention="axial"),
    "compact-local/4": ViTConfig(32, 4, 192, 6, 3, 768, classes=10, attention="local", window=3),
    # The paper's released hybrid: a ResNet-50 without its last stage, one token per pixel of its 14 × 14 map.
    "R50+B/16": replace(_imagenet("B", 16), resnet=(3, 4, 9)),
}


# The paper's baseline, with BiT's names: R, the number of layers with weights, x, the width factor.
RESNETS: dict[str, ResNetConfig] = {
    "R50x1": ResNetConfig(224, (3, 4, 6, 3), 1, classes=1000),
    "R101x1": ResNetConfig(224, (3, 4, 23, 3), 1, classes=1000),
    "compact-resnet": ResNetConfig(32, (1, 1, 1), 1, classes=10),
}


def any_variant(name: str) -> ViTConfig | ResNetConfig:
    """The named ViT or ResNet. Raises ValueError for an unknown name."""
    if name in RESNETS:
        return RESNETS[name]
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {name!r}; known: {', '.join([*VARIANTS, *RESNETS])}")
    return VARIANTS[name]


def variant(name: str, **changes: int | str | None) -> ViTConfig:
    """The named ViT with fields changed: ``variant("B/16", classes=10)``. Raises ValueError for an unknown name."""
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {name!r}; known: {', '.join(VARIANTS)}")
    return replace(VARIANTS[name], **changes)  # type: ignore[arg-type]  # replace() and __post_init__ check them


def variant_of(config: NetworkConfig) -> str:
    """The variant's name, ignoring image size, classes and token merging; "custom" if no variant matches."""
    if isinstance(config, LibraryConfig):
        return config.architecture
    return next((name for name, known in (VARIANTS | RESNETS).items() if _shape(known) == _shape(config)), "custom")


def _shape(config: ViTConfig | ResNetConfig) -> dict[str, object]:
    """The fields besides image size and classes. No configuration is made: not every image size fits every network."""
    return {name: value for name, value in vars(config).items() if name not in ("image_size", "classes", "merge")}
