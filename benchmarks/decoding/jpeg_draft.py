"""How decoding JPEGs at a reduced scale changes pixels, logits, and predictions, by image size.

    python -m benchmarks.decoding.jpeg_draft PHOTOS [--sizes 32 64 128 224 384] [--crops 20] [--gap 3]

PHOTOS is a directory of JPEGs. Four sets are made of them, because few photos are large enough to be reduced:

    photos     as they are
    crops      random squares of half of the shorter side to all of it
    mosaics    4000 × 3000 pixels of tiles of the photos, as sharp as they are, like images of a camera
    enlarged   each photo, resized to 4000 pixels; softer than images of a camera

Networks with random weights show how much the logits change, relative to the largest one; at 32 pixels it is the
bundled default model. It also gives the predictions: of the image at 32 pixels, and of each tile of 32 × 32 pixels at
other sizes. No larger trained network is at hand.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitserve.model.bundle.bundle import open_bundle
from vitserve.model.bundle.images.formats.jpeg import JpegImage
from vitserve.model.bundle.preprocess import DRAFT_GAP, Decoder, Preprocessing
from vitserve.model.config import ViTConfig
from vitserve.model.network.build import network_of
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.settings import DEFAULT_BUNDLE

_LARGE = (4000, 3000)
_TILE = (500, 375)
_MOSAICS = 12
_QUALITY = 92
_SUBSET = 12  # photos that are enlarged

Logits = Callable[[np.ndarray], np.ndarray]  # uint8 [n, H, W, 3] → [n, classes]


@dataclass(frozen=True)
class Difference:
    images: int
    reduced: int  # images that are decoded at a reduced scale
    mean: float  # levels of 255, over the reduced images
    worst: float  # the mean of the worst image
    largest: float
    logits: float  # the median image's largest difference, relative to the largest logit of all
    worst_logits: float
    predictions: int
    flips: int  # predictions of the default model that change
    speedup: float  # of decoding all images

    def row(self) -> str:
        values = (
            f"{self.mean:.2f} | {self.worst:.2f} | {self.largest:.0f} | {self.logits:.1e} | {self.worst_logits:.1e}"
        )
        return f"{self.reduced} of {self.images} | {values} | {self.flips} of {self.predictions} | {self.speedup:.1f} ×"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128, 224, 384])
    parser.add_argument("--crops", type=int, default=20, help="of each photo")
    parser.add_argument("--gap", type=float, default=DRAFT_GAP, help="multiple of the resized size that must remain")
    parser.add_argument("--sets", nargs="+", default=["photos", "crops", "mosaics", "enlarged"])
    arguments = parser.parse_args()
    paths = sorted(arguments.photos.glob("*.jpg"))
    makers: dict[str, Callable[[], Iterator[bytes]]] = {
        "photos": lambda: (path.read_bytes() for path in paths),
        "crops": lambda: _crops(paths, arguments.crops),
        "mosaics": lambda: _mosaics(paths),
        "enlarged": lambda: _enlarged(paths[:: max(1, len(paths) // _SUBSET)]),
    }
    head = "image size | reduced | mean | worst | largest | logits | worst | predictions that change | speedup"
    print(f"| images | {head} |")  # noqa: T201
    print("|---|---|---|---|---|---|---|---|---|---|")  # noqa: T201
    for name in arguments.sets:
        images = list(makers[name]())
        for size in arguments.sizes:
            print(f"| {name} | {size} | {_compare(images, size, arguments.gap).row()} |", flush=True)  # noqa: T201


def _compare(images: list[bytes], size: int, gap: float) -> Difference:
    preprocessing, run = _network(size)
    decoders = [Decoder(preprocessing, mode="exact"), Decoder(preprocessing, mode="fastest", draft_gap=gap)]
    decoded, seconds = [], []
    for decoder in decoders:
        start = time.perf_counter()
        decoded.append(np.stack([decoder.decode(image) for image in images]))
        seconds.append(time.perf_counter() - start)
    is_reduced = np.array([_is_reduced(decoders[1], image) for image in images])
    if not is_reduced.any():
        return Difference(len(images), 0, 0, 0, 0, 0, 0, 0, 0, seconds[0] / seconds[1])
    levels = np.abs(decoded[0].astype(np.int16) - decoded[1]).reshape(len(images), -1)[is_reduced]
    exact, draft = (run(pixels[is_reduced]) for pixels in decoded)
    changes = np.abs(exact - draft).max(1) / np.abs(exact).max()
    predictions = [_predictions(pixels[is_reduced]) for pixels in decoded]
    return Difference(
        len(images),
        int(is_reduced.sum()),
        float(levels.mean()),
        float(levels.mean(1).max()),
        float(levels.max()),
        float(np.median(changes)),
        float(changes.max()),
        len(predictions[0]),
        int((predictions[0] != predictions[1]).sum()),
        seconds[0] / seconds[1],
    )


def _is_reduced(decoder: Decoder, image: bytes) -> bool:
    opened = decoder.open(image)._encoded
    assert isinstance(opened, JpegImage)
    return opened.scale > 1


def _network(size: int) -> tuple[Preprocessing, Logits]:
    if size == 32:
        return _default_model()
    torch.manual_seed(0)
    patch = 16 if size >= 128 else 8
    config = ViTConfig(image_size=size, patch_size=patch, width=192, depth=4, heads=3, mlp_width=768, classes=1000)
    network = network_of(config).eval()
    torch.nn.init.trunc_normal_(network.head.weight, std=0.02)

    def run(pixels: np.ndarray) -> np.ndarray:
        parts = []
        with torch.inference_mode():
            for start in range(0, len(pixels), 16):
                images = torch.from_numpy(pixels[start : start + 16]).permute(0, 3, 1, 2) / 127.5 - 1
                parts.append(network(images)[0].numpy())
        return np.concatenate(parts)

    return Preprocessing(size), run


def _default_model() -> tuple[Preprocessing, Logits]:
    bundle = open_bundle(DEFAULT_BUNDLE)
    (artifact,) = (a for a in bundle.manifest.artifacts if (a.engine, a.precision) == ("openvino", "fp32"))
    engine = construct_engine("openvino", "fp32", bundle.path / artifact.path, EngineOptions(max_batch=16))

    def run(pixels: np.ndarray) -> np.ndarray:
        return np.concatenate([engine.run(0, pixels[i : i + 16]).logits for i in range(0, len(pixels), 16)])

    return bundle.manifest.preprocessing, run


def _predictions(pixels: np.ndarray) -> np.ndarray:
    """Classes of the default model, for each tile of each image."""
    _, run = _default_model()
    count, height, width, _ = pixels.shape
    tiles = pixels.reshape(count, height // 32, 32, width // 32, 32, 3).swapaxes(2, 3).reshape(-1, 32, 32, 3)
    classes: np.ndarray = run(np.ascontiguousarray(tiles)).argmax(1)
    return classes


def _crops(paths: list[Path], count: int) -> Iterator[bytes]:
    random = np.random.default_rng(0)
    for path in paths:
        image = Image.open(path).convert("RGB")
        for _ in range(count):
            side = int(min(image.size) * random.uniform(0.5, 1))
            left, top = (int(random.integers(0, length - side + 1)) for length in image.size)
            yield _encoded(image.crop((left, top, left + side, top + side)))


def _mosaics(paths: list[Path]) -> Iterator[bytes]:
    random = np.random.default_rng(0)
    images = [Image.open(path).convert("RGB") for path in paths]
    images = [image for image in images if image.width >= _TILE[0] and image.height >= _TILE[1]]
    for _ in range(_MOSAICS):
        mosaic = Image.new("RGB", _LARGE)
        for top in range(0, _LARGE[1], _TILE[1]):
            for left in range(0, _LARGE[0], _TILE[0]):
                image = images[int(random.integers(len(images)))]
                x, y = (int(random.integers(0, own - tile + 1)) for own, tile in zip(image.size, _TILE, strict=True))
                mosaic.paste(image.crop((x, y, x + _TILE[0], y + _TILE[1])), (left, top))
        yield _encoded(mosaic)


def _enlarged(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        image = Image.open(path).convert("RGB")
        factor = _LARGE[0] / max(image.size)
        size = (round(image.width * factor), round(image.height * factor))
        yield _encoded(image.resize(size, Image.Resampling.LANCZOS))


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
