"""Keeps OpenVINO and NNCF from reporting their use."""

from __future__ import annotations

import sys


def disable_telemetry() -> None:
    """Call this before every import of openvino or nncf.

    Both send usage data from a fork of the importing process. In an engine worker that fork has deadlocked and kept the
    control channel open, so that the supervisor could not stop. Without the module ``openvino_telemetry`` they send
    nothing.
    """
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
