"""Small images of every format, and random damage to them."""

from __future__ import annotations

import random

import numpy as np
from PIL import features

from tests.support.encoders import bmp, chunk, png, tiff
from tests.support.images import encoded, random_image


def seeds() -> list[bytes]:
    """Valid images."""
    image, small = random_image(300, 200), random_image(24, 16)
    samples = np.asarray(random_image(40, 30)).astype(int)
    return [
        encoded(image, "JPEG"),
        encoded(image, "PNG"),
        encoded(image, "WEBP"),
        encoded(image, "GIF", save_all=True, append_images=[random_image(300, 200, seed=1)]),
        encoded(image, "TIFF", compression="tiff_lzw"),
        encoded(image, "BMP"),
        encoded(image, "JPEG", progressive=True),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image, "JPEG")[:-2],
        encoded(small.convert("RGBA")),
        encoded(small.quantize(8)),
        encoded(small.convert("RGBA"), "WEBP", lossless=True),
        encoded(small, "TIFF", compression="jpeg"),
        encoded(small.convert("1"), "TIFF", compression="group4"),
        png(samples * 257, 16, 2, chunk(b"tRNS", bytes(6)), interlaced=True),
        tiff(samples * 257, 16, 2, order=">", in_planes=True, compression=8, rows=7),
        tiff(samples[..., :1], 8, 0, big=True, tile=16),
        bmp(samples[..., 0], 32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)),
        *([encoded(small.convert("RGBA"), "AVIF")] if features.check("avif") else []),
    ]


def mutate(image: bytes, generator: random.Random) -> bytes:
    data = bytearray(image)
    for _ in range(generator.choice((1, 1, 2, 8, 64))):
        position = generator.randrange(min(len(data), generator.choice((32, 256, len(data)))))
        match generator.randrange(5):
            case 0:
                data[position] = generator.choice((0, 0xFF, 0x7F, generator.randrange(256)))
            case 1:
                data[position : position + 4] = generator.randbytes(4)
            case 2:
                del data[position : position + generator.randrange(1, 64)]
            case 3:
                data[position:position] = data[: generator.randrange(64)]
            case _:
                del data[max(1, position) :]
        data = data or bytearray(b"\0")
    return bytes(data)
