"""Checks that the packages of the extra `export` are installed, before any of them is imported."""

from __future__ import annotations

from importlib.util import find_spec

ONNX_PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")  # for an ONNX file
EXPORT_PACKAGES = ("torch", *ONNX_PACKAGES, "safetensors")


class MissingPackageError(RuntimeError):
    """A package of the extra `export` is not installed; the message has the command that installs it."""


def require_packages(*names: str) -> None:
    """Raises MissingPackageError if one of the packages is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"reading a checkpoint requires {', '.join(missing)}; install with: pip install 'vitserve[export]'"
        )
