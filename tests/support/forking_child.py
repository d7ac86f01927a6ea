"""A child of the supervisor that forks, reports the fork's process id and exits. The fork keeps the channel open."""

from __future__ import annotations

import os
import signal

from vitserve.service.ipc.child_runtime import start_child
from vitserve.service.ipc.control_messages import Progress, StartHttpWorker

if __name__ == "__main__":
    channel = start_child(StartHttpWorker)[0]
    fork = os.fork()
    if fork == 0:
        signal.pause()
    channel.send(Progress(str(fork), None))
    os._exit(3)
