"""The kernels of kernels.py, if Triton can compile them here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch

log = logging.getLogger(__name__)


@cache
def fused_kernel(name: Literal["add_norm", "quantize"]) -> Callable[..., Any] | None:
    """None if Triton is not installed or has no C compiler, which it needs to make its kernels callable."""
    try:
        from vitserve.service.engines.torch import kernels

        kernel: Callable[..., Any] = getattr(kernels, name)
        probe = torch.ones(2, 64, device="cuda")
        arguments = {"add_norm": (probe, probe, probe[0], probe[0], 1e-6), "quantize": (probe, probe[0, 0])}
        kernel(*arguments[name])
    except Exception as error:  # of several types, none of them public
        log.warning("Triton cannot compile the kernel %s, so torch's own kernels compute it: %s", name, error)
        return None
    return kernel
