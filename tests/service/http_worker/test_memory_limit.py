"""Many images of 49 megapixels at once, with the memory limit of the shipped manifests: nothing is killed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image, features

from tests.support.cgroup import MemoryGroup, memory_group
from tests.support.encoders import chunk, png, tiff
from tests.support.http import classify
from tests.support.images import encoded, random_image
from tests.support.server import Server, start_server

LIMIT_BYTES = 2 * 2**30
COUNT = 64
SIDE = 7000
EXPECTED = {200, 413, 422, 429}

pytestmark = pytest.mark.slow


def flat(mode: str, color: object) -> Image.Image:
    return Image.new(mode, (SIDE, SIDE), color)  # type: ignore[arg-type]


def image(kind: str) -> bytes:
    samples = np.broadcast_to(np.arange(60, 64, dtype=np.uint8), (SIDE, SIDE, 4))
    match kind:
        case "jpeg":
            return encoded(flat("RGB", "teal"), "JPEG")
        case "jpeg-progressive":
            return encoded(flat("RGB", "teal"), "JPEG", progressive=True, subsampling=0)
        case "jpeg-cmyk":
            return encoded(flat("CMYK", "teal"), "JPEG")
        case "png-rgb" | "png-rgba" | "png-l" | "png-la":
            colors = {"rgb": "teal", "rgba": (9, 200, 9, 90), "l": 60, "la": (60, 90)}
            mode = kind.removeprefix("png-")
            return encoded(flat(mode.upper(), colors[mode]))
        case "png-gray16":
            return png(samples[..., :1], 16, 0, chunk(b"tRNS", b"\0\1"))
        case "png-palette":
            return png(samples[..., :1], 8, 3, chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", bytes(256)))
        case "gif":
            return encoded(flat("L", 60), "GIF", transparency=3)
        case "tiff-gray16":
            return tiff(samples[..., :1], 16, 1, compression=8)
        case "tiff-rgba":
            return tiff(samples, 8, 2, compression=8)
        case "webp-rgb":
            return encoded(flat("RGB", "teal"), "WEBP", method=0)
        case "webp-rgba":
            return encoded(flat("RGBA", (9, 200, 9, 90)), "WEBP", lossless=True, method=0, quality=0)
    return encoded(flat("RGB", "teal"), "AVIF", speed=10)


KINDS = (
    *("jpeg", "jpeg-progressive", "jpeg-cmyk", "png-rgb", "png-rgba", "png-l", "png-la", "png-gray16", "png-palette"),
    *("gif", "tiff-gray16", "tiff-rgba", "webp-rgb", "webp-rgba", *(("avif",) if features.check("avif") else ())),
)


@pytest.fixture(scope="module")
def group() -> Iterator[MemoryGroup]:
    with memory_group(LIMIT_BYTES) as group:
        yield group


@pytest.fixture(scope="module")
def server(group: MemoryGroup) -> Iterator[Server]:
    running = start_server("--workers", "2", prefix=group.prefix)
    yield running
    assert running.stop() == 0
    assert group.kills() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_many_large_images_at_once_stay_within_the_limit(kind: str, server: Server, group: MemoryGroup) -> None:
    body, small = image(kind), encoded(random_image(40, 30))
    with httpx.Client(base_url=server.url, timeout=120, limits=httpx.Limits(max_connections=COUNT + 1)) as client:
        with ThreadPoolExecutor(COUNT) as pool:
            raw = list(pool.map(lambda _: client.post("/v1/classify", content=body), range(COUNT)))
            form = pool.submit(client.post, "/v1/classify", files=[("image", body)] * COUNT)
            others = [classify(client, small).status_code for _ in range(20)]
        statuses = Counter(response.status_code for response in raw)
    assert statuses.keys() <= EXPECTED, statuses
    assert form.result().status_code in EXPECTED
    assert set(others) == {200}
    assert group.kills() == 0
    assert group.peak_bytes() <= LIMIT_BYTES
