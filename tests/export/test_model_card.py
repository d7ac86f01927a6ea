"""The model card shows what the training recorded."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from tests.support.networks import TINY
from vitserve.export.report.model_card import model_card
from vitserve.model.bundle.bundle import Artifact, Evaluation, Quantization
from vitserve.model.bundle.parity import Parity
from vitserve.model.config import ResNetConfig

RECORD: dict[str, Any] = {
    "config": asdict(TINY),
    "labels": ["cat", "dog"],
    "recipe": {"epochs": 3, "validation_images": 50, "learning_rate": 0.003},
    "history": [{"epoch": 1, "loss": 0.69314, "validation_accuracy": 0.5, "seconds": 2.4}],
    "confusion": [[9, 1], [2, 8]],
    "training_images": 1950,
    "test_images": 20,
    "test_accuracy": 0.85,
    "seconds": 1212,
    "machine": "a CPU",
}


def test_card_shows_the_training_record() -> None:
    lines = model_card("pets", "tiny/8", RECORD).splitlines()
    assert lines[0] == "# pets"
    for line in (
        "Test accuracy **85.00%** on 20 images.",
        "- **Data**: 1,950 training images and 50 validation images.",
        "- **Training**: `vitserve train DATA --output RUN --variant tiny/8 --epochs 3`, 1,212 seconds on a CPU.",
        "| | cat | dog |",
        "|---|---|---|",
        "| **dog** | 2 | 8 |",
        "| 1 | 0.693 | 50.00% | 2 |",
        "| learning_rate | 0.003 |",
    ):
        assert line in lines


@pytest.mark.parametrize(
    ("config", "described"),
    [
        (asdict(TINY), "- **Model**: Vision Transformer with image_size 16, patch_size 8, width 32, depth 2, heads 2,"),
        (asdict(ResNetConfig(32, (1, 1), 1, 5)), "- **Model**: ResNet with image_size 32, blocks (1, 1),"),
    ],
)
def test_card_names_the_kind_of_network(config: dict[str, Any], described: str) -> None:
    assert described in model_card("pets", "tiny", RECORD | {"config": config})


def test_card_shows_the_share_of_quantized_layers() -> None:
    parity = Parity(0.1, 0.1, 0.1, 1.0, 0.1)
    int8 = Artifact("openvino", "int8", "int8.xml", parity, quantization=Quantization(11, 22))
    int8 = replace(int8, evaluation=Evaluation(1000, 0.99, 0.1, 0.9, 0.91))
    lines = model_card(
        "pets", "tiny/8", RECORD, [Artifact("openvino", "fp32", "model.onnx", parity), int8]
    ).splitlines()
    assert "| openvino | fp32 |  |  |  |" in lines
    assert "| openvino | int8 | 11 of 22 (50%) | 99.00% of 1,000 | 90.00% |" in lines
