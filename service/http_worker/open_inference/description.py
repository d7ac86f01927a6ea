"""Descriptions of the server and its model in the Open Inference Protocol, and in Triton's extensions of it.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/extension_model_configuration.html
https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/extension_statistics.html
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import Metric

from vitserve import __version__
from vitserve.service import errors
from vitserve.service.http_worker.dispatch.dispatcher import Dispatcher
from vitserve.service.http_worker.open_inference.infer import output_names
from vitserve.service.ipc.model_info import ModelInfo

EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "statistics"]
# Stage in Triton's statistics → our histogram.
_STAGES = {
    "queue": "vitserve_queue_seconds",
    "compute_input": "vitserve_decode_seconds",
    "compute_infer": "vitserve_inference_seconds",
}


def check_model(info: ModelInfo, name: str, version: str) -> None:
    """``version``: empty for any. Raises NotFoundError unless this model is served."""
    if name != info.name or version not in ("", info.version):
        wanted = f"{name}, version {version}" if version else name
        raise errors.NotFoundError(f"unknown model {wanted[:200]!r}; served: {info.name!r}, version {info.version}")


def server() -> dict[str, Any]:
    return {"name": "vitserve", "version": __version__, "extensions": EXTENSIONS}


def model(dispatcher: Dispatcher) -> dict[str, Any]:
    info = dispatcher.model_info
    return {
        "name": info.name,
        "versions": [info.version],
        "platform": f"{info.engine}_{info.precision}",
        "inputs": [
            {"name": "image", "datatype": "BYTES", "shape": [-1, 1]},
            {"name": "pixels", "datatype": "UINT8", "shape": [-1, *info.preprocessing.shape]},
        ],
        "outputs": [{"name": name, "datatype": "FP32", "shape": [-1, size]} for name, size in _sizes(dispatcher)],
    }


def index(dispatcher: Dispatcher) -> list[dict[str, str]]:
    info = dispatcher.model_info
    return [{"name": info.name, "version": info.version, "state": "READY", "reason": ""}]


def configuration(dispatcher: Dispatcher, max_images: int) -> dict[str, Any]:
    """Without the dimension of the batch, as ``max_batch_size`` above 0 requires. A request has one of the inputs."""
    info = dispatcher.model_info
    inputs = ("image", "TYPE_STRING", [1]), ("pixels", "TYPE_UINT8", list(info.preprocessing.shape))
    return {
        "name": info.name,
        "platform": f"{info.engine}_{info.precision}",
        "backend": info.engine,
        "max_batch_size": max_images,
        "input": [{"name": name, "data_type": kind, "dims": dims, "optional": True} for name, kind, dims in inputs],
        "output": [
            {"name": name, "data_type": "TYPE_FP32", "dims": [size], "label_filename": ""}
            for name, size in _sizes(dispatcher)
        ],
        "dynamic_batching": {"preferred_batch_size": [dispatcher.slot_table.measured(0)["preferred_batch_size"]]},
    }


def statistics(dispatcher: Dispatcher, metrics: Iterable[Metric]) -> dict[str, Any]:
    """Of all processes since the service started, with any route. Durations are in nanoseconds."""
    samples = {}
    images = {"ok": 0, "other": 0}
    for metric in metrics:
        for sample in metric.samples:
            if sample.name.endswith(("_sum", "_count")) and not sample.labels:
                samples[sample.name] = sample.value
            elif sample.name == "vitserve_images_total":
                images["ok" if sample.labels["outcome"] == "ok" else "other"] += int(sample.value)

    def duration(histogram: str) -> dict[str, int]:
        count, seconds = samples.get(f"{histogram}_count", 0), samples.get(f"{histogram}_sum", 0.0)
        return {"count": int(count), "ns": round(seconds * 1e9)}

    stages = {stage: duration(histogram) for stage, histogram in _STAGES.items()}
    nothing = {"count": 0, "ns": 0}
    total = sum(stage["ns"] for stage in stages.values())
    return {
        "name": dispatcher.model_info.name,
        "version": dispatcher.model_info.version,
        "last_inference": 0,
        "inference_count": images["ok"],
        "execution_count": stages["compute_infer"]["count"],
        "inference_stats": {
            "success": {"count": images["ok"], "ns": total},
            "fail": {"count": images["other"], "ns": 0},
            **stages,
            "compute_output": nothing,
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": [],
    }


def _sizes(dispatcher: Dispatcher) -> list[tuple[str, int]]:
    shape = dispatcher.slot_table.shape
    sizes = {"probabilities": shape.classes, "logits": shape.classes, "embedding": shape.embedding}
    return [(name, sizes[name]) for name in output_names(dispatcher.model_info)]
