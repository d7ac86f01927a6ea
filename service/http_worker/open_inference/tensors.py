"""Tensors of the Open Inference Protocol: in JSON, or as binary data after the JSON.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol
https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/extension_binary_data.html
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic_core import to_json

from vitserve.model.arrays import Floats, Pixels
from vitserve.service import errors
from vitserve.service.http_worker.inference import base64_image

_LENGTH = struct.Struct("<I")  # before each element of a binary tensor of BYTES


class Input(NamedTuple):
    """An input of a request. ``binary`` is None if the values are in ``data``, from JSON or a typed field of gRPC."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Any
    binary: memoryview | None

    def check(self, datatype: str, shape: Sequence[int | None]) -> None:
        """``shape``: None for any size. Raises BadRequestError."""
        if self.datatype != datatype:
            raise errors.BadRequestError(
                f"input {self.name!r} has datatype {self.datatype[:100]!r}; it must be {datatype}"
            )
        if len(self.shape) != len(shape) or any(
            expected not in (None, size) for size, expected in zip(self.shape, shape, strict=True)
        ):
            expectation = ", ".join("n" if size is None else str(size) for size in shape)
            raise errors.BadRequestError(
                f"input {self.name!r} has shape {list(self.shape)}; it must be [{expectation}]"
            )

    def elements(self) -> list[bytes | errors.ServiceError]:
        """Of a tensor of BYTES [n] or [n, 1]: encoded images. In JSON, they are in base64. Raises BadRequestError.

        No more than n are read: the data of a request may have millions.
        """
        count = self.shape[0]
        if self.binary is None:
            values = list(_flat(self.data))
            if len(values) != count:
                raise self._wrong_count(str(len(values)))
            return [self._element(index, value) for index, value in enumerate(values)]
        elements: list[bytes | errors.ServiceError] = []
        position = 0
        while position < len(self.binary):
            if len(elements) == count:
                raise self._wrong_count(f"more than {count}")
            start = position + _LENGTH.size
            length = _LENGTH.unpack_from(self.binary, position)[0] if start <= len(self.binary) else math.inf
            if start + length > len(self.binary):
                raise errors.BadRequestError(f"the binary data of input {self.name!r} ends within an element")
            position = start + int(length)
            elements.append(bytes(self.binary[start:position]))
        if len(elements) != count:
            raise self._wrong_count(str(len(elements)))
        return elements

    def _wrong_count(self, number: str) -> errors.BadRequestError:
        return errors.BadRequestError(f"input {self.name!r} has {number} elements; its shape needs {self.shape[0]}")

    def _element(self, index: int, value: Any) -> bytes | errors.BadRequestError:
        if isinstance(value, bytes):  # of gRPC
            return value
        if not isinstance(value, str):
            raise errors.BadRequestError(f"input {self.name!r} must have images in base64; element {index} is no text")
        try:
            return base64_image.decode(value.encode())
        except base64_image.Base64Error as error:
            return errors.BadRequestError(f"element {index} of input {self.name!r} {error}")

    def pixels(self) -> Pixels:
        """Of a tensor of UINT8. Raises BadRequestError."""
        count = math.prod(self.shape)
        if self.binary is not None:
            if len(self.binary) != count:
                raise errors.BadRequestError(
                    f"the binary data of input {self.name!r} has {len(self.binary):,} bytes; its shape needs {count:,}"
                )
            return np.frombuffer(self.binary, np.uint8).reshape(self.shape)
        values = np.array(list(_flat(self.data)))
        if len(values) != count:
            raise errors.BadRequestError(f"input {self.name!r} has {len(values):,} values; its shape needs {count:,}")
        if count and (values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255):
            raise errors.BadRequestError(f"input {self.name!r} must have integers from 0 to 255")
        return values.astype(np.uint8).reshape(self.shape)


def _flat(data: Any) -> Iterable[Any]:
    """Tensors in JSON may be nested lists or one list. from_json() has limited the depth."""
    if not isinstance(data, list):
        return [data]
    if any(isinstance(item, list) for item in data):
        return [value for item in data for value in _flat(item)]
    return data


class Output(NamedTuple):
    """An output of a response: float32 [n, …], or the texts of classifications."""

    name: str
    values: Floats | list[list[bytes]]
    binary: bool

    def encode(self) -> tuple[dict[str, Any], bytes]:
        """The entry in the JSON, and the binary data after it."""
        if isinstance(self.values, list):
            datatype, shape = "BYTES", [len(self.values), len(self.values[0])]
            texts = [text for row in self.values for text in row]
            data: Any = [text.decode() for text in texts]
            content = b"".join(_LENGTH.pack(len(text)) + text for text in texts) if self.binary else b""
        else:
            datatype, shape = "FP32", list(self.values.shape)
            data = None if self.binary else self.values.reshape(-1).tolist()
            content = self.values.astype("<f4").tobytes() if self.binary else b""
        entry = {"name": self.name, "datatype": datatype, "shape": shape}
        if self.binary:
            return entry | {"parameters": {"binary_data_size": len(content)}}, content
        return entry | {"data": data}, b""


def message(fields: dict[str, Any], outputs: Iterable[Output]) -> tuple[bytes, int | None]:
    """The body of a response, and the length of its JSON if binary data follows it."""
    entries, contents = zip(*(output.encode() for output in outputs), strict=True)
    text = to_json(fields | {"outputs": entries})
    binary = any("parameters" in entry for entry in entries)
    return b"".join((text, *contents)), len(text) if binary else None
