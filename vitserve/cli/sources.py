"""Sources of `vitserve export`: the list of those that are known, and the name and training record of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

# (kind of SOURCE, the networks in it, the form in which they are exported)
SOURCES = (
    (
        "directory or state dict of timm",
        "vit_*, deit_*, deit3_*, hybrids vit_*_r*_s*, resnetv2_*_bit",
        "vitserve's network, optimized and compared with timm's; timm's own for arguments that it lacks. "
        "resnetv2_*_bit may need --network library: see docs/models.md",
    ),
    ("directory or state dict of timm", "every other classifier of timm", "timm's network; needs vitserve[timm]"),
    (
        "directory of Transformers",
        "vit, deit, dinov2, dinov2_with_registers",
        "vitserve's network, optimized and compared with Transformers'",
    ),
    (
        "directory of Transformers",
        "every other class ...ForImageClassification, except imagegpt, perceiver, shieldgemma2, siglip2 (NaFlex)",
        "Transformers' network; needs vitserve[transformers]",
    ),
    (
        "directory of Transformers, with --labels and --prompt",
        "clip, metaclip_2, siglip",
        "the image tower, with the embeddings of the labels as head; needs vitserve[transformers]",
    ),
    ("FILE.onnx", "every image classifier with one input of a fixed size", "the file's graph; needs no torch"),
    ("FILE.pt2", "programs of torch.export.save() with one image as input", "the program's graph"),
    ("FILE.pth or FILE.safetensors", "torchvision's vit_*", "vitserve's network, optimized"),
    ("FILE.npz", "Google's ViT and R+ViT", "vitserve's network, optimized"),
    ("FILE.safetensors", "written by vitserve train", "vitserve's network, optimized"),
    ("hf:owner/name, timm:NAME", "a model on the hub", "like its directory"),
    ("random:VARIANT", "a variant with random weights, for measurements", "vitserve's network, optimized"),
)


def print_sources(wanted: bool) -> None:
    """The callback of --list. Ends the command."""
    if not wanted:
        return
    for source, networks, form in SOURCES:
        typer.echo(f"{source}\n    {networks}\n    → {form}")
    raise typer.Exit


def training_record(source: str) -> dict[str, Any] | None:
    """That of `vitserve train`, which lies beside its weights."""
    path = Path(source)
    if path.name != "weights.safetensors" or not path.with_name("training.json").exists():
        return None
    record: dict[str, Any] = json.loads(path.with_name("training.json").read_text())
    return record


def name_of(source: str) -> str:
    """The source itself where it is no path; else the name of the directory, or of the file without its suffix."""
    path = Path(source)
    if not path.exists():
        return source
    if path.is_dir():
        return path.resolve().name
    return path.resolve().parent.name if path.name == "weights.safetensors" else path.stem
