"""Fetches from a hub in a process of its own, because huggingface_hub reads its environment when it is imported."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

SCRIPT = """
import json, sys
from vitserve.export.checkpoint.errors import HubError
from vitserve.export.checkpoint.hub import fetch
try:
    snapshot = fetch(sys.argv[1])
except HubError as error:
    sys.exit(f"HubError: {error}")
print(json.dumps([str(snapshot.path), snapshot.commit]))
"""

CONFIG, PREPROCESSOR, WEIGHTS = b'{"model_type": "vit"}', b'{"size": 224}', random.Random(0).randbytes(2_000_000)
PLAIN = {"config.json": CONFIG, "preprocessor_config.json": PREPROCESSOR, "model.safetensors": WEIGHTS}
UNUSED = {
    "README.md": b"# A model",
    "modeling_x.py": b"raise SystemExit",
    "tf_model.h5": b"h5",
    "pytorch_model.bin": b"pickle",
    "model.fp16.safetensors": b"half",
    "onnx/config.json": b"{}",
}
SHARDS = {f"model-0000{index}-of-00002.safetensors": random.Random(index).randbytes(1_000_000) for index in (1, 2)}


def index_of(*shards: str) -> bytes:
    """A model.safetensors.index.json with two tensors per shard."""
    weight_map = {f"tensor.{number}": shard for number, shard in enumerate(shards * 2)}
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


SHARDED = {"config.json": CONFIG, "model.safetensors.index.json": index_of(*SHARDS), **SHARDS}


@dataclass(frozen=True)
class Fetched:
    files: dict[str, bytes]
    commit: str
    stderr: str


@dataclass(frozen=True)
class ClientMachine:
    """A user's machine: a home directory with the cache, and the URL of a hub."""

    home: Path
    endpoint: str

    def fetch(self, source: str, **settings: str) -> Fetched:
        result = self._run(source, settings)
        assert result.returncode == 0, result.stderr
        path, commit = json.loads(result.stdout)
        files = {str(file.relative_to(path)): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}
        return Fetched(files, commit, result.stderr)

    def error(self, source: str, **settings: str) -> str:
        """The message of the HubError that fetching raises."""
        result = self._run(source, settings)
        last_line = result.stderr.strip().rsplit("\n", 1)[-1]
        assert (result.returncode, last_line[:10]) == (1, "HubError: "), result.stderr
        return last_line

    def _run(self, source: str, settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
        # A minimal environment: no proxy, token or setting of the user who runs the tests.
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "HOME": str(self.home),
            "HF_HOME": str(self.home / "hf"),
            "HF_ENDPOINT": self.endpoint,
            **settings,
        }
        command = [sys.executable, "-W", "error", "-c", SCRIPT, source]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
