"""Opens a bundle with the engine that the service would use."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vitserve.model.bundle.bundle import Bundle, open_bundle
from vitserve.model.bundle.head import Head, HeadError, backbone_of, check_fits, head_files, read_head
from vitserve.model.bundle.preprocess import prepare_pillow
from vitserve.predict.run import Predictor
from vitserve.service import machine
from vitserve.service.engine_worker.startup import for_small_network
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.engines.selection import open_engine
from vitserve.service.settings import DEFAULT_BUNDLE


def open_predictor(
    bundle: Path | None = None,
    *,
    head: str = "",
    top_k: int = 5,
    engine: str = "auto",
    precision: str = "auto",
    max_batch: int = 16,
    cores: int | None = None,
) -> Predictor:
    """``bundle``: None for the bundled model. ``cores``: to use, None for all.

    Close its engine at the end. Raises BundleError, HeadError, NoEngineError.
    """
    prepare_pillow()
    opened = open_bundle(bundle or DEFAULT_BUNDLE)
    chosen = _head_of(opened, head) if head else None
    options = EngineOptions(engine, precision, max_batch=max_batch, plan_dir=str(machine.plan_dir()))
    used = cores or machine.cores()
    options = for_small_network(opened, options, used)
    if cores is not None and not options.threads:
        options = dataclasses.replace(options, threads=cores)
    return Predictor(opened, open_engine(opened, options).engine, top_k, chosen, used)


def _head_of(bundle: Bundle, name: str) -> Head:
    files = head_files(bundle.path)
    if name not in files:
        raise HeadError(f"the bundle has no head {name!r}; it has: {', '.join(files) or 'none'}")
    head = read_head(files[name])
    check_fits(head, backbone_of(bundle.manifest.files), bundle.golden().reference.embedding.shape[1])
    return head
