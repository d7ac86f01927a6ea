"""``vitserve predict``: predictions for a whole directory, without a service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitserve.cli.console import one_line_errors


def predict(
    source: Annotated[
        str,
        typer.Argument(
            help="Directory, pattern in quotes, .tar file, or a .csv or .parquet file with a column path or image."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .csv, .jsonl, or .parquet.")],
    bundle: Annotated[
        Path | None, typer.Option(help="Directory of a bundle. Default: the bundled model.", show_default=False)
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="File to write the embeddings to (.npy), float32, a row for each image.")
    ] = None,
    head: Annotated[str, typer.Option(help="Name of a head of the bundle. Default: the network's classifier.")] = "",
    top_k: Annotated[int, typer.Option(min=1, help="Predictions per image.")] = 5,
    engine: Annotated[str, typer.Option(help="As for `vitserve serve`.")] = "auto",
    precision: Annotated[str, typer.Option(help="As for `vitserve serve`.")] = "auto",
    max_batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 16,
    plot: Annotated[
        Path | None,
        typer.Option(help="Plot of confusion and calibration, if directories are named after labels (.png, .svg)."),
    ] = None,
) -> None:
    """Predict all images of a directory, an archive, or a table.

    A run that was ended continues where it stopped: give the same source and output. Images that cannot be read
    have the reason in the column error.
    """
    with one_line_errors("bench"):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from vitserve.model.bundle.bundle import MANIFEST, open_bundle, sha256
        from vitserve.model.bundle.head import HeadError, backbone_of, check_fits, head_files, read_head
        from vitserve.model.bundle.preprocess import prepare_pillow
        from vitserve.predict.items import items_of
        from vitserve.predict.output import Embeddings, Output
        from vitserve.predict.report import plot as draw
        from vitserve.predict.report import report_of
        from vitserve.predict.run import Predictor
        from vitserve.service import machine
        from vitserve.service.engine_worker.startup import for_small_network
        from vitserve.service.engines.engine import EngineOptions
        from vitserve.service.engines.selection import open_engine
        from vitserve.service.settings import DEFAULT_BUNDLE

        prepare_pillow()
        opened, items = open_bundle(bundle or DEFAULT_BUNDLE), items_of(source)
        chosen = None
        if head:
            if head not in head_files(opened.path):
                known = ", ".join(head_files(opened.path)) or "none"
                raise HeadError(f"the bundle has no head {head!r}; it has: {known}")
            chosen = read_head(head_files(opened.path)[head])
            check_fits(chosen, backbone_of(opened.manifest.files), opened.golden().reference.embedding.shape[1])
        model = sha256(opened.path / MANIFEST)
        written = Output(output, f"{model} {'' if chosen is None else chosen.version} {top_k}")
        console, done, complete = Console(stderr=True), len(written.rows), False
        try:
            if done:
                console.print(f"{done} of {len(items)} images were predicted by an earlier run")
            width = opened.golden().reference.embedding.shape[1]
            array = None if embeddings is None else Embeddings(embeddings, len(items), width, done)
            options = EngineOptions(engine, precision, max_batch=max_batch, plan_dir=str(machine.plan_dir()))
            used = open_engine(opened, for_small_network(opened, options, machine.cores())).engine
            console.print(f"{opened.manifest.name} on {used.name} in {used.precision}")
            columns = TextColumn("{task.fields[rate]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            with Progress(*columns, console=console) as bar:
                task = bar.add_task("", total=len(items), completed=done, rate="")

                def progress(rows: int) -> None:
                    bar.update(task, advance=rows, rate=f"{bar.tasks[0].speed or 0:.0f} images/s")

                Predictor(opened, used, top_k, chosen).run(items, written, array, progress)
            used.close()
            complete = True
        finally:
            written.close(complete)
        failed = sum(bool(row.error) for row in written.rows)
        typer.echo(f"{output}: images: {len(written.rows)}, without prediction: {failed}")
        report = report_of(written.rows, opened.labels if chosen is None else chosen.labels)
        if report is not None:
            shares = f"accuracy {100 * report.accuracy:.2f}%, ECE {100 * report.calibration_error:.2f}%"
            typer.echo(f"{shares}, images: {report.images}")
            if plot is not None:
                draw(report, plot)
