"""Recognizes the format of an encoded image, and reads its header."""

from __future__ import annotations

from collections.abc import Callable

from PIL import features

from vitserve.model.bundle.images.decoded import EncodedImage
from vitserve.model.bundle.images.errors import NotAnImageError
from vitserve.model.bundle.images.formats import bmp, gif, jpeg, png, tiff, webp

_TIFF = (b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"II+\0", b"MM\0+")
_AVIF_BRANDS = (b"avif", b"avis", b"mif1", b"msf1")
_AVIF = bool(features.check("avif"))


def allowed_formats() -> tuple[str, ...]:
    """Pillow's names."""
    return ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(("AVIF",) if _AVIF else ()))


def read_header(encoded: bytes) -> EncodedImage:
    """Raises ImageError. Reads no pixels."""
    read = _reader(encoded)
    if read is None:
        raise NotAnImageError(f"not an image in one of the formats {', '.join(allowed_formats())}")
    return read(encoded)


def _reader(encoded: bytes) -> Callable[[bytes], EncodedImage] | None:
    if encoded.startswith(b"\xff\xd8\xff"):
        return jpeg.read
    if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return png.read
    if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        return webp.read
    if encoded.startswith((b"GIF87a", b"GIF89a")):
        return gif.read
    if encoded.startswith(_TIFF):
        return tiff.read
    if encoded.startswith(b"BM"):
        return bmp.read
    if _AVIF and encoded[4:8] == b"ftyp" and encoded[8:12] in _AVIF_BRANDS:
        from vitserve.model.bundle.images.formats import avif  # Pillow may be built without it

        return avif.read
    return None
