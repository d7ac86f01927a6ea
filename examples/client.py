"""A client in Python, without dependencies: ``python client.py [--url URL] [--top-k N] IMAGE…``.

It sends several images at a time. If vitserve rejects an image because of overload, it waits for the time in the
header `Retry-After` and tries again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

ATTEMPTS = 5


class ClassificationError(Exception):
    """vitserve responded with an error."""


@dataclass(frozen=True)
class Prediction:
    label: str
    probability: float


def classify(url: str, image: bytes, top_k: int = 5, timeout_ms: int = 10_000) -> list[Prediction]:
    """The most probable classes of one encoded image. Raises ClassificationError."""
    query = urlencode({"top_k": top_k, "timeout_ms": timeout_ms})
    headers = {"Content-Type": "application/octet-stream"}
    request = Request(f"{url}/v1/classify?{query}", data=image, headers=headers)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urlopen(request, timeout=timeout_ms / 1000 + 5) as response:
                predictions = json.load(response)["results"][0]["predictions"]
                return [Prediction(item["label"], item["probability"]) for item in predictions]
        except HTTPError as error:
            if error.code != 429 or attempt == ATTEMPTS:
                problem = json.load(error)  # application/problem+json, RFC 9457
                raise ClassificationError(f"{problem['title']}: {problem['detail']}") from error
            time.sleep(float(error.headers.get("Retry-After", "1")))
    raise AssertionError("unreachable")


def main() -> int:
    parser = argparse.ArgumentParser(description="Classify images with vitserve.")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--top-k", type=int, default=3)
    options = parser.parse_args()

    def describe(path: Path) -> str:
        predictions = classify(options.url, path.read_bytes(), options.top_k)
        return f"{path}: " + ", ".join(f"{item.label} {item.probability:.1%}" for item in predictions)

    with ThreadPoolExecutor(max_workers=8) as pool:
        try:
            for line in pool.map(describe, options.images):
                print(line)  # noqa: T201
        except (ClassificationError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
