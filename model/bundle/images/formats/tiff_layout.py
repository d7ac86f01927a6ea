"""The layouts of a TIFF's samples, and those that are read (TIFF 6.0, sections 3 to 23)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from vitserve.model.bundle.images.directory import Directory
from vitserve.model.bundle.images.errors import DamagedImageError, TooComplexError, UnsupportedImageError

MAX_BLOCKS = 32_768  # strips or tiles
_MOST_PADDED = 4  # pixels of all tiles for each pixel of the image, and
_SMALL_TILES = 2**20  # pixels, the tiles of a small image


class Tags(IntEnum):
    WIDTH = 256
    HEIGHT = 257
    BITS = 258
    COMPRESSION = 259
    PHOTOMETRIC = 262
    FILL_ORDER = 266
    STRIP_OFFSETS = 273
    SAMPLES = 277
    ROWS_PER_STRIP = 278
    STRIP_BYTES = 279
    PLANAR = 284
    FAX_3_OPTIONS = 292
    FAX_4_OPTIONS = 293
    PREDICTOR = 317
    PALETTE = 320
    TILE_WIDTH = 322
    TILE_HEIGHT = 323
    TILE_OFFSETS = 324
    TILE_BYTES = 325
    EXTRA_SAMPLES = 338
    SAMPLE_FORMAT = 339
    JPEG_TABLES = 347
    YCBCR_COEFFICIENTS = 529
    YCBCR_SUBSAMPLING = 530
    YCBCR_POSITIONING = 531
    REFERENCE_BLACK_WHITE = 532


OLD_JPEG_TAGS = range(512, 522)  # TIFF 6.0, section 22


class Photometric(IntEnum):
    WHITE_IS_ZERO = 0
    BLACK_IS_ZERO = 1
    RGB = 2
    PALETTE = 3
    CMYK = 5
    YCBCR = 6
    LAB = 8


class Extra(IntEnum):
    """The meaning of a sample that is no color."""

    UNSPECIFIED = 0
    PREMULTIPLIED = 1
    ALPHA = 2
    COREL = 999  # alpha, as Corel Draw 10 writes it


GRAYS = (Photometric.WHITE_IS_ZERO, Photometric.BLACK_IS_ZERO)
# Samples of a color; 1 for all others.
_COLORS = {
    Photometric.RGB: 3,
    Photometric.CMYK: 4,
    Photometric.YCBCR: 3,
    Photometric.LAB: 3,
}  # samples; 1 of all others
_FORMATS = {2: "signed integers", 3: "floating-point numbers", 5: "complex integers", 6: "complex numbers"}
UNCOMPRESSED = 1
OLD_JPEG = 6
JPEGS = (OLD_JPEG, 7)
DICTIONARIES = (34925, 50000)  # LZMA and Zstandard keep a copy of the decompressed data
# Also CCITT, LZW, deflate, PackBits.
_COMPRESSIONS = (UNCOMPRESSED, 2, 3, 4, 5, *JPEGS, 8, 32773, 32946, *DICTIONARIES)
# Photometric interpretation, number of extra samples → bits of a sample. Samples side by side, and in planes.
_SIDE_BY_SIDE = {
    (Photometric.WHITE_IS_ZERO, 0): (1, 2, 4, 8, 12, 16),
    (Photometric.WHITE_IS_ZERO, 1): (8,),
    (Photometric.BLACK_IS_ZERO, 0): (1, 2, 4, 8, 12, 16),
    (Photometric.BLACK_IS_ZERO, 1): (8,),
    (Photometric.PALETTE, 0): (1, 2, 4, 8),
    (Photometric.PALETTE, 1): (8,),
    (Photometric.RGB, 0): (8, 16),
    (Photometric.RGB, 1): (8, 16),
    (Photometric.RGB, 2): (8,),
    (Photometric.RGB, 3): (8,),
    (Photometric.CMYK, 0): (8, 16),
    (Photometric.CMYK, 1): (8,),
    (Photometric.CMYK, 2): (8,),
    (Photometric.YCBCR, 0): (8,),
    (Photometric.LAB, 0): (8,),
}
_IN_PLANES = (*GRAYS, Photometric.RGB, Photometric.CMYK)


@dataclass(frozen=True)
class Layout:
    width: int
    height: int
    photometric: Photometric
    bits: int  # of a sample
    extra: tuple[int, ...]  # the meaning of each sample that is no color
    in_planes: bool
    compression: int
    tiled: bool
    block: tuple[int, int]  # width and height of a tile, or of a strip

    @property
    def colors(self) -> int:
        return _COLORS.get(self.photometric, 1)

    @property
    def blocks(self) -> int:
        """In one plane."""
        return -(-self.width // self.block[0]) * -(-self.height // self.block[1])

    @property
    def alpha(self) -> Extra | None:
        first = self.extra[0] if self.extra else Extra.UNSPECIFIED
        return None if first == Extra.UNSPECIFIED else Extra(first)

    @property
    def premultiplied(self) -> bool:
        return self.alpha == Extra.PREMULTIPLIED


def layout_of(directory: Directory) -> Layout:
    """Raises UnsupportedImageError, DamagedImageError or TooComplexError."""
    width, height = directory.value(Tags.WIDTH, 0), directory.value(Tags.HEIGHT, 0)
    if not width or not height:
        raise DamagedImageError(f"the image is {width} × {height} pixels")
    photometric = _photometric(directory)
    bits, samples = _samples(directory)
    extra = samples - _COLORS.get(photometric, 1)
    if extra < 0:
        raise DamagedImageError(f"the TIFF has {samples} samples a pixel, too few for {photometric.name}")
    tiled = Tags.TILE_OFFSETS in directory.tags
    layout = Layout(
        width,
        height,
        photometric,
        bits,
        _extra(directory, photometric, extra),
        samples > 1 and directory.value(Tags.PLANAR, 1) == 2,
        directory.value(Tags.COMPRESSION, UNCOMPRESSED),
        tiled,
        _block(directory, width, height, tiled),
    )
    _check_kind(layout, directory)
    _check_blocks(layout, directory)
    return layout


def _photometric(directory: Directory) -> Photometric:
    stated = directory.value(Tags.PHOTOMETRIC, 0)
    if directory.value(Tags.COMPRESSION, UNCOMPRESSED) == OLD_JPEG:
        return Photometric.YCBCR  # whatever the tag says
    try:
        photometric = Photometric(stated)
    except ValueError as error:
        raise UnsupportedImageError(
            f"a TIFF of photometric interpretation {stated} is not read; store gray, RGB, a palette, CMYK, YCbCr or Lab"
        ) from error
    one_sample = directory.value(Tags.SAMPLES, 1) == 1
    return Photometric.BLACK_IS_ZERO if photometric == Photometric.YCBCR and one_sample else photometric


def _samples(directory: Directory) -> tuple[int, int]:
    """Bits of each, and number."""
    samples = directory.value(Tags.SAMPLES, 3 if directory.value(Tags.COMPRESSION, UNCOMPRESSED) == OLD_JPEG else 1)
    bits = set(directory.values(Tags.BITS)[: max(samples, 1)] or (1,))
    formats = set(directory.values(Tags.SAMPLE_FORMAT)[: max(samples, 1)] or (1,))
    if formats != {1}:
        kind = _FORMATS.get(max(formats), "undefined type")
        raise UnsupportedImageError(
            f"a TIFF whose samples are {kind} of {max(bits)} bits is not read, because their range is unknown;"
            " store unsigned integers of 8 or 16 bits"
        )
    if len(bits) > 1 or not 1 <= samples <= 16:
        raise UnsupportedImageError(f"a TIFF of {samples} samples of {sorted(bits)} bits a pixel is not read")
    return bits.pop(), samples


def _extra(directory: Directory, photometric: Photometric, count: int) -> tuple[int, ...]:
    stated = directory.values(Tags.EXTRA_SAMPLES)[:count]
    if not stated and photometric == Photometric.RGB and count == 1:
        return (Extra.ALPHA,)  # the tag is missing: by custom, the fourth sample is alpha
    return (*stated, *[Extra.UNSPECIFIED] * (count - len(stated)))


def _block(directory: Directory, width: int, height: int, tiled: bool) -> tuple[int, int]:
    block = (width, min(height, directory.value(Tags.ROWS_PER_STRIP, height)))
    if tiled:
        block = directory.value(Tags.TILE_WIDTH, 0), directory.value(Tags.TILE_HEIGHT, 0)
    if not all(block):
        raise DamagedImageError(f"the TIFF has blocks of {block[0]} × {block[1]} pixels")
    return block


def _check_kind(layout: Layout, directory: Directory) -> None:
    bits, count = layout.bits, len(layout.extra)
    if layout.compression not in _COMPRESSIONS:
        raise UnsupportedImageError(f"a TIFF of compression {layout.compression} is not read")
    if layout.in_planes:
        read = layout.photometric in _IN_PLANES and bits in (8, 16)
    else:
        read = bits in _SIDE_BY_SIDE.get((layout.photometric, count), ())
    read &= all(extra == Extra.UNSPECIFIED for extra in layout.extra[1:])
    read &= count == 0 or layout.extra[0] in _extras(layout.photometric)
    if layout.photometric == Photometric.YCBCR and layout.compression == UNCOMPRESSED:
        read &= (directory.values(Tags.YCBCR_SUBSAMPLING) or (2, 2)) == (1, 1)
    if not read:
        raise UnsupportedImageError(
            f"a TIFF of the kind {layout.photometric.name} with {layout.colors + count} samples of {bits} bits"
            f"{' in planes' if layout.in_planes else ''} is not read; store gray or RGB of 8 bits"
        )


def _extras(photometric: Photometric) -> tuple[int, ...]:
    if photometric == Photometric.CMYK:
        return (Extra.UNSPECIFIED,)
    # Of an index or an inverted gray, multiplication by alpha is not defined.
    if photometric in (Photometric.PALETTE, Photometric.WHITE_IS_ZERO):
        return (Extra.UNSPECIFIED, Extra.ALPHA)
    return tuple(Extra)


def _check_blocks(layout: Layout, directory: Directory) -> None:
    offsets = Tags.TILE_OFFSETS if layout.tiled else Tags.STRIP_OFFSETS
    planes = layout.colors + len(layout.extra) if layout.in_planes else 1
    tag = directory.tags.get(offsets)
    if tag is None or tag.length < planes * layout.blocks:
        raise DamagedImageError(f"the TIFF has {tag.length if tag else 0} blocks and needs {planes * layout.blocks:,}")
    if max(tag.length, planes * layout.blocks) > MAX_BLOCKS:
        raise TooComplexError(f"the TIFF has {tag.length:,} strips or tiles; the limit is {MAX_BLOCKS:,}")
    pixels = layout.blocks * layout.block[0] * layout.block[1]
    if pixels > max(_MOST_PADDED * layout.width * layout.height, _SMALL_TILES):
        raise DamagedImageError(
            f"the TIFF has tiles of {layout.block[0]} × {layout.block[1]} pixels for an image of"
            f" {layout.width} × {layout.height}"
        )
