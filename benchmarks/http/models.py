"""The network of one block, as a bundle for vitserve and as a plain graph for the peers. Exported once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.servers import ROOT

SOURCE = "random:one-block/4"


def one_block(directory: Path) -> tuple[Path, Path]:
    """Returns bundle and graph. Exports in another process, because it needs torch. Raises CalledProcessError."""
    bundle, graph = (directory / "one-block").resolve(), (directory / "one-block.onnx").resolve()
    directory.mkdir(parents=True, exist_ok=True)
    if not bundle.exists():
        _run("vitserve", "export", SOURCE, "--output", str(bundle))
    if not graph.exists():
        _run("benchmarks.plain_graph", SOURCE, str(graph))
    return bundle, graph


def _run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True, stdout=sys.stderr)
