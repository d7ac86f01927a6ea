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

        from vitserve.model.bundle.bundle import MANIFEST, sha256
        from vitserve.predict.items import items_of
        from vitserve.predict.opening import open_predictor
        from vitserve.predict.output import Embeddings, Output
        from vitserve.predict.report import plot as draw
        from vitserve.predict.report import report_of

        items = items_of(source)
        predictor = open_predictor(
            bundle, head=head, top_k=top_k, engine=engine, precision=precision, max_batch=max_batch
        )
        opened, used, chosen = predictor.bundle, predictor.engine, predictor.head
        model = sha256(opened.path / MANIFEST)
        written = Output(output, f"{model} {'' if chosen is None else chosen.version} {top_k}")
        console, done, complete = Console(stderr=True), len(written.rows), False
        try:
            if done:
                console.print(f"{done} of {len(items)} images were predicted by an earlier run")
            width = opened.golden().reference.embedding.shape[1]
            array = None if embeddings is None else Embeddings(embeddings, len(items), width, done)
            console.print(f"{opened.manifest.name} on {used.name} in {used.precision}")
            columns = TextColumn("{task.fields[rate]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            with Progress(*columns, console=console) as bar:
                task = bar.add_task("", total=len(items), completed=done, rate="")

                def progress(rows: int) -> None:
                    bar.update(task, advance=rows, rate=f"{bar.tasks[0].speed or 0:.0f} images/s")

                predictor.run(items, written, array, progress)
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
