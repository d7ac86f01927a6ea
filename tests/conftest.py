"""What several test files share: a small bundle, images made here, and a real server process."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import httpx
import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image

from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.load import Checkpoint
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ViTConfig
from vitserve.model.network.vit import ViT

hypothesis.settings.register_profile(
    "any machine", deadline=None
)  # how long an example takes says how busy the machine is
hypothesis.settings.load_profile("any machine")

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
TINY = ViTConfig(image_size=16, patch_size=8, width=32, depth=2, heads=2, mlp_width=64, classes=7)


def network(config: ViTConfig, seed: int = 0) -> ViT:
    """Random weights large enough that logits differ from image to image."""
    torch.manual_seed(seed)
    made = ViT(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def checkpoint(config: ViTConfig = TINY, seed: int = 0) -> Checkpoint:
    labels = tuple(f"class {index}" for index in range(config.classes))
    return Checkpoint(network(config, seed), labels, Preprocessing(config.image_size))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """A smooth random color picture, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What engines compile and sources become is kept for this run, and not where the user keeps it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> None:
    """Networks as small as the tests' run faster on one: torch's threads spin while they wait for one another, on the cores that the servers want."""
    torch.set_num_threads(1 if request.node.get_closest_marker("slow") is None else os.cpu_count() or 1)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_bundle(checkpoint(), tmp_path_factory.mktemp("bundles") / "tiny", name="tiny")


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    found = sorted((SHARED / "data" / "photos").glob("*.jpg"))
    if not found:
        pytest.skip("the real photos are not beside the repository")
    return found


@pytest.fixture(scope="session")
def timm() -> Iterator[ModuleType]:
    """The library whose names and preprocessing are ours too. Optional: `pip install --no-deps timm torchvision`.

    timm imports torchvision, whose compiled operators do not fit a CPU build of torch: they are declared, and never called.
    """
    if importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None:
        pytest.skip("timm and torchvision are not installed")
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, about themselves
        import timm as imported
        import timm.data
    yield imported
    del library


@pytest.fixture(scope="session")
def transformers(timm: ModuleType) -> ModuleType:
    """After timm's fixture, which declares what torchvision lacks here."""
    return pytest.importorskip("transformers", reason="transformers is not installed")


@dataclass
class Server:
    """A `vitserve serve` of its own process, on a free port."""

    process: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)
    _ended: bool = False
    _grown: threading.Condition = field(default_factory=threading.Condition)

    def read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                with self._grown:
                    self.log.append(line)
                    self._grown.notify_all()
        with self._grown:
            self._ended = True
            self._grown.notify_all()

    def wait_for(self, pattern: str) -> str:
        """The last group (or the whole) of the pattern in the log, as soon as it is there."""
        with self._grown:
            while not (found := re.search(pattern, "".join(self.log))):
                assert not self._ended, f"the server ended without {pattern!r}:\n{''.join(self.log)}"
                assert self._grown.wait(60), f"no {pattern!r} within a minute:\n{''.join(self.log)}"
            return found.group(found.lastindex or 0)

    def pids(self, module: str) -> list[int]:
        """Of the processes that the supervisor has started to run this module, in the order of their start."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
                command = (directory / "cmdline").read_bytes().split(b"\0")
            except (OSError, IndexError):  # it has ended meanwhile
                continue
            if parent == self.process.pid and module.encode() in command:
                found.append(int(directory.name))
        return sorted(found)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def start_server(
    *arguments: str, until: str = "vitserve.http_worker: ready", environment: Mapping[str, str] | None = None
) -> Server:
    """Returns when the log says so; whatever it says instead is in the failure."""
    command = [sys.executable, "-m", "vitserve", "serve", "--port", "0", *arguments]
    complete = os.environ | {"PYTHONWARNINGS": "default"} | dict(environment or {})
    process = subprocess.Popen(
        command, cwd=ROOT, env=complete, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stderr is not None
    running = Server(process)
    threading.Thread(target=running.read, daemon=True).start()  # a pipe that nobody reads would stop the server
    running.url = running.wait_for(r"running on (http://[\d.:]+)")
    running.wait_for(re.escape(until))
    return running


@pytest.fixture(scope="session")
def server(bundle: Bundle) -> Iterator[Server]:
    running = start_server("--bundle", str(bundle.path), "--max-images", "64", "--timeout-ms", "60000")
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made
