"""One table of graphs that TensorRT rejects or builds: the double and the genuine library decide alike."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support.gpu.fixtures import Gpu, Rtx
from tests.support.gpu.rejected_graphs import CASES, Case
from vitserve.service.engines.gpu_artifacts import PlanOptions


def rejection(builder: Any, case: Case) -> str | None:
    """The reason for which there is no plan; None if there is one, with its attention fused."""
    graph = case.graph()
    attention = sum(node.op_type == "Attention" for node in graph.graph.node)
    options = PlanOptions(max_batch=8, capabilities=(case.capability,))
    try:
        builder.build(graph.SerializeToString(), attention, options)
    except builder.PlanError as error:
        return str(error)
    return None


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@pytest.mark.parametrize("library", ["rtx", "rtx_gpu"], ids=["genuine", "double"])
def test_graphs_are_rejected_for_the_same_reason(request: pytest.FixtureRequest, library: str, case: Case) -> None:
    fixture: Rtx | Gpu = request.getfixturevalue(library)
    reason = rejection(fixture.builder, case)
    if case.rejection is None:
        assert reason is None
    else:
        assert reason is not None, "it was built"
        assert re.search(case.rejection, reason)
