"""``vitserve inspect``: the contents of a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vitserve.cli.console import one_line_errors, print_artifacts


def inspect(
    bundle: Annotated[
        Path | None, typer.Argument(help="Directory of a bundle. Default: the bundled model.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON instead of a table.")] = False,
) -> None:
    """Show the contents of a bundle.

    Prints the network, its artifacts, their numerical parity, and which kernels run the attention.
    """
    from rich.console import Console

    with one_line_errors():
        from vitserve.model.bundle.bundle import open_bundle
        from vitserve.model.config import ViTConfig
        from vitserve.service import machine
        from vitserve.service.engines.gpu_artifacts import plans_of, report_beside
        from vitserve.service.settings import DEFAULT_BUNDLE

        opened = open_bundle(bundle or DEFAULT_BUNDLE)
        if as_json:
            typer.echo(json.dumps(opened.summary(), indent=1))
            return
        manifest, console = opened.manifest, Console()
        (height, width, channels), classes = manifest.preprocessing.shape, manifest.config.classes
        title = f"[bold]{manifest.name}[/bold] {manifest.version}"
        gray = ", gray" if channels == 1 else ""
        shape = f"{manifest.variant}, {width} × {height} pixels{gray}, classes: {classes}, {manifest.activation}"
        console.print(f"{title}: {shape}", highlight=False)
        if manifest.processor is not None:
            console.print(f"preprocessing: {manifest.processor}", highlight=False, soft_wrap=True)
        if isinstance(manifest.config, ViTConfig) and manifest.config.merge:
            tokens = ", ".join(map(str, manifest.config.tokens_of_blocks))
            console.print(f"tokens per block: {tokens}", highlight=False, soft_wrap=True)
        calibration = manifest.probability_calibration
        console.print(f"probabilities: {calibration or 'not calibrated'}", highlight=False, soft_wrap=True)
        print_artifacts(opened)
        for plan in plans_of(machine.plan_dir(), opened):
            if (report := report_beside(plan)) is not None:
                console.print(f"{plan.stem}: {report}", highlight=False)
        for reason in opened.damaged_files.values():
            console.print(f"[red]damaged: {reason}[/red]")
