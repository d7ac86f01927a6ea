"""The service as its users meet it: a process of its own, a real socket."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import signal
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from tests.support.http import classify, metric
from tests.support.images import encoded, png_header, random_image
from tests.support.networks import checkpoint
from tests.support.server import Server, start_server
from vitserve.export.build_bundle import build_bundle
from vitserve.model.arrays import Floats, softmax
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.parity import TOLERANCE
from vitserve.model.bundle.preprocess import Decoder
from vitserve.service import errors
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.engines.selection import open_engine
from vitserve.service.http_worker.app import most_probable


def probabilities(result: dict[str, list[dict[str, float]]]) -> list[float]:
    """In the order of the classes."""
    return [each["probability"] for each in sorted(result["predictions"], key=lambda each: each["index"])]


def all_ways(client: httpx.Client, images: list[bytes]) -> list[np.ndarray]:
    """[images, classes] as answered raw, in one multipart form, and in one JSON body."""
    raw = [classify(client, image, top_k=7).json()["results"][0] for image in images]
    form = client.post("/v1/classify", params={"top_k": 7}, files=[("image", ("name", image)) for image in images])
    sent = {"images": [base64.b64encode(image).decode() for image in images], "top_k": 7}
    return [
        np.array([probabilities(each) for each in results])
        for results in (raw, form.json()["results"], client.post("/v1/classify", json=sent).json()["results"])
    ]


def test_one_shape_of_answer(client: httpx.Client) -> None:
    response = classify(client, encoded(random_image()))
    assert response.status_code == 200
    assert response.json().keys() == {"model", "version", "results"}
    (result,) = response.json()["results"]
    assert len(result["predictions"]) == 5
    assert result["predictions"][0].keys() == {"label", "index", "probability"}
    ordered = [each["probability"] for each in result["predictions"]]
    assert ordered == sorted(ordered, reverse=True)
    assert all(each["label"] == f"class {each['index']}" for each in result["predictions"])


def test_raw_multipart_and_base64_agree_and_are_the_networks(client: httpx.Client, bundle: Bundle) -> None:
    images = [encoded(random_image(seed=seed), "JPEG") for seed in range(20)]
    raw, form, sent = all_ways(client, images)
    np.testing.assert_allclose(form, raw, atol=1e-6)
    np.testing.assert_allclose(sent, raw, atol=1e-6)
    np.testing.assert_allclose(raw.sum(1), 1, atol=1e-6)
    engine = open_engine(bundle, EngineOptions()).engine
    decoder = Decoder(bundle.manifest.preprocessing)
    expected = softmax(engine.run(0, np.stack([decoder.decode(image) for image in images])).logits)
    engine.close()
    np.testing.assert_allclose(raw, expected, atol=1e-5)


def test_all_photos_agree_however_they_are_sent(client: httpx.Client, photos: list[Path]) -> None:
    raw, form, sent = all_ways(client, [photo.read_bytes() for photo in photos])
    np.testing.assert_allclose(form, raw, atol=1e-6)
    np.testing.assert_allclose(sent, raw, atol=1e-6)
    np.testing.assert_allclose(raw.sum(1), 1, atol=1e-6)


def test_many_at_once_each_get_their_own_answer(client: httpx.Client) -> None:
    images = [encoded(random_image(seed=seed)) for seed in range(40)]
    alone = [probabilities(classify(client, image, top_k=7).json()["results"][0]) for image in images]
    with ThreadPoolExecutor(16) as pool:
        crowd = list(pool.map(lambda index: classify(client, images[index % 40], top_k=7).json(), range(400)))
    for index, answer in enumerate(crowd):
        np.testing.assert_allclose(probabilities(answer["results"][0]), alone[index % 40], atol=1e-6)


def test_a_bad_image_among_several_carries_its_own_error(client: httpx.Client) -> None:
    good = encoded(random_image())
    response = client.post(
        "/v1/classify",
        files=[("a", good), ("b", b"not an image"), ("c", good[:-40]), ("d", png_header(9000, 9000)), ("e", good)],
    )
    assert response.status_code == 200
    results = response.json()["results"]
    assert [each["error"]["code"] for each in results if "error" in each] == [
        "not_an_image",
        "damaged_image",
        "image_too_large",
    ]
    assert probabilities(results[0]) == probabilities(results[4])
    sent = client.post("/v1/classify", json={"images": ["%%%", 7, base64.b64encode(good).decode()]})
    assert [each.get("error", {}).get("code") for each in sent.json()["results"]] == [
        "bad_request",
        "bad_request",
        None,
    ]


def test_server_timing_names_the_stages(client: httpx.Client) -> None:
    timing = classify(client, encoded(random_image())).headers["server-timing"]
    assert re.fullmatch(r"read;dur=[\d.]+, decode;dur=[\d.]+, queue;dur=[\d.]+, inference;dur=[\d.]+", timing)


GOOD = encoded(random_image())
ANOTHER_FIELD = b'--x\r\nContent-Disposition: form-data; name="path"\r\n\r\n/etc\r\n--x--\r\n'
PROBLEMS: dict[str, tuple[int, str, bytes, str, str]] = {
    "empty": (422, "not_an_image", b"", "image/png", ""),
    "text": (422, "not_an_image", b"hello", "image/png", ""),
    "truncated": (422, "damaged_image", GOOD[:-40], "image/png", ""),
    "huge in its header": (413, "image_too_large", png_header(20000, 20000), "image/png", ""),
    "unknown type": (415, "unsupported_media_type", b"a=b", "application/x-www-form-urlencoded", ""),
    "not json": (400, "bad_request", b"{", "application/json", ""),
    "deep json": (400, "bad_request", b"[" * 100_000, "application/json", ""),
    "json of another shape": (400, "bad_request", b'{"image": ""}', "application/json", ""),
    "json with an unknown field": (
        400,
        "bad_request",
        b'{"images": [""], "url": "http://127.0.0.1/"}',
        "application/json",
        "",
    ),
    "no images": (400, "bad_request", b'{"images": []}', "application/json", ""),
    "too many images": (400, "bad_request", json.dumps({"images": [""] * 65}).encode(), "application/json", ""),
    "a form without its boundary": (400, "bad_request", b"--x\r\n\r\n", "multipart/form-data", ""),
    "a broken form": (400, "bad_request", b"garbage", "multipart/form-data; boundary=x", ""),
    "a form with another field": (
        400,
        "bad_request",
        b'--x\r\nContent-Disposition: form-data; name="path"\r\n\r\n/etc\r\n--x--\r\n',
        "multipart/form-data; boundary=x",
        "",
    ),
    "top_k of zero": (400, "bad_request", GOOD, "image/png", "?top_k=0"),
    "top_k above the classes": (400, "bad_request", GOOD, "image/png", "?top_k=8"),
    "top_k of words": (400, "bad_request", GOOD, "image/png", "?top_k=many"),
    "timeout of zero": (400, "bad_request", GOOD, "image/png", "?timeout_ms=0"),
}


@pytest.mark.parametrize(("status", "code", "body", "kind", "query"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_problems_have_a_status_and_a_stable_code(
    client: httpx.Client, status: int, code: str, body: bytes, kind: str, query: str
) -> None:
    response = client.post(f"/v1/classify{query}", content=body, headers={"content-type": kind})
    problem = response.json()
    assert (response.status_code, problem["code"]) == (status, code), problem
    assert response.headers["content-type"] == "application/problem+json"
    assert problem.keys() >= {"type", "title", "status", "detail"}


def test_what_a_client_wrote_can_be_sent_back_in_a_message(client: httpx.Client) -> None:
    """A lone surrogate, which no UTF-8 holds."""
    answer = client.post(
        "/v1/classify", content=b'{"images":[],"\\ud800":1}', headers={"content-type": "application/json"}
    )
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
    assert metric(client, "vitserve_requests_total", route="/v1/classify", status="400") > 0


@given(values=arrays(np.float32, st.integers(1, 60), elements=st.sampled_from([0.0, 0.125, 0.25, 0.5])), data=st.data())
def test_the_most_probable_come_first_and_of_equal_ones_the_first_class(values: Floats, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    found = most_probable(values, count)
    assert found == sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]
    assert {type(index) for index in found} == {int}


def test_labels_are_sent_as_they_are_written(tmp_path: Path) -> None:
    labels = ("Möwe", "猫", 'so-called "bird"', "back\\slash", "\t", "🦆", "plain")
    build_bundle(dataclasses.replace(checkpoint(), labels=labels), tmp_path / "bundle", name="labels")
    running = start_server("--bundle", str(tmp_path / "bundle"))
    with httpx.Client(base_url=running.url, timeout=60) as own:
        response = classify(own, GOOD, top_k=7)
    assert response.headers["content-type"] == "application/json"
    assert {each["index"]: each["label"] for each in response.json()["results"][0]["predictions"]} == dict(
        enumerate(labels)
    )
    assert running.stop() == 0


def test_messages_name_both_numbers(client: httpx.Client) -> None:
    assert (
        "20000 × 20000 pixels; the limit is 50,000,000" in classify(client, png_header(20000, 20000)).json()["detail"]
    )
    assert "top_k is 8; it must be from 1 to 7" in classify(client, GOOD, top_k=8).json()["detail"]


@pytest.mark.parametrize(
    "image",
    [
        encoded(Image.new("RGB", (1, 1), "red")),
        encoded(random_image().convert("CMYK"), "JPEG"),
        encoded(Image.fromarray(np.arange(0, 65536, 16, np.uint16).reshape(64, 64))),
        encoded(random_image(), "GIF", save_all=True, append_images=[random_image(seed=1)]),
        encoded(random_image(), "WEBP"),
        encoded(random_image(), "BMP"),
        encoded(random_image(), "TIFF", compression="tiff_lzw"),
    ],
    ids=["1x1", "cmyk", "16-bit", "animated", "webp", "bmp", "tiff"],
)
def test_unusual_images_are_answered(client: httpx.Client, image: bytes) -> None:
    response = client.post("/v1/classify", content=image, headers={"content-type": "application/octet-stream"})
    assert response.status_code == 200, response.text


def test_every_error_has_its_own_code() -> None:
    def below(kind: type[errors.ServiceError]) -> list[type[errors.ServiceError]]:
        return [kind] + [each for direct in kind.__subclasses__() for each in below(direct)]

    kinds = below(errors.ServiceError)
    assert len({each.code for each in kinds}) == len(kinds)
    assert errors.__doc__ is not None
    for each in kinds[1:]:
        assert f"{each.__name__} {each.status}" in errors.__doc__


def test_a_body_over_the_limit_is_cut_off_while_it_streams(bundle: Bundle) -> None:
    """The declared length is rejected at once; an undeclared one when the limit is passed, though the body never ends."""
    running = start_server("--bundle", str(bundle.path), "--max-body-bytes", "100000")
    host, port = running.url.removeprefix("http://").split(":")
    heading = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    try:
        for start in (
            b"Content-Length: 100001\r\n\r\n",
            b"Transfer-Encoding: chunked\r\n\r\n" + b"186a1\r\n" + b"x" * 100_001,
        ):
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.sendall(heading + start)
                answer = connection.recv(65536)
                assert answer.startswith(b"HTTP/1.1 413")
        with httpx.Client(base_url=running.url) as client:
            assert "100,001 bytes; the limit is 100,000" in classify(client, b"x" * 100_001).json()["detail"]
    finally:
        assert running.stop() == 0


def test_a_client_that_goes_away_mid_body_costs_nothing(server: Server, client: httpx.Client) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(20):
        with socket.create_connection((host, int(port))) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(
                b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nabc"
            )
    assert classify(client, GOOD).status_code == 200
    assert metric(client, "vitserve_images_in_flight") == 0


def test_metrics_count_what_happened(client: httpx.Client) -> None:
    def counted() -> list[float]:
        return [
            metric(client, "vitserve_requests_total", route="/v1/classify", status="200"),
            metric(client, "vitserve_requests_total", route="/v1/classify", status="422"),
            metric(client, "vitserve_images_total", outcome="ok"),
            metric(client, "vitserve_images_total", outcome="not_an_image"),
            metric(client, "vitserve_batch_size_sum"),
            metric(client, "vitserve_decode_seconds_count"),
        ]

    before = counted()
    classify(client, GOOD)
    classify(client, b"no")
    client.post("/v1/classify", files=[("a", GOOD), ("b", GOOD)])
    assert [after - ahead for after, ahead in zip(counted(), before, strict=True)] == [2, 1, 3, 1, 3, 4]
    assert metric(client, "vitserve_ready") == 1
    precision = client.get("/v1/model").json()["serving"]["precision"]
    assert metric(client, "vitserve_model_info", name="tiny", engine="openvino", precision=precision) == 1


def test_what_operators_ask(client: httpx.Client, bundle: Bundle) -> None:
    assert client.get("/livez").json() == {"status": "live"}
    ready = client.get("/readyz").json()
    assert (ready["status"], ready["reasons"]) == ("ready", [])
    assert all(each["cause"] == "unavailable" for each in ready["rejected"]), (
        "bf16, on a CPU that has none, and nothing else"
    )
    model = client.get("/v1/model").json()
    assert (model["name"], model["version"], model["labels"]) == ("tiny", bundle.manifest.version, list(bundle.labels))
    serving = model["serving"]
    assert serving["engine"] == "openvino"
    assert serving["precision"] == ("fp32" if ready["rejected"] else "bf16")
    assert serving["parity"]["logits"] < TOLERANCE[serving["precision"]]
    assert "/v1/classify" in client.get("/openapi.json").json()["paths"]
    assert client.get("/docs").status_code == 200


def test_overload_is_refused_with_a_retry_after_and_the_admitted_are_answered(bundle: Bundle) -> None:
    """A form of more images than there are slots: those without a slot are shed before they are decoded."""
    running = start_server("--bundle", str(bundle.path), "--slots", "8", "--max-images", "8")
    try:
        with httpx.Client(base_url=running.url, timeout=60) as client, ThreadPoolExecutor(12) as pool:
            many = [("image", encoded(random_image(1200, 900, seed=seed))) for seed in range(8)]
            answers = list(pool.map(lambda _: client.post("/v1/classify", files=many), range(12)))
            rejection = [
                each["error"]
                for answer in answers
                if answer.status_code == 200
                for each in answer.json()["results"]
                if "error" in each
            ]
            rejected = [answer for answer in answers if answer.status_code == 429]
            assert {answer.status_code for answer in answers} <= {200, 429}
            assert {each["code"] for each in rejection} <= {"overloaded"}
            assert rejection or rejected
            assert all(
                int(answer.headers["retry-after"]) >= 1 and answer.json()["retry_after_seconds"] >= 0
                for answer in rejected
            )
            assert metric(client, "vitserve_images_shed_total") == len(rejection) + 8 * len(rejected)
            assert metric(client, "vitserve_images_in_flight") == 0
            assert classify(client, GOOD).status_code == 200
    finally:
        assert running.stop() == 0


def test_a_deadline_that_cannot_be_met_is_refused(client: httpx.Client) -> None:
    """A form of 64 images of which the last cannot be through in a millisecond: each is answered, shed, or late, and none hangs."""
    form = [("image", encoded(random_image(800, 600, seed=seed))) for seed in range(64)]
    response = client.post("/v1/classify", params={"timeout_ms": 1}, files=form)
    outcomes = response.json().get("results", [{"error": response.json()}])
    assert {each["error"]["code"] for each in outcomes if "error" in each} <= {"overloaded", "deadline_exceeded"}
    assert any("error" in each for each in outcomes)


def test_sigterm_answers_what_was_admitted_and_ends_with_zero(bundle: Bundle) -> None:
    running = start_server("--bundle", str(bundle.path))
    host, port = running.url.removeprefix("http://").split(":")
    image = encoded(random_image(2000, 1500))
    half_sent, finish = threading.Barrier(9), threading.Event()
    answers: list[bytes] = []

    def send() -> None:
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            heading = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: image/png\r\nContent-Length: {len(image)}\r\n\r\n"
            connection.sendall(heading.encode() + image[:1000])
            half_sent.wait()
            finish.wait()
            connection.sendall(image[1000:])
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
            answers.append(answer)

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    half_sent.wait()
    with httpx.Client(base_url=running.url) as client:
        assert client.get("/readyz").status_code == 200
        running.process.send_signal(signal.SIGTERM)
    running.wait_for("draining")
    finish.set()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)
    assert running.process.wait(60) == 0


def test_a_service_without_a_model_lives_is_not_ready_and_says_why(tmp_path: Path) -> None:
    running = start_server("--bundle", str(tmp_path), until="the bundle cannot be served")
    try:
        with httpx.Client(base_url=running.url) as client:
            assert client.get("/livez").status_code == 200
            ready = client.get("/readyz")
            assert ready.status_code == 503
            assert "is not a bundle" in ready.json()["reasons"][0]
            assert classify(client, GOOD).status_code == 503
            assert metric(client, "vitserve_ready") == 0
    finally:
        assert running.stop() == 0
