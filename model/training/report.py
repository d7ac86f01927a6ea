"""The results of a training: a model card, and its curves as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MOST_LABELS = 20  # of a confusion matrix in full; of more, the most frequent confusions
_CONFUSIONS = 10


def write_card(report: Mapping[str, Any], command: str, path: Path) -> None:
    """``report``: the content of training.json."""
    recipe, labels, faults = report["recipe"], report["labels"], report["faults"]
    start = f"`{report['source']}`" if report["source"] else "random weights"
    used = _best_epoch(report)
    path.write_text(
        f"""# {path.parent.name}

Test accuracy **{report["test_accuracy"]:.2%}** on {report["test_images"]:,} images.
The test images were used once, after the last epoch, with the weights as they are stored (rounded to half precision).

- **Start**: {start}.
- **Data**: {report["training_images"]:,} training images and {report["validation_images"]:,} validation images of \
{len(labels)} classes. {f"{len(faults)} files could not be decoded and were skipped." if faults else ""}
- **Training**: `{command}`, {report["seconds"]:,} seconds on {report["machine"]}.
- **Weights**: of epoch {used} of {len(report["history"])}, averaged over earlier steps.
- **Limits**: the model knows only the {len(labels)} classes below.
  It assigns one of these classes to every image, whatever the image shows.

## {"Confusion matrix" if len(labels) <= _MOST_LABELS else "Most frequent confusions"}

{_confusion(labels, report["confusion"])}

## History

| epoch | loss | validation accuracy | seconds |
|---|---|---|---|
{_history(report)}

## Recipe

| setting | value |
|---|---|
{chr(10).join(f"| {name} | {value} |" for name, value in recipe.items())}
""",
        encoding="utf-8",
    )


def _best_epoch(report: Mapping[str, Any]) -> int:
    history = report["history"]
    if not report["recipe"]["patience"]:
        return len(history)
    return int(max(history, key=lambda row: row["validation_accuracy"])["epoch"])


def _history(report: Mapping[str, Any]) -> str:
    return "\n".join(
        f"| {row['epoch']} | {row['loss']:.3f} | {row['validation_accuracy']:.2%} | {row['seconds']:.0f} |"
        for row in report["history"]
    )


def _confusion(labels: list[str], confusion: list[list[int]]) -> str:
    if len(labels) <= _MOST_LABELS:
        rows = [
            f"| **{label}** | {' | '.join(map(str, counts))} |" for label, counts in zip(labels, confusion, strict=True)
        ]
        header = f"Rows are the true classes, columns are the predictions.\n\n| | {' | '.join(labels)} |"
        return "\n".join([header, f"|---|{'---|' * len(labels)}", *rows])
    pairs = [
        (count, label, predicted)
        for label, counts in zip(labels, confusion, strict=True)
        for predicted, count in zip(labels, counts, strict=True)
        if count and predicted != label
    ]
    rows = [f"| {label} | {predicted} | {count} |" for count, label, predicted in sorted(pairs)[::-1][:_CONFUSIONS]]
    return "\n".join(["| true class | prediction | images |", "|---|---|---|", *rows])


def draw_curves(report: Mapping[str, Any], path: Path) -> None:
    """Loss and validation accuracy of each epoch. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    history = report["history"]
    epochs = [row["epoch"] for row in history]
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [row["loss"] for row in history], "o-", color="#2b6cb0")
    left.set(title="training loss", xlabel="epoch")
    right.plot(epochs, [100 * row["validation_accuracy"] for row in history], "o-", color="#2f855a")
    right.axhline(100 * report["test_accuracy"], linestyle="--", color="#718096")
    right.set(title=f"validation accuracy (%), dashed: test, {report['test_accuracy']:.2%}", xlabel="epoch")
    figure.savefig(path)
