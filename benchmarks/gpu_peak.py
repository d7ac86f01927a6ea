"""Measures the peak of a GPU: a large matrix product in bf16, and a copy. Needs torch with CUDA.

python -m benchmarks.gpu_peak
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console

SIDE = 8192  # of the square matrices
COPIED_BYTES = 1 << 32
REPEATS = 20


def main() -> None:
    left, right = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    target = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    source = torch.ones_like(target)
    product, copy = _seconds(lambda: left @ right), _seconds(lambda: target.copy_(source))
    compute = f"{2 * SIDE**3 / product / 1e12:.0f} TFLOP/s in bf16"
    bandwidth = f"{2 * COPIED_BYTES / copy / 1e12:.2f} TB/s read and written"
    Console().print(f"{torch.cuda.get_device_name()}: {compute}, {bandwidth}")


def _seconds(run: Callable[[], object]) -> float:
    for _ in range(3):
        run()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    began.record()
    for _ in range(REPEATS):
        run()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1000 / REPEATS


if __name__ == "__main__":
    main()
