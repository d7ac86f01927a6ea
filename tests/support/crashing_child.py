"""A child process that writes to its standard error as a native library does, and crashes."""

from __future__ import annotations

import os

from vitserve.service.supervisor.child_stderr import MOST_LINE_BYTES

os.write(2, b"x" * (MOST_LINE_BYTES + 100) + b"\nlast words")
os.abort()
