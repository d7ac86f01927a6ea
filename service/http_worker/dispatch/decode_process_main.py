"""A process that decodes one large image after another, for one thread of an HTTP worker.

python -m vitserve.service.http_worker.dispatch.decode_process_main <file descriptor of the connection> \\
    <process> <log_level> <log_format>

It may be killed at any time: nothing is shared with it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

from vitserve.model.bundle import preprocess
from vitserve.service.ipc.framed_worker import answer_messages, give_way
from vitserve.service.log_format import set_up_logging

IDLE_SECONDS = 30.0  # afterwards the process exits, so that its memory is free
NICENESS = 5  # small images of other clients go first
_SLACK_BYTES = 128 * 2**20  # address space beyond the estimate: the encoded image, the allocator's reserves


def main() -> None:
    process, log_level, log_format = sys.argv[2:5]
    set_up_logging(process, log_level, log_format)
    parent = give_way()
    os.nice(NICENESS)
    preprocess.prepare_pillow()
    answer_messages(int(sys.argv[1]), parent, IDLE_SECONDS, lambda message: decode(json.loads(message[0]), message[1]))


def decode(description: dict[str, object], encoded: bytes) -> list[bytes]:
    """The pixels, or the class name and the message of an error."""
    try:
        image = decoder_of(description).open(encoded)
        limit_address_space(image.peak_bytes + len(encoded))
        return [image.pixels().tobytes()]
    except preprocess.ImageError as error:
        return [type(error).__name__.encode(), str(error).encode()]


def decoder_of(description: dict[str, object]) -> preprocess.Decoder:
    preprocessing = description.pop("preprocessing")
    assert isinstance(preprocessing, dict)
    return preprocess.Decoder(preprocess.Preprocessing(**preprocessing), **description)  # type: ignore[arg-type]


def limit_address_space(more: int) -> None:
    """A decoder that took more memory than estimated would fail, and not the processes that serve."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2 * more + _SLACK_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    main()
