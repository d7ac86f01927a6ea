"""int8 forms of the reference graph: calibrated ones for OpenVINO, by NNCF, and one without calibration for ONNX Runtime."""

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

RANKED_ON = 64  # batches of 16 that say which layer costs most, again for each that is left in float; the loss itself is of all images
ASKED_OF_THE_SEARCH = 0.8  # of the loss that is allowed: it runs the model in batches of its own, which round otherwise
MISSING = "int8 for OpenVINO needs nncf, which is not installed: pip install 'vitserve[int8]'"


def calibrated(graph: Path, images: Pixels, *, smooth: bool) -> openvino.Model:
    """Weights and activations in int8 (NNCF's transformer preset), ranges from ``images``; SmoothQuant (arXiv:2211.10438) or not.

    On a CPU without VNNI weights use half their range, for there pairs of products are added in 16 bits, which else saturate, silently: an artifact made with
    VNNI is less exact here, and the golden check says so. Raises ImportError without NNCF.
    """
    nncf, arguments = _nncf(images, smooth)
    with _quiet():
        model = nncf.quantize(_read(graph), **arguments)
    fold_smoothing(model)
    return model


def calibrated_until(
    graph: Path,
    images: Pixels,
    evaluation_images: Pixels,
    loss: Callable[[Outputs], float],
    max_loss: float,
    *,
    smooth: bool,
) -> openvino.Model:
    """As calibrated(), with the layers that cost most left in float until ``loss``, in points, of the outputs for ``judged`` is within ``max_loss``."""
    nncf, arguments = _nncf(images, smooth)

    def validate(compiled: Any, dataset: Any) -> tuple[float, None]:
        results = [compiled({"pixels": pixels}) for pixels in dataset]
        outputs = Outputs(
            np.concatenate([each["logits"] for each in results]),
            np.concatenate([each["embedding"] for each in results]),
        )
        return 100 - loss(outputs), None

    batches = [evaluation_images[start : start + 16] for start in range(0, len(evaluation_images), 16)]
    with _quiet():
        model = nncf.quantize_with_accuracy_control(
            _read(graph),
            arguments.pop("calibration_dataset"),
            nncf.Dataset(batches),
            validation_fn=validate,
            max_drop=ASKED_OF_THE_SEARCH * max_loss,
            drop_type=nncf.DropType.ABSOLUTE,
            advanced_quantization_parameters=arguments.pop("advanced_parameters"),
            advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                ranking_subset_size=min(RANKED_ON, len(batches))
            ),
            **arguments,
        )
    fold_smoothing(model)
    return model


def fold_smoothing(model: openvino.Model) -> int:
    """SmoothQuant's factors that follow a LayerNorm become part of its scale and shift, exactly: one pass over memory less for each. Returns how many did.

    OpenVINO has taken the LayerNorm apart into MVN · scale + shift, of constants.
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
        if any(each is None for each in constants) or any(
            len(node.output(0).get_target_inputs()) > 1 for node in (scale, shift)
        ):
            continue  # somebody else reads what is not multiplied by the factors
        factors = constants[0].reshape(-1)
        for node, values in ((scale, constants[1]), (shift, constants[2])):
            node.input(1).replace_source_output(opset13.constant(values * factors).output(0))
        factor.output(0).replace(shift.output(0))
        folded += 1
    model.validate_nodes_and_infer_types()
    return folded


def _constant(value: Any) -> Any:
    """An array, or None of what is computed."""
    node = value.get_node()
    return node.get_data() if node.get_type_name() == "Constant" else None


def without_calibration(graph: Path, path: Path) -> None:
    """Writes ``graph`` with int8 weights to ``path``; activations are quantized as they come (ONNX Runtime, dynamic quantization).

    Weights use 7 bits on a CPU without VNNI, for the reason given above.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            graph,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=not multiplies_int8(),
            weight_type=QuantType.QInt8,
        )


def _read(graph: Path) -> openvino.Model:
    """A convolution's bias is a constant of the output's rank, instead of one that is given that rank when the model runs.

    OpenVINO 2026's int8 transformations lose the other kind where ReLU and quantization follow: 1.2 points of accuracy of the model that comes along.
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
    """Without what NNCF and ONNX Runtime's tools say about themselves."""
    loggers = [logging.getLogger(name) for name in ("nncf", "")]
    levels = [each.level for each in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in loggers:
            each.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for each, level in zip(loggers, levels, strict=True):
                each.setLevel(level)
