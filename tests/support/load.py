"""Clients that send requests without a pause and check every response against the expected one."""

from __future__ import annotations

import http.client
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.support.images import encoded, random_image
from vitserve.model.arrays import softmax
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.preprocess import Decoder
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.engines.selection import open_engine

IMAGES = [encoded(random_image(60, 45, seed=seed), "JPEG") for seed in range(50)]
TOLERANCE = 1e-4  # of a probability: batches of different sizes may be rounded differently


def expectations(*bundles: Bundle) -> dict[tuple[str, str], np.ndarray]:
    """The probabilities of IMAGES by model name and version: float32 [images, classes].

    Any two images differ by far more than the tolerance, so that a response with another image's result is noticed.
    """
    expected = {}
    for bundle in bundles:
        engine = open_engine(bundle, EngineOptions(max_batch=1)).engine
        decoder = Decoder(bundle.manifest.preprocessing)
        logits = np.concatenate([engine.run(0, decoder.decode(image)[None]).logits for image in IMAGES])
        engine.close()
        probabilities = softmax(logits)
        differences = np.abs(probabilities[:, None] - probabilities[None]).max(-1) + np.eye(len(IMAGES))
        assert differences.min() > 20 * TOLERANCE, "two images have nearly equal results"
        expected[bundle.manifest.name, bundle.manifest.version] = probabilities
    return expected


def local_port(connection: http.client.HTTPConnection) -> int:
    assert connection.sock is not None
    port: int = connection.sock.getsockname()[1]
    return port


@dataclass
class Load:
    """Sends requests over ``connections`` connections as long as its ``with`` block runs.

    Counts every request under its status, or as "broken" (the connection failed) or "wrong" (not the expected result).
    """

    url: str
    expected: dict[tuple[str, str], np.ndarray]
    connections: int = 16
    stop_at_close: bool = False  # a client ends at the first "Connection: close", like a balancer that goes elsewhere
    counts: Counter[str] = field(default_factory=Counter)
    versions: Counter[tuple[str, str]] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)  # local ports of the connections that failed
    ports: dict[int, int] = field(default_factory=dict)  # local port of each client's connection

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._send_requests, args=(number,), daemon=True)
            for number in range(self.connections)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self.join()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a request was never answered"

    def wait_for(self, count: int) -> None:
        """Returns when this many more requests have been answered with 200."""
        with self._changed:
            target = self.counts["200"] + count
            answered = self._changed.wait_for(lambda: self.counts["200"] >= target, 60)
            assert answered, f"no {count} responses within a minute: {self.counts} {self.complaints[:3]}"

    def _send_requests(self, client: int) -> None:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        request = client * 1000  # clients start with different images
        while not self._stop.is_set():
            request += 1
            index = request % len(IMAGES)
            try:
                if connection.sock is None:
                    connection.connect()
                    self.ports[client] = local_port(connection)
                connection.request("POST", "/v1/classify", IMAGES[index], {"Content-Type": "image/jpeg"})
                response = connection.getresponse()
                body = response.read()
            except ConnectionRefusedError:
                return  # the service has stopped
            except (OSError, http.client.HTTPException) as error:
                self._count("broken", f"{error!r}")
                self.broken.append(self.ports[client])
                connection.close()
                continue
            complaint = self._check(index, json.loads(body)) if response.status == 200 else body.decode()
            self._count("wrong" if complaint and response.status == 200 else str(response.status), complaint)
            if self.stop_at_close and response.getheader("Connection") == "close":
                return
        connection.close()

    def _check(self, index: int, body: dict[str, Any]) -> str:
        """What is wrong with the response for image ``index``; empty if nothing."""
        version = (body["model"], body["version"])
        if version not in self.expected:
            return f"unknown version {version}"
        self.versions[version] += 1
        expected = self.expected[version][index]
        predictions = body["results"][0]["predictions"]
        most_probable = np.argsort(-expected, kind="stable")[0]
        if any(
            abs(prediction["probability"] - expected[prediction["index"]]) > TOLERANCE
            or prediction["label"] != f"class {prediction['index']}"
            for prediction in predictions
        ):
            return f"image {index} with {version}: got {predictions}, expected {expected}"
        if abs(predictions[0]["probability"] - expected[most_probable]) > TOLERANCE:
            return f"image {index} with {version}: the most probable class is missing"
        return ""

    def _count(self, outcome: str, complaint: str) -> None:
        with self._changed:
            self.counts[outcome] += 1
            if complaint:
                self.complaints.append(complaint)
            self._changed.notify_all()
