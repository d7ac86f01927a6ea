"""Reads any source: an ONNX file without torch, an exported program of torch, everything else as a checkpoint."""

from __future__ import annotations

from pathlib import Path

from vitserve.export.checkpoint.locate import check_source
from vitserve.export.checkpoint.overrides import Overrides
from vitserve.export.requirements import EXPORT_PACKAGES, ONNX_PACKAGES, require_packages
from vitserve.export.source_model import Exportable


def load_source(source: str, overrides: Overrides | None = None) -> Exportable:
    """Raises CheckpointError, MissingPackageError, ValueError, OSError."""
    check_source(source)
    require_packages(*packages_for(source))
    if is_onnx(source):
        from vitserve.export.onnx_file.load import load_onnx

        return load_onnx(Path(source), overrides or Overrides())
    if _is_program(source):
        from vitserve.export.program_file.load import load_program

        return load_program(Path(source), overrides or Overrides())
    from vitserve.export.checkpoint.load import load_checkpoint

    return load_checkpoint(source, overrides)


def packages_for(source: str) -> tuple[str, ...]:
    """Those that an export of the source imports."""
    return ONNX_PACKAGES if is_onnx(source) else EXPORT_PACKAGES


def is_onnx(source: str) -> bool:
    return Path(source).suffix == ".onnx"


def _is_program(source: str) -> bool:
    return Path(source).suffix == ".pt2" and Path(source).is_file()
