"""What bf16 makes of a network, on a CPU that has none: for proving a bf16 artifact where it cannot run."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def rounded(x: Tensor) -> Tensor:
    """To the nearest bf16, kept as float32."""
    return x.bfloat16().float()


def simulated(network: nn.Module) -> nn.Module:
    """A copy whose every projection and convolution multiplies operands that were rounded to bf16, sums in float32, and rounds what comes out.

    As the CPU's and OpenVINO's bf16 does it; softmax, norms and GELU are computed in float32 by either.
    """
    copied = copy.deepcopy(network)
    for module in copied.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            with torch.no_grad():
                module.weight.copy_(rounded(module.weight))
            module.register_forward_pre_hook(_round_inputs)
            module.register_forward_hook(_round_output)
    return copied


def _round_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(rounded(each) for each in inputs)


def _round_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return rounded(output)
