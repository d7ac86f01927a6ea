"""What a TensorRT plan is built for. Needs TensorRT only to find out what this machine is."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """The GPU and the TensorRT version that a plan is built for. It runs on no other."""

    gpu: str
    compute_capability: tuple[int, int]
    tensorrt: str

    @property
    def slug(self) -> str:
        major, minor = self.compute_capability
        return f"{re.sub(r'[^A-Za-z0-9]+', '-', self.gpu).strip('-').lower()}-sm{major}{minor}-trt{self.tensorrt}"


def local_target() -> Target:
    """This machine's. Raises ImportError without TensorRT, EngineUnavailableError without a GPU."""
    import tensorrt

    from vitserve.service.engines.cuda import runtime

    runtime.count_devices()
    name, capability = runtime.describe_device()
    return Target(name, capability, tensorrt.__version__)
