"""Other people's checkpoints: written to disk by the libraries themselves with random weights, they give the same logits here, in torch and as served."""

from __future__ import annotations

import io
import json
import logging
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from tests.support.images import encoded, random_image
from tests.support.server import start_server
from vitserve.cli.main import app
from vitserve.export.checkpoint.load import Checkpoint, load_checkpoint
from vitserve.export.checkpoint.state_dict import CheckpointError, Tensors
from vitserve.export.graph.reference import ReferenceNetwork
from vitserve.export.graph.trace import trace
from vitserve.model.arrays import Pixels
from vitserve.model.bundle.bundle import open_bundle
from vitserve.model.config import ViTConfig
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import EngineOptions

log = logging.getLogger("parity")  # docs/models.md says how to see it

TORCH_LIMIT, SERVED_LIMIT = 1e-4, 1e-3  # of the greatest logit


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def shaken(network: nn.Module) -> nn.Module:
    """Weights large enough that every part of the network shows in the logits: as they are initialized, layer scales and heads hide the rest."""
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
    """Of different colors, so that a mean over patches still tells them apart."""
    random = np.random.default_rng(0)
    return (random.integers(0, 128, (count, side, side, 3)) + random.integers(0, 128, (count, 1, 1, 3))).astype(
        np.uint8
    )


def assert_equal(
    checkpoint: Checkpoint, theirs: Callable[[Tensor], Tensor], directory: Path | None = None, count: int = 2
) -> None:
    """Our torch network, and with a ``directory`` the exported graph in ONNX Runtime, against their network on the same normalized images."""
    pixels = random_pixels(checkpoint.preprocessing.image_size, count)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (checkpoint.preprocessing.mean, checkpoint.preprocessing.std)
    )
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.inference_mode():
        expected, ours = theirs(images), checkpoint.network(images)[0]
    scale = expected.abs().max()
    assert scale > 1e-3
    assert (expected[0] - expected[-1]).abs().max() > 0.01 * scale, "the logits hardly depend on the image"
    apart = float((ours - expected).abs().max() / scale)
    log.info("torch: %.1e of the greatest logit", apart)
    assert apart <= TORCH_LIMIT
    if directory is None:
        return
    graph = directory / "model.onnx"
    trace(ReferenceNetwork(checkpoint.network, checkpoint.preprocessing).eval(), checkpoint.preprocessing.image_size, graph)
    engine = construct_engine("onnxruntime", "fp32", graph, EngineOptions(max_batch=count))
    served = engine.run(0, pixels).logits
    engine.close()
    apart = float(np.abs(served - expected.numpy()).max() / scale)
    log.info("ONNX Runtime: %.1e of the greatest logit", apart)
    assert apart <= SERVED_LIMIT


# -- timm

# The libraries' own warnings are theirs.
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_classes": 5}
TIMM = {
    "class token": ("vit_base_patch16_224", SMALL | {"num_heads": 12}),
    "mean, norm before it": ("vit_base_patch16_gap_224", SMALL | {"num_heads": 12}),
    "mean, norm after it": ("vit_base_patch16_224", SMALL | {"num_heads": 12, "global_pool": "avg"}),
    "patches alone have positions, layer scale": ("deit3_small_patch16_224", SMALL | {"num_heads": 6}),
    "distillation token": ("deit_tiny_distilled_patch16_224", SMALL | {"num_heads": 3}),
    "registers": ("vit_base_patch14_reg4_dinov2", SMALL | {"num_heads": 12}),
    "SwiGLU": ("vit_giant_patch14_reg4_dinov2", SMALL | {"num_heads": 24}),
    "norm before the blocks, quick GELU": ("vit_base_patch16_clip_quickgelu_224", SMALL | {"num_heads": 12}),
    "no bias of q, k, v": ("vit_base_patch16_224_miil", SMALL | {"num_heads": 12}),
    "norms of q and k": ("vit_base_patch16_224", SMALL | {"num_heads": 12, "qk_norm": True}),
    "hybrid": (
        "vit_small_r26_s32_224",
        {"img_size": 64, "embed_dim": 96, "depth": 2, "num_heads": 6, "num_classes": 5},
    ),
    "ResNet": ("resnetv2_50x1_bit", {"num_classes": 5}),
}
FULL_TIMM = [
    "vit_base_patch16_224",
    "vit_small_patch32_384",
    "vit_base_patch16_gap_224",
    "deit3_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit_base_distilled_patch16_224",
    "vit_base_r50_s16_224",
    "resnetv2_50x1_bit",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch14_reg4_dinov2",
    "vit_large_patch16_384",
    "vit_huge_patch14_224",
]


def written_by_timm(timm: ModuleType, directory: Path, architecture: str, arguments: dict[str, Any]) -> nn.Module:
    """As timm's own push to the hub writes it: config.json and model.safetensors."""
    side = arguments.get("img_size")
    overlay = {"input_size": (3, side, side)} if side else {}
    if architecture == "resnetv2_50x1_bit":
        overlay = {"input_size": (3, 64, 64), "fixed_input_size": False}
    network = shaken(
        timm.create_model(architecture, **{"num_classes": 1000} | arguments, pretrained_cfg_overlay=overlay)
    )
    from timm.models import save_for_hf

    save_for_hf(network, directory, safe_serialization=True)
    settings = json.loads((directory / "config.json").read_text())
    settings["model_args"] = {name: value for name, value in arguments.items() if name == "num_heads"}
    (directory / "config.json").write_text(json.dumps(settings))
    return network


SERVED = {
    "registers",
    "SwiGLU",
    "norm before the blocks, quick GELU",
    "norms of q and k",
}  # the others' graphs: full-sized, and in test_export.py


@pytest.mark.parametrize("kind", TIMM)
def test_a_folder_of_timms(kind: str, timm: ModuleType, tmp_path: Path) -> None:
    architecture, arguments = TIMM[kind]
    theirs = written_by_timm(timm, tmp_path, architecture, arguments)
    assert_equal(load_checkpoint(tmp_path), theirs, tmp_path if kind in SERVED else None)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FULL_TIMM)
def test_a_full_sized_folder_of_timms(architecture: str, timm: ModuleType, tmp_path: Path) -> None:
    theirs = written_by_timm(timm, tmp_path, architecture, {})
    checkpoint = load_checkpoint(tmp_path)
    assert_equal(checkpoint, theirs, tmp_path)
    assert len(checkpoint.labels) == 1000
    assert checkpoint.labels[0] == "tench"


@pytest.mark.slow
def test_every_architecture_of_timms_that_is_accepted_is_taken_for_what_it_is(timm: ModuleType) -> None:
    """What its tensors do not show and its name has to: heads, epsilon, activation, pooling, and that its blocks are of the kind that ours are."""
    accepted = 0
    for name in timm.list_models(["vit_*", "deit*"]):
        with torch.device("meta"):
            theirs = timm.create_model(name, num_classes=10)
        try:
            ours = timm.read(Tensors(theirs.state_dict()), name, theirs.pretrained_cfg, theirs.global_pool).config
        except CheckpointError:
            continue
        accepted += 1
        assert isinstance(ours, ViTConfig)
        block = theirs.blocks[0]
        assert (type(block).__name__, type(block.attn).__name__, type(block.norm1).__name__) == (
            "Block",
            "Attention",
            "LayerNorm",
        ), name
        assert (block.attn.num_heads, block.norm1.eps) == (ours.heads, ours.norm_epsilon), name
        kinds = {"gelu": "GELU(approximate='none')", "quick_gelu": "QuickGELU()"}
        assert str(block.mlp.act) == ("SiLU()" if ours.swiglu else kinds[ours.activation]), name
        assert theirs.global_pool == {"token": "token", "mean": "avg"}[ours.pool], name
        assert not ours.prefix or theirs.no_embed_class is not ours.prefix_positions, name
    assert accepted > 75


def test_a_bare_state_dict_of_timms_needs_its_architecture(timm: ModuleType, tmp_path: Path) -> None:
    theirs = shaken(timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=1000))
    for name in ("weights.pth", "weights.safetensors"):
        (torch.save if name.endswith("pth") else save_file)(theirs.state_dict(), tmp_path / name)
        with pytest.raises(CheckpointError, match=r"has timm's names; say which architecture it is"):
            load_checkpoint(tmp_path / name)
        made = load_checkpoint(tmp_path / name, architecture="vit_tiny_patch16_224")
        assert_equal(made, theirs)
        assert (made.preprocessing.crop, made.preprocessing.mean) == (0.9, (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    "architecture",
    ["vit_base_patch16_rpn_224", "vit_base_patch16_siglip_gap_224", "eva_large_patch14_196", "vit_wide_patch16_224"],
)
def test_what_might_compute_something_else_with_the_same_tensors_is_refused(
    architecture: str, timm: ModuleType, tmp_path: Path
) -> None:
    written_by_timm(timm, tmp_path, "vit_base_patch16_224", SMALL | {"num_heads": 12})
    settings = json.loads((tmp_path / "config.json").read_text()) | {"architecture": architecture}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=f"architecture '{architecture}' is not one that is known"):
        load_checkpoint(tmp_path)


# -- transformers

HF_SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
HF = {
    "ViT": ("ViTConfig", "ViTForImageClassification", {"intermediate_size": 96}),
    "ViT without bias, tanh GELU": (
        "ViTConfig",
        "ViTForImageClassification",
        {"intermediate_size": 96, "qkv_bias": False, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "DeiT": ("DeiTConfig", "DeiTForImageClassification", {"intermediate_size": 96}),
    "DeiT with teacher": ("DeiTConfig", "DeiTForImageClassificationWithTeacher", {"intermediate_size": 96}),
    "DINOv2": ("Dinov2Config", "Dinov2ForImageClassification", {}),
    "DINOv2 with registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification", {}),
    "DINOv2 with SwiGLU": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersForImageClassification",
        {"use_swiglu_ffn": True},
    ),
}
SQUASH = {
    "size": {"height": 32, "width": 32},
    "resample": 2,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
    "do_normalize": True,
}


def written_by_transformers(
    transformers: ModuleType,
    directory: Path,
    config: str,
    network: str,
    arguments: dict[str, Any],
    preprocessor: Any = SQUASH,
) -> nn.Module:
    made = shaken(getattr(transformers, network)(getattr(transformers, config)(**arguments)))
    made.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return made


def logits_of(theirs: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    def logits(images: Tensor) -> Tensor:
        found: Tensor = theirs(images, **options).logits
        return found

    return logits


@pytest.mark.parametrize(("config", "network", "arguments"), HF.values(), ids=HF.keys())
def test_a_folder_of_transformers(
    config: str, network: str, arguments: dict[str, Any], transformers: ModuleType, tmp_path: Path
) -> None:
    theirs = written_by_transformers(transformers, tmp_path, config, network, HF_SMALL | arguments)
    made = load_checkpoint(tmp_path)
    assert_equal(made, logits_of(theirs), tmp_path if network.startswith("Dinov2With") else None)
    assert (made.preprocessing.mean, made.preprocessing.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "network", "arguments"),
    [
        ("ViTConfig", "ViTForImageClassification", {}),
        ("DeiTConfig", "DeiTForImageClassificationWithTeacher", {}),
        (
            "Dinov2WithRegistersConfig",
            "Dinov2WithRegistersForImageClassification",
            {"hidden_size": 384, "num_attention_heads": 6, "patch_size": 14},
        ),
    ],
)
def test_a_full_sized_folder_of_transformers(
    config: str, network: str, arguments: dict[str, Any], transformers: ModuleType, tmp_path: Path
) -> None:
    preprocessor = SQUASH | {"size": {"height": 224, "width": 224}}
    theirs = written_by_transformers(
        transformers, tmp_path, config, network, {"num_labels": 1000, "image_size": 224} | arguments, preprocessor
    )
    assert_equal(load_checkpoint(tmp_path), logits_of(theirs), tmp_path)


def test_labels_are_the_configurations_or_a_files_or_imagenets(transformers: ModuleType, tmp_path: Path) -> None:
    named = HF_SMALL | {"intermediate_size": 96, "id2label": dict(enumerate("abcde"))}
    written_by_transformers(transformers, tmp_path, "ViTConfig", "ViTForImageClassification", named)
    assert load_checkpoint(tmp_path).labels == tuple("abcde")
    assert load_checkpoint(tmp_path, labels=list("vwxyz")).labels == tuple("vwxyz")
    with pytest.raises(CheckpointError, match="4 labels were given; the head has 5 classes"):
        load_checkpoint(tmp_path, labels=list("vwxy"))


def test_a_network_whose_images_are_smaller_than_it_was_made_for(transformers: ModuleType, tmp_path: Path) -> None:
    """As DINOv2's classifiers are published: 518 in the configuration, 224 in the preprocessor; the library interpolates, and so do we."""
    arguments = HF_SMALL | {"image_size": 64}
    theirs = written_by_transformers(
        transformers, tmp_path, "Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification", arguments
    )
    made = load_checkpoint(tmp_path)
    assert made.network.config.image_size == 32
    assert_equal(made, logits_of(theirs))


# -- torchvision


@pytest.mark.parametrize(
    "arguments", [{"hidden_dim": 192}, {"hidden_dim": 192, "representation_size": 40}], ids=["plain", "representation"]
)
def test_a_state_dict_of_torchvisions(arguments: dict[str, Any], timm: ModuleType, tmp_path: Path) -> None:
    from torchvision.models.vision_transformer import VisionTransformer

    small = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "mlp_dim": 96, "num_classes": 5}
    theirs = shaken(VisionTransformer(**small | arguments))
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    assert_equal(load_checkpoint(tmp_path / "vit.pth"), theirs)


@pytest.mark.slow
def test_a_full_sized_state_dict_of_torchvisions(timm: ModuleType, tmp_path: Path) -> None:
    from torchvision.models import vit_b_16

    theirs = shaken(vit_b_16())
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    assert_equal(load_checkpoint(tmp_path / "vit.pth"), theirs, tmp_path)


# -- Google


def google_layout(network: nn.Module) -> dict[str, np.ndarray]:
    """A network of timm's in the layout of Google's .npz."""
    given = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    heads = network.blocks[0].attn.num_heads
    out = {"cls": given["cls_token"], "Transformer/posembed_input/pos_embedding": given["pos_embed"]}

    def dense(theirs: str, ours: str) -> None:
        out[f"{theirs}/kernel"], out[f"{theirs}/bias"] = given[f"{ours}.weight"].T, given[f"{ours}.bias"]

    def norm(theirs: str, ours: str) -> None:
        out[f"{theirs}/scale"], out[f"{theirs}/bias"] = given[f"{ours}.weight"], given[f"{ours}.bias"]

    def filters(theirs: str, ours: str) -> None:
        out[f"{theirs}/kernel"] = given[f"{ours}.weight"].transpose(2, 3, 1, 0)

    filters("embedding", "patch_embed.proj")
    out["embedding/bias"] = given["patch_embed.proj.bias"]
    norm("Transformer/encoder_norm", "norm")
    dense("head", "head")
    for index in range(len(network.blocks)):
        theirs, ours = f"Transformer/encoderblock_{index}", f"blocks.{index}"
        norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1")
        norm(f"{theirs}/LayerNorm_2", f"{ours}.norm2")
        dense(f"{theirs}/MlpBlock_3/Dense_0", f"{ours}.mlp.fc1")
        dense(f"{theirs}/MlpBlock_3/Dense_1", f"{ours}.mlp.fc2")
        weight, bias = given[f"{ours}.attn.qkv.weight"], given[f"{ours}.attn.qkv.bias"]
        width = weight.shape[1]
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        for number, name in enumerate(("query", "key", "value")):
            rows = slice(number * width, (number + 1) * width)
            out[f"{attention}/{name}/kernel"] = weight[rows].T.reshape(width, heads, -1)
            out[f"{attention}/{name}/bias"] = bias[rows].reshape(heads, -1)
        out[f"{attention}/out/kernel"] = given[f"{ours}.attn.proj.weight"].T.reshape(heads, -1, width)
        out[f"{attention}/out/bias"] = given[f"{ours}.attn.proj.bias"]
    for name in [name.removesuffix(".weight") for name in given if "backbone" in name and name.endswith(".weight")]:
        *_, last = parts = name.removeprefix("patch_embed.backbone.").split(".")
        if parts[0] == "stem":
            theirs = "conv_root" if last == "conv" else "gn_root"
        else:
            kind = {"conv": "conv", "norm": "gn"}[last.rstrip("123")]
            theirs = f"block{int(parts[1]) + 1}/unit{int(parts[3]) + 1}/{kind}{'_proj' if parts[4] == 'downsample' else last[-1]}"
        (filters if last.startswith("conv") else norm)(theirs, name)
    return out


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_an_archive_in_googles_layout(kind: str, timm: ModuleType, tmp_path: Path) -> None:
    """The archive is what timm's own reader of the release takes for one: it gives timm's network back."""
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    if kind == "hybrid":
        small = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    name = "vit_base_patch16_224" if kind == "plain" else "vit_base_r50_s16_224"
    theirs = shaken(timm.create_model(name, **small))
    np.savez(tmp_path / "release.npz", **google_layout(theirs))
    read_back = timm.create_model(name, **small).eval()
    read_back.load_pretrained(str(tmp_path / "release.npz"))
    images = torch.randn(1, 3, small["img_size"], small["img_size"])
    with torch.inference_mode():
        torch.testing.assert_close(read_back(images), theirs(images))
    assert_equal(load_checkpoint(tmp_path / "release.npz"), theirs)


# -- other image sizes


@pytest.mark.parametrize("size", [16, 48])
def test_positions_are_interpolated_as_timm_does(size: int, timm: ModuleType, tmp_path: Path) -> None:
    theirs = written_by_timm(timm, tmp_path, "vit_base_patch16_224", SMALL | {"num_heads": 12})
    theirs.set_input_size((size, size))
    made = load_checkpoint(tmp_path, image_size=size)
    assert made.preprocessing.image_size == made.network.config.image_size == size
    assert_equal(made, theirs)


def test_sizes_that_do_not_fit_are_refused_with_both_numbers(timm: ModuleType, tmp_path: Path) -> None:
    written_by_timm(timm, tmp_path, "vit_base_patch16_224", SMALL | {"num_heads": 12})
    with pytest.raises(ValueError, match="image size 30 is not a multiple of patch size 8"):
        load_checkpoint(tmp_path, image_size=30)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["pretrained_cfg"]["input_size"] = [3, 32, 64]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="64 × 32 pixels are not square"):
        load_checkpoint(tmp_path)


# -- files that are wrong, truncated or hostile


class Hostile:
    """A pickle that touches a file when it is executed."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.proof,))


def truncated(path: Path, data: bytes) -> Path:
    path.write_bytes(data[: len(data) * 2 // 3])
    return path


@pytest.mark.parametrize("name", ["weights.pth", "pytorch_model.bin", "weights.pkl"])
def test_a_pickle_with_code_is_refused_and_executes_nothing(name: str, tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    if name.endswith("pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Hostile(proof), protocol=2))
    else:
        torch.save({"head.weight": Hostile(proof)}, tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(CheckpointError, match="holds more than tensors, and what else a pickle holds is not executed"):
        load_checkpoint(tmp_path if name.endswith("bin") else tmp_path / name)
    assert not proof.exists()


def test_an_archive_with_objects_is_refused_and_executes_nothing(tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    np.savez(tmp_path / "release.npz", cls=np.array([Hostile(proof)], dtype=object))
    with pytest.raises(CheckpointError, match=r"cls.npy holds objects"):
        load_checkpoint(tmp_path / "release.npz")
    assert not proof.exists()


def test_a_header_that_claims_what_is_not_there_takes_no_memory(tmp_path: Path) -> None:
    """Ten gigabytes by an array's shape, by a safetensors header's length, by a tensor's offsets; and a bomb of zeros."""
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": (2_500_000_000,)})
    with zipfile.ZipFile(tmp_path / "claim.npz", "w") as archive:
        archive.writestr("cls.npy", array.getvalue())
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("cls.npy", "w") as member,
    ):
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (200_000_000,)})
        for _ in range(200):
            member.write(bytes(1_000_000))
    (tmp_path / "length.safetensors").write_bytes(struct.pack("<Q", 10_000_000_000) + b"{}")
    claim = json.dumps(
        {"head.weight": {"dtype": "F32", "shape": [2_500_000_000], "data_offsets": [0, 10_000_000_000]}}
    ).encode()
    (tmp_path / "offsets.safetensors").write_bytes(struct.pack("<Q", len(claim)) + claim)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, message in {
        "claim.npz": "claims 10,000,000,000 bytes",
        "bomb.npz": "claims 200,000,000 bytes",
        "length.safetensors": "is not a safetensors file",
        "offsets.safetensors": "is not a safetensors file",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "in kilobytes"


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    weights = {"head.weight": torch.randn(50, 50)}
    torch.save(weights, tmp_path / "whole.pth")
    save_file(weights, tmp_path / "whole.safetensors")
    np.savez(tmp_path / "whole.npz", cls=weights["head.weight"].numpy())
    for name in ("whole.pth", "whole.safetensors", "whole.npz"):
        with pytest.raises(CheckpointError):
            load_checkpoint(truncated(tmp_path / f"cut{Path(name).suffix}", (tmp_path / name).read_bytes()))
    for noise in (b"", b"\x80\x02", b"PK", b"noise" * 100):
        (tmp_path / "noise.pth").write_bytes(noise)
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path / "noise.pth")


def test_a_tensor_that_is_missing_unexpected_or_misshapen_is_named_with_its_shapes(
    timm: ModuleType, transformers: ModuleType, tmp_path: Path
) -> None:
    written_by_timm(timm, tmp_path, "vit_base_patch16_224", SMALL | {"num_heads": 12})
    whole = load_file(tmp_path / "model.safetensors")
    for change, message in {
        "missing": r"missing: blocks.0.attn.proj.bias \[96\]",
        "unexpected": r"unexpected: attn_pool.latent \[1, 1, 96\]",
        "misshapen": r"misshapen: norm.weight is \[95\] and should be \[96\]",
    }.items():
        weights = dict(whole)
        if change == "missing":
            del weights["blocks.0.attn.proj.bias"]
        elif change == "unexpected":
            weights["attn_pool.latent"] = torch.zeros(1, 1, 96)
        else:
            weights["norm.weight"] = torch.zeros(95)
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path)
    directory = tmp_path / "hf"
    written_by_transformers(
        transformers, directory, "ViTConfig", "ViTForImageClassification", HF_SMALL | {"intermediate_size": 96}
    )
    whole = load_file(directory / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in whole.items() if name != "vit.layernorm.bias"},
        directory / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"missing: vit.layernorm.bias"):
        load_checkpoint(directory)
    save_file(whole | {"vit.pooler.dense.bias": torch.zeros(3)}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected: vit.pooler.dense.bias \[3\]"):
        load_checkpoint(directory)


def test_a_folder_whose_index_points_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"names a file outside its directory"):
        load_checkpoint(tmp_path)


def test_what_the_preprocessor_asks_and_we_do_not_do_is_refused(transformers: ModuleType, tmp_path: Path) -> None:
    arguments = HF_SMALL | {"intermediate_size": 96}
    for change, message in {
        "size is 64 × 32: not square": {"size": {"height": 32, "width": 64}},
        "cuts nothing out": {"size": {"shortest_edge": 32}},
        "crop_size is 40, more than the 32": {"do_center_crop": True, "crop_size": 40},
        "resample is 5": {"resample": 5},
        "image_mean is None": {"image_mean": None},
    }.items():
        written_by_transformers(
            transformers, tmp_path, "ViTConfig", "ViTForImageClassification", arguments, SQUASH | message
        )
        with pytest.raises(CheckpointError, match=change):
            load_checkpoint(tmp_path)


# -- the commands


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vitserve"


def test_the_command_exports_a_folder_at_another_size_under_other_labels(timm: ModuleType, tmp_path: Path) -> None:
    written_by_timm(timm, tmp_path / "model", "vit_base_patch16_224", SMALL | {"num_heads": 12})
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\ne\n")
    command = [
        "export",
        str(tmp_path / "model"),
        "-o",
        str(tmp_path / "bundle"),
        "--image-size",
        "48",
        "--labels",
        str(tmp_path / "labels.txt"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    bundle = open_bundle(tmp_path / "bundle")
    assert (bundle.labels, bundle.manifest.name, bundle.manifest.preprocessing.image_size) == (
        tuple("abcde"),
        "model",
        48,
    )
    rejected = CliRunner().invoke(app, [*command, "--image-size", "50"])
    assert rejected.exit_code == 2
    assert "image size 50 is not a multiple of patch size 8" in rejected.output


def test_a_source_is_served_and_exported_only_once(transformers: ModuleType, tmp_path: Path, cache: Path) -> None:
    arguments = HF_SMALL | {"intermediate_size": 96, "id2label": dict(enumerate("abcde"))}
    theirs = written_by_transformers(
        transformers, tmp_path / "model", "ViTConfig", "ViTForImageClassification", arguments
    )
    image = encoded(random_image(50, 40))
    pixels = (
        np.asarray(Image.open(io.BytesIO(image)).resize((32, 32), Image.Resampling.BILINEAR)).astype(np.float32) / 255
    )
    normal = (pixels - np.array(SQUASH["image_mean"], np.float32)) / np.array(SQUASH["image_std"], np.float32)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(normal).permute(2, 0, 1)[None]).logits.softmax(-1)[0]
    for times in range(2):
        running = start_server(str(tmp_path / "model"), "--precision", "fp32")
        with httpx.Client(base_url=running.url, timeout=60) as client:
            answer = client.post("/v1/classify", content=image, headers={"content-type": "image/png"}).json()
        assert running.stop() == 0
        for each in answer["results"][0]["predictions"]:
            assert each["label"] == "abcde"[each["index"]]
            assert each["probability"] == pytest.approx(float(expected[each["index"]]), abs=1e-4)
        assert ("exporting" in "".join(running.log)) is (times == 0)
    assert len(list(cache.glob("model-*"))) == 1


def test_two_things_to_serve_are_one_too_many(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(tmp_path), "--bundle", "elsewhere"])
    assert result.exit_code == 2
    assert "both a source" in result.output
