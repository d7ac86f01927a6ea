"""Installs the GPU double in a process of its own, in the place of TensorRT and CUDA."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from tests.support.gpu.cuda import Device, cuda_modules, cudaError_t
from tests.support.gpu.tensorrt import tensorrt_of
from tests.support.gpu.tensorrt_rtx import tensorrt_rtx_of


class _FailingDevice(Device):
    """Is lost in the process that finds and removes the file that the environment variable DOUBLE_FAULT names."""

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> tuple[Any, ...]:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.environ.get("DOUBLE_FAULT", ""))
            self.lost = cudaError_t.cudaErrorIllegalAddress
            return (self.lost,)
        return super().cudaGraphLaunch(graphExec, stream)


def install() -> None:
    """An L4 with TensorRT for RTX if the environment variable DOUBLE_RTX is set, otherwise an H200 with TensorRT."""
    rtx = "DOUBLE_RTX" in os.environ
    device = _FailingDevice(gpu="NVIDIA L4", capability=(8, 9)) if rtx else _FailingDevice()
    module = tensorrt_rtx_of(device) if rtx else tensorrt_of(device)
    sys.modules.update(cuda_modules(device) | {module.__name__: module})
