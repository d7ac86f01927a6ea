"""Decodes and resizes JPEGs on the GPU with nvImageCodec and torch, for servers that are limited by decoding.

While the device works on one batch, the next images queue; one of the waiting threads then decodes them as a batch.
The CPU decoder validates every image, and decodes those that are not plain JPEGs or fail on the device. So the same
images are rejected, and pixels differ from the CPU decoder's by at most MAX_DIFFERENCE.
"""

from __future__ import annotations

import io
import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia import nvimgcodec
from PIL import Image

from vitserve.model.arrays import Pixels
from vitserve.model.bundle.preprocess import Decoder, Header, OpenedImage

log = logging.getLogger(__name__)

MAX_BATCH = 64
MAX_BATCH_PIXELS = 64_000_000  # needs about ten times as many bytes of device memory
MAX_IMAGE_PIXELS = 8_000_000  # the CPU decoder decodes larger images at a reduced scale, which is fast
MAX_FAILURES = 3  # consecutive failed batches, after which the device is not used again
# Without this option, nvJPEG repeats chroma samples where libjpeg interpolates them: a mean difference of 0.7 levels at
# 224 pixels, measured with nvImageCodec's CPU decoder.
OPTIONS = ":fancy_upsampling=1"
# Levels of 255: mean of an image, maximum of a pixel. Pillow rounds and clips between its two resizing passes, the
# device once at the end.
MAX_DIFFERENCE = (0.5, 16.0)
_INTERPOLATION_MODES = {"bilinear": "bilinear", "bicubic": "bicubic"}
_BATCH_SECONDS = 0.002  # that a thread waits for the device at least: too long for the event loop


class DecoderRejectedError(RuntimeError):
    """The device's pixels differ too much from the CPU decoder's. The message has the difference."""


@dataclass
class _Job:
    encoded: bytes
    header: Header
    pixels: Pixels | None = None
    done: bool = False


@dataclass(frozen=True)
class _DeviceImage:
    """An image that the device decodes."""

    decoder: GpuDecoder
    encoded: bytes
    opened: OpenedImage

    seconds = _BATCH_SECONDS

    @property
    def peak_bytes(self) -> int:
        return len(self.encoded)  # the pixels are in the device's memory

    def pixels(self) -> Pixels:
        return self.decoder.run(self)


class GpuDecoder:
    """Same interface as Decoder. Threads that call decode() at the same time share a batch."""

    def __init__(self, decoder: Decoder, device: str = "cuda") -> None:
        """``device`` "cpu" runs the same code with nvImageCodec's CPU decoders. Raises DecoderRejectedError."""
        self.decoder, self._device = decoder, torch.device(device)
        on_cpu = self._device.type == "cpu"
        # By default, nvImageCodec gives a part of each batch to the hardware decoder, which is slower (docs/gpu.md).
        backend = nvimgcodec.BackendKind.CPU_ONLY if on_cpu else nvimgcodec.BackendKind.HYBRID_CPU_GPU
        self._codec = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY if on_cpu else 0,
            backends=[nvimgcodec.Backend(backend)],
            options=OPTIONS,
        )
        self._parameters = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)
        self._waiting: deque[_Job] = deque()
        self._device_lock = threading.Lock()
        self._failures = 0  # consecutive failed batches
        self._check()

    @property
    def on_cpu(self) -> Decoder:
        return self.decoder

    def open(self, encoded: bytes) -> OpenedImage | _DeviceImage:
        """Reads the header. Raises ImageError."""
        opened = self.decoder.open(encoded)
        if self._failures >= MAX_FAILURES or not self._supports(opened.header, encoded):
            return opened
        return _DeviceImage(self, encoded, opened)

    def decode(self, encoded: bytes) -> Pixels:
        """Raises ImageError."""
        return self.open(encoded).pixels()

    def run(self, image: _DeviceImage) -> Pixels:
        """Waits for the device. Raises ImageError."""
        job = _Job(image.encoded, image.opened.header)
        self._waiting.append(job)
        while not job.done:
            with self._device_lock:
                if not job.done:
                    self._run(self._next_batch())
        return image.opened.pixels() if job.pixels is None else job.pixels

    def _supports(self, header: Header, encoded: bytes) -> bool:
        """Upright color JPEGs of moderate size that are complete: the device may fill in data that is missing."""
        plain = header.format == "JPEG" and header.mode == "RGB" and header.orientation == 1
        complete = encoded[-64:].rstrip(b"\0").endswith(b"\xff\xd9")
        interpolation = self.decoder.preprocessing.interpolation
        return plain and complete and header.pixels <= MAX_IMAGE_PIXELS and interpolation in _INTERPOLATION_MODES

    def _next_batch(self) -> list[_Job]:
        """Requires the device lock."""
        jobs, pixels = list[_Job](), 0
        while (
            self._waiting
            and len(jobs) < MAX_BATCH
            and (not jobs or pixels + self._waiting[0].header.pixels <= MAX_BATCH_PIXELS)
        ):
            jobs.append(self._waiting.popleft())
            pixels += jobs[-1].header.pixels
        return jobs

    def _run(self, jobs: list[_Job]) -> None:
        """Marks every job as done, also after a failure. The CPU decodes the jobs that have no pixels then."""
        try:
            images = self._codec.decode([job.encoded for job in jobs], params=self._parameters)
            decoded = [(job, image) for job, image in zip(jobs, images, strict=True) if image is not None]
            if decoded:
                resized = [self._resized(image, job.header) for job, image in decoded]
                for (job, _), pixels in zip(decoded, torch.stack(resized).cpu().numpy(), strict=True):
                    job.pixels = pixels
            self._failures = 0
        except Exception:  # of CUDA, torch or nvImageCodec
            self._failures += 1
            if self._failures in (1, MAX_FAILURES):  # logged when an outage starts, and when it becomes permanent
                consequence = "; the GPU is not used again" if self._failures == MAX_FAILURES else ""
                log.warning("failed to decode images on the GPU%s", consequence, exc_info=True)
        finally:
            for job in jobs:
                job.done = True

    def _resized(self, image: Any, header: Header) -> torch.Tensor:
        """uint8 [side, side, 3]"""
        if self._device.type == "cpu":
            stored = torch.from_numpy(np.asarray(image))
        else:
            stored = torch.as_tensor(image, device=self._device)
        width, height = header.wanted
        planes = stored.permute(2, 0, 1)[None].float()  # [1, 3, height, width]
        if (stored.shape[1], stored.shape[0]) != header.wanted:
            mode = _INTERPOLATION_MODES[self.decoder.preprocessing.interpolation]
            planes = torch.nn.functional.interpolate(
                planes, (height, width), mode=mode, antialias=True, align_corners=False
            )
        left, top, wide, high = self.decoder.preprocessing.cropped(width, height)
        cropped = planes[0, :, top : top + high, left : left + wide]
        return cropped.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)

    def _check(self) -> None:
        """Compares generated images, larger and smaller than the model's input, with the CPU decoder."""
        exact = Decoder(self.decoder.preprocessing, self.decoder.max_pixels, mode="exact")
        generator = np.random.default_rng(0)
        for width, height in ((640, 427), (333, 500), (97, 64), (1200, 900)):
            coarse = Image.fromarray(generator.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8))
            file = io.BytesIO()
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            job = _Job(file.getvalue(), exact.header(file.getvalue()))
            self._run([job])
            if job.pixels is None:
                raise DecoderRejectedError("the GPU cannot decode JPEGs; the log has the error")
            difference = np.abs(job.pixels.astype(np.int16) - exact.decode(job.encoded))
            mean, maximum = float(difference.mean()), int(difference.max())
            if mean > MAX_DIFFERENCE[0] or maximum > MAX_DIFFERENCE[1]:
                raise DecoderRejectedError(
                    f"GPU pixels of an image of {width} × {height} differ by {mean:.2f} levels on average "
                    f"and {maximum} at most; allowed are {MAX_DIFFERENCE[0]} and {MAX_DIFFERENCE[1]:.0f}"
                )
