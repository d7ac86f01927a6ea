"""The command line: one sub-command per stage. Each imports its stage only when it is asked for, so that --help is quick."""

from __future__ import annotations

import dataclasses
import inspect
import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from vitserve import __version__
from vitserve.service.settings import Settings, SettingsError

if TYPE_CHECKING:
    from vitserve.model.bundle.bundle import Bundle


class Precision(StrEnum):
    """As vitserve.model.bundle.parity has them, without importing numpy for --help."""

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"
    fp8 = "fp8"


app = typer.Typer(help="Put a trained Vision Transformer into production.", no_args_is_help=True, add_completion=False)


def _fail(error: Exception) -> typer.Exit:
    typer.secho(f"vitserve: {error}", fg="red", err=True)
    return typer.Exit(2)


def _serve(source: str, **values: Any) -> None:
    """Serve a model over HTTP: a bundle, or a SOURCE as `vitserve export` takes it, exported into the cache first. Without either, the one that comes along."""
    from vitserve.service.supervisor.supervisor import serve

    try:
        if source and values["bundle"]:
            raise SettingsError(f"both a source, {source}, and a bundle, {values['bundle']}, were named to be served")
        if source:
            values["bundle"] = _exported(source)
        status = serve(Settings(**values))
    except (ValueError, RuntimeError, OSError) as error:
        raise _fail(error) from error
    raise typer.Exit(status)


def _exported(source: str) -> str:
    """The directory of the source's bundle; a bundle stands for itself."""
    if (Path(source) / "bundle.json").exists():
        return source
    from vitserve.export.cache import cached_bundle

    return str(cached_bundle(source, __version__, lambda step: typer.echo(step, err=True)))


def _settings_as_options() -> inspect.Signature:
    """One option per setting, --like-this, with VITSERVE_LIKE_THIS as its environment variable."""
    hints = get_type_hints(Settings)
    argument = typer.Argument(
        help="FILE or FOLDER of a checkpoint or bundle, hf:owner/name[@revision], timm:NAME; see docs/models.md."
    )
    parameters = [
        inspect.Parameter(
            "source", inspect.Parameter.POSITIONAL_OR_KEYWORD, default="", annotation=Annotated[str, argument]
        )
    ]
    for each in dataclasses.fields(Settings):
        option = typer.Option(help=each.metadata["help"], envvar=f"VITSERVE_{each.name.upper()}")
        parameters.append(
            inspect.Parameter(
                each.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=each.default,
                annotation=Annotated[hints[each.name], option],
            )
        )
    return inspect.Signature(parameters)


_serve.__signature__ = _settings_as_options()  # type: ignore[attr-defined]  # typer reads it
_serve.__annotations__ = {
    parameter.name: parameter.annotation for parameter in _settings_as_options().parameters.values()
}
app.command("serve")(_serve)


@app.command()
def export(
    source: Annotated[
        str,
        typer.Argument(
            help="FILE or FOLDER of a checkpoint, hf:owner/name[@revision], timm:NAME, or random:VARIANT; see docs/models.md."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the bundle to write.")],
    name: Annotated[
        str, typer.Option(help="The model's name, as clients will see it; the source's own unless told.")
    ] = "",
    version: Annotated[
        str, typer.Option(help="The model's version; the first digits of the graph's sha256 unless told.")
    ] = "",
    image_size: Annotated[
        int, typer.Option(help="Pixels; positions are interpolated to it. 0 keeps the checkpoint's.")
    ] = 0,
    labels: Annotated[Path | None, typer.Option(help="File of one label a line, in place of the checkpoint's.")] = None,
    architecture: Annotated[
        str, typer.Option(help="timm's name of the network, for a bare state dict of timm's.")
    ] = "",
    precision: Annotated[
        list[Precision] | None,
        typer.Option(help="What must be in the bundle besides fp32; may be given again. bf16 unless told."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Directory of images, or .npz as for `train`, to calibrate int8 with and judge precisions on."
        ),
    ] = None,
    calibration_images: Annotated[int, typer.Option(min=1, help="How many of them to calibrate with.")] = 300,
    evaluation_image_count: Annotated[int, typer.Option(min=1, help="How many others to judge on.")] = 1000,
    max_loss: Annotated[
        float,
        typer.Option(
            help="Points of accuracy that bf16 and int8 may lose; without labels, twice as many of disagreement."
        ),
    ] = 0.5,
) -> None:
    """Export a checkpoint to a bundle, proving every engine equal to its source before it is accepted."""
    from rich.console import Console

    from vitserve.export.build_bundle import ExportError, build_bundle
    from vitserve.export.checkpoint.load import load_checkpoint
    from vitserve.model.bundle.evaluation import read_images

    console = Console(stderr=True)
    record = Path(source).with_name("training.json")
    try:
        checkpoint = load_checkpoint(
            source,
            image_size=image_size or None,
            labels=labels.read_text(encoding="utf-8").splitlines() if labels else None,
            architecture=architecture,
        )
        with console.status("exporting") as status:

            def progress(step: str) -> None:
                status.update(step)
                console.print(f"[dim]{step}[/dim]")

            calibration = evaluation_images = None
            if images is not None:
                progress(f"reading images of {images}")
                calibration, evaluation_images = read_images(
                    images, checkpoint.preprocessing, checkpoint.labels, calibration_images, evaluation_image_count
                )
            bundle = build_bundle(
                checkpoint,
                output,
                name=name or _name_of(source),
                version=version or None,
                training=json.loads(record.read_text()) if record.exists() else None,
                precisions=[each.value for each in precision] if precision else None,
                calibration=calibration,
                evaluation_images=evaluation_images,
                max_loss=max_loss,
                progress=progress,
            )
    except (ValueError, OSError, ExportError) as error:
        raise _fail(error) from error
    _show(bundle)
    typer.echo(f"{bundle.manifest.name} {bundle.manifest.version} → {output}")


def _name_of(source: str) -> str:
    """A file's directory or its own name where the directory says nothing; everything else as it was called."""
    path = Path(source)
    if not path.exists():
        return source
    return (
        path.resolve().name
        if path.is_dir()
        else path.resolve().parent.name
        if path.name == "weights.safetensors"
        else path.stem
    )


def _show(bundle: Bundle) -> None:
    """Prints what a bundle can be run with, and what was shown of each."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("engine", "precision", "Δ golden", "images", "agree", "Δ p", "accuracy", "loss"):
        table.add_column(title, justify="left" if title in ("engine", "precision") else "right", no_wrap=True)
    for each in bundle.manifest.artifacts:
        evaluation_images = each.evaluation
        found = ("", "", "", "", "")
        if evaluation_images is not None:
            accuracy = "" if evaluation_images.accuracy is None else f"{evaluation_images.accuracy:.2%}"
            found = (
                str(evaluation_images.images),
                f"{evaluation_images.top1_agreement:.2%}",
                f"{evaluation_images.probability:.1e}",
                accuracy,
                f"{evaluation_images.loss:.2f}",
            )
        table.add_row(
            each.engine,
            each.precision + (" (simulated)" if each.simulated else ""),
            f"{each.parity.logits:.1e}",
            *found,
        )
    Console().print(table)
    for each in bundle.manifest.artifacts:
        if each.attention is not None:
            kernels = ", ".join(f"{count} × {name}" for name, count in each.attention.kernels.items()) or "not fused"
            typer.echo(
                f"attention, {each.engine} in {each.precision}: {kernels}; {each.attention.softmax_layers} softmax layers beside"
            )


@app.command("inspect")
def inspect_bundle(
    bundle: Annotated[
        Path | None, typer.Argument(help="Directory of a bundle; the one that comes along unless told.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The manifest, instead of a table.")] = False,
) -> None:
    """Show what a bundle holds: the network, its artifacts, what each has shown, and which kernels run its attention."""
    from rich.console import Console

    from vitserve.model.bundle.bundle import BundleError, open_bundle
    from vitserve.service import machine
    from vitserve.service.engines.gpu_artifacts import plans_of
    from vitserve.service.engines.tensorrt.plan_report import PlanReport
    from vitserve.service.settings import DEFAULT_BUNDLE

    try:
        opened = open_bundle(bundle or DEFAULT_BUNDLE)
    except (BundleError, OSError) as error:
        raise _fail(error) from error
    if as_json:
        typer.echo(json.dumps(opened.summary(), indent=1))
        return
    manifest, console = opened.manifest, Console()
    size, classes = manifest.preprocessing.image_size, manifest.config.classes
    console.print(
        f"[bold]{manifest.name}[/bold] {manifest.version}: {manifest.variant}, {size} × {size} pixels, {classes} classes",
        highlight=False,
    )
    _show(opened)
    for plan in plans_of(machine.plan_dir(), opened):
        console.print(f"{plan.stem}: {PlanReport.from_json(plan.with_suffix('.json').read_text())}", highlight=False)
    for reason in opened.damaged.values():
        console.print(f"[red]damaged: {reason}[/red]")


@app.command()
def tune(
    bundle: Annotated[
        Path | None, typer.Argument(help="Directory of a bundle; the one that comes along unless told.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch.")] = 8,
    seconds: Annotated[float, typer.Option(min=0.01, help="How long each setting runs.")] = 1.0,
    plot: Annotated[
        Path | None,
        typer.Option(help="Picture of throughput against latency to write, .svg or .png; needs matplotlib."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Measure and remember nothing.")] = False,
) -> None:
    """Measure engines × precisions × streams × batch sizes on this machine, and have `vitserve serve` take the fastest of them."""
    from rich.console import Console
    from rich.table import Table

    from vitserve.bench.tune import Measurement, SkippedEngine, choose, measure
    from vitserve.model.bundle.bundle import MANIFEST, BundleError, open_bundle, sha256
    from vitserve.service import machine
    from vitserve.service.engine_worker.tuning_cache import save_tuning_result
    from vitserve.service.settings import DEFAULT_BUNDLE

    console, measured = Console(), list[Measurement]()

    def skipped(what: SkippedEngine) -> None:
        console.print(f"skipped: {what.engine} in {what.precision}: {what.reason}", highlight=False)

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("engine", "precision", "streams × threads", "batch", "images/s", "p50 ms"):
        table.add_column(title, justify="left" if title in ("engine", "precision") else "right")
    try:
        opened = open_bundle(bundle or DEFAULT_BUNDLE)
        with console.status("measuring"):
            for each in measure(opened, machine.cores(), max_batch, seconds, skipped):
                measured.append(each)
                split = f"{each.streams} × {each.threads}"
                table.add_row(
                    each.engine,
                    each.precision,
                    split,
                    str(each.batch_size),
                    f"{each.images_per_second:.1f}",
                    f"{1000 * each.p50_seconds:.1f}",
                )
        choice = choose(measured)
        console.print(table)
        if plot is not None:
            from vitserve.bench.plot import draw_tuning

            draw_tuning(measured, plot)
        kept = "" if dry_run else f" → {save_tuning_result(sha256(opened.path / MANIFEST), choice)}"
    except (BundleError, ValueError, OSError, ImportError) as error:
        raise _fail(error) from error
    setting = f"{choice.engine} in {choice.precision}, {choice.streams} × {choice.threads} threads"
    typer.echo(f"fastest: {setting}, {choice.images_per_second:.1f} images/s{kept}")


@app.command()
def bench(
    target: Annotated[
        str,
        typer.Argument(
            help="URL of a running service, or FOLDER of a bundle; the engines of the one that comes along unless told."
        ),
    ] = "",
    images: Annotated[
        Path | None, typer.Option(help="Service: what is posted, a file or a directory; a JPEG made here unless told.")
    ] = None,
    connections: Annotated[
        str,
        typer.Option(
            help="Service, closed loop: clients who ask again when answered. 1,8, or none with --rate, unless told."
        ),
    ] = "",
    rate: Annotated[
        str,
        typer.Option(
            help="Service, open loop: Poisson arrivals a second, latency counted from the planned one; 100,200."
        ),
    ] = "",
    deadline_ms: Annotated[
        float,
        typer.Option(
            min=0, help="Service: what comes within it is goodput; told as timeout_ms unless the URL has a path."
        ),
    ] = 0,
    engine: Annotated[str, typer.Option(help="Bundle: onnxruntime or openvino; auto measures all.")] = "auto",
    precision: Annotated[str, typer.Option(help="Bundle: fp32, bf16 or int8; auto measures all.")] = "auto",
    batch_sizes: Annotated[str, typer.Option(help="Bundle: images in a batch.")] = "1,2,4,8",
    streams: Annotated[int, typer.Option(min=1, help="Bundle: batches that run at once.")] = 1,
    threads: Annotated[
        int, typer.Option(min=0, help="Bundle: threads per stream; 0 shares the machine's cores among the streams.")
    ] = 0,
    rounds: Annotated[
        int, typer.Option(min=1, help="Bundle: in each of which every engine has its turn; medians are reported.")
    ] = 3,
    seconds: Annotated[
        float, typer.Option(min=0, help="How long each load, or each turn of an engine, is measured; 0 takes 10 and 1.")
    ] = 0,
    warm_up_seconds: Annotated[
        float, typer.Option(min=0, help="Service: under the same load before it is measured.")
    ] = 2,
    csv: Annotated[Path | None, typer.Option(help="CSV to write.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="JSON to write, with the machine that it was.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write, .svg or .png; needs matplotlib.")] = None,
) -> None:
    """Measure a running service, or a bundle's engines alone; docs/benchmarks.md says how."""
    from vitserve.bench.command import run
    from vitserve.bench.options import BenchOptions

    options = BenchOptions(
        target=target,
        images=images,
        connections=connections,
        rate=rate,
        deadline_ms=deadline_ms,
        engine=engine,
        precision=precision,
        batch_sizes=batch_sizes,
        streams=streams,
        threads=threads,
        rounds=rounds,
        seconds=seconds,
        warm_up_seconds=warm_up_seconds,
        csv=csv,
        json=as_json,
        plot=plot,
    )
    try:
        run(options, __version__)
    except (ValueError, OSError, ImportError) as error:
        raise _fail(error) from error


@app.command("verify")
def verify_bundle(
    bundle: Annotated[
        Path | None, typer.Argument(help="Directory of a bundle; the one that comes along unless told.")
    ] = None,
    engine: Annotated[str, typer.Option(help="As for `serve`.")] = "auto",
    precision: Annotated[str, typer.Option(help="As for `serve`.")] = "auto",
    images: Annotated[
        Path | None,
        typer.Option(help="Directory of images, or .npz as for `train`, to compare with float32 on the CPU."),
    ] = None,
    most_images: Annotated[int, typer.Option(min=1, help="How many of them at most.")] = 1000,
    batch_sizes: Annotated[
        str, typer.Option(help="Images in a batch; the largest is what the engine is opened for.")
    ] = "1,2,4,8",
    streams: Annotated[int, typer.Option(min=1, help="Batches that run at once.")] = 1,
    threads: Annotated[
        int, typer.Option(min=0, help="Threads per stream, on a CPU; 0 shares its cores among the streams.")
    ] = 0,
    seconds: Annotated[float, typer.Option(min=0.01, help="How long each batch size is measured in a round.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are reported.")] = 3,
    as_json: Annotated[Path | None, typer.Option("--json", help="Report to write, with all that was found.")] = None,
) -> None:
    """Open an engine here, verify it on golden images and on a directory, show whether its attention is fused, and measure it: one report. Status 1 if it fails."""
    from rich.console import Console

    from vitserve.bench.options import whole_numbers
    from vitserve.bench.verify import show, verify
    from vitserve.model.bundle.bundle import open_bundle
    from vitserve.model.bundle.evaluation import Images, read_images
    from vitserve.service import machine
    from vitserve.service.engines.engine import EngineOptions
    from vitserve.service.settings import DEFAULT_BUNDLE

    console = Console(stderr=True)
    try:
        opened, sizes = open_bundle(bundle or DEFAULT_BUNDLE), whole_numbers(batch_sizes, "--batch-sizes")
        evaluation_images: Images | None = None
        if images is not None:
            _, evaluation_images = read_images(images, opened.manifest.preprocessing, opened.labels, 1, most_images)
        options = EngineOptions(engine, precision, streams, threads, max(sizes), plan_dir=str(machine.plan_dir()))
        with console.status("opening") as status:
            report = verify(opened, options, evaluation_images, sizes, seconds, rounds, status.update)
        show(report)
        if as_json is not None:
            as_json.write_text(report.to_json())
    except (ValueError, RuntimeError, OSError) as error:
        raise _fail(error) from error
    raise typer.Exit(1 if report.failures else 0)


@app.command()
def train(
    data: Annotated[
        Path, typer.Argument(help="An .npz of encoded images: {train,test}_{jpeg,offsets,labels} and classes.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory of the run; a run already there goes on where it stopped.")
    ],
    variant: Annotated[str, typer.Option(help="The network, a name from model/config.py.")] = "compact-hybrid/4",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where torch sees one.")] = "auto",
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Passes over the training set; the schedule is stretched over them. 6 on a CPU, 100 on a GPU."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights, the order, and the augmentation.")] = 0,
    share: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=1,
            help="Of the training set, what is trained on; a smaller share is a part of a greater one.",
        ),
    ] = 1.0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a step. 192 on a CPU, 512 on a GPU.")] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Have torch.compile make the network's kernels first: a minute, which pays on a GPU."
        ),
    ] = False,
) -> None:
    """Train a compact ViT on labeled images: within an hour on two CPU cores, or in many more epochs on a GPU."""
    from dataclasses import replace

    from vitserve.model.config import any_variant
    from vitserve.model.training.train import LONG, QUICK, device_called, train

    try:
        place = device_called(device)
        recipe = LONG if place.type == "cuda" else QUICK
        recipe = replace(
            recipe, epochs=epochs or recipe.epochs, seed=seed, share=share, batch_size=batch_size or recipe.batch_size
        )
        report = train(any_variant(variant), recipe, data, output, place, compiled)
    except (ValueError, OSError) as error:
        raise _fail(error) from error
    typer.echo(
        f"test accuracy {report['test_accuracy']:.2%} after {report['seconds']} s → {output / 'weights.safetensors'}"
    )
