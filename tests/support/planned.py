"""A bundle with a TensorRT plan that the double runs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitserve.model.bundle.bundle import MANIFEST, Artifact, Bundle, write_bundle
from vitserve.model.bundle.plan import PlanReport
from vitserve.service.engines.gpu_artifacts import PlanOptions

PLAN = "bf16-rtx.plan"
MAX_BATCH = 4


def with_plan(bundle: Bundle, path: Path, builder: Any, **changes: Any) -> Bundle:
    """The bundle with a bf16 plan for an L4, at ``path``.

    ``builder`` is the module build_plan. ``changes`` are made to the report.
    """
    contents = path.with_name(f"{path.name}-contents")
    shutil.copytree(bundle.path, contents, ignore=shutil.ignore_patterns(MANIFEST))
    report: PlanReport = builder.plan_for(
        bundle.path / "model.onnx", contents / PLAN, PlanOptions("bf16", MAX_BATCH, ((8, 9),))
    )
    for temporary in (".json", ".lock"):
        (contents / PLAN).with_suffix(temporary).unlink()
    artifacts = bundle.manifest.artifacts
    parity = next(each.parity for each in artifacts if each.precision == "bf16")
    own = Artifact("tensorrt", "bf16", PLAN, parity, simulated=True, plan=replace(report, **changes))
    return write_bundle(path, replace(bundle.manifest, artifacts=(*artifacts, own)), contents)
