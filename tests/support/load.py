"""Clients in a closed loop, each over a connection that it keeps, who know what every answer must be."""

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
TOLERANCE = 1e-4  # of a probability: batches of different sizes may round differently


def expectations(*bundles: Bundle) -> dict[tuple[str, str], np.ndarray]:
    """By name and version: each image's probabilities, [images, classes]. They differ between any two images by far more than the tolerance."""
    expected = {}
    for bundle in bundles:
        engine = open_engine(bundle, EngineOptions(max_batch=1)).engine
        decoder = Decoder(bundle.manifest.preprocessing)
        found = softmax(np.concatenate([engine.run(0, decoder.decode(image)[None]).logits for image in IMAGES]))
        engine.close()
        apart = np.abs(found[:, None] - found[None]).max(-1) + np.eye(len(found))
        assert apart.min() > 20 * TOLERANCE, "an answer could be another image's"
        expected[bundle.manifest.name, bundle.manifest.version] = found
    return expected


@dataclass
class Load:
    """``with`` it, so many clients ask without pause. Each of their requests is counted under its status, or as broken or wrong."""

    url: str
    expected: dict[tuple[str, str], np.ndarray]
    connections: int = 16
    counts: Counter[str] = field(default_factory=Counter)
    versions: Counter[tuple[str, str]] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)  # local ports of the connections that broke
    ports: dict[int, int] = field(default_factory=dict)  # of each client's connection
    leave_when_told: bool = False  # end at the first "Connection: close", as a balancer that goes elsewhere

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._ask, args=(number,), daemon=True) for number in range(self.connections)
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

    def wait_for(self, more: int) -> None:
        """Until so many further requests have been answered 200."""
        with self._changed:
            target = self.counts["200"] + more
            assert self._changed.wait_for(lambda: self.counts["200"] >= target, 60), (
                f"nothing moves: {self.counts} {self.complaints[:3]}"
            )

    def _ask(self, number: int) -> None:
        host = self.url.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=60)
        asked = number * 1000
        while not self._stop.is_set():
            asked += 1
            index = asked % len(IMAGES)
            try:
                if connection.sock is None:
                    connection.connect()
                    self.ports[number] = connection.sock.getsockname()[1]
                connection.request("POST", "/v1/classify", IMAGES[index], {"Content-Type": "image/jpeg"})
                response = connection.getresponse()
                body = response.read()
            except ConnectionRefusedError:
                return  # it has gone
            except (OSError, http.client.HTTPException) as error:
                self._count("broken", f"{error!r}")
                self.broken.append(self.ports[number])
                connection.close()
                continue
            complaint = self._check(index, json.loads(body)) if response.status == 200 else body.decode()
            self._count("wrong" if complaint and response.status == 200 else str(response.status), complaint)
            if self.leave_when_told and response.getheader("Connection") == "close":
                return
        connection.close()

    def _check(self, index: int, answer: dict[str, Any]) -> str:
        version = (answer["model"], answer["version"])
        if version not in self.expected:
            return f"unknown version {version}"
        self.versions[version] += 1
        right = self.expected[version][index]
        predictions = answer["results"][0]["predictions"]
        order = np.argsort(-right, kind="stable")[: len(predictions)]
        if any(
            abs(each["probability"] - right[each["index"]]) > TOLERANCE or each["label"] != f"class {each['index']}"
            for each in predictions
        ):
            return f"image {index} of {version} was answered {predictions}; right is {right}"
        if abs(predictions[0]["probability"] - right[order[0]]) > TOLERANCE:
            return f"image {index} of {version}: the most probable class is missing"
        return ""

    def _count(self, what: str, complaint: str) -> None:
        with self._changed:
            self.counts[what] += 1
            if complaint:
                self.complaints.append(complaint)
            self._changed.notify_all()
