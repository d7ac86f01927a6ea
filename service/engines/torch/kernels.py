"""GPU kernels in Triton, which is installed with torch for CUDA.

One computes a sum and its LayerNorm in one pass. torch's two kernels take twice the time (docs/gpu.md).
The other quantizes to fp8 in one pass. torch needs four kernels.
"""
# No `from __future__ import annotations`: Triton reads the annotations themselves.

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(
    x: Any,
    y: Any,
    weight: Any,
    bias: Any,
    total: Any,
    normed: Any,
    width: tl.constexpr,
    block: tl.constexpr,
    epsilon: tl.constexpr,
) -> None:
    """One program per row. As in torch, the sum is rounded to its type and then normalized in float32."""
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, block)
    inside = column < width
    left = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(y + row + column, mask=inside, other=0.0).to(tl.float32)
    rounded = (left + right).to(total.dtype.element_ty)
    tl.store(total + row + column, rounded, mask=inside)
    exact = rounded.to(tl.float32)
    mean = tl.sum(exact, 0) / width
    centered = tl.where(inside, exact - mean, 0.0)
    inverse_deviation = tl.rsqrt(tl.sum(centered * centered, 0) / width + epsilon)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    result = centered * inverse_deviation * scale + shift
    tl.store(normed + row + column, result.to(normed.dtype.element_ty), mask=inside)


def add_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + y and its LayerNorm over the last axis. x and y are contiguous, with the same shape and type."""
    total, normed, width = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    block = triton.next_power_of_2(width)
    _add_norm[(x.numel() // width,)](
        x, y, weight, bias, total, normed, width, block, epsilon, num_warps=4 if block <= 1024 else 8
    )
    return total, normed


@triton.jit  # type: ignore[untyped-decorator]
def _quantize(x: Any, scale: Any, quantized: Any, count: Any, block: tl.constexpr, greatest: tl.constexpr) -> None:
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < count
    scaled = tl.load(x + index, mask=inside, other=0.0).to(tl.float32) / tl.load(scale)
    clamped = tl.minimum(tl.maximum(scaled, -greatest), greatest)
    tl.store(quantized + index, clamped.to(quantized.dtype.element_ty), mask=inside)


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Contiguous x and its float32 scale → fp8. Values beyond the range become the greatest value."""
    quantized, count, block = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.numel(), 4096
    greatest = torch.finfo(torch.float8_e4m3fn).max
    _quantize[(triton.cdiv(count, block),)](x, scale, quantized, count, block, greatest)
    return quantized
