"""Checkpoint → bundle: trace, make golden images, prove every engine equal to the source, and only then accept. Imported by vitserve.py."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from export.card import model_card
from export.checkpoint import Checkpoint
from export.golden import golden
from export.to_onnx import Servable, trace
from model.bundle import GRAPH, SCHEMA_VERSION, Artefact, Bundle, Golden, Manifest, save_golden, sha256, write_bundle
from model.config import variant_of
from model.parity import Precision, compare
from service.engines.engine import EngineUnavailable
from service.engines.open import EngineOptions, open_one

# What a CPU can run from the canonical graph alone; of one precision the faster first, since that is the order in which serving tries them.
CANDIDATES: tuple[tuple[str, Precision], ...] = (("openvino", "fp32"), ("onnxruntime", "fp32"), ("openvino", "bf16"))


class ExportError(RuntimeError):
    """The exported model does not do what its source does; no bundle was written."""


def build_bundle(
    checkpoint: Checkpoint,
    path: Path,
    *,
    name: str,
    version: str | None = None,
    training: dict[str, Any] | None = None,
    candidates: Sequence[tuple[str, Precision]] = CANDIDATES,
    progress: Callable[[str], None] = lambda step: None,
) -> Bundle:
    """Exports, proves and writes. Raises ExportError naming the engine, the output and the difference; then ``path`` is untouched."""
    servable = Servable(checkpoint.network, checkpoint.preprocessing).eval()
    with tempfile.TemporaryDirectory() as folder:
        contents = Path(folder)
        progress("tracing the network to ONNX")
        trace(servable, checkpoint.preprocessing.image_size, contents / GRAPH)
        progress("running the source network on golden images")
        reference = golden(servable, checkpoint.preprocessing.image_size)
        save_golden(contents / "golden.npz", reference.pixels, reference.reference)
        (contents / "labels.txt").write_text("".join(f"{label}\n" for label in checkpoint.labels), encoding="utf-8")
        if training is not None:
            (contents / "MODEL_CARD.md").write_text(model_card(name, training), encoding="utf-8")
        artefacts = tuple(_prove(contents / GRAPH, reference, candidates, progress))
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=name,
            version=version or sha256(contents / GRAPH)[:12],
            variant=variant_of(checkpoint.network.config),
            config=checkpoint.network.config,
            preprocessing=checkpoint.preprocessing,
            artefacts=artefacts,
            training=training,
        )
        progress("writing the bundle")
        return write_bundle(path, manifest, contents)


def _prove(graph: Path, reference: Golden, candidates: Sequence[tuple[str, Precision]], progress: Callable[[str], None]) -> list[Artefact]:
    """Each candidate that can run here, with its parity. One that runs and differs fails the export; one whose library is absent is left out."""
    proven = []
    for name, precision in candidates:
        progress(f"proving {name} in {precision}")
        try:
            engine = open_one(name, precision, graph, EngineOptions(max_batch=len(reference.pixels)))
        except EngineUnavailable as error:
            progress(f"left out: {error}")
            continue
        try:
            parity = compare(engine.run(0, reference.pixels), reference.reference)
        finally:
            engine.close()
        failure = parity.failure(precision)
        if failure:
            raise ExportError(f"{name} in {precision} is not equal to its source: {failure}")
        proven.append(Artefact(name, precision, graph.name, parity))
    if not proven:
        raise ExportError("no engine could run the exported graph here, so nothing is proven; install onnxruntime or openvino")
    return proven
