"""Turns a decoded image upright and opaque, in strips, and then resizes and crops it.

Strips need little memory. The resize is one call for the whole image, because Pillow rounds to 8 bits between its pass
over rows and its pass over columns, and decides by the sizes which pass is the first. So the result equals that of the
source libraries bit for bit. If only the part that the crop keeps is resized, some values differ slightly.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from vitserve.model.bundle.images.decoded import Decoded, Footprint, as_stored

STRIP_PIXELS = 2**18
_KEPT = 1.05  # the allocator keeps some of the memory that is freed in between
_STRIP_BYTES = 32  # that a conversion takes at most for each pixel

# EXIF 2.32, 4.6.4: orientation → the transposition that undoes it. 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TRANSPOSED = (5, 6, 7, 8)
_REVERSED = (3, 4, 7, 8)  # the upright rows begin at the end of the stored rows or columns
# Coefficients of the filter for each pixel of the larger image (Pillow's Resample.c).
_COEFFICIENTS = {
    Image.Resampling.NEAREST: 0,
    Image.Resampling.BILINEAR: 2,
    Image.Resampling.BICUBIC: 4,
    Image.Resampling.LANCZOS: 6,
}


@dataclass(frozen=True)
class Target:
    """The pixels that are wanted."""

    size: tuple[int, int]  # width and height of the whole upright image after the resize
    left: int  # of the crop; negative with a border
    top: int
    width: int  # of the crop
    height: int
    channels: int  # 3, or 1 for gray
    resampling: Image.Resampling
    border: tuple[int, ...] | None = None  # its color, one value for each channel
    whole: bool = True  # resize all of the image before the crop

    @property
    def resizes_part(self) -> bool:
        """Not with the nearest pixel, which could be another one."""
        smaller = (self.width, self.height) != self.size
        return smaller and not self.whole and self.border is None and self.resampling != Image.Resampling.NEAREST

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part that the crop keeps, of an image of this size before the resize."""
        across, down = width / self.size[0], height / self.size[1]
        return (
            max(0.0, self.left * across),
            max(0.0, self.top * down),
            min(width, (self.left + self.width) * across),
            min(height, (self.top + self.height) * down),
        )


def is_transposed(orientation: int) -> bool:
    return orientation in _TRANSPOSED


def resized(decoded: Decoded, target: Target) -> Image.Image:
    """RGB or L, ``target.width`` pixels wide and ``target.height`` high."""
    image = _upright(decoded)
    mode = "RGB" if target.channels == 3 else "L"
    if mode == "L" and image.mode != "L":  # before the resize, as the source libraries do
        image = image.convert("L")
    if image.size != target.size:
        if target.resizes_part:
            image = image.resize((target.width, target.height), target.resampling, target.box(*image.size))
            return image if image.mode == mode else image.convert(mode)
        image = image.resize(target.size, target.resampling)
    if target.border is not None:
        return _framed(image.convert(mode), target)
    image = image.crop((target.left, target.top, target.left + target.width, target.top + target.height))
    return image if image.mode == mode else image.convert(mode)


def _framed(image: Image.Image, target: Target) -> Image.Image:
    assert target.border is not None
    color = target.border if len(target.border) > 1 else target.border[0]
    framed = Image.new(image.mode, (target.width, target.height), color)
    framed.paste(image, (-target.left, -target.top))
    return framed


def peak_bytes(footprint: Footprint, size: tuple[int, int], orientation: int, target: Target) -> int:
    """Upper bound of the memory that decoding an image of ``size``, and resized(), take."""
    width, height = (-(-side // footprint.scale) for side in size)
    copy = 0
    if orientation != 1 or (footprint.converted and not footprint.in_place):
        copy = (footprint.converted or 4) * width * height + 8 * max(width, height)
    if target.channels == 1:
        copy += width * height
    strip = _STRIP_BYTES * min(max(STRIP_PIXELS, width, height), width * height) if copy or footprint.converted else 0
    if is_transposed(orientation):
        width, height = height, width
    wide, high = target.size
    taps = _COEFFICIENTS[target.resampling]
    coefficients = 8 * (taps * (width + height) + (taps + 3) * (wide + high))
    passes = 4 * (max(wide * height, width * high) + wide * high)
    return int(_KEPT * max(footprint.decoding, footprint.decoded + copy + max(strip, coefficients + passes)))


def _upright(decoded: Decoded) -> Image.Image:
    """L, RGB, or RGBX."""
    plane = decoded.planes[0]
    if decoded.convert is as_stored and decoded.orientation == 1:
        return plane
    width, height = plane.size[::-1] if is_transposed(decoded.orientation) else plane.size
    rows = max(1, STRIP_PIXELS // width)
    if rows >= height:
        return _part(decoded, 0, height)
    first = _part(decoded, 0, rows)
    in_place = decoded.orientation == 1 and plane.mode in (first.mode, f"{first.mode}X")  # RGBX holds RGB
    upright = plane if in_place else Image.new(first.mode, (width, height))
    upright.paste(first, (0, 0))
    for top in range(rows, height, rows):
        upright.paste(_part(decoded, top, min(top + rows, height)), (0, top))
    return upright


def _part(decoded: Decoded, top: int, bottom: int) -> Image.Image:
    """Rows of the upright image, converted."""
    width, height = decoded.planes[0].size
    transposed = is_transposed(decoded.orientation)
    if decoded.orientation in _REVERSED:
        length = width if transposed else height
        top, bottom = length - bottom, length - top
    box = (top, 0, bottom, height) if transposed else (0, top, width, bottom)
    whole = box == (0, 0, width, height)
    part = decoded.convert(*(plane if whole else plane.crop(box) for plane in decoded.planes))
    return part if decoded.orientation == 1 else part.transpose(_UPRIGHT[decoded.orientation])
