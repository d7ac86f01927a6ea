"""int8 forms of the reference graph: calibrated with NNCF for OpenVINO, or without images for ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitserve.model.arrays import Outputs, Pixels
from vitserve.service.engines.telemetry import disable_telemetry
from vitserve.service.machine import multiplies_int8

if TYPE_CHECKING:
    import openvino

BATCH_SIZE = 16  # of the images that accuracy is measured on
RANKING_BATCHES = 64  # at most this many batches rank the layers by their loss; the loss itself is of all images
SEARCH_MARGIN = 0.8  # of the allowed loss: the search runs the model in other batches, which round differently
MISSING = "int8 for OpenVINO needs nncf, which is not installed: pip install 'vitserve[int8]'"


def quantize(graph: Path, images: Pixels, *, smooth: bool) -> openvino.Model:
    """Weights and activations in int8 with ranges from ``images`` [n, H, W, C], by NNCF's transformer preset.

    ``smooth`` applies SmoothQuant (arXiv:2211.10438). On a CPU without VNNI, weights use half of their range: such a
    CPU adds pairs of products in 16 bits, which would saturate without an error. For the same reason a model that was
    quantized with VNNI is less exact on a CPU without it; the golden check detects this. Raises ImportError without
    NNCF.
    """
    nncf, arguments = _nncf(images, smooth)
    with _quiet():
        model = nncf.quantize(_read(graph), **arguments)
    fold_smoothing(model)
    return model


def quantize_within_loss(
    graph: Path,
    images: Pixels,
    evaluation_images: Pixels,
    loss: Callable[[Outputs], float],
    max_loss: float,
    *,
    smooth: bool,
) -> openvino.Model:
    """Like quantize(), but keeps the layers that lose most in float32 until ``loss`` is at most ``max_loss``.

    ``loss`` takes the outputs for ``evaluation_images`` and returns percentage points.
    """
    nncf, arguments = _nncf(images, smooth)

    def validate(compiled: Any, dataset: Any) -> tuple[float, None]:
        results = [compiled({"pixels": pixels}) for pixels in dataset]
        outputs = Outputs(
            np.concatenate([result["logits"] for result in results]),
            np.concatenate([result["embedding"] for result in results]),
        )
        return 100 - loss(outputs), None

    batches = [evaluation_images[start : start + BATCH_SIZE] for start in range(0, len(evaluation_images), BATCH_SIZE)]
    with _quiet():
        model = nncf.quantize_with_accuracy_control(
            _read(graph),
            arguments.pop("calibration_dataset"),
            nncf.Dataset(batches),
            validation_fn=validate,
            max_drop=SEARCH_MARGIN * max_loss,
            drop_type=nncf.DropType.ABSOLUTE,
            advanced_quantization_parameters=arguments.pop("advanced_parameters"),
            advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                ranking_subset_size=min(RANKING_BATCHES, len(batches))
            ),
            **arguments,
        )
    fold_smoothing(model)
    return model


def fold_smoothing(model: openvino.Model) -> int:
    """Makes SmoothQuant's factors part of the LayerNorm before them. Returns the number of folded factors.

    The result is the same, with one pass over memory less per factor. OpenVINO represents a LayerNorm as MVN · scale +
    shift, where scale and shift are constants.
    """
    disable_telemetry()
    from openvino import opset13

    folded = 0
    for factor in model.get_ordered_ops():
        if factor.get_type_name() != "Multiply" or not factor.get_friendly_name().endswith("nncf_smooth_quant"):
            continue
        shift = factor.input_value(0).get_node()
        scale = shift.input_value(0).get_node() if shift.get_type_name() == "Add" else None
        if (
            scale is None
            or scale.get_type_name() != "Multiply"
            or scale.input_value(0).get_node().get_type_name() != "MVN"
        ):
            continue
        constants = [_constant(node.input_value(1)) for node in (factor, scale, shift)]
        if any(constant is None for constant in constants) or any(
            len(node.output(0).get_target_inputs()) > 1 for node in (scale, shift)
        ):
            continue  # another operator reads the norm without the factors
        factors = constants[0].reshape(-1)
        for node, values in ((scale, constants[1]), (shift, constants[2])):
            node.input(1).replace_source_output(opset13.constant(values * factors).output(0))
        factor.output(0).replace(shift.output(0))
        folded += 1
    model.validate_nodes_and_infer_types()
    return folded


def _constant(value: Any) -> Any:
    """The array of a constant; None for a computed value."""
    node = value.get_node()
    return node.get_data() if node.get_type_name() == "Constant" else None


def write_dynamic_int8_graph(graph: Path, path: Path) -> None:
    """Writes ``graph`` with int8 weights to ``path``. ONNX Runtime computes the ranges of activations for every batch.

    On a CPU without VNNI, weights use 7 bits for the reason that quantize() gives. Raises ImportError without ONNX
    Runtime.
    """
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ImportError(f"int8 without images needs onnxruntime ({error}): pip install 'vitserve[export]'") from error

    with _quiet():
        quantize_dynamic(
            graph,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=not multiplies_int8(),
            weight_type=QuantType.QInt8,
        )


def save(model: openvino.Model, path: Path) -> None:
    """Writes ``path`` (.xml) and its weights (.bin), without rounding float32 constants to fp16."""
    disable_telemetry()
    import openvino

    openvino.save_model(model, path, compress_to_fp16=False)


def _read(graph: Path) -> openvino.Model:
    """The graph with each convolution bias as a constant of the output's rank, instead of a constant and a Reshape.

    OpenVINO 2026's int8 transformations drop a reshaped bias if ReLU and quantization follow. This cost the default
    model 1.2 percentage points of accuracy.
    """
    disable_telemetry()
    import openvino
    from openvino import opset13

    model = openvino.Core().read_model(graph)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Add" and node.input_value(0).get_node().get_type_name() == "Convolution":
            shaped = node.input_value(1).get_node()
            bias = _constant(shaped.input_value(0)) if shaped.get_type_name() == "Reshape" else None
            if bias is not None:
                node.input(1).replace_source_output(opset13.constant(bias.reshape(1, -1, 1, 1)).output(0))
    model.validate_nodes_and_infer_types()
    return model


def _nncf(images: Pixels, smooth: bool) -> tuple[Any, dict[str, Any]]:
    disable_telemetry()
    try:
        with _quiet():
            import nncf
            from nncf.quantization.advanced_parameters import AdvancedSmoothQuantParameters, OverflowFix
    except ImportError as error:
        raise ImportError(MISSING) from error
    overflow = OverflowFix.DISABLE if multiplies_int8() else OverflowFix.ENABLE
    smoothing = AdvancedSmoothQuantParameters() if smooth else AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
    return nncf, {
        "calibration_dataset": nncf.Dataset(list(images[:, None]), lambda pixels: {"pixels": pixels}),
        "model_type": nncf.ModelType.TRANSFORMER,
        "preset": nncf.QuantizationPreset.PERFORMANCE,
        "subset_size": len(images),
        "advanced_parameters": nncf.AdvancedQuantizationParameters(
            overflow_fix=overflow, smooth_quant_alphas=smoothing
        ),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the warnings and log messages of NNCF and of ONNX Runtime's quantization tools."""
    loggers = [logging.getLogger(name) for name in ("nncf", "")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
