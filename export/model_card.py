"""The model card of a bundle, written from its training's own record."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from vitserve.model.config import ResNetConfig, ViTConfig


def model_card(name: str, variant: str, training: dict[str, Any]) -> str:
    """Markdown: data, recipe, command, seconds, machine, accuracy, confusion. ``training`` is training.json of `vitserve train`."""
    labels, confusion = training["labels"], training["confusion"]
    usual = {
        field.name: field.default
        for kind in (ViTConfig, ResNetConfig)
        for field in fields(kind)
        if field.default is not MISSING
    }
    shape = ", ".join(f"{key} {value}" for key, value in training["config"].items() if value != usual.get(key))
    command = f"vitserve train DATA --output RUN --variant {variant} --epochs {training['recipe']['epochs']}"
    recipe = "\n".join(f"| {key} | {value} |" for key, value in training["recipe"].items())
    history = "\n".join(
        f"| {int(row['epoch'])} | {row['loss']:.3f} | {row['validation_accuracy']:.2%} | {row['seconds']:.0f} |"
        for row in training["history"]
    )
    table = "\n".join(
        f"| **{label}** | " + " | ".join(str(count) for count in row) + " |"
        for label, row in zip(labels, confusion, strict=True)
    )
    return f"""# {name}

Test accuracy **{training["test_accuracy"]:.2%}** on {training["test_images"]:,} images that were read once, after the last epoch, with the weights as they
are stored (rounded to half precision).

- **What it is**: a Vision Transformer. {shape}.
- **Data**: {training["training_images"]:,} training images; {training["recipe"]["validation_images"]:,} more held out of the training set for validation.
- **Command**: `{command}`, {training["seconds"]:,} seconds on {training["machine"]}.
- **What it is not**: a classifier of anything but small, centered pictures of the {len(labels)} classes below. It calls every photo one of them.

## Confusion

Rows are true classes, columns what was predicted.

| | {" | ".join(labels)} |
|---|{"---|" * len(labels)}
{table}

## History

| epoch | loss | validation | seconds |
|---|---|---|---|
{history}

## Recipe

| setting | value |
|---|---|
{recipe}
"""
