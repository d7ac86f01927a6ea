"""torch as an engine: with CUDA graphs on a GPU, or on the CPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitserve.model.arrays import Outputs, Pixels, Precision
from vitserve.service import machine
from vitserve.service.engines.engine import EngineUnavailableError, select_rows
from vitserve.service.engines.torch import fp8
from vitserve.service.engines.torch.interpreter import TorchGraph

if TYPE_CHECKING:
    from vitserve.service.engines.cuda.batching import Buffers, GpuEngine

TYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,  # beside the products that the graph quantizes
}
_ATTENTION = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def open_torch(
    graph: Path, precision: Precision, streams: int, threads: int, max_batch: int, *, compiled: bool = False
) -> TorchEngine | GpuEngine:
    """Uses the GPU if torch sees one. With ``compiled``, torch.compile runs for each batch size and takes minutes.

    Raises EngineUnavailableError.
    """
    if precision not in TYPES:
        raise EngineUnavailableError(f"torch does not support {precision}; it supports {', '.join(TYPES)}")
    on_gpu = torch.cuda.is_available()
    if machine.gpus() and not on_gpu:
        raise EngineUnavailableError(
            "this machine has a GPU, but torch cannot use it: it was built without CUDA or for another driver"
        )
    if on_gpu and precision == "fp8":
        fp8.check_device()
    network = TorchGraph(graph, TYPES[precision]).eval()
    if not on_gpu:
        return TorchEngine(network, precision, streams, threads, max_batch, compiled=compiled)
    return _on_gpu(network.cuda(), precision, streams, max_batch, compiled=compiled)


class TorchEngine:
    """torch on the CPU. All streams use one network."""

    name = "torch"

    def __init__(
        self, network: TorchGraph, precision: Precision, streams: int, threads: int, max_batch: int, *, compiled: bool
    ) -> None:
        self.precision, self.streams, self.max_batch = precision, streams, max_batch
        torch.set_num_threads(threads)  # for each thread that runs a stream
        self._network = torch.compile(network, dynamic=True) if compiled else network

    def share(self, pixels: Pixels) -> None:
        """Does nothing: the CPU reads the slot table directly."""

    def run(self, stream: int, pixels: Pixels, rows: Sequence[int] | None = None) -> Outputs:
        with torch.inference_mode():
            logits, embedding = self._network(torch.from_numpy(select_rows(pixels, rows)))
        return Outputs(logits.numpy(), embedding.numpy())

    def close(self) -> None:
        del self._network


def _on_gpu(network: TorchGraph, precision: Precision, streams: int, max_batch: int, *, compiled: bool) -> GpuEngine:
    from vitserve.service.engines.cuda.batching import Buffers, GpuEngine, candidate_sizes

    class TorchCudaEngine(GpuEngine):
        name = "torch"

    shape, sizes = network.image_shape, candidate_sizes(max_batch)
    with torch.inference_mode():
        logits, embedding = network(torch.zeros(1, *shape, dtype=torch.uint8, device="cuda"))
    backend = fastest_attention(network, torch.zeros(max_batch, *shape, dtype=torch.uint8, device="cuda"))
    runnable = _compiled(network, len(sizes)) if compiled else network
    return TorchCudaEngine(
        precision,
        streams,
        max_batch,
        sizes,
        lambda: Buffers(shape, logits.shape[1], embedding.shape[1], max_batch),
        lambda buffers: _Program(runnable, buffers, backend, max_batch),
    )


def _compiled(network: TorchGraph, size_count: int) -> Any:
    """One compilation per batch size. Beyond its limit torch would silently run the network uncompiled."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, size_count + 1)
    return torch.compile(network, dynamic=False)


def fastest_attention(network: TorchGraph, pixels: torch.Tensor) -> SDPBackend:
    """The fastest of torch's attention kernels, by measurement. Kernels that cannot run the network are skipped."""
    seconds = dict[SDPBackend, float]()
    for backend in _ATTENTION:
        try:
            with torch.inference_mode(), sdpa_kernel([backend]):
                for _ in range(3):  # the last one counts: the first initializes the kernels
                    started = time.monotonic()
                    network(pixels)[0].cpu()
                    seconds[backend] = time.monotonic() - started
        except RuntimeError:  # "No available kernel"
            continue
    return min(seconds, key=lambda backend: seconds[backend])


class _DeviceArray:
    """Device memory for torch to read: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html."""

    def __init__(self, address: int, shape: tuple[int, ...], kind: str) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": shape, "typestr": kind, "version": 3}


class _Program:
    """One CUDA graph per batch size. They share one memory pool, because one of them runs at a time."""

    def __init__(self, network: Any, buffers: Buffers, backend: SDPBackend, max_batch: int) -> None:
        self._network, self._buffers, self._backend = network, buffers, backend
        self._stream = torch.cuda.ExternalStream(buffers.stream.handle)  # type: ignore[no-untyped-call]
        self._pixels = torch.as_tensor(
            _DeviceArray(buffers.pixels.address, (max_batch, *buffers.image_shape), "|u1"), device="cuda"
        )
        self._outputs = {
            name: torch.as_tensor(_DeviceArray(memory.address, buffers.host[name].array.shape, "<f4"), device="cuda")
            for name, memory in buffers.device.items()
        }
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs = dict[int, torch.cuda.CUDAGraph]()

    def prepare(self, size: int) -> None:
        with torch.inference_mode(), sdpa_kernel([self._backend]):
            with torch.cuda.stream(self._stream):
                self._run(size)  # outside the graph: the libraries' initialization cannot be captured
            self._buffers.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                self._run(size)
        self._graphs[size] = graph

    def _run(self, size: int) -> None:
        for name, values in zip(("logits", "embedding"), self._network(self._pixels[:size]), strict=True):
            self._outputs[name][:size].copy_(values)

    def enqueue(self, size: int) -> None:
        with torch.cuda.stream(self._stream):
            self._graphs[size].replay()
        self._buffers.read(size)

    def forget(self, size: int) -> None:
        del self._graphs[size]

    def close(self) -> None:
        self._graphs.clear()
