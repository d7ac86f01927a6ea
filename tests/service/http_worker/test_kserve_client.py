"""KServe's own client against a real server. It needs other versions of our libraries, so it gets an environment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.images import encoded, random_image
from tests.support.server import Server

PROGRAM = """
import asyncio, json, sys
import numpy
from kserve import InferInput, InferRequest, InferenceRESTClient, RESTConfig

async def main(url, path):
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await client.is_server_live(url) and await client.is_server_ready(url)
    assert await client.is_model_ready(url, "tiny")
    image = InferInput("image", [1], "BYTES")
    image.set_data_from_numpy(numpy.array([open(path, "rb").read()], object), binary_data=True)
    pixels = InferInput("pixels", [2, 16, 16, 3], "UINT8")
    pixels.set_data_from_numpy(numpy.full((2, 16, 16, 3), 7, numpy.uint8), binary_data=False)
    shapes = {}
    for tensor in (image, pixels):
        answer = await client.infer(url, InferRequest("tiny", [tensor]), model_name="tiny")
        shapes[tensor.name] = {output.name: output.shape for output in answer.outputs}
    print(json.dumps(shapes))

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_client_of_kserve(server: Server, tmp_path: Path) -> None:
    environment, image = tmp_path / "venv", tmp_path / "image.jpg"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    subprocess.run([environment / "bin/pip", "install", "-q", "kserve>=0.21"], check=True)
    image.write_bytes(encoded(random_image(), "JPEG"))
    command = [str(environment / "bin/python"), "-c", PROGRAM, server.url, str(image)]
    shapes = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    sizes = {"probabilities": 7, "logits": 7, "embedding": 32}
    for name, count in (("image", 1), ("pixels", 2)):
        assert shapes[name] == {output: [count, size] for output, size in sizes.items()}
