"""The GPU decoder, run with nvImageCodec's CPU decoders and torch on the CPU."""

from __future__ import annotations

import io
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.http import post_jpeg
from tests.support.images import encoded, random_image
from tests.support.server import start_server
from tests.support.waiting import eventually
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.preprocess import (
    DamagedImageError,
    Decoder,
    Interpolation,
    NotAnImageError,
    Preprocessing,
    TooManyPixelsError,
)
from vitserve.service.http_worker.dispatch.decoding import decoder_for
from vitserve.service.settings import Settings

pytest.importorskip("nvidia.nvimgcodec", reason="nvidia-nvimgcodec is not installed")

from vitserve.service.http_worker.dispatch.gpu_decoder import MAX_DIFFERENCE, DecoderRejectedError, GpuDecoder

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")


@pytest.fixture(scope="module")
def gpu() -> GpuDecoder:
    return GpuDecoder(Decoder(Preprocessing(32), mode="exact"), "cpu")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "crop"), [(32, 1.0), (224, 0.9)])
def test_photos_are_within_the_documented_difference(
    size: int, crop: float, interpolation: Interpolation, photos: list[Path]
) -> None:
    exact = Decoder(Preprocessing(size, crop, interpolation), mode="exact")
    decoder = GpuDecoder(exact, "cpu")
    for photo in photos:
        difference = np.abs(decoder.decode(photo.read_bytes()).astype(int) - exact.decode(photo.read_bytes()))
        assert difference.mean() <= MAX_DIFFERENCE[0], photo
        assert difference.max() <= MAX_DIFFERENCE[1], photo


def test_waiting_images_are_decoded_as_one_batch(gpu: GpuDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [encoded(random_image(60, 40, seed), "JPEG") for seed in range(24)]
    alone = [gpu.decode(image) for image in images]
    sizes, started, release = list[int](), threading.Event(), threading.Event()
    run = gpu._run

    def blocked(jobs: list[Any]) -> None:
        sizes.append(len(jobs))
        if not started.is_set():
            started.set()
            assert release.wait(60)
        run(jobs)

    monkeypatch.setattr(gpu, "_run", blocked)
    with ThreadPoolExecutor(len(images)) as threads:
        results = [threads.submit(gpu.decode, images[0])]
        assert started.wait(60)
        results += [threads.submit(gpu.decode, image) for image in images[1:]]
        eventually(lambda: len(gpu._waiting) == len(images) - 1, "all other images are waiting")
        release.set()
        assert all(np.array_equal(result.result(60), expected) for result, expected in zip(results, alone, strict=True))
    assert sizes == [1, 23]


@pytest.mark.parametrize("kind", ["PNG", "rotated", "gray", "CMYK", "progressive"])
def test_other_images_are_decoded_on_the_cpu(gpu: GpuDecoder, kind: str) -> None:
    image, file = random_image(60, 40), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    match kind:
        case "PNG":
            image.save(file, "PNG")
        case "rotated":
            image.save(file, "JPEG", exif=exif)
        case "progressive":
            image.save(file, "JPEG", progressive=True)
        case _:
            image.convert("L" if kind == "gray" else "CMYK").save(file, "JPEG")
    assert (
        np.abs(gpu.decode(file.getvalue()).astype(int) - gpu.decoder.decode(file.getvalue())).max() <= MAX_DIFFERENCE[1]
    )


def test_the_same_images_are_rejected(gpu: GpuDecoder) -> None:
    complete = encoded(random_image(600, 400), "JPEG")
    with pytest.raises(NotAnImageError):
        gpu.decode(b"not an image")
    with pytest.raises(DamagedImageError):
        gpu.decode(complete[: len(complete) // 2])
    small = GpuDecoder(Decoder(Preprocessing(32), max_pixels=2_000_000, mode="exact"), "cpu")
    with pytest.raises(TooManyPixelsError, match="2400 × 1000 pixels; the limit is 2,000,000"):
        small.decode(encoded(random_image(2400, 1000), "JPEG"))


def test_a_failing_device_loses_no_image(
    gpu: GpuDecoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "_resized", fail)
    monkeypatch.setattr(gpu, "_failures", 0)
    images = [encoded(random_image(60, 40, seed), "JPEG") for seed in range(6)]
    assert all(np.array_equal(gpu.decode(image), gpu.decoder.decode(image)) for image in images)
    assert caplog.text.count("failed to decode images on the GPU") == 2, "the first and the last failure"
    assert "the GPU is not used again" in caplog.text


def test_chroma_is_interpolated_as_in_libjpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvJPEG does not by default. The option makes the CPU decoder behave in the same way, and the check notices."""
    monkeypatch.setattr("vitserve.service.http_worker.dispatch.gpu_decoder.OPTIONS", ":fancy_upsampling=0")
    with pytest.raises(DecoderRejectedError, match="levels on average"):
        GpuDecoder(Decoder(Preprocessing(224), mode="exact"), "cpu")


def test_large_images_are_decoded_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = GpuDecoder(Decoder(Preprocessing(32)), "cpu")
    monkeypatch.setattr(decoder, "_run", lambda jobs: pytest.fail("the device must not be used"))
    large = encoded(random_image(4000, 2100), "JPEG")
    assert np.array_equal(decoder.decode(large), decoder.decoder.decode(large))


def test_the_pixels_of_a_batch_are_limited(gpu: GpuDecoder) -> None:
    from vitserve.service.http_worker.dispatch.gpu_decoder import MAX_IMAGE_PIXELS, _Job

    header = gpu.decoder.header(encoded(random_image(60, 40), "JPEG"))
    gpu._waiting.extend(_Job(b"", replace(header, pixels=MAX_IMAGE_PIXELS)) for _ in range(20))
    assert [len(gpu._next_batch()) for _ in range(3)] == [8, 8, 4]


def test_a_device_with_different_pixels_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    resized = GpuDecoder._resized
    monkeypatch.setattr(GpuDecoder, "_resized", lambda self, image, header: resized(self, image, header).roll(1, 0))
    with pytest.raises(
        DecoderRejectedError,
        match=r"GPU pixels of an image of 640 × 427 differ by \d+\.\d+ levels on average and \d+ at most; allowed",
    ):
        GpuDecoder(Decoder(Preprocessing(32)), "cpu")


def test_without_its_packages_the_cpu_decodes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia", None)
    monkeypatch.delitem(sys.modules, "vitserve.service.http_worker.dispatch.gpu_decoder")
    assert isinstance(decoder_for(Preprocessing(33), Settings(decode="gpu")), Decoder)
    assert "pip install 'vitserve[gpu-decode]'" in caplog.text


def test_a_server_without_a_gpu_logs_it_and_decodes_on_the_cpu(bundle: Bundle) -> None:
    running = start_server("--bundle", str(bundle.path), "--decode", "gpu")
    response = post_jpeg(running.url)
    assert response.status_code == 200
    running.wait_for("images are decoded on the CPU: ")
    assert running.stop() == 0
