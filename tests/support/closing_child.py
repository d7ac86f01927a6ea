"""A child of the supervisor that closes its channel and exits a moment later, as one whose interpreter ends."""

from __future__ import annotations

import os
import threading

from vitserve.service.ipc.child_runtime import start_child
from vitserve.service.ipc.control_messages import StartHttpWorker

if __name__ == "__main__":
    start_child(StartHttpWorker)[0].close()
    threading.Timer(0.2, lambda: os._exit(3)).start()
