"""JPEGs decoded and resized on the GPU, for where decode threads are the bottleneck: nvImageCodec and torch.

A batch is whatever waits when the device is free; one of those who wait runs it for all. What may be decoded at all is the Decoder's to say, and whatever is
not a plain JPEG, or fails here, is the Decoder's to decode: so refusals are the same, and pixels within DIFFERENCE of its own.
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
from vitserve.model.bundle.preprocess import Decoder, Header

log = logging.getLogger(__name__)

MOST_AT_ONCE = 64
MOST_PIXELS_AT_ONCE = 64_000_000  # of a batch: five times as many bytes, twice over, for a moment
MOST_PIXELS = 8_000_000  # of an image; the Decoder decodes larger ones at a reduced scale, which is quick
FAILURES = 3  # batches in a row, after which the device is left alone
# Without it nvJPEG repeats chroma where libjpeg interpolates it: 0.7 levels in the mean at 224 pixels, measured with nvImageCodec's decoder for the CPU.
OPTIONS = ":fancy_upsampling=1"
# Levels of 255, mean of an image and greatest of a pixel: Pillow rounds and clips between its two passes, and the device once at the end.
DIFFERENCE = (0.5, 16.0)
_MODES = {"bilinear": "bilinear", "bicubic": "bicubic"}


class DecoderRejectedError(RuntimeError):
    """The device does not decode as the Decoder does; the message says by how much."""


@dataclass
class _Job:
    encoded: bytes
    header: Header
    pixels: Pixels | None = None
    done: bool = False


class GpuDecoder:
    """As a Decoder, for threads that wait: the more of them, the larger the batches."""

    def __init__(self, decoder: Decoder, device: str = "cuda") -> None:
        """``device`` may be "cpu", where nvImageCodec's own decoders for the CPU and torch's kernels do the same. Raises Unproven."""
        self.decoder, self._device = decoder, torch.device(device)
        on_cpu = self._device.type == "cpu"
        # Left to choose on a GPU, nvImageCodec gives the hardware decoder its share of a batch, and is slower for it (docs/gpu.md).
        backends = [
            nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY if on_cpu else nvimgcodec.BackendKind.HYBRID_CPU_GPU)
        ]
        self._codec = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY if on_cpu else 0, backends=backends, options=OPTIONS
        )
        self._parameters = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)
        self._waiting: deque[_Job] = deque()
        self._free = threading.Lock()  # the device's
        self._failures = 0  # in a row
        self._prove()

    def decode(self, encoded: bytes | memoryview) -> Pixels:
        """Raises ImageError."""
        header = self.decoder.header(encoded)
        if self._failures >= FAILURES or not self._takes(header, encoded):
            return self.decoder.decode(encoded)
        job = _Job(bytes(encoded), header)
        self._waiting.append(job)
        while not job.done:
            with self._free:
                if not job.done:
                    self._run(self._next())
        return self.decoder.decode(encoded) if job.pixels is None else job.pixels

    def _takes(self, header: Header, encoded: bytes | memoryview) -> bool:
        """Upright, in color, of a size that is worth it, and whole: a device may fill up what is missing, where the Decoder rejects."""
        plain = header.format == "JPEG" and header.mode == "RGB" and header.orientation == 1
        whole = bytes(encoded[-64:]).rstrip(b"\0").endswith(b"\xff\xd9")
        return plain and whole and header.pixels <= MOST_PIXELS and self.decoder.preprocessing.interpolation in _MODES

    def _next(self) -> list[_Job]:
        """The device is held."""
        jobs, pixels = list[_Job](), 0
        while (
            self._waiting
            and len(jobs) < MOST_AT_ONCE
            and (not jobs or pixels + self._waiting[0].header.pixels <= MOST_PIXELS_AT_ONCE)
        ):
            jobs.append(self._waiting.popleft())
            pixels += jobs[-1].header.pixels
        return jobs

    def _run(self, jobs: list[_Job]) -> None:
        """Whatever fails, every job is done afterwards, and what has no pixels then is decoded on the CPU."""
        try:
            decoded = self._codec.decode([job.encoded for job in jobs], params=self._parameters)
            made = [
                (job, self._resized(image, job.header))
                for job, image in zip(jobs, decoded, strict=True)
                if image is not None
            ]
            if made:
                arrays = torch.stack([pixels for _, pixels in made]).cpu().numpy()
                for (job, _), pixels in zip(made, arrays, strict=True):
                    job.pixels = pixels
            self._failures = 0
        except Exception:  # of CUDA, torch or nvImageCodec
            self._failures += 1
            if self._failures in (
                1,
                FAILURES,
            ):  # an outage is logged when it begins, and when it is taken to be for good
                log.warning(
                    "images could not be decoded on the GPU%s",
                    ", which is left alone" if self._failures == FAILURES else "",
                    exc_info=True,
                )
        finally:
            for job in jobs:
                job.done = True

    def _resized(self, image: Any, header: Header) -> torch.Tensor:
        """[side, side, 3]"""
        stored = (
            torch.from_numpy(np.asarray(image))
            if self._device.type == "cpu"
            else torch.as_tensor(image, device=self._device)
        )
        wide, high = header.wanted
        planes = stored.permute(2, 0, 1)[None].float()
        if (stored.shape[1], stored.shape[0]) != header.wanted:
            mode = _MODES[self.decoder.preprocessing.interpolation]
            planes = torch.nn.functional.interpolate(
                planes, (high, wide), mode=mode, antialias=True, align_corners=False
            )
        left, top, side = self.decoder.preprocessing.cropped(wide, high)
        square = planes[0, :, top : top + side, left : left + side]
        return square.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)

    def _prove(self) -> None:
        """On pictures made here, larger and smaller than the model's, upright and wide."""
        exact, random = (
            Decoder(self.decoder.preprocessing, self.decoder.max_pixels, jpeg_draft=False),
            np.random.default_rng(0),
        )
        for wide, high in ((640, 427), (333, 500), (97, 64), (1200, 900)):
            coarse = Image.fromarray(random.integers(0, 256, (high // 16 + 1, wide // 16 + 1, 3), np.uint8))
            file = io.BytesIO()
            coarse.resize((wide, high), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            job = _Job(file.getvalue(), exact.header(file.getvalue()))
            self._run([job])
            if job.pixels is None:
                raise DecoderRejectedError("the GPU decodes no JPEG; the log says why")
            difference = np.abs(job.pixels.astype(np.int16) - exact.decode(job.encoded))
            if difference.mean() > DIFFERENCE[0] or difference.max() > DIFFERENCE[1]:
                found = f"{difference.mean():.2f} levels in the mean and {difference.max()} at most"
                raise DecoderRejectedError(
                    f"the GPU's pixels of a picture of {wide} × {high} differ by {found}; {DIFFERENCE[0]} and {DIFFERENCE[1]:.0f} are allowed"
                )
