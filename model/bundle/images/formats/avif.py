"""AVIF (AV1 Image File Format 1.1): the first image. The frames that AV1 will decode are checked before decoding.

The size that the file states need not be that of its frames: libavif decodes frames of any size, and then scales them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import AvifImagePlugin, Image

from vitserve.model.bundle.images.decoded import Decoded, Footprint, as_stored, over_white
from vitserve.model.bundle.images.directory import orientation_of
from vitserve.model.bundle.images.errors import DamagedImageError, UnsupportedImageError
from vitserve.model.bundle.images.formats import av1, heif

_FEW_FRAMES = 4  # more are the cells of a grid, which libavif copies into one image
_AV1_BYTES = 1  # of a pixel, for the state of the decoder
_MOST_CODED = 2  # pixels of a frame for each stated pixel of the image, and
_SMALL_FRAME = 2**16  # pixels, the cells of a grid around a small image


@dataclass(frozen=True)
class AvifImage:
    encoded: bytes
    size: tuple[int, int]
    mode: str
    orientation: int
    frames: tuple[av1.Frame, ...]

    format = "AVIF"

    @property
    def footprint(self) -> Footprint:
        width, height = self.size
        pixels, channels = width * height, len(self.mode)
        planes = sum(frame.width * frame.height * (frame.bytes_per_pixel + _AV1_BYTES) for frame in self.frames)
        if len(self.frames) > _FEW_FRAMES:
            planes += pixels * self.frames[0].bytes_per_pixel
        decoded = (channels if self.mode in ("L", "RGBA") else 4) * pixels + 8 * height
        # libavif's pixels and Pillow's copy of them; then the copy and the image.
        decoding = max(int(planes) + 2 * channels * pixels, channels * pixels + decoded)
        return Footprint(decoding, decoded, 4 if self.mode == "RGBA" else 0)

    @property
    def seconds(self) -> float:
        coded = sum(frame.width * frame.height for frame in self.frames)
        return (coded + self.size[0] * self.size[1]) * 5e-9 + len(self.encoded) * 8e-8

    def decode(self) -> Decoded:
        data = self._first_frame()
        if self.mode == "RGB":
            image = Image.frombytes(self.mode, self.size, data)
        else:
            image = Image.frombuffer(self.mode, self.size, data, "raw", self.mode, 0, 1)  # shares the memory
        return Decoded((image,), over_white if self.mode == "RGBA" else as_stored, self.orientation)

    def _first_frame(self) -> bytes:
        """Not by Image.load(), which keeps AV1's planes while it copies the pixels."""
        file = AvifImagePlugin.AvifImageFile(io.BytesIO(self.encoded))
        data: bytes = file._decoder.get_frame(0)[0]
        return data


def read(encoded: bytes) -> AvifImage:
    """Raises ImageError."""
    frames = [frame for data in heif.av1_data(encoded) for frame in av1.frames(data)]
    if not frames:
        raise UnsupportedImageError("the file has no AV1 image; other HEIF files, such as HEIC, are not read")
    try:
        file = AvifImagePlugin.AvifImageFile(io.BytesIO(encoded))
    except Exception as error:  # Pillow raises errors of several types here
        raise DamagedImageError(f"the AVIF's header is damaged: {error}") from error
    width, height = file.size
    for frame in frames:
        if frame.width * frame.height > max(_MOST_CODED * width * height, _SMALL_FRAME):
            raise DamagedImageError(
                f"the AVIF has a frame of {frame.width} × {frame.height} pixels for an image of {width} × {height}"
            )
    orientation = orientation_of(file.info.get("exif", b""))
    return AvifImage(encoded, file.size, file.mode, orientation, tuple(frames))
