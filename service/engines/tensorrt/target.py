"""The target of a TensorRT plan: GPU and library. Needs TensorRT only to describe this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vitserve.model.bundle.plan import TITLES, Capability, Library, PlanReport, name_of
from vitserve.service.engines.tensorrt import provider


@dataclass(frozen=True)
class Target:
    """The GPU, and the library and version, of a machine. A plan that is built there runs on no other."""

    gpu: str
    compute_capability: Capability
    version: str
    library: Library

    @property
    def slug(self) -> str:
        gpu = re.sub(r"[^A-Za-z0-9]+", "-", self.gpu).strip("-").lower()
        short = "rtx" if self.library == "rtx" else "trt"
        return f"{gpu}-{name_of(self.compute_capability)}-{short}{self.version}"

    def mismatch(self, plan: PlanReport) -> str | None:
        """Why the plan does not run here, as a sentence; None if it may."""
        if plan.library != self.library:
            return f"the plan is for {TITLES[plan.library]}; {TITLES[self.library]} is used here"
        if plan.version != self.version:
            return f"the plan is of {TITLES[plan.library]} {plan.version}; {self.version} is installed"
        if self.compute_capability not in plan.capabilities:
            built_for = ", ".join(map(name_of, plan.capabilities))
            return f"the plan is for {built_for}; the {self.gpu} is {name_of(self.compute_capability)}"
        return None


def local_target() -> Target:
    """This machine's. Raises ImportError without TensorRT, EngineUnavailableError without a GPU."""
    chosen = provider.choose()
    version = str(chosen.load().__version__)

    from vitserve.service.engines.cuda import runtime

    runtime.count_devices()
    name, capability = runtime.describe_device()
    return Target(name, capability, version, chosen.library)
