"""The model card of a bundle, written from the record of its training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

from vitserve.model.bundle.bundle import Artifact
from vitserve.model.bundle.calibration import ProbabilityCalibration
from vitserve.model.bundle.processor import ProcessorComparison
from vitserve.model.config import ResNetConfig, ViTConfig


def model_card(
    name: str,
    variant: str,
    training: dict[str, Any],
    artifacts: Iterable[Artifact] = (),
    processor: ProcessorComparison | None = None,
    calibration: ProbabilityCalibration | None = None,
) -> str:
    """Markdown with accuracy, data, training command, artifacts, confusion matrix, history and recipe.

    ``training`` is the content of training.json, which `vitserve train` writes.
    """
    labels, recipe = training["labels"], training["recipe"]
    network = f"--from {training['source']}" if training.get("source") else f"--variant {variant}"
    command = f"vitserve train DATA --output RUN {network} --epochs {recipe['epochs']}"
    validation_images = training.get("validation_images", recipe["validation_images"])  # a limit in earlier records
    return f"""# {name}

Test accuracy **{training["test_accuracy"]:.2%}** on {training["test_images"]:,} images.
The test images were used once, after the last epoch, with the weights as they are stored (rounded to half precision).

- **Model**: {_architecture(training["config"])}.
- **Data**: {training["training_images"]:,} training images and {validation_images:,} validation images.
- **Training**: `{command}`, {training["seconds"]:,} seconds on {training["machine"]}.
- **Limits**: the model knows only the {len(labels)} classes below, from small, centered images.
  It assigns one of these classes to every image, whatever the image shows.
- **Probabilities**: {"not calibrated" if calibration is None else calibration}.
{"" if processor is None else f"- **Preprocessing**: {processor}.{chr(10)}"}
## Artifacts

Compared with the float32 network on the evaluation images of the export, if it had any.
Layers are those with weights.

| engine | precision | quantized layers | same prediction | accuracy |
|---|---|---|---|---|
{_rows(_artifact_row(artifact) for artifact in artifacts)}

## Confusion matrix

Rows are the true classes, columns are the predictions.

| | {" | ".join(labels)} |
|---|{"---|" * len(labels)}
{_rows([f"**{label}**", *counts] for label, counts in zip(labels, training["confusion"], strict=True))}

## Training history

| epoch | loss | validation accuracy | seconds |
|---|---|---|---|
{_rows(_history_row(row) for row in training["history"])}

## Recipe

| setting | value |
|---|---|
{_rows(recipe.items())}
"""


def _architecture(config: dict[str, Any]) -> str:
    """The kind of network, with the settings that are not defaults."""
    kind, name = (ResNetConfig, "ResNet") if "blocks" in config else (ViTConfig, "Vision Transformer")
    defaults = {field.name: field.default for field in fields(kind) if field.default is not MISSING}
    settings = [f"{key} {value}" for key, value in config.items() if value != defaults.get(key)]
    return f"{name} with {', '.join(settings)}"


def _artifact_row(artifact: Artifact) -> list[str]:
    quantization, evaluation = artifact.quantization, artifact.evaluation
    quantized = "" if quantization is None else f"{quantization.layers} of {quantization.of} ({quantization.share:.0%})"
    agreement = "" if evaluation is None else f"{evaluation.top1_agreement:.2%} of {evaluation.images:,}"
    accuracy = "" if evaluation is None or evaluation.accuracy is None else f"{evaluation.accuracy:.2%}"
    return [artifact.engine, artifact.precision, quantized, agreement, accuracy]


def _history_row(row: dict[str, float]) -> list[str]:
    return [str(int(row["epoch"])), f"{row['loss']:.3f}", f"{row['validation_accuracy']:.2%}", f"{row['seconds']:.0f}"]


def _rows(rows: Iterable[Iterable[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
