"""Decoding as on the GPU: the same code, on nvImageCodec's own decoders for the CPU and torch's kernels there."""

from __future__ import annotations

import io
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.images import encoded, random_image
from tests.support.server import start_server
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.preprocess import (
    DamagedImageError,
    Decoder,
    Interpolation,
    NotAnImageError,
    Preprocessing,
    TooManyPixelsError,
)
from vitserve.service.http_worker.decoding import decoder_for
from vitserve.service.settings import Settings

pytest.importorskip("nvidia.nvimgcodec", reason="nvidia-nvimgcodec is not installed")

from vitserve.service.http_worker.gpu_decoder import DIFFERENCE, DecoderRejectedError, GpuDecoder  # which imports it

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")


@pytest.fixture(scope="module")
def gpu() -> GpuDecoder:
    return GpuDecoder(Decoder(Preprocessing(32), jpeg_draft=False), "cpu")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "crop"), [(32, 1.0), (224, 0.9)])
def test_photos_are_within_the_stated_difference(
    size: int, crop: float, interpolation: Interpolation, photos: list[Path]
) -> None:
    exact = Decoder(Preprocessing(size, crop, interpolation), jpeg_draft=False)
    ours = GpuDecoder(exact, "cpu")
    for photo in photos:
        difference = np.abs(ours.decode(photo.read_bytes()).astype(int) - exact.decode(photo.read_bytes()))
        assert difference.mean() <= DIFFERENCE[0], photo
        assert difference.max() <= DIFFERENCE[1], photo


def test_who_waits_is_decoded_with_the_others_and_gets_their_own(
    gpu: GpuDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [encoded(random_image(60, 40, seed), "JPEG") for seed in range(24)]
    alone = [gpu.decode(image) for image in images]
    sizes, first, go = list[int](), threading.Event(), threading.Event()
    run = gpu._run

    def held(jobs: list[Any]) -> None:
        sizes.append(len(jobs))
        if not first.is_set():  # until all the others wait
            first.set()
            assert go.wait(60)
        run(jobs)

    monkeypatch.setattr(gpu, "_run", held)
    with ThreadPoolExecutor(len(images)) as threads:
        answers = [threads.submit(gpu.decode, images[0])]
        assert first.wait(60)
        answers += [threads.submit(gpu.decode, image) for image in images[1:]]
        while len(gpu._waiting) < len(images) - 1:
            assert not any(each.done() for each in answers)
        go.set()
        assert all(np.array_equal(each.result(60), expected) for each, expected in zip(answers, alone, strict=True))
    assert sizes == [1, 23]


@pytest.mark.parametrize("kind", ["PNG", "rotated", "gray", "CMYK", "progressive"])
def test_what_is_no_plain_jpeg_is_decoded_all_the_same(gpu: GpuDecoder, kind: str) -> None:
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
    assert np.abs(gpu.decode(file.getvalue()).astype(int) - gpu.decoder.decode(file.getvalue())).max() <= DIFFERENCE[1]


def test_refusals_are_the_same(gpu: GpuDecoder) -> None:
    whole = encoded(random_image(600, 400), "JPEG")
    with pytest.raises(NotAnImageError):
        gpu.decode(b"no image")
    with pytest.raises(DamagedImageError):
        gpu.decode(whole[: len(whole) // 2])
    small = GpuDecoder(Decoder(Preprocessing(32), max_pixels=2_000_000, jpeg_draft=False), "cpu")
    with pytest.raises(TooManyPixelsError, match="2400 × 1000 pixels; the limit is 2,000,000"):
        small.decode(encoded(random_image(2400, 1000), "JPEG"))


def test_a_device_that_fails_costs_no_image(
    gpu: GpuDecoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lost(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "_resized", lost)
    monkeypatch.setattr(gpu, "_failures", 0)
    images = [encoded(random_image(60, 40, seed), "JPEG") for seed in range(6)]
    assert all(np.array_equal(gpu.decode(image), gpu.decoder.decode(image)) for image in images)
    assert caplog.text.count("could not be decoded on the GPU") == 2, (
        "when it began, and when it was taken to be for good"
    )
    assert "which is left alone" in caplog.text


def test_chroma_is_interpolated_as_libjpeg_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvJPEG's default on a GPU; its decoder for the CPU can be made to do the same."""
    monkeypatch.setattr("vitserve.service.http_worker.gpu_decoder.OPTIONS", ":fancy_upsampling=0")
    with pytest.raises(DecoderRejectedError, match="levels in the mean"):
        GpuDecoder(Decoder(Preprocessing(224), jpeg_draft=False), "cpu")


def test_large_images_are_decoded_at_a_reduced_scale_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = GpuDecoder(Decoder(Preprocessing(32)), "cpu")
    monkeypatch.setattr(ours, "_run", lambda jobs: pytest.fail("it was given to the device"))
    large = encoded(random_image(4000, 2100), "JPEG")
    assert np.array_equal(ours.decode(large), ours.decoder.decode(large))


def test_a_batch_is_bounded_by_its_pixels(gpu: GpuDecoder) -> None:
    from vitserve.service.http_worker.gpu_decoder import MOST_PIXELS, _Job

    header = gpu.decoder.header(encoded(random_image(60, 40), "JPEG"))
    gpu._waiting.extend(_Job(b"", replace(header, pixels=MOST_PIXELS)) for _ in range(20))
    assert [len(gpu._next()) for _ in range(3)] == [8, 8, 4]


def test_a_device_that_decodes_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    resized = GpuDecoder._resized
    monkeypatch.setattr(GpuDecoder, "_resized", lambda self, image, header: resized(self, image, header).roll(1, 0))
    with pytest.raises(
        DecoderRejectedError,
        match=r"the GPU's pixels of a picture of 640 × 427 differ by \d+\.\d+ levels in the mean and \d+ at most; 0\.5 and 16 are",
    ):
        GpuDecoder(Decoder(Preprocessing(32)), "cpu")


def test_without_its_packages_the_line_to_run_is_logged_and_the_cpu_decodes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia", None)
    monkeypatch.delitem(sys.modules, "vitserve.service.http_worker.gpu_decoder")
    assert isinstance(decoder_for(Preprocessing(33), Settings(decode="gpu")), Decoder)
    assert "pip install 'vitserve[gpu-decode]'" in caplog.text


def test_a_service_without_a_gpu_that_is_to_decode_on_one_says_so_and_answers(bundle: Bundle) -> None:
    running = start_server("--bundle", str(bundle.path), "--decode", "gpu")
    answer = httpx.post(
        f"{running.url}/v1/classify",
        content=encoded(random_image(), "JPEG"),
        headers={"content-type": "image/jpeg"},
        timeout=60,
    )
    assert answer.status_code == 200
    running.wait_for("images are decoded on the CPU: ")
    assert running.stop() == 0
