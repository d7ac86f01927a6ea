"""A child of the supervisor in which a library forks: it says so, and ends; the fork holds its channel and lives on. Run by test_processes.py."""

from __future__ import annotations

import os
import signal

from vitserve.service.ipc.control_channel import start_child

channel, _, _ = start_child()
fork = os.fork()
if fork == 0:
    signal.pause()
channel.send({"kind": "forked", "pid": fork})
os._exit(3)
