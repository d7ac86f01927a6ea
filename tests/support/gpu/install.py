"""Installs the GPU double in a process of its own, in the place of TensorRT and CUDA."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from tests.support.gpu.cuda import Device, cuda_modules, cudaError_t
from tests.support.gpu.tensorrt import tensorrt_of


class _FailingDevice(Device):
    """Is lost in the process that finds and removes the file that the environment variable DOUBLE_FAULT names."""

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> tuple[Any, ...]:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.environ.get("DOUBLE_FAULT", ""))
            self.lost = cudaError_t.cudaErrorIllegalAddress
            return (self.lost,)
        return super().cudaGraphLaunch(graphExec, stream)


def install() -> None:
    device = _FailingDevice()
    sys.modules.update(cuda_modules(device))
    sys.modules["tensorrt"] = tensorrt_of(device)
