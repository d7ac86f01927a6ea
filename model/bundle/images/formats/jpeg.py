"""JPEG (ITU T.81): reads the header as libjpeg does, bounds the scans, and decodes at a reduced scale."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import simplejpeg
from PIL import Image, ImageChops

from vitserve.model.arrays import Pixels
from vitserve.model.bundle.images.decoded import Decoded, Footprint, as_stored, opaque
from vitserve.model.bundle.images.directory import orientation_of
from vitserve.model.bundle.images.errors import DamagedImageError, TooComplexError, UnsupportedImageError

MAX_SEGMENTS = 4096  # before the first scan
MAX_BYTES_BETWEEN = 2**16  # that belong to no segment
MAX_TURBO_PIXELS = 4_000_000  # the array and the image made of it are in memory at the same time
MAX_SCANS = 100  # as in libtiff: each scan visits the whole image; encoders write 10 to 20

_TURBO_COLORS = {1: "GRAY", 3: "RGB"}
_MODES = {1: "L", 3: "RGB", 4: "CMYK"}  # by the number of components
# T.81, table B.1: frames that libjpeg decodes. Baseline, extended, progressive; the same with arithmetic coding.
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
_PROGRESSIVE = {0xC2, 0xCA}
_ARITHMETIC = {0xC9, 0xCA}
_OTHER_FRAMES = {0xC3, 0xC5, 0xC6, 0xC7, 0xC8, 0xCB, 0xCD, 0xCE, 0xCF}
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD8)}
_SCAN, _EXIF_SEGMENT, _END_OF_IMAGE = 0xDA, 0xE1, b"\xff\xd9"
_WITH_LENGTH = {*_FRAMES, _SCAN, 0xC4, 0xCC, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE}
_SCAN_MARKER = b"\xff\xda"
_SCANS = re.compile(_SCAN_MARKER)
_NO_MARKER = (b"", b"\x00", b"\xff")
_MARKER = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)
# Two continuations of data that ends early. Pixels that are there do not depend on the continuation.
_CONTINUATIONS = (b"\0" * 64, b"\x55\xaa" * 32)


class Component(NamedTuple):
    identifier: int
    horizontal: int  # sampling factors
    vertical: int


Segment = tuple[int, int, int]  # marker, start of the data behind the length, end


@dataclass(frozen=True)
class JpegImage:
    encoded: bytes
    size: tuple[int, int]
    components: tuple[Component, ...]
    frame: int  # the marker that says how the image is coded
    scan: int  # position of the first scan's header
    scans: int
    orientation: int
    scale: int = 1  # both sides are divided by it while decoding: 1, 2, 4 or 8

    format = "JPEG"

    @property
    def mode(self) -> str:
        return _MODES[len(self.components)]

    @property
    def is_plain(self) -> bool:
        """Upright RGB."""
        return self.orientation == 1 and len(self.components) == 3

    @property
    def scaled(self) -> tuple[int, int]:
        return -(-self.size[0] // self.scale), -(-self.size[1] // self.scale)

    @property
    def footprint(self) -> Footprint:
        width, height = self.scaled
        decoded = width * height * (1 if self.mode == "L" else 4) + 8 * height
        rows = 64 * self.size[0] * len(self.components)
        # libjpeg keeps the coefficients of all blocks until the last scan, as 16 bits.
        coefficients = 2 * self._samples() if self.scans > 1 else 0
        images, copies = (1, 0) if self._has_end else (3, 2)  # two results and their difference
        array = width * height * len(self.components) if width * height <= MAX_TURBO_PIXELS else 0
        decoding = images * decoded + array + int(coefficients) + rows + copies * len(self.encoded)
        converted = 4 if self.mode == "CMYK" else 0
        return Footprint(decoding, decoded, converted, scale=self.scale)

    @property
    def seconds(self) -> float:
        if self.frame in _ARITHMETIC:
            return self._samples() * 5e-9 + len(self.encoded) * 2e-7
        if self.scans > 1:
            return self._samples() * (2.5e-9 + 4e-10 * self.scans) + len(self.encoded) * 2e-8
        return self._samples() * 2.5e-9 + len(self.encoded) * 7e-9

    def reduced(self, width: int, height: int) -> JpegImage:
        """Decoded at the smallest scale that keeps at least this size."""
        most = min(self.size[0] // width, self.size[1] // height)
        return replace(self, scale=next((scale for scale in (8, 4, 2) if most >= scale), 1))

    def decode(self) -> Decoded:
        pixels = self.array()
        if pixels is not None:
            image = Image.fromarray(pixels if self.mode == "RGB" else pixels[..., 0])
        else:
            image = self._pixels(self.encoded) if self._has_end else self._pixels_without_end()
        return Decoded((image,), opaque if self.mode == "CMYK" else as_stored, self.orientation)

    def array(self) -> Pixels | None:
        """The pixels by libjpeg-turbo's own interface, in a fraction of the time that Pillow takes for small images.

        [height, width, 3], or [height, width, 1] for gray; equal to Pillow's. None where Pillow has to decode: if the
        data has any fault, which is Pillow's to judge, and for CMYK.
        """
        width, height = self.scaled
        color = _TURBO_COLORS.get(len(self.components))
        # simplejpeg takes the smallest scale that keeps a size. Below 8 pixels, several scales have the same size.
        is_ambiguous = self.scale > 1 and max(self.size) < 8
        if color is None or is_ambiguous or width * height > MAX_TURBO_PIXELS:
            return None
        least = (height, width) if self.scale > 1 else (0, 0)
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(self.encoded, color, False, False, *least)
        except ValueError:
            return None
        return pixels if pixels.shape[:2] == (height, width) else None

    def _pixels(self, encoded: bytes) -> Image.Image:
        # CMYK is stored inverted, as Adobe's programs do.
        raw = "CMYK;I" if self.mode == "CMYK" else self.mode
        return Image.frombytes(self.mode, self.scaled, encoded, "jpeg", raw, "", self.scale, 0)

    def _pixels_without_end(self) -> Image.Image:
        """All pixels may be there although the end marker is missing. Raises DamagedImageError if they are not."""
        if self.scans > 1 and not self._is_refined():
            raise DamagedImageError("the JPEG ends before its last scan")
        data = self.encoded.rstrip(b"\xff")
        image, repeated = (self._pixels(data + continuation + _END_OF_IMAGE) for continuation in _CONTINUATIONS)
        if ImageChops.difference(image, repeated).getbbox() is not None:
            raise DamagedImageError("the JPEG ends before its last pixel")
        return image

    @cached_property
    def _has_end(self) -> bool:
        tail = max(self.scan, len(self.encoded) - 64)  # nearly all images end here
        return self.encoded.find(_END_OF_IMAGE, tail) >= 0 or self.encoded.find(_END_OF_IMAGE, self.scan) >= 0

    def _is_refined(self) -> bool:
        """Whether the scans give every bit of every coefficient (T.81, G.1.1)."""
        missing = {component.identifier: [True] * 64 for component in self.components}
        for match in _SCANS.finditer(self.encoded, self.scan):
            at = match.start() + 4
            header = self.encoded[at : at + 4 + 2 * self.encoded[at]]  # number of components, two bytes for each, bits
            first, last, bits = header[-3], header[-2], header[-1] & 15
            for identifier in header[1:-3:2]:
                if identifier in missing:
                    missing[identifier][first : last + 1] = [bits > 0] * (last + 1 - first)
        return not any(any(coefficients) for coefficients in missing.values())

    def _samples(self) -> float:
        """Of all components, with the blocks that are cut at the right and the bottom."""
        most = max(part.horizontal for part in self.components) * max(part.vertical for part in self.components)
        share = sum(part.horizontal * part.vertical for part in self.components) / most
        return share * (self.size[0] + 32) * (self.size[1] + 32)


def read(encoded: bytes) -> JpegImage:
    """Raises ImageError. Accepts only headers that libjpeg reads the same way."""
    frame: Segment | None = None
    orientation = 0
    for marker, start, end in _segments(encoded):
        if marker == _SCAN:
            if frame is None:
                break
            coding, first, last = frame
            size, components = _frame(encoded[first:last])
            scans = _scans(encoded, start - 4, coding, encoded[start] < len(components))
            return JpegImage(encoded, size, components, coding, start - 4, scans, orientation or 1)
        if marker in _FRAMES:
            if frame is not None:
                raise DamagedImageError("the JPEG has two frame headers")
            frame = marker, start, end
        elif marker == _EXIF_SEGMENT and not orientation and encoded.startswith(b"Exif\0\0", start):
            orientation = orientation_of(encoded[start:end])
    raise DamagedImageError("the JPEG ends before its first scan")


def _segments(encoded: bytes) -> Iterator[Segment]:
    """Up to the header of the first scan."""
    position, between, length = 2, 0, len(encoded)
    for _ in range(MAX_SEGMENTS):
        if encoded[position : position + 1] != b"\xff" or encoded[position + 1 : position + 2] in _NO_MARKER:
            match = _MARKER.search(encoded, position, position + MAX_BYTES_BETWEEN - between)
            if match is None:
                return
            between += match.start() - position
            position = match.start()
        marker = encoded[position + 1]
        start = position + 4
        if marker in _WITHOUT_LENGTH:
            position += 2
            continue
        end = position + 2 + int.from_bytes(encoded[position + 2 : start])
        if marker in _OTHER_FRAMES:
            raise UnsupportedImageError(f"a JPEG of the kind SOF{marker - 0xC0} is not read: lossless or hierarchical")
        if marker not in _WITH_LENGTH or end < start or end > length:
            raise DamagedImageError(f"the JPEG's header is damaged at byte {position:,}")
        yield marker, start, end
        position = end
    raise TooComplexError(f"the JPEG has more than {MAX_SEGMENTS:,} segments before its first scan")


def _frame(data: bytes) -> tuple[tuple[int, int], tuple[Component, ...]]:
    """Size and components (T.81, B.2.2)."""
    if len(data) < 6 or len(data) != 6 + 3 * data[5]:
        raise DamagedImageError("the JPEG's frame header is damaged")
    if data[0] != 8:
        raise UnsupportedImageError(f"a JPEG of {data[0]} bits a sample is not read; store 8 bits")
    if data[5] not in _MODES:
        raise UnsupportedImageError(f"a JPEG of {data[5]} components is not read; store 1, 3 or 4")
    components = tuple(Component(data[at], data[at + 1] >> 4, data[at + 1] & 15) for at in range(6, len(data), 3))
    if not all(1 <= factor <= 4 for _, *factors in components for factor in factors):
        raise DamagedImageError("the JPEG's sampling factors are damaged")
    return (int.from_bytes(data[3:5]), int.from_bytes(data[1:3])), components


def _scans(encoded: bytes, start: int, frame: int, partial: bool) -> int:
    """``partial``: the first scan does not have all components. Raises TooComplexError."""
    if frame not in _PROGRESSIVE and not partial:
        return 1  # libjpeg decodes no more than the first scan
    scans = encoded.count(_SCAN_MARKER, start)
    if scans > MAX_SCANS:  # perhaps of other data that follows the image
        end = encoded.find(_END_OF_IMAGE, start)
        scans = encoded.count(_SCAN_MARKER, start, end if end >= 0 else len(encoded))
    if scans > MAX_SCANS:
        raise TooComplexError(f"the JPEG has {scans:,} scans; the limit is {MAX_SCANS}")
    return max(scans, 2)
