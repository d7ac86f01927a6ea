"""WebP (RFC 9649): the first frame. libwebp decodes into a canvas of the whole size, and keeps two of them."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image, WebPImagePlugin

from vitserve.model.bundle.images.decoded import Decoded, Footprint, as_stored, over_white
from vitserve.model.bundle.images.directory import orientation_of
from vitserve.model.bundle.images.errors import DamagedImageError

_ALPHA = 0x10  # of the flags of the extended format


@dataclass(frozen=True)
class WebpImage:
    encoded: bytes
    size: tuple[int, int]
    transparent: bool
    lossless: bool
    extended: bool  # may have several frames, and chunks of any kind

    format, orientation = "WEBP", 1  # the orientation is known after decoding

    @property
    def mode(self) -> str:
        return "RGBA" if self.transparent else "RGB"

    @property
    def footprint(self) -> Footprint:
        pixels = self.size[0] * self.size[1]
        # Two canvases and the pixels, of libwebp or of Python; two copies of the encoded image and a list of frames.
        copies = (3 if self.extended else 2) * len(self.encoded)
        return Footprint(12 * pixels + copies, 4 * pixels, 4 if self.transparent else 0)

    @property
    def seconds(self) -> float:
        return self.size[0] * self.size[1] * 1e-8 + len(self.encoded) * (1e-8 if self.lossless else 5e-8)

    def decode(self) -> Decoded:
        data, is_transparent, exif = self._first_frame()
        orientation = orientation_of(exif) if exif else 1
        if is_transparent:
            image = Image.frombuffer("RGBA", self.size, data, "raw", "RGBA", 0, 1)  # shares the memory
            return Decoded((image,), over_white, orientation)
        return Decoded((Image.frombytes("RGB", self.size, data, "raw", "RGBX"),), as_stored, orientation)

    def _first_frame(self) -> tuple[bytes, bool, bytes]:
        """Pixels of 4 bytes, whether the fourth is alpha, and EXIF metadata.

        Not by Image.load(), which keeps the canvases while it copies the pixels.
        """
        image = WebPImagePlugin.WebPImageFile(io.BytesIO(self.encoded))
        if image.size != self.size:
            raise DamagedImageError("the WebP's header is damaged")
        data, _ = image._decoder.get_next()
        return data, image.rawmode == "RGBA", image.info.get("exif", b"")


def read(encoded: bytes) -> WebpImage:
    """Raises ImageError."""
    kind = encoded[12:16]
    header = encoded[20:30]
    if len(header) == 10 and kind == b"VP8X":
        size = 1 + int.from_bytes(header[4:7], "little"), 1 + int.from_bytes(header[7:10], "little")
        return WebpImage(encoded, size, bool(header[0] & _ALPHA), False, True)
    if len(header) == 10 and kind == b"VP8 ":
        size = int.from_bytes(header[6:8], "little") & 0x3FFF, int.from_bytes(header[8:10], "little") & 0x3FFF
        return WebpImage(encoded, size, False, False, False)
    if len(header) >= 5 and kind == b"VP8L":
        bits = int.from_bytes(header[1:5], "little")
        return WebpImage(encoded, ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1), bool(bits >> 28 & 1), True, False)
    raise DamagedImageError("the WebP's header is damaged")
