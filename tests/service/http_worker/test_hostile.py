"""Thousands of broken images and random bodies: no response is a server error, and memory does not grow."""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.http import metric
from tests.support.mutation import mutate, seeds
from tests.support.processes import resident_bytes
from tests.support.server import start_server
from vitserve.model.bundle.bundle import Bundle

# After the first fifth of the requests. Room for the largest decoded image; leaking one per request would be gigabytes.
MAX_GROWTH_BYTES = 64 * 2**20


def hostile_request(number: int, images: list[bytes]) -> tuple[bytes, str]:
    """Body and content type. The same number always gives the same request."""
    generator = random.Random(number)
    image = mutate(generator.choice(images), generator)
    kind = generator.randrange(10)
    if kind < 6:
        return image, generator.choice(("image/jpeg", "application/octet-stream"))
    if kind == 6:
        content_type = generator.choice(("image/png", "application/json", "multipart/form-data; boundary=x"))
        return generator.randbytes(generator.randrange(2000)), content_type
    if kind == 7:
        invalid = mutate(b"aGVsbG8=", generator).decode("latin-1")
        return json.dumps({"images": [base64.b64encode(image).decode(), invalid]}).encode(), "application/json"
    if kind == 8:
        body = json.dumps({"images": [base64.b64encode(image).decode()]}).encode()
        return mutate(body, generator), "application/json"
    part = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n' + image + b"\r\n--x--\r\n"
    return (part if generator.random() < 0.5 else mutate(part, generator)), "multipart/form-data; boundary=x"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_hostile_bodies_do_no_harm(count: int, bundle: Bundle) -> None:
    running, images = start_server("--bundle", str(bundle.path), "--timeout-ms", "60000"), seeds()
    statuses: Counter[int] = Counter()
    (worker,) = running.pids("vitserve.service.http_worker.main")

    with httpx.Client(base_url=running.url, timeout=60) as client:

        def post(number: int) -> int:
            body, content_type = hostile_request(number, images)
            return client.post("/v1/classify", content=body, headers={"content-type": content_type}).status_code

        with ThreadPoolExecutor(8) as pool:
            statuses.update(pool.map(post, range(count // 5)))
            before = resident_bytes(worker)
            statuses.update(pool.map(post, range(count // 5, count)))
            growth = resident_bytes(worker) - before
        valid = client.post("/v1/classify", content=images[0], headers={"content-type": "image/jpeg"})
        in_flight = metric(client, "vitserve_images_in_flight")
    assert running.stop() == 0
    assert statuses.total() == count
    assert not {status for status in statuses if status >= 500 or status == 429}, statuses
    assert statuses[200] > count // 100, "some mutated images are valid, so that the engine is tested too"
    assert statuses[422] > count // 5
    assert valid.status_code == 200
    assert in_flight == 0
    assert growth <= MAX_GROWTH_BYTES, f"resident memory grew by {growth / 2**20:.0f} MiB"
