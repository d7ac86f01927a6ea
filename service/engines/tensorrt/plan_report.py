"""Whether a TensorRT plan fuses its attention, read from the engine inspector's JSON.

With ProfilingVerbosity.DETAILED each layer has a name, a type and a tactic. The name or the tactic of a fused attention
contains ``mha``. Attention that is not fused leaves a softmax, either as a layer or inside a Myelin kernel
(NVIDIA/TensorRT #4397, #4516, #4537).
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
    attention: tuple[PlanLayer, ...]  # fused attention layers of the plan
    softmaxes: tuple[PlanLayer, ...]  # outside fused attention
    layers: int

    @property
    def fused(self) -> bool:
        return len(self.attention) >= self.depth and not self.softmaxes

    def __str__(self) -> str:
        types = ", ".join(sorted({layer.input_type for layer in self.attention})) or "none"
        summary = f"{len(self.attention)} of {self.depth} attention layers are fused (input: {types})"
        softmaxes = "".join(f"; softmax remains in {layer.name}" for layer in self.softmaxes)
        return f"{summary} in a plan of {self.layers} layers{softmaxes}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> PlanReport:
        plain = json.loads(text)
        for name in ("attention", "softmaxes"):
            plain[name] = tuple(PlanLayer(**layer) for layer in plain[name])
        return PlanReport(**plain)


def report_of(inspected: str, depth: int) -> PlanReport:
    """``inspected`` is the JSON of ``get_engine_information``. Raises ValueError for a plan built without details."""
    described: list[Any] = json.loads(inspected)["Layers"]
    if any(not isinstance(layer, dict) for layer in described):
        raise ValueError(
            f"the plan holds only the names of its {len(described)} layers; "
            "it must be built with ProfilingVerbosity.DETAILED"
        )
    layers = [_layer(layer) for layer in described]
    attention = tuple(layer for layer in layers if "mha" in f"{layer.name} {layer.tactic}".lower())
    softmaxes = tuple(layer for layer in layers if layer not in attention and _has_softmax(layer))
    return PlanReport(depth, attention, softmaxes, len(layers))


def _has_softmax(layer: PlanLayer) -> bool:
    return "softmax" in f"{layer.name} {layer.kind} {layer.tactic}".lower()


def _layer(described: dict[str, Any]) -> PlanLayer:
    inputs = described.get("Inputs") or [{}]
    name, kind = str(described.get("Name", "")), str(described.get("LayerType", ""))
    return PlanLayer(name, kind, str(described.get("TacticName", "")), str(inputs[0].get("Format/Datatype", "unknown")))
