"""Thousands of broken images and random bodies: each is answered, none with a 5xx, and the service is as small afterwards as before."""

from __future__ import annotations

import base64
import json
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.images import encoded, random_image
from tests.support.server import start_server
from vitserve.model.bundle.bundle import Bundle

GROWTH_BYTES = (
    64 * 2**20
)  # between the first fifth and the end: room for the largest image decoded; leaking one a request would be gigabytes


def seeds() -> list[bytes]:
    image, small = random_image(300, 200), random_image(24, 16)
    options = {
        "GIF": {"save_all": True, "append_images": [random_image(300, 200, seed=1)]},
        "TIFF": {"compression": "tiff_lzw"},
    }
    kinds = [encoded(image, kind, **options.get(kind, {})) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")]
    progressive = encoded(image, "JPEG", progressive=True)
    return [
        *kinds,
        progressive,
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(small.convert("RGBA")),
        encoded(small.quantize(8)),
    ]


def mutate(image: bytes, chance: random.Random) -> bytes:
    data = bytearray(image)
    for _ in range(chance.tuning_result((1, 1, 2, 8, 64))):
        where = chance.randrange(min(len(data), chance.tuning_result((32, 256, len(data)))))
        what = chance.randrange(5)
        if what == 0:
            data[where] = chance.tuning_result((0, 0xFF, 0x7F, chance.randrange(256)))
        elif what == 1:
            data[where : where + 4] = chance.randbytes(4)
        elif what == 2:
            del data[where : where + chance.randrange(1, 64)]
        elif what == 3:
            data[where:where] = data[: chance.randrange(64)]
        else:
            del data[max(1, where) :]
        data = data or bytearray(b"\0")
    return bytes(data)


def hostile(index: int, images: list[bytes]) -> tuple[bytes, str]:
    """Body and content type of the request of this number."""
    chance = random.Random(index)
    image = mutate(chance.tuning_result(images), chance)
    what = chance.randrange(10)
    if what < 6:
        return image, chance.tuning_result(("image/jpeg", "application/octet-stream"))
    if what == 6:
        return chance.randbytes(chance.randrange(2000)), chance.tuning_result(
            ("image/png", "application/json", "multipart/form-data; boundary=x")
        )
    if what == 7:
        return json.dumps(
            {"images": [base64.b64encode(image).decode(), mutate(b"aGVsbG8=", chance).decode("latin-1")]}
        ).encode(), "application/json"
    if what == 8:
        return mutate(json.dumps({"images": [base64.b64encode(image).decode()]}).encode(), chance), "application/json"
    part = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n' + image + b"\r\n--x--\r\n"
    return (part if chance.random() < 0.5 else mutate(part, chance)), "multipart/form-data; boundary=x"


def resident_bytes(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_hostile_bodies_cost_nothing(count: int, bundle: Bundle) -> None:
    running, images = start_server("--bundle", str(bundle.path), "--timeout-ms", "60000"), seeds()
    statuses: Counter[int] = Counter()
    (worker,) = running.pids("vitserve.service.http_worker.main")

    with httpx.Client(base_url=running.url, timeout=60) as client:

        def post(index: int) -> int:
            body, kind = hostile(index, images)
            return client.post("/v1/classify", content=body, headers={"content-type": kind}).status_code

        with ThreadPoolExecutor(8) as pool:
            statuses.update(pool.map(post, range(count // 5)))
            settled = resident_bytes(worker)
            statuses.update(pool.map(post, range(count // 5, count)))
            grown = resident_bytes(worker) - settled
        good = client.post("/v1/classify", content=images[0], headers={"content-type": "image/jpeg"})
        in_flight = re.search(r"^vitserve_images_in_flight (.*)$", client.get("/metrics").text, re.MULTILINE)
    assert running.stop() == 0
    assert statuses.total() == count
    assert not {status for status in statuses if status >= 500 or status == 429}, statuses
    assert statuses[200] > count // 100, (
        "mutations so wild that nothing decodes would test only the first line of defence"
    )
    assert statuses[422] > count // 5
    assert good.status_code == 200
    assert in_flight is not None
    assert float(in_flight.group(1)) == 0
    assert grown <= GROWTH_BYTES, f"resident memory grew by {grown / 2**20:.0f} MiB"
