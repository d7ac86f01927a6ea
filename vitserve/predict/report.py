"""Accuracy, confusion and calibration of predictions whose directories are named after the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vitserve.model.bundle.calibration import calibration_error, reliability
from vitserve.predict.output import Row


@dataclass(frozen=True)
class Report:
    labels: tuple[str, ...]
    confusion: npt.NDArray[np.int64]  # [actual, predicted]
    calibration: npt.NDArray[np.float64]  # [bins, 3]: images, mean probability, accuracy

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / max(self.images, 1))

    @property
    def calibration_error(self) -> float:
        """The expected calibration error."""
        return calibration_error(self.calibration)


def report_of(rows: Sequence[Row], labels: Sequence[str]) -> Report | None:
    """None unless every image with a prediction lies in a directory named after a label."""
    index = {label: number for number, label in enumerate(labels)}
    judged = [row for row in rows if row.probability is not None]
    actual = [index.get(Path(row.path).parent.name, -1) for row in judged]
    if not judged or min(actual) < 0:
        return None
    predicted = [index[row.label] for row in judged]
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(confusion, (actual, predicted), 1)
    probabilities = np.array([row.probability for row in judged])
    right = np.array(actual) == np.array(predicted)
    return Report(tuple(labels), confusion, reliability(probabilities, right))


def plot(report: Report, path: Path) -> None:
    """The confusion matrix and the calibration. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.imshow(
        report.confusion / np.maximum(report.confusion.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1
    )
    left.set(title=f"accuracy {100 * report.accuracy:.2f}%", xlabel="predicted", ylabel="actual")
    if len(report.labels) <= 30:
        left.set_xticks(range(len(report.labels)), report.labels, rotation=90)
        left.set_yticks(range(len(report.labels)), report.labels)
    counts, probability, accuracy = report.calibration.T
    right.plot([0, 1], [0, 1], "--", color="gray")
    right.plot(probability[counts > 0], accuracy[counts > 0], "o-")
    right.set(title=f"ECE {100 * report.calibration_error:.2f}%", xlabel="probability", ylabel="accuracy")
    figure.savefig(path)
