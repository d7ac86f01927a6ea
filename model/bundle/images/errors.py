"""Why an image is rejected. The messages are for the client.

ImageError
├── NotAnImageError          the bytes are in none of the allowed formats
│   └── UnsupportedImageError  an allowed format, but of a kind that is not read
├── DamagedImageError        the header is valid, the data is truncated or broken
├── TooManyPixelsError       decoding or resizing would exceed the limit of pixels; decided from the header alone
└── TooComplexError          more scans, chunks, directories or frames than the limit; decided before decoding
"""

from __future__ import annotations


class ImageError(ValueError):
    """The image cannot be decoded. The message is for the client."""


class NotAnImageError(ImageError):
    pass


class UnsupportedImageError(NotAnImageError):
    pass


class DamagedImageError(ImageError):
    pass


class TooManyPixelsError(ImageError):
    pass


class TooComplexError(ImageError):
    pass


_KINDS = {
    kind.__name__: kind
    for kind in (NotAnImageError, UnsupportedImageError, DamagedImageError, TooManyPixelsError, TooComplexError)
}


def named_error(name: str, text: str) -> ImageError | None:
    """The error of a class that another process has named. None if it is no ImageError."""
    return _KINDS[name](text) if name in _KINDS else None
