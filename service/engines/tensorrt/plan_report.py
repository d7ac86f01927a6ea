"""What a TensorRT plan is made of, from the engine inspector's JSON.

With ProfilingVerbosity.DETAILED each layer tells its name, type and tactic. A fused attention is a layer whose name or tactic holds ``mha``; what is left of an
attention that was not fused is a softmax of its own, alone or inside a kernel that Myelin made (NVIDIA/TensorRT #4397, #4516, #4537).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PlanLayer:
    name: str
    kind: str
    tactic: str
    input_type: str


@dataclass(frozen=True)
class PlanReport:
    depth: int  # attention layers of the graph
    attention: tuple[PlanLayer, ...]  # the fused ones
    softmaxes: tuple[PlanLayer, ...]  # outside of them
    layers: int

    @property
    def fused(self) -> bool:
        return len(self.attention) >= self.depth and not self.softmaxes

    def __str__(self) -> str:
        types = ", ".join(sorted({each.input_type for each in self.attention})) or "none"
        left = "".join(f"; softmax left in {each.name}" for each in self.softmaxes)
        return f"{len(self.attention)} of {self.depth} attention layers are fused (input: {types}) in a plan of {self.layers} layers{left}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> PlanReport:
        plain = json.loads(text)
        for name in ("attention", "softmaxes"):
            plain[name] = tuple(PlanLayer(**each) for each in plain[name])
        return PlanReport(**plain)


def report_of(inspected: str, depth: int) -> PlanReport:
    """From the JSON of ``get_engine_information``. Raises ValueError where the plan was built without detail: then it verifies nothing."""
    described: list[Any] = json.loads(inspected)["Layers"]
    if any(not isinstance(each, dict) for each in described):
        raise ValueError(
            f"the plan tells only the names of its {len(described)} layers; it must be built with ProfilingVerbosity.DETAILED"
        )
    layers = [_layer(each) for each in described]
    attention = tuple(each for each in layers if "mha" in f"{each.name} {each.tactic}".lower())
    softmaxes = tuple(
        each
        for each in layers
        if each not in attention and "softmax" in f"{each.name} {each.kind} {each.tactic}".lower()
    )
    return PlanReport(depth, attention, softmaxes, len(layers))


def _layer(described: dict[str, Any]) -> PlanLayer:
    inputs = described.get("Inputs") or [{}]
    name, kind = str(described.get("Name", "")), str(described.get("LayerType", ""))
    return PlanLayer(name, kind, str(described.get("TacticName", "")), str(inputs[0].get("Format/Datatype", "unknown")))
