"""Chooses the image decoder: Pillow on the CPU, or the GPU if it is enabled and its check passes."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from dataclasses import dataclass
from typing import Protocol, cast

from vitserve.model.arrays import Pixels
from vitserve.model.bundle.preprocess import DecodeMode, Decoder, ImageError, Preprocessing
from vitserve.service import errors
from vitserve.service.settings import Settings

log = logging.getLogger(__name__)


class OpenedImage(Protocol):
    """An image whose header was read."""

    @property
    def seconds(self) -> float:
        """An estimate of the time that pixels() takes on one core."""

    @property
    def peak_bytes(self) -> int:
        """An upper bound of the memory that pixels() takes."""

    def pixels(self) -> Pixels:
        """uint8 [height, width, channels]. Raises ImageError."""
        ...


@dataclass(frozen=True, slots=True)
class PixelImage:
    """Pixels that the client has prepared. They need no decoding."""

    array: Pixels  # [height, width, channels]

    seconds = 0.0
    peak_bytes = 0

    def pixels(self) -> Pixels:
        return self.array


class ImageDecoder(Protocol):
    @property
    def on_cpu(self) -> Decoder:
        """Gives the same pixels, as far as they are defined."""

    def open(self, encoded: bytes) -> OpenedImage:
        """Reads the header. Raises ImageError."""
        ...


def preload(settings: Settings) -> None:
    """Imports the GPU decoder, which takes seconds, before the first request. decoder_for() reports any failure."""
    if settings.decode == "gpu":
        with contextlib.suppress(Exception):
            importlib.import_module("vitserve.service.http_worker.dispatch.gpu_decoder")


def decoder_for(preprocessing: Preprocessing, settings: Settings) -> ImageDecoder:
    decoder = Decoder(preprocessing, settings.max_image_pixels, cast(DecodeMode, settings.decode_mode))
    return _gpu_decoder(decoder) if settings.decode == "gpu" else decoder


def open_image(decoder: ImageDecoder, encoded: bytes) -> OpenedImage | errors.ServiceError:
    """The error to respond with if that fails."""
    try:
        return decoder.open(encoded)
    except Exception as error:
        return response_error(error)


def decode_into(pixels: Pixels, slot: int, image: OpenedImage | errors.ServiceError) -> errors.ServiceError | None:
    """Writes the decoded image to ``pixels[slot]``. Returns the error to respond with if that fails."""
    if isinstance(image, errors.ServiceError):
        return image
    try:
        array = image.pixels()
        if array.shape != pixels.shape[1:]:  # numpy would repeat an image of one row or channel
            return errors.UnsupportedImageError(
                f"the pixels have shape {array.shape}; the model has {pixels.shape[1:]}"
            )
        pixels[slot] = array
    except Exception as error:
        return response_error(error)
    return None


def response_error(error: Exception) -> errors.ServiceError:
    """An unexpected error is reported too: the client would otherwise wait until its deadline."""
    if isinstance(error, ImageError):
        return errors.from_image_error(error)
    log.error("unexpected error while decoding an image", exc_info=error)
    return errors.ServiceError("the image could not be decoded")


@functools.lru_cache(maxsize=2)  # a reload with the same preprocessing reuses the decoder
def _gpu_decoder(decoder: Decoder) -> ImageDecoder:
    """The CPU decoder, with an error in the log, if the GPU decoder cannot be used."""
    try:
        from vitserve.service.http_worker.dispatch.gpu_decoder import GpuDecoder

        return GpuDecoder(decoder)
    except ImportError as error:
        log.error("images are decoded on the CPU: %s: pip install 'vitserve[gpu-decode]'", error)
    except Exception as error:  # of CUDA, torch or nvImageCodec
        log.error("images are decoded on the CPU: %s", error)
    return decoder
