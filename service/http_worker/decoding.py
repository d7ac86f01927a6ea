"""Chooses what decodes images: Pillow on the CPU, or the GPU where that is asked for and verified. The only place that knows both."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from typing import Protocol

from vitserve.model.arrays import Pixels
from vitserve.model.bundle.preprocess import Decoder, Preprocessing
from vitserve.service.settings import Settings

log = logging.getLogger(__name__)


class Decodes(Protocol):
    def decode(self, encoded: bytes | memoryview) -> Pixels:
        """uint8 [image size, image size, 3]. Raises ImageError."""
        ...


def preload(settings: Settings) -> None:
    """Imports what takes seconds, before anybody waits for this process to answer. Whether it can be used is seen and said later."""
    if settings.decode == "gpu":
        with contextlib.suppress(Exception):
            importlib.import_module("vitserve.service.http_worker.gpu_decoder")


def decoder_for(preprocessing: Preprocessing, settings: Settings) -> Decodes:
    decoder = Decoder(preprocessing, settings.max_image_pixels, settings.jpeg_draft)
    return _on_gpu(decoder) if settings.decode == "gpu" else decoder


@functools.lru_cache(maxsize=2)  # a model that is opened again finds the device as it was
def _on_gpu(decoder: Decoder) -> Decodes:
    try:
        from vitserve.service.http_worker.gpu_decoder import GpuDecoder

        return GpuDecoder(decoder)
    except ImportError as error:
        log.error("images are decoded on the CPU: %s: pip install 'vitserve[gpu-decode]'", error)
    except Exception as error:  # of CUDA, torch or nvImageCodec
        log.error("images are decoded on the CPU: %s", error)
    return decoder
