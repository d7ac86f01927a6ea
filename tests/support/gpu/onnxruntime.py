"""A double of ONNX Runtime's CUDA provider: ONNX Runtime itself computes on the CPU when the stream runs."""

from __future__ import annotations

import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from tests.support.gpu.cuda import Device


class Binding:
    """ONNX Runtime's own IOBinding, with memory of the GPU double."""

    def __init__(self, session: Any, device: Device) -> None:
        self.real, self._device = session.io_binding(), device

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Any, buffer_ptr: int
    ) -> None:
        self._check(device_type, device_id, element_type, shape, buffer_ptr)
        self.real.bind_input(name, "cpu", 0, element_type, shape, buffer_ptr)

    def bind_output(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Any, buffer_ptr: int
    ) -> None:
        self._check(device_type, device_id, element_type, shape, buffer_ptr)
        self.real.bind_output(name, "cpu", 0, element_type, shape, buffer_ptr)

    def _check(self, device_type: str, device_id: int, element_type: Any, shape: Any, buffer_ptr: int) -> None:
        assert (device_type, device_id) == ("cuda", 0)
        assert np.prod(shape) * np.dtype(element_type).itemsize <= len(self._device.allocated[buffer_ptr]), (
            "the binding exceeds the allocated memory"
        )


def onnxruntime_of(device: Device, *, unplaced: str = "", loads: bool = True) -> types.ModuleType:
    """The module ``onnxruntime`` with a CUDA provider for ``device``.

    ``unplaced`` is an operator without a GPU kernel. Without ``loads`` the CUDA libraries are missing.
    """

    class InferenceSession:
        def __init__(
            self, path: Path, sess_options: Any, providers: list[tuple[str, dict[str, str]]], enable_fallback: int
        ) -> None:
            ((name, self._options),) = providers
            assert (name, enable_fallback) == ("CUDAExecutionProvider", 0)
            assert sess_options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
            nodes = onnx.load(path, load_external_data=False).graph.node
            if not loads or any(node.op_type == unplaced for node in nodes):
                raise RuntimeError(
                    "This session contains graph nodes that are assigned to the default CPU EP, "
                    "but fallback to CPU EP has been disabled"
                )
            self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            self._thread: int | None = None

        def io_binding(self) -> Binding:
            return Binding(self._session, device)

        def run_with_iobinding(self, iobinding: Binding, run_options: Any) -> None:
            assert run_options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
            assert run_options.get_run_config_entry("gpu_graph_id")
            self._thread = self._thread or threading.get_ident()
            assert self._thread == threading.get_ident(), "a second thread would capture the graphs again"
            if device.lost:
                raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")
            stream = int(self._options["user_compute_stream"])
            device.enqueue(stream, lambda: self._session.run_with_iobinding(iobinding.real))

    module = types.ModuleType("onnxruntime")
    vars(module).update(
        SessionOptions=onnxruntime.SessionOptions,
        RunOptions=onnxruntime.RunOptions,
        IOBinding=Binding,
        InferenceSession=InferenceSession,
        preload_dlls=lambda: None,
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    return module
