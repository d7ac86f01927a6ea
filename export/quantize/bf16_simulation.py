"""Simulates bf16 arithmetic on a CPU that has none, to verify a bf16 artifact on such a machine."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def simulate_bf16(network: nn.Module) -> nn.Module:
    """A copy of the network whose projections and convolutions compute as in bf16.

    Operands are rounded to bf16, sums are in float32, results are rounded to bf16. CPUs and OpenVINO compute bf16 in
    the same way. Softmax, norms and GELU stay in float32, as they do there.
    """
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            with torch.no_grad():
                module.weight.copy_(_rounded(module.weight))
            module.register_forward_pre_hook(_round_inputs)
            module.register_forward_hook(_round_output)
    return network


def _rounded(x: Tensor) -> Tensor:
    """The nearest bf16 values, stored as float32."""
    return x.bfloat16().float()


def _round_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_rounded(x) for x in inputs)


def _round_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return _rounded(output)
