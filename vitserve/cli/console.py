"""Output that several commands share: errors in one line, and the table of a bundle's artifacts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from vitserve.service.log_format import is_json

if TYPE_CHECKING:
    from vitserve.model.bundle.bundle import Artifact, Bundle

log = logging.getLogger("vitserve")

# The extras that install a module. A module that is not in this table is in the base install.
_EXTRAS = {
    "torch": ("export", "train"),
    "safetensors": ("export", "train"),
    "onnx": ("export",),
    "onnxscript": ("export",),
    "onnx_ir": ("export",),
    "huggingface_hub": ("export",),
    "nncf": ("int8",),
    "matplotlib": ("bench",),
    "onnxruntime": ("onnxruntime",),
    "sklearn": ("heads",),
    "pyarrow": ("predict",),
}


@contextmanager
def one_line_errors(extra: str = "") -> Iterator[None]:
    """Ends the command with status 2 and one line instead of a traceback, for errors that the user can correct.

    A missing package is reported with the pip command that installs it. If several extras have the package, the command
    names ``extra``, the one that the whole command needs.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extras = _EXTRAS.get(package)
        if extras is None:  # a broken installation, or a bug: the traceback is needed
            raise
        chosen = extra if extra in extras else extras[0]
        raise fail(f"{package} is not installed. Install it with: pip install 'vitserve[{chosen}]'") from error
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise fail(str(error)) from error


def fail(message: str) -> typer.Exit:
    """Prints the message, or logs it if the log is JSON. Raise the result, which ends the command with status 2."""
    if is_json():
        log.critical("%s", message)
    else:
        typer.secho(f"vitserve: {message}", fg="red", err=True)
    return typer.Exit(2)


def print_artifacts(bundle: Bundle) -> None:
    """Prints the bundle's artifacts with the numerical parity and accuracy that each one showed."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("engine", "precision", "quantized", "Δ golden", "images", "agree", "Δ p", "accuracy", "loss"):
        table.add_column(title, justify="left" if title in ("engine", "precision") else "right", no_wrap=True)
    for artifact in bundle.manifest.artifacts:
        table.add_row(*_row(artifact))
    Console().print(table)
    for artifact in bundle.manifest.artifacts:
        if artifact.attention is not None:
            kernels = (
                ", ".join(f"{count} × {name}" for name, count in artifact.attention.kernels.items()) or "not fused"
            )
            softmax = artifact.attention.softmax_layers
            typer.echo(
                f"attention, {artifact.engine} in {artifact.precision}: {kernels}; separate softmax layers: {softmax}"
            )
    for artifact in bundle.manifest.artifacts:
        if artifact.plan is not None:
            typer.echo(f"plan, {artifact.engine} in {artifact.precision}: {artifact.plan}")


def _row(artifact: Artifact) -> tuple[str, ...]:
    precision = artifact.precision + (" (simulated)" if artifact.simulated else "")
    quantization = artifact.quantization
    quantized = "" if quantization is None else f"{quantization.layers}/{quantization.of} layers"
    row = (artifact.engine, precision, quantized, f"{artifact.parity.logits:.1e}")
    evaluation = artifact.evaluation
    if evaluation is None:
        return (*row, "", "", "", "", "")
    accuracy = "" if evaluation.accuracy is None else f"{evaluation.accuracy:.2%}"
    agreement, difference = f"{evaluation.top1_agreement:.2%}", f"{evaluation.probability:.1e}"
    return (*row, str(evaluation.images), agreement, difference, accuracy, f"{evaluation.loss:.2f}")
