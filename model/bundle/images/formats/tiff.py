"""TIFF 6.0 and BigTIFF: the first image, if its samples are unsigned integers whose range is known.

Pillow and libtiff get a file with a new directory of only the tags that describe the pixels. So they neither read nor
report any others, and kinds that Pillow reads wrongly become kinds that it reads right:

- 0 is white: decoded as if 0 was black, and inverted afterwards.
- Samples in planes of their own: decoded as gray images, one for each sample.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

from PIL import Image, ImageChops, TiffImagePlugin

from vitserve.model.bundle.images.decoded import (
    Conversion,
    Decoded,
    DeepGray,
    Footprint,
    as_stored,
    gray,
    gray_over_white,
    opaque,
    over_white,
)
from vitserve.model.bundle.images.directory import LONG, SHORT, VALUE_BYTES, Directory, read_directory
from vitserve.model.bundle.images.errors import UnsupportedImageError
from vitserve.model.bundle.images.formats.tiff_layout import (
    DICTIONARIES,
    GRAYS,
    JPEGS,
    MAX_BLOCKS,
    OLD_JPEG_TAGS,
    Layout,
    Photometric,
    Tags,
    layout_of,
)

_PACKED = 12  # bits of samples that do not end at a byte; their order does not depend on that of the file
# Copied as they are. All others that describe the pixels are written from the layout.
_COPIED = (
    Tags.FILL_ORDER,
    Tags.FAX_3_OPTIONS,
    Tags.FAX_4_OPTIONS,
    Tags.PREDICTOR,
    Tags.JPEG_TABLES,
    Tags.YCBCR_COEFFICIENTS,
    Tags.YCBCR_SUBSAMPLING,
    Tags.YCBCR_POSITIONING,
    Tags.REFERENCE_BLACK_WHITE,
    *OLD_JPEG_TAGS,
)
_MAX_COPIED_BYTES = 2**16


@dataclass(frozen=True)
class TiffImage:
    encoded: bytes
    directory: Directory
    layout: Layout
    orientation: int

    format = "TIFF"

    @property
    def size(self) -> tuple[int, int]:
        return self.layout.width, self.layout.height

    @property
    def mode(self) -> str:
        layout = self.layout
        if layout.photometric in GRAYS and not layout.extra:
            return "I;16" if layout.bits > 8 else "L"
        return "P" if layout.photometric == Photometric.PALETTE else layout.photometric.name

    @property
    def footprint(self) -> Footprint:
        layout = self.layout
        pixel = {"I;16": 2, "L": 1, "P": 1}.get(self.mode, 4)
        if layout.in_planes:
            pixel = self._planes() * layout.bits // 8
        # Pillow keeps the file.
        decoded = layout.width * layout.height * pixel + 8 * layout.height * self._planes() + len(self.encoded)
        samples = 1 if layout.in_planes else layout.colors + len(layout.extra)
        block = layout.block[0] * layout.block[1] * samples * layout.bits // 8
        if layout.photometric == Photometric.YCBCR:
            block += 4 * layout.block[0] * layout.block[1]  # libtiff converts a block to RGB
        if layout.compression in DICTIONARIES:
            block *= 2
        decoding = decoded + block
        if layout.photometric in GRAYS:
            converts = layout.bits not in (2, 4, 8) or layout.photometric == Photometric.WHITE_IS_ZERO or layout.extra
            return Footprint(decoding, decoded, 1 if converts else 0, self.mode == "L" and layout.bits > 1)
        plain = layout.photometric in (Photometric.RGB, Photometric.YCBCR) and not layout.extra and not layout.in_planes
        return Footprint(decoding, decoded, 0 if plain else 4)

    @property
    def seconds(self) -> float:
        layout = self.layout
        samples = layout.blocks * layout.block[0] * layout.block[1] * (layout.colors + len(layout.extra))
        coded = len(self.encoded) * (8e-9 if layout.compression in JPEGS else 2e-9)
        return samples * max(1, layout.bits / 8) * 3e-9 + coded + layout.blocks * 5e-6

    def decode(self) -> Decoded:
        if self.layout.in_planes:
            planes = tuple(self._image(plane) for plane in range(self._planes()))
            return Decoded(planes, _planes_conversion(self.layout), self.orientation)
        image = self._image()
        if self.layout.photometric == Photometric.PALETTE:
            image.putpalette(self._palette())
        return Decoded((image,), _conversion(self.layout, image.mode), self.orientation)

    def _planes(self) -> int:
        layout = self.layout
        return layout.colors + (layout.alpha is not None) if layout.in_planes else 1

    def _palette(self) -> bytes:
        """RGB triples. The file has all reds first, then all greens and blues, of 16 bits."""
        entries = 2**self.layout.bits
        levels = self.directory.values(Tags.PALETTE, 3 * 256)
        if max(levels) > 255:  # some programs write 8 bits, as libtiff notes
            levels = tuple(level // 256 for level in levels)
        return bytes(levels[color * entries + entry] for entry in range(entries) for color in range(3))

    def _image(self, plane: int | None = None) -> Image.Image:
        """Of all samples, or of one plane as a gray image."""
        try:
            image = TiffImagePlugin.TiffImageFile(io.BytesIO(self._described(plane)))
        except SyntaxError as error:
            layout = self.layout
            raise UnsupportedImageError(
                f"a TIFF of the kind {layout.photometric.name} with samples of {layout.bits} bits is not read"
            ) from error
        image.load()
        return image

    def _described(self, plane: int | None) -> bytes:
        """The file with a new directory at its end."""
        order = "<" if self.layout.bits == _PACKED else self.directory.order
        padding = bytes(len(self.encoded) % 2)
        start = len(self.encoded) + len(padding)
        header = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, start)
        tags = dict(sorted(self._tags(order, plane).items()))
        at = start + 2 + 12 * len(tags) + 4
        entries, values = struct.pack(f"{order}H", len(tags)), b""
        for tag, (kind, count, value) in tags.items():
            entries += struct.pack(f"{order}HHI", tag, kind, count)
            if len(value) <= 4:
                entries += value.ljust(4, b"\0")
            else:
                entries += struct.pack(f"{order}I", at + len(values))
                values += value + b"\0" * (len(value) % 2)
        return b"".join((header, memoryview(self.encoded)[len(header) :], padding, entries, bytes(4), values))

    def _tags(self, order: str, plane: int | None) -> dict[int, tuple[int, int, bytes]]:
        """Tag → type, number of values, and their bytes."""
        layout = self.layout
        is_gray = plane is not None or layout.photometric in GRAYS
        samples = 1 if plane is not None else layout.colors + len(layout.extra)
        tags: dict[int, tuple[int, tuple[int, ...]]] = {
            Tags.WIDTH: (LONG, (layout.width,)),
            Tags.HEIGHT: (LONG, (layout.height,)),
            Tags.BITS: (SHORT, (layout.bits,) * samples),
            Tags.COMPRESSION: (SHORT, (layout.compression,)),
            Tags.PHOTOMETRIC: (SHORT, (Photometric.BLACK_IS_ZERO if is_gray else layout.photometric,)),
            Tags.SAMPLES: (SHORT, (samples,)),
            **self._block_tags(plane or 0),
        }
        if layout.extra and plane is None:
            tags[Tags.EXTRA_SAMPLES] = (SHORT, layout.extra)
        if layout.photometric == Photometric.PALETTE:
            tags[Tags.PALETTE] = (SHORT, self.directory.values(Tags.PALETTE, 3 * 256))
        packed = {
            tag: (kind, len(values), struct.pack(f"{order}{len(values)}{'H' if kind == SHORT else 'I'}", *values))
            for tag, (kind, values) in tags.items()
        }
        return packed | self._copied_tags(order)

    def _block_tags(self, plane: int) -> dict[int, tuple[int, tuple[int, ...]]]:
        layout, blocks = self.layout, slice(plane * self.layout.blocks, (plane + 1) * self.layout.blocks)
        offsets, sizes = (
            (Tags.TILE_OFFSETS, Tags.TILE_BYTES) if layout.tiled else (Tags.STRIP_OFFSETS, Tags.STRIP_BYTES)
        )
        tags: dict[int, tuple[int, tuple[int, ...]]] = {
            tag: (LONG, self.directory.values(tag, MAX_BLOCKS)[blocks])
            for tag in (offsets, sizes)
            if tag in self.directory.tags
        }
        if layout.tiled:
            return tags | {Tags.TILE_WIDTH: (LONG, layout.block[:1]), Tags.TILE_HEIGHT: (LONG, layout.block[1:])}
        return tags | {Tags.ROWS_PER_STRIP: (LONG, layout.block[1:])}

    def _copied_tags(self, order: str) -> dict[int, tuple[int, int, bytes]]:
        copied = {}
        for number in _COPIED:
            tag = self.directory.tags.get(number)
            if tag is None or (size := tag.length * VALUE_BYTES.get(tag.kind, 1)) > _MAX_COPIED_BYTES:
                continue
            if tag.kind == SHORT:  # the byte order may change
                value = struct.pack(f"{order}{tag.length}H", *self.directory.values(number, _MAX_COPIED_BYTES))
            else:
                value = self.encoded[tag.at : tag.at + size]
            copied[int(number)] = (tag.kind, tag.length, value)
        return copied


def _conversion(layout: Layout, mode: str) -> Conversion:
    """``mode`` is Pillow's of the decoded image."""
    inverted = layout.photometric == Photometric.WHITE_IS_ZERO
    if layout.bits in (12, 16) and layout.photometric in GRAYS:
        return DeepGray(2**layout.bits - 1, inverted)
    if mode in ("LA", "La"):
        return lambda part: gray_over_white(_gray_with_alpha(part, inverted))
    if inverted:
        return lambda part: ImageChops.invert(part.convert("L"))
    if layout.alpha is not None:
        return over_white
    return {"L": as_stored, "RGB": as_stored, "1": gray}.get(mode, opaque)


def _gray_with_alpha(part: Image.Image, inverted: bool) -> Image.Image:
    levels, alpha = part.convert("LA").split()
    return Image.merge("LA", (ImageChops.invert(levels) if inverted else levels, alpha))


def _planes_conversion(layout: Layout) -> Conversion:
    deep = DeepGray(65_535) if layout.bits == 16 else as_stored
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[layout.colors]
    if layout.alpha is not None:
        mode += "a" if layout.premultiplied else "A"

    def convert(*parts: Image.Image) -> Image.Image:
        bands = [deep(part) for part in parts]
        if layout.photometric == Photometric.WHITE_IS_ZERO:
            bands[0] = ImageChops.invert(bands[0])
        merged = Image.merge(mode, bands) if len(bands) > 1 else bands[0]
        if mode == "La":
            merged = merged.convert("LA")
        return over_white(merged) if layout.alpha is not None else opaque(merged)

    return convert


def read(encoded: bytes) -> TiffImage:
    """Raises ImageError."""
    directory = read_directory(encoded)
    return TiffImage(encoded, directory, layout_of(directory), directory.orientation)
