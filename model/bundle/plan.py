"""The report on a TensorRT plan: its origin, the hardware that it is for, and the kernels that it holds."""

from __future__ import annotations

from statistics import median, median_low
from typing import Literal

import pydantic
from pydantic.dataclasses import dataclass as validated

Library = Literal["data-center", "rtx"]
Capability = tuple[int, int]  # compute capability, such as (8, 9)

TITLES: dict[Library, str] = {"data-center": "TensorRT", "rtx": "TensorRT for RTX"}
_STRICT = pydantic.ConfigDict(extra="forbid")


@validated(frozen=True, config=_STRICT)
class ProfileKernels:
    """The kernels of one optimization profile, read from the layer information that TensorRT wrote for the plan."""

    max_batch: int
    kernels: int
    attention: tuple[str, ...]  # names of the fused attention kernels, in order
    unfused: tuple[str, ...]  # names of the kernels that compute a softmax outside of a fused attention kernel
    distances: tuple[int, ...] = ()  # kernels from each fused attention to the next

    @property
    def per_block(self) -> float | None:
        """Kernels of a typical block. None for fewer than two blocks."""
        return median_low(self.distances) if self.distances else None


@validated(frozen=True, config=_STRICT)
class PlanReport:
    """The plan of one graph. Written beside a plan as JSON, and into the manifest of a bundle that holds the plan."""

    library: Library
    version: str  # of the library: a plan is for one version
    capabilities: tuple[Capability, ...]  # compute capabilities that it runs on
    attention: int  # attention operators of the graph
    input_types: tuple[str, ...]  # of the fused attention kernels
    profiles: tuple[ProfileKernels, ...]
    size_bytes: int
    build_seconds: float

    @property
    def max_batch(self) -> int:
        return max(profile.max_batch for profile in self.profiles)

    @property
    def fused(self) -> bool:
        """Whether every profile computes every attention in one kernel."""
        return all(len(profile.attention) == self.attention and not profile.unfused for profile in self.profiles)

    def to_json(self) -> str:
        return pydantic.TypeAdapter(PlanReport).dump_json(self, indent=1).decode()

    @staticmethod
    def from_json(text: str) -> PlanReport:
        """Raises ValueError if the text is not a report of this version."""
        return pydantic.TypeAdapter(PlanReport).validate_json(text)

    def __str__(self) -> str:
        """One line: fused attention per profile, kernels, size, build time."""
        counts = {len(profile.attention) for profile in self.profiles}
        fused = (
            str(counts.pop())
            if len(counts) == 1
            else ", ".join(str(len(profile.attention)) for profile in self.profiles)
        )
        batches = ", ".join(str(profile.max_batch) for profile in self.profiles)
        blocks = [profile.per_block for profile in self.profiles if profile.per_block is not None]
        per_block = f" ({median(blocks):g} a block)" if blocks else ""
        kernels = ", ".join(str(profile.kernels) for profile in self.profiles)
        unfused = "".join(
            f"; softmax outside of a fused kernel, batches up to {profile.max_batch}: {', '.join(profile.unfused)}"
            for profile in self.profiles
            if profile.unfused
        )
        return (
            f"{fused} of {self.attention} attention layers are fused (input: {', '.join(self.input_types) or 'none'}) "
            f"in profiles for batches of up to {batches}{unfused}; {kernels} kernels{per_block}; "
            f"{self.size_bytes / 1e6:.1f} MB, built in {self.build_seconds:.1f} s by {TITLES[self.library]} "
            f"{self.version} for {', '.join(map(name_of, self.capabilities))}"
        )


def name_of(capability: Capability) -> str:
    """Such as sm89."""
    return f"sm{capability[0]}{capability[1]}"
