"""A kernel of ours for a GPU, in Triton, which comes with torch for CUDA.

A sum and its LayerNorm in one pass: torch's two kernels take twice the time (docs/gpu.md).
"""
# No `from __future__ import annotations`: Triton reads the annotations themselves.

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(x, y, weight, bias, total, normed, width: tl.constexpr, block: tl.constexpr, epsilon: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """A row each program. The sum is rounded to its type before it is normed, in float32, as torch does."""
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, block)
    there = column < width
    added = tl.load(x + row + column, mask=there, other=0.0).to(tl.float32) + tl.load(
        y + row + column, mask=there, other=0.0
    ).to(tl.float32)
    rounded = added.to(total.dtype.element_ty)
    tl.store(total + row + column, rounded, mask=there)
    exact = rounded.to(tl.float32)
    mean = tl.sum(exact, 0) / width
    centered = tl.where(there, exact - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centered * centered, 0) / width + epsilon)
    made = centered * scale * tl.load(weight + column, mask=there, other=0.0).to(tl.float32) + tl.load(
        bias + column, mask=there, other=0.0
    ).to(tl.float32)
    tl.store(normed + row + column, made.to(normed.dtype.element_ty), mask=there)


def add_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + y and its LayerNorm over the last axis; x and y contiguous, of one shape and type."""
    total, normed, width = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    block = triton.next_power_of_2(width)
    _add_norm[(x.numel() // width,)](
        x, y, weight, bias, total, normed, width, block, epsilon, num_warps=4 if block <= 1024 else 8
    )
    return total, normed
