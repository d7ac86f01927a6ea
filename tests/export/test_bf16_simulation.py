"""Simulated bf16 rounds as bf16 does, and verifies the artifact on a CPU without bf16."""

from __future__ import annotations

import openvino
import torch

from tests.support.bundles import SMALL, artifact_in, random_images
from tests.support.networks import network
from vitserve.export.graph.reference import ReferenceNetwork
from vitserve.export.quantize.bf16_simulation import simulate_bf16
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.preprocess import Preprocessing


def test_simulation_rounds_weights_and_outputs_to_bf16() -> None:
    reference = ReferenceNetwork(network(SMALL), Preprocessing(32)).eval()
    pixels = torch.from_numpy(random_images(16).pixels)
    with torch.inference_mode():
        (simulated, _), (exact, _) = simulate_bf16(reference)(pixels), reference(pixels)
    difference = float((simulated - exact).abs().max() / exact.abs().max())
    assert 1e-4 < difference < 6e-2
    for parameter in simulate_bf16(reference).parameters():
        if parameter.ndim > 1 and parameter.shape[0] != 1:
            assert torch.equal(parameter, parameter.bfloat16().float())


def test_bf16_is_in_every_bundle_and_marked_if_simulated(bundle: Bundle) -> None:
    artifact = artifact_in(bundle, "bf16")
    assert artifact.simulated == ("BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    assert 1e-5 < artifact.parity.logits < 6e-2
