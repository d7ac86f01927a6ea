"""Requests that several tests send."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families


def classify(client: httpx.Client, image: bytes, **options: int) -> httpx.Response:
    return client.post("/v1/classify", content=image, headers={"content-type": "image/png"}, params=options)


def metric(client: httpx.Client, sample_name: str, /, **labels: str) -> float:
    samples = [
        sample for family in text_string_to_metric_families(client.get("/metrics").text) for sample in family.samples
    ]
    return sum(
        sample.value for sample in samples if sample.name == sample_name and labels.items() <= sample.labels.items()
    )
