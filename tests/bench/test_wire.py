"""What goes over the wire: answers read whole however they come in, requests that carry their image whole."""

from __future__ import annotations

import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from tests.support.images import encoded, random_image
from vitserve.bench.http1 import AnswerReader
from vitserve.bench.request import Picture, multipart, open_inference

JPEG = Picture(encoded(random_image(60, 45), "JPEG"), "image/jpeg")


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=4), st.data())
def test_answers_are_read_whole_however_they_are_cut(bodies: list[bytes], data: st.DataObject) -> None:
    wire = b""
    for body in bodies:
        wire += b"HTTP/1.1 100 Continue\r\n\r\n" if data.draw(st.booleans()) else b""
        if data.draw(st.booleans()):
            parts = (body[:7], body[7:]) if len(body) > 7 else (body,)
            wire += b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            wire += (
                b"".join(b"%x;note=1\r\n%b\r\n" % (len(part), part) for part in parts if part)
                + b"0\r\nTrailer: 1\r\n\r\n"
            )
        else:
            wire += b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=8)))
    reader, found = AnswerReader(), []
    for before, after in itertools.pairwise([0, *cuts, len(wire)]):
        answer = reader.feed(wire[before:after])
        while answer is not None:
            found.append(answer)
            answer = reader.feed(b"")
    assert [each.body for each in found] == bodies
    assert all(each.keeps for each in found)


def test_a_body_may_end_with_its_connection() -> None:
    reader = AnswerReader()
    assert reader.feed(b"HTTP/1.0 200 OK\r\n\r\nwhole ") is None
    assert reader.feed(b"body") is None
    answer = reader.end()
    assert answer is not None
    assert (answer.body, answer.keeps) == (b"whole body", False)


def test_forms_and_tensors_carry_the_image_whole() -> None:
    form = multipart("/x", JPEG, "request")
    head, _, body = form.partition(b"\r\n\r\n")
    assert int(head.rpartition(b"Content-Length: ")[2]) == len(body)
    assert body.count(JPEG.content) == 1
    tensor = open_inference("/x", JPEG, "image", "logits")
    head, _, body = tensor.partition(b"\r\n\r\n")
    length = int(head.partition(b"Inference-Header-Content-Length: ")[2].partition(b"\r")[0])
    header = json.loads(body[:length])
    assert header["inputs"][0]["parameters"]["binary_data_size"] == len(body) - length
    assert body[length:] == len(JPEG.content).to_bytes(4, "little") + JPEG.content
