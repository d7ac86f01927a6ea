"""``vitserve export``: a checkpoint becomes a bundle."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vitserve.cli.console import one_line_errors, print_artifacts
from vitserve.cli.sources import name_of, print_sources, training_record


class Activation(StrEnum):
    """The function from logits to probabilities."""

    softmax = "softmax"
    sigmoid = "sigmoid"


class Interpolation(StrEnum):
    """The filter that resizes images."""

    bilinear = "bilinear"
    bicubic = "bicubic"
    lanczos = "lanczos"
    nearest = "nearest"


class Layout(StrEnum):
    """The order of the axes of an image."""

    nchw = "nchw"
    nhwc = "nhwc"


class OutputKind(StrEnum):
    """The outputs of a network."""

    logits = "logits"
    probabilities = "probabilities"


class NetworkChoice(StrEnum):
    """The form of the network that is exported."""

    auto = "auto"
    ours = "ours"
    library = "library"


class Precision(StrEnum):
    """A precision that a bundle may be required to have. Every bundle has fp32."""

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"
    fp8 = "fp8"


def export(
    source: Annotated[
        str,
        typer.Argument(
            help="Directory or file of a checkpoint, a .onnx or .pt2 file, hf:owner/name[@revision], timm:NAME, or "
            "random:VARIANT. See docs/models.md."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the bundle to write.")],
    list_sources: Annotated[
        bool,
        typer.Option(
            "--list", callback=print_sources, is_eager=True, help="Print the sources that are known, and exit."
        ),
    ] = False,
    name: Annotated[str, typer.Option(help="Model name reported to clients. Default: taken from the source.")] = "",
    version: Annotated[
        str, typer.Option(help="Model version reported to clients. Default: the first digits of the graph's sha256.")
    ] = "",
    image_size: Annotated[
        int, typer.Option(help="Image size in pixels; position embeddings are resized to it. 0 keeps the checkpoint's.")
    ] = 0,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Text file with one label a line, or a .json file with a list of labels. Default: the checkpoint's."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="For CLIP and SigLIP: the text for a label, with {} in its place. Repeatable; the embeddings of "
            "several texts are averaged. Default: 'a photo of a {}.'",
            metavar="TEMPLATE",
        ),
    ] = None,
    labels_encoding: Annotated[
        str, typer.Option(help="Encoding of --labels, such as cp1252. Default: UTF-8, or by its byte order mark.")
    ] = "",
    architecture: Annotated[
        str, typer.Option(help="timm's name of the network, for a state dict that does not name it.")
    ] = "",
    model_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="Argument of timm.create_model() that the network was created with, such as num_heads=4. Repeatable.",
            metavar="NAME=VALUE",
        ),
    ] = None,
    preprocessor: Annotated[
        str,
        typer.Option(
            help="preprocessor_config.json or timm's config.json, or a directory with one, for a source without "
            "preprocessing; or torchvision:WEIGHTS, such as torchvision:ViT_B_16_Weights.IMAGENET1K_SWAG_LINEAR_V1."
        ),
    ] = "",
    mean: Annotated[
        str, typer.Option(help="Mean of the channels, of pixels from 0 to 1, such as 0.485,0.456,0.406.")
    ] = "",
    std: Annotated[str, typer.Option(help="Standard deviation of the channels, of pixels from 0 to 1.")] = "",
    interpolation: Annotated[Interpolation | None, typer.Option(help="Filter that resizes images.")] = None,
    crop: Annotated[float, typer.Option(help="Share of the resized shorter side that the center crop keeps.")] = 0.0,
    squash: Annotated[
        bool | None, typer.Option("--squash/--no-squash", help="Resize without keeping the aspect ratio.")
    ] = None,
    layout: Annotated[
        Layout | None, typer.Option(help="Layout of the input of a .onnx file. Default: the one that its shape shows.")
    ] = None,
    outputs: Annotated[
        OutputKind | None,
        typer.Option(
            help="Outputs of a .onnx file. Default: probabilities if it ends in a softmax or sigmoid, or if its "
            "values add up to 1."
        ),
    ] = None,
    network: Annotated[
        NetworkChoice,
        typer.Option(
            help="ours: only with vitserve's own optimized network. library: the network as timm or transformers "
            "computes it."
        ),
    ] = NetworkChoice.auto,
    weights: Annotated[
        str,
        typer.Option(
            help="Which weights to take from a file with several: a key or prefix, such as state_dict, or raw or "
            "averaged. Default: averaged (EMA), if there are any."
        ),
    ] = "",
    activation: Annotated[
        Activation | None,
        typer.Option(
            help="From logits to probabilities: sigmoid if an image can have several classes. Default: that of "
            "the checkpoint, otherwise softmax; sigmoid for a single logit."
        ),
    ] = None,
    merge: Annotated[
        int,
        typer.Option(
            min=0,
            help="Merge so many similar tokens in each block: faster, with a loss of accuracy that --images measures. "
            "See docs/models.md.",
        ),
    ] = 0,
    ignore_key: Annotated[
        list[str] | None,
        typer.Option(help="Key of the checkpoint's configuration that has no effect on the outputs. Repeatable."),
    ] = None,
    precision: Annotated[
        list[Precision] | None,
        typer.Option(
            help="Precision that the bundle must have besides fp32. Repeatable. fp32 alone adds none. Default: bf16, "
            "if it passes."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Directory of images, or a training archive (.npz), to calibrate int8 and to evaluate precisions with."
        ),
    ] = None,
    calibration_images: Annotated[int, typer.Option(min=1, help="Number of images to calibrate with.")] = 300,
    evaluation_images: Annotated[int, typer.Option(min=1, help="Number of other images to evaluate with.")] = 1000,
    golden_images: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of the evaluation images to put into the bundle, for the check of every engine at start-up. "
            "Everyone who has the bundle can see them.",
        ),
    ] = 0,
    max_loss: Annotated[
        float,
        typer.Option(
            help="Accuracy in percentage points that bf16 and int8 may lose. Without labels, half of the predictions "
            "that change count as lost."
        ),
    ] = 0.5,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Calibrate the probabilities with these labeled images: directories named after the labels, or an "
            "archive for `vitserve train`. The predicted classes stay the same."
        ),
    ] = None,
    plan: Annotated[
        str,
        typer.Option(
            help="Add TensorRT plans, built without a GPU by TensorRT for RTX: rtx, for every GPU with bf16 that it "
            "supports, or rtx: with compute capabilities, such as rtx:sm75,sm89. See docs/gpu.md.",
            metavar="rtx[:SM,…]",
        ),
    ] = "",
) -> None:
    """Export a checkpoint to a bundle.

    An engine's artifact is accepted only if its outputs are equal to the checkpoint's network within the tolerance.
    """
    from rich.console import Console

    console = Console(stderr=True)
    with one_line_errors("export"), console.status("exporting") as status:
        from vitserve.model.bundle.bundle import check_destination

        check_destination(output)
        from vitserve.export.build_bundle import build_bundle
        from vitserve.export.checkpoint.labels import read_label_file
        from vitserve.export.checkpoint.overrides import Overrides, channel_values, model_arguments
        from vitserve.export.load_source import load_source
        from vitserve.export.tensorrt.bundle_plans import plan_request
        from vitserve.model.bundle.evaluation import read_images, read_labeled_images

        def progress(step: str) -> None:
            status.update(step)
            console.print(step, style="dim", markup=False, highlight=False)

        def note(text: str) -> None:
            console.print(f"note: {text}", style="yellow", markup=False, highlight=False)

        if golden_images and images is None:
            raise ValueError("--golden-images needs --images")
        plans = plan_request(plan) if plan else None
        overrides = Overrides(
            image_size=image_size or None,
            labels=read_label_file(labels, labels_encoding) if labels else None,
            architecture=architecture,
            model_args=model_arguments(model_arg or ()),
            preprocessor=preprocessor,
            weights=weights,
            activation=activation.value if activation else None,
            network=network.value,
            prompts=tuple(prompt or ()),
            mean=channel_values("--mean", mean),
            std=channel_values("--std", std),
            interpolation=interpolation.value if interpolation else None,
            crop=crop or None,
            squash=squash,
            layout=layout.value if layout else None,
            outputs=outputs.value if outputs else None,
            merge=merge,
            ignored_keys=tuple(ignore_key or ()),
        )
        checkpoint = load_source(source, overrides)
        for text in checkpoint.notes:
            note(text)
        calibration = evaluation = None
        if images is not None:
            progress(f"reading images from {images}")
            calibration, evaluation = read_images(
                images, checkpoint.preprocessing, checkpoint.labels, calibration_images, evaluation_images, note
            )
        labeled = None
        if calibrate is not None:
            progress(f"reading images from {calibrate}")
            labeled = read_labeled_images(calibrate, checkpoint.preprocessing, checkpoint.labels, note)
        bundle = build_bundle(
            checkpoint,
            output,
            name=name or name_of(source),
            version=version or None,
            training=training_record(source),
            golden_images=golden_images,
            precisions=[choice.value for choice in precision] if precision else None,
            calibration_images=calibration,
            evaluation_images=evaluation,
            max_loss=max_loss,
            plans=plans,
            labeled_images=labeled,
            progress=progress,
        )
    print_artifacts(bundle)
    if bundle.manifest.probability_calibration is not None:
        typer.echo(f"probabilities: {bundle.manifest.probability_calibration}")
    typer.echo(f"{bundle.manifest.name} {bundle.manifest.version} → {output}")
