"""Gives this process the lowest priority before anything else is imported, which would delay inference."""

from __future__ import annotations

import contextlib
import os

with contextlib.suppress(OSError, AttributeError):  # Linux only
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))

from vitserve.service.explain_worker.main import main

main()
