"""Builds TensorRT plans of many architectures without a GPU, and makes the table of docs/gpu.md.

    python -m benchmarks.tensorrt_plans WORK --seconds 150 --docs docs/gpu.md

Every plan has profiles for batches of up to 1, 8 and 64, and no attention may be taken apart: a build either fuses all
of it or fails. Weights are random. WORK keeps graphs and results. A run stops after the plan in which --seconds have
passed, and the next run continues.

For large networks, each compute capability is built with three blocks only, and the whole network once for all of them
together. A block that fuses does so at any depth, because all blocks but the last are alike.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from rich.console import Console

from benchmarks.document_sections import check, rewrite
from vitserve.export.graph.optimize import OptimizedNetwork
from vitserve.export.graph.tensorrt_attention import attention_nodes, tensorrt_graph
from vitserve.export.graph.trace import trace
from vitserve.export.quantize.fp8 import write_fp8_graph
from vitserve.export.tensorrt.builder import PlanError, build
from vitserve.model.bundle.bundle import GRAPH, WEIGHTS
from vitserve.model.bundle.plan import Capability, PlanReport, name_of
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ViTConfig, variant
from vitserve.model.network.vit import ViT
from vitserve.service.engines.gpu_artifacts import PlanOptions
from vitserve.service.engines.tensorrt.provider import RTX_CAPABILITIES, require_rtx
from vitserve.service.settings import DEFAULT_BUNDLE

Precision = Literal["bf16", "fp16", "fp8"]

SECTION = "plans"
MAX_BATCH = 64
CUT_DEPTH = 3  # blocks of the large networks, for each compute capability alone
FIRST: dict[Precision, Capability] = {"bf16": (8, 0), "fp16": (7, 5), "fp8": (8, 9)}
# SigLIP So400m (arXiv:2303.15343; arXiv:2305.13035): heads of 72 values, and an MLP whose width is odd times 16.
SO400M = ViTConfig(224, 14, 1152, 27, 16, 4304, classes=1000, pool="mean", class_token=False, activation="gelu_tanh")
NETWORKS: dict[str, ViTConfig] = {
    "default model": variant("compact-hybrid-deep/4"),
    "Ti/16": variant("Ti/16"),
    "S/16": variant("S/16"),
    "B/32": variant("B/32"),
    "B/16": variant("B/16"),
    "B/16, 384": variant("B/16", image_size=384),
    "L/16": variant("L/16"),
    "So400m/14": SO400M,
    "H/14": variant("H/14"),
}
LARGE = ("B/32", "B/16", "B/16, 384", "L/16", "So400m/14", "H/14")


@dataclass(frozen=True)
class Cell:
    """One plan to build."""

    network: str
    depth: int
    precision: Precision
    capabilities: tuple[Capability, ...]

    @property
    def name(self) -> str:
        return f"{self.network}, {self.depth} blocks, {self.precision}, {'+'.join(map(name_of, self.capabilities))}"


@dataclass(frozen=True)
class Result:
    cell: Cell
    report: PlanReport | None
    failure: str = ""
    cpu_seconds: float | None = None  # of the build; its duration depends on what else the machine does


def cells() -> Iterator[Cell]:
    """Grouped by graph."""
    for network, config in NETWORKS.items():
        depths = (CUT_DEPTH, config.depth) if network in LARGE else (config.depth,)
        for depth in depths:
            for precision, first in FIRST.items():
                capabilities = tuple(each for each in RTX_CAPABILITIES if each >= first)
                together = network in LARGE and depth == config.depth
                for group in [capabilities] if together else [(each,) for each in capabilities]:
                    yield Cell(network, depth, precision, group)


class Workplace:
    """The directory with graphs and results."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._results = directory / "results.jsonl"
        self._last: tuple[tuple[str, int, str], bytes, int] | None = None

    def results(self) -> dict[str, Result]:
        """By the name of the cell."""
        lines = self._results.read_text().splitlines() if self._results.exists() else []
        found = {}
        for line in lines:
            plain = json.loads(line)
            report = PlanReport.from_json(json.dumps(plain["report"])) if plain["report"] else None
            found[plain["name"]] = (report, plain["failure"], plain.get("cpu_seconds"))
        return {cell.name: Result(cell, *found[cell.name]) for cell in cells() if cell.name in found}

    def build(self, cell: Cell) -> Result:
        graph, attention = self._cast(cell)
        began = time.process_time()
        try:
            report = build(graph, attention, PlanOptions(cell.precision, MAX_BATCH, cell.capabilities)).report
            result = Result(cell, report, cpu_seconds=time.process_time() - began)
        except PlanError as error:
            result = Result(cell, None, str(error))
        line = {"name": cell.name, **asdict(result)} | {"cell": None}
        with self._results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return result

    def _cast(self, cell: Cell) -> tuple[bytes, int]:
        """The serialized graph of the plan, and the number of its attention operators. Keeps the last one."""
        key = (cell.network, cell.depth, cell.precision)
        if self._last is None or self._last[0] != key:
            self._last = None  # a large graph is freed before the next one is made
            model = tensorrt_graph(self._graph(cell), cell.precision)
            self._last = key, ir.to_proto(model).SerializeToString(), len(attention_nodes(model))
        return self._last[1:]

    def _graph(self, cell: Cell) -> Path:
        """Traces the network unless its graph is the last one that was traced."""
        directory = self.directory / f"{cell.network.replace('/', '-')}-{cell.depth}"
        if not directory.exists():
            for old in [path for path in self.directory.iterdir() if path.is_dir()]:
                shutil.rmtree(old)
            _write_graph(cell, directory)
        if cell.precision != "fp8":
            return directory / GRAPH
        quantized = directory / "fp8.onnx"
        if not quantized.exists():
            size = NETWORKS[cell.network].image_size
            images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
            write_fp8_graph(directory / GRAPH, quantized, images)
        return quantized


def _write_graph(cell: Cell, directory: Path) -> None:
    config = replace(NETWORKS[cell.network], depth=cell.depth)
    temporary = directory.with_name("traced")
    temporary.mkdir()
    if cell.network == "default model":
        for file in (GRAPH, WEIGHTS):
            shutil.copy(DEFAULT_BUNDLE / file, temporary)
    else:
        torch.manual_seed(0)
        network = OptimizedNetwork(ViT(config), Preprocessing(config.image_size))
        trace(network.eval(), config.image_size, temporary / GRAPH)
    temporary.rename(directory)


def table(results: Sequence[Result]) -> str:
    """Markdown: one row for each network, precision and depth; and the share of plans that fuse."""
    titles = ["network", "blocks", "precision", *map(name_of, RTX_CAPABILITIES)]
    titles += ["kernels", "per block", "plan, MB", "CPU, s"]
    groups: dict[tuple[str, int, Precision], list[Result]] = {}
    for result in results:
        groups.setdefault((result.cell.network, result.cell.depth, result.cell.precision), []).append(result)
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *(_row(*key, group) for key, group in groups.items())]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    pairs = [(result, capability) for result in results for capability in result.cell.capabilities]
    fused = sum(result.report is not None for result, _ in pairs)
    failures = "".join(f"\n- {result.cell.name}: {result.failure}" for result in results if result.report is None)
    version = next((result.report.version for result in results if result.report is not None), "")
    return (
        f"TensorRT for RTX {version}: in {fused} of {len(pairs)} combinations of network, precision, and compute "
        f"capability ({fused / len(pairs):.0%}), all attention is fused in every profile.{failures}\n\n{text}"
    )


def _row(network: str, depth: int, precision: Precision, results: Sequence[Result]) -> list[str]:
    reports = [result.report for result in results if result.report is not None]
    seconds = [result.cpu_seconds for result in results if result.cpu_seconds is not None]
    kernels = [profile.kernels for report in reports for profile in report.profiles]
    per_block = [profile.per_block for report in reports for profile in report.profiles if profile.per_block]
    return [
        network,
        str(depth),
        precision,
        *(_attention(capability, results) for capability in RTX_CAPABILITIES),
        _range(kernels, "d"),
        _range(per_block, "g"),
        _range([report.size_bytes / 1e6 for report in reports], ".0f"),
        f"{statistics.median(seconds):.1f}" if seconds else "",
    ]


def _attention(capability: Capability, results: Sequence[Result]) -> str:
    """Fused attention kernels of the attention operators of all profiles."""
    for result in results:
        if capability in result.cell.capabilities:
            if result.report is None:
                return "fails"
            fused = sum(len(profile.attention) for profile in result.report.profiles)
            return f"{fused}/{result.report.attention * len(result.report.profiles)}"
    return "–"


def _range(values: Sequence[float], style: str) -> str:
    if not values:
        return ""
    least, most = format(min(values), style), format(max(values), style)
    return least if least == most else f"{least}–{most}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="directory for graphs and results")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after about this time")
    parser.add_argument("--docs", type=Path, help="document whose section `plans` is rewritten")
    options = parser.parse_args()
    require_rtx()
    if options.docs is not None:
        check(options.docs, SECTION)
    workplace, console, began = Workplace(options.work), Console(), time.monotonic()
    results = workplace.results()
    for cell in cells():
        if cell.name not in results and time.monotonic() - began < options.seconds:
            results[cell.name] = result = workplace.build(cell)
            console.print(f"{cell.name}: {result.report or result.failure}", highlight=False)
    console.print(f"{len(results)} of {sum(1 for _ in cells())} plans are built")
    if options.docs is not None:
        rewrite(options.docs, SECTION, table([results[cell.name] for cell in cells() if cell.name in results]))


if __name__ == "__main__":
    main()
