"""The libraries that decode images, in a process that decodes those of others."""

from __future__ import annotations

import contextlib
import ctypes
import warnings

from PIL import Image, _imaging

from vitserve.model.bundle.images.header import allowed_formats

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only


def prepare_pillow() -> None:
    """Configures Pillow for a process that decodes untrusted images with Decoder only. Applies to the whole process.

    Decoder replaces Pillow's own size limit. Messages of Pillow and libtiff about broken images are suppressed, because
    they would let any client write to the log. AVIF images are decoded by the thread that decode() is called in.
    """
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module="PIL")
    if "AVIF" in allowed_formats():
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    _silence_libtiff()


def _silence_libtiff() -> None:
    """libtiff writes to stderr by default. Pillow switches off its warnings, but not its errors."""
    with contextlib.suppress(AttributeError, OSError):  # Pillow was built without libtiff, or hides its symbols
        set_handler = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
        set_handler.argtypes, set_handler.restype = (ctypes.c_void_p,), ctypes.c_void_p
        set_handler(None)


def return_freed_memory() -> None:
    """glibc keeps freed blocks of up to 32 MiB, several for each thread: 1.6 GB after large images in 4 threads."""
    if _malloc_trim is not None:
        _malloc_trim(0)
