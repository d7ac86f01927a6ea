"""Reads the layers of a plan from TensorRT's own information, and reports which kernels compute its attention.

With ProfilingVerbosity.DETAILED each layer has a name, a type, a tactic and the types of its inputs. There are two
sources: the engine inspector's JSON, which needs a GPU, and the message "Layers:" that TensorRT for RTX logs while it
builds, which needs none.

The names were read from plans of TensorRT for RTX 1.7 (docs/gpu.md). A fused attention is one kernel, `_gemm_mha_v2` or
`_gemv_mha_v1`. Attention that was taken apart leaves a softmax, in a kernel that is named by its operations:
`__myl_MaxrSubExpSumDiv…`. The word "softmax" is in no such name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vitserve.model.bundle.plan import ProfileKernels

LAYERS = "Layers:"  # begins the log message with the layers of a plan

_FUSED = re.compile(r"mha", re.IGNORECASE)
_SOFTMAX = re.compile(r"softmax|Max\w*Sub\w*Exp\w*Sum", re.IGNORECASE)
_NO_KERNELS = ("signal", "wait", "shape_call")  # layers that synchronize, or compute shapes on the host
_LOGGED = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>.*?), Inputs: \[(?P<inputs>.*?)\], Constants: .*?"
    r"TacticName: (?P<tactic>.*?), StreamId:"
)
_PROFILE = re.compile(r"_myl(\d+)_|\[profile (\d+)\]")


@dataclass(frozen=True)
class PlanLayer:
    name: str
    kind: str
    tactic: str
    input_types: tuple[str, ...]

    @property
    def profile(self) -> int:
        match = _PROFILE.search(self.name)
        return int(match[1] or match[2]) if match else 0

    @property
    def fused_attention(self) -> bool:
        return _FUSED.search(f"{self.name} {self.tactic}") is not None

    @property
    def softmax(self) -> bool:
        """Whether it computes a softmax that is not part of a fused attention."""
        return not self.fused_attention and _SOFTMAX.search(f"{self.name} {self.kind} {self.tactic}") is not None


def logged_layers(message: str) -> list[PlanLayer]:
    """``message`` is the log message that begins with LAYERS. Raises ValueError if a layer cannot be read."""
    lines = [line for line in message.splitlines() if line.removeprefix(LAYERS).startswith("Name: ")]
    matches = [_LOGGED.match(line.removeprefix(LAYERS)) for line in lines]
    layers = [
        PlanLayer(match["name"], match["kind"], match["tactic"], tuple(re.findall(r"Datatype: (\w+)", match["inputs"])))
        for match in matches
        if match is not None
    ]
    if not layers or len(layers) < len(lines):
        raise ValueError(f"only {len(layers)} of {len(lines)} layers in TensorRT's log can be read")
    return layers


def inspected_layers(inspected: str) -> list[PlanLayer]:
    """``inspected`` is the JSON of ``get_engine_information``. Raises ValueError for a plan built without details."""
    described: list[Any] = json.loads(inspected)["Layers"]
    if any(not isinstance(layer, dict) for layer in described):
        raise ValueError(
            f"the plan holds only the names of its {len(described)} layers; "
            "it must be built with ProfilingVerbosity.DETAILED"
        )
    return [_inspected(layer) for layer in described]


def _inspected(described: dict[str, Any]) -> PlanLayer:
    name, kind, tactic = (str(described.get(key, "")) for key in ("Name", "LayerType", "TacticName"))
    types = [value.get("Datatype") or value.get("Format/Datatype") for value in described.get("Inputs") or []]
    return PlanLayer(name, kind, tactic, tuple(str(value) for value in types if value))


def kernels_of_profiles(layers: Sequence[PlanLayer], max_batches: Sequence[int]) -> tuple[ProfileKernels, ...]:
    """The kernels of each profile. ``max_batches`` is the largest batch of each profile, in their order."""
    kernels = [layer for layer in layers if layer.kind not in _NO_KERNELS]
    return tuple(
        _kernels_of([layer for layer in kernels if layer.profile == profile], max_batch)
        for profile, max_batch in enumerate(max_batches)
    )


def _kernels_of(layers: Sequence[PlanLayer], max_batch: int) -> ProfileKernels:
    places = [place for place, layer in enumerate(layers) if layer.fused_attention]
    return ProfileKernels(
        max_batch,
        len(layers),
        tuple(layers[place].name for place in places),
        tuple(layer.name for layer in layers if layer.softmax),
        tuple(after - before for before, after in pairwise(places)),
    )


def attention_types(layers: Sequence[PlanLayer]) -> tuple[str, ...]:
    """The input types of the fused attention kernels."""
    return tuple(sorted({kind for layer in layers if layer.fused_attention for kind in layer.input_types}))
