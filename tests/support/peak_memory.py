"""A program for tests: decodes images and prints, for each, the peak of the memory, the estimate, and the outcome.

python -m tests.support.peak_memory MAX_PIXELS FILE... writes a JSON list with one entry per file.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

from tests.support.images import encoded, random_image
from vitserve.model.bundle.preprocess import Decoder, ImageError, Preprocessing, prepare_pillow

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


def status(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(decoder: Decoder, image: bytes) -> dict[str, object]:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before = status("VmRSS")
    estimate, error = 0, ""
    try:
        opened = decoder.open(image)
        estimate = opened.peak_bytes
        opened.pixels()
    except ImageError as raised:
        error = type(raised).__name__
    return {"peak": status("VmHWM") - before, "estimate": estimate, "error": error}


def main(max_pixels: str, *files: str) -> None:
    prepare_pillow()
    decoder = Decoder(Preprocessing(224, 0.875), int(max_pixels), mode="exact")
    for kind in FORMATS:  # loads the libraries
        decoder.decode(encoded(random_image(), kind))
    sys.stdout.write(json.dumps([measure(decoder, Path(file).read_bytes()) for file in files]))


if __name__ == "__main__":
    main(*sys.argv[1:])
