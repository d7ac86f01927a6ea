"""Matrix products in fp8 (E4M3) with one scale per tensor, from a graph that export/quantize/fp8.py has quantized.

On a GPU they need compute capability 8.9. A CPU computes them too, for tests and comparisons: it is slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vitserve.service.engines.engine import EngineUnavailableError
from vitserve.service.engines.torch.fused_kernels import fused_kernel

FIRST_CAPABILITY = (8, 9)  # Ada: https://docs.nvidia.com/cuda/cuda-c-programming-guide
_GREATEST = torch.finfo(torch.float8_e4m3fn).max
_PER_TENSOR = functional.ScalingType.TensorWise


def check_device() -> None:
    """Raises EngineUnavailableError if the GPU has no fp8."""
    capability = torch.cuda.get_device_capability()
    if capability < FIRST_CAPABILITY:
        name = torch.cuda.get_device_name()
        raise EngineUnavailableError(f"fp8 needs compute capability {FIRST_CAPABILITY}; the {name} has {capability}")


def stored_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """float32 [in, out] → fp8 [out, in], the layout of the second operand that the GPU's kernels need."""
    return _to_fp8(weight / scale).T.contiguous()


def quantize(inputs: Sequence[Any], _: Any) -> Tensor:
    """Values and their float32 scale → fp8 values."""
    x, scale = inputs[:2]
    kernel = fused_kernel("quantize") if x.is_cuda and x.is_contiguous() else None
    quantized: Tensor = kernel(x, scale) if kernel is not None else _to_fp8(x.float() / scale)
    return quantized


def product(inputs: Sequence[Any], _: Any) -> Tensor:
    """fp8 [n, tokens, in], scale, fp8 [out, in], scale, and optionally a bias [out] → bf16 [n, tokens, out]."""
    x, scale, weight, weight_scale, *bias = inputs
    flat: Tensor = functional.scaled_mm(
        x.flatten(0, -2),
        weight.T,
        scale,
        _PER_TENSOR,
        weight_scale,
        _PER_TENSOR,
        bias=bias[0] if bias else None,
        output_dtype=torch.bfloat16,
        use_fast_accum=x.is_cuda,  # partial sums stay in the tensor cores, as with TensorRT; a CPU has no such mode
    )
    return flat.view(*x.shape[:-1], -1)


def _to_fp8(scaled: Tensor) -> Tensor:
    """Values beyond the range of E4M3 become its greatest value. Without the clamp, they would become NaN."""
    return scaled.clamp(-_GREATEST, _GREATEST).to(torch.float8_e4m3fn)
