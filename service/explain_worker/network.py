"""The network of a bundle in OpenVINO, with the attention of its layers as further outputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vitserve.model.arrays import Activation, Floats, Pixels, to_probabilities
from vitserve.model.bundle.bundle import GRAPH, Bundle
from vitserve.model.bundle.calibration import temperature_of
from vitserve.service.engines.telemetry import disable_telemetry
from vitserve.service.explain_worker.attention import NotExplainableError

_OCCLUSIONS = 7  # cells per side that are covered, one after the other
_BATCH = 8


class ExplainableNetwork:
    """On one thread, in float32."""

    def __init__(self, bundle: Bundle) -> None:
        disable_telemetry()
        import openvino

        core = openvino.Core()
        model = core.read_model(str(bundle.path / GRAPH))
        options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        self._compiled = core.compile_model(model, "CPU", options)
        self.layers = _add_attention(model)
        self._with_attention = core.compile_model(model, "CPU", options) if self.layers else self._compiled
        self._activation: Activation = bundle.manifest.activation
        self._temperature = temperature_of(bundle.manifest.probability_calibration)
        self._mean = np.array(bundle.manifest.preprocessing.mean) * 255

    def attentions(self, pixels: Pixels) -> list[Floats]:
        """[heads, queries, tokens] of each layer. ``pixels``: [height, width, channels].

        Raises NotExplainableError if the layers do not attend to the same tokens.
        """
        if not self.layers:
            raise NotExplainableError("the network has no attention that its graph shows")
        results = self._with_attention([np.ascontiguousarray(pixels[None])])
        attentions: list[Floats] = [results[port][0] for port in self._with_attention.outputs[-self.layers :]]
        tokens = attentions[0].shape[-1]
        whole = all(attention.shape[1:] == (tokens, tokens) for attention in attentions[:-1])
        if not whole or attentions[-1].shape[-1] != tokens:
            raise NotExplainableError(
                "the layers of the network attend to different tokens, in windows or because tokens are merged"
            )
        return attentions

    def probabilities(self, pixels: Pixels) -> Floats:
        """[classes]."""
        probabilities: Floats = to_probabilities(self._logits(pixels[None]), self._activation, self._temperature)[0]
        return probabilities

    def occlusion(self, pixels: Pixels, index: int) -> Floats:
        """How much the probability of a class falls if a part of the image is covered, [7, 7], the largest 1.

        Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", 2014 (arXiv:1311.2901), section 4.2.
        """
        height, width, _ = pixels.shape
        rows, columns = (np.linspace(0, side, _OCCLUSIONS + 1).round().astype(int) for side in (height, width))
        covered = np.repeat(pixels[None], _OCCLUSIONS**2, axis=0)
        for number in range(_OCCLUSIONS**2):
            row, column = divmod(number, _OCCLUSIONS)
            covered[number, rows[row] : rows[row + 1], columns[column] : columns[column + 1]] = self._mean
        logits = [self._logits(covered[start : start + _BATCH]) for start in range(0, len(covered), _BATCH)]
        probabilities = to_probabilities(np.concatenate(logits), self._activation, self._temperature)[:, index]
        fall = np.maximum(self.probabilities(pixels)[index] - probabilities, 0)
        grid: Floats = (fall / max(float(fall.max()), 1e-12)).reshape(_OCCLUSIONS, _OCCLUSIONS)
        return grid

    def _logits(self, pixels: Pixels) -> Floats:
        """[n, classes]. ``pixels``: [n, height, width, channels]."""
        logits: Floats = self._compiled([np.ascontiguousarray(pixels)])["logits"]
        return logits


def _add_attention(model: Any) -> int:
    """Adds softmax(Q Kᵀ · scale + mask) of each fused attention, in the order of the layers. Returns their number."""
    disable_telemetry()
    import openvino.opset13 as operators

    found = [node for node in model.get_ordered_ops() if node.get_type_name() == "ScaledDotProductAttention"]
    results = []
    for node in found:
        inputs = [port.get_source_output() for port in node.inputs()]
        query, key = inputs[:2]
        if query.get_partial_shape().rank.get_length() != 4:
            return 0
        size = query.get_partial_shape()[3].get_length()
        scale = inputs[4] if len(inputs) > 4 else operators.constant(np.float32(1 / math.sqrt(size)))
        scores = operators.multiply(operators.matmul(query, key, False, True), scale)
        if len(inputs) > 3 and inputs[3].get_partial_shape().rank.get_length() > 0:
            scores = operators.add(scores, inputs[3])
        results.append(operators.result(operators.softmax(scores, axis=-1)))
    model.add_results(results)
    return len(results)
