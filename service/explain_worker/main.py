"""A process that explains one image after another, for one HTTP worker.

python -m vitserve.service.explain_worker <file descriptor of the connection> <bundle> <process> <log_level> \
    <log_format>

It has the lowest priority, so that it delays no inference (see __main__.py), and may be killed at any time.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np

from vitserve.model.arrays import Floats, Pixels
from vitserve.model.bundle import preprocess
from vitserve.model.bundle.bundle import MANIFEST, Bundle, open_bundle, sha256
from vitserve.service.explain_worker.attention import NotExplainableError, attention_of, grid_of, on_grid, rollout
from vitserve.service.explain_worker.network import ExplainableNetwork
from vitserve.service.ipc.framed_worker import answer_messages, give_way
from vitserve.service.log_format import set_up_logging

log = logging.getLogger(__name__)

IDLE_SECONDS = 60.0  # afterwards the process exits, so that its memory is free
MOST_DECODE_BYTES = 256 * 2**20  # that decoding an image may take


def main() -> None:
    bundle, process, log_level, log_format = sys.argv[2:6]
    set_up_logging(process, log_level, log_format)
    parent = give_way()
    preprocess.prepare_pillow()
    explainer = Explainer(open_bundle(Path(bundle)))
    answer_messages(
        int(sys.argv[1]), parent, IDLE_SECONDS, lambda message: explainer.answer(json.loads(message[0]), message[1])
    )


Map = tuple[dict[str, Any], Floats]  # method and what belongs to it, and the values, [rows, columns]


class Explainer:
    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._network: ExplainableNetwork | None = None
        try:
            self._network = ExplainableNetwork(bundle)
        except RuntimeError as error:  # of OpenVINO
            log.error("OpenVINO cannot run the graph: %s", error)
        self._identity = sha256(bundle.path / MANIFEST)

    def answer(self, options: dict[str, Any], encoded: bytes) -> list[bytes]:
        """A description in JSON, the map in float32, and the pixels. If it fails, the kind of the error and its text.

        ``options``: see options.py of the HTTP worker.
        """
        try:
            if options.get("identity", self._identity) != self._identity:
                raise NotExplainableError("the bundle has changed since the model was loaded; reload it first")
            image = preprocess.Decoder(self._bundle.manifest.preprocessing).open(encoded)
            if image.peak_bytes > MOST_DECODE_BYTES:
                raise preprocess.TooManyPixelsError(f"decoding the image takes up to {image.peak_bytes:,} bytes")
            pixels = image.pixels()
            if self._network is None:
                raise NotExplainableError("OpenVINO cannot run the graph of the network")
            description, grid = self._explain(self._network, options, pixels)
        except (preprocess.ImageError, NotExplainableError, IndexError) as error:
            return [type(error).__name__.encode(), str(error).encode()]
        description |= {"rows": grid.shape[0], "columns": grid.shape[1], "shape": pixels.shape}
        return [json.dumps(description).encode(), grid.astype(np.float32).tobytes(), pixels.tobytes()]

    def _explain(
        self, network: ExplainableNetwork, options: dict[str, Any], pixels: Pixels
    ) -> tuple[dict[str, Any], Floats]:
        method, layer, head = options["method"], options["layer"], options["head"]
        if method == "auto":
            try:
                return self._explain(network, options | {"method": "rollout"}, pixels)
            except NotExplainableError:
                return self._explain(network, options | {"method": "occlusion"}, pixels)
        if method == "occlusion":
            return self._occlusion(network, pixels, options["class"])
        attentions = network.attentions(pixels)
        grid = grid_of(pixels.shape[0], pixels.shape[1], attentions[0].shape[-1])
        layers, heads = len(attentions), len(attentions[0])
        layer = layers if layer is None else layer
        if not 1 <= layer <= layers:
            raise IndexError(f"layer is {layer}; the network has layers 1 to {layers}")
        if head is not None and not 1 <= head <= heads:
            raise IndexError(f"head_index is {head}; the layer has heads 1 to {heads}")
        if method == "rollout":
            row = rollout(attentions, grid[2])[layer - 1]
        else:
            row = attention_of(attentions[layer - 1], None if head is None else head - 1, grid[2])
        return {"method": method, "layer": layer, "layers": layers, "heads": heads}, on_grid(row, grid)

    def _occlusion(
        self, network: ExplainableNetwork, pixels: Pixels, index: int | None
    ) -> tuple[dict[str, Any], Floats]:
        labels = self._bundle.labels
        if not labels:
            raise NotExplainableError("the network has no classes, so covering a part of the image changes none")
        chosen = int(network.probabilities(pixels).argmax()) if index is None else index
        if not 0 <= chosen < len(labels):
            raise IndexError(f"class is {chosen}; the model has classes 0 to {len(labels) - 1}")
        description = {"method": "occlusion", "class": chosen, "label": labels[chosen]}
        return description, network.occlusion(pixels, chosen)
