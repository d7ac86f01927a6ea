"""Fixtures that several test files share: a small bundle, real photos, a server process.

torch is imported in the fixtures, because the process that distributes the tests reads this file too.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import hypothesis
import pytest

from tests.support.paths import PHOTOS, ROOT
from tests.support.server import Server, start_server
from vitserve.model.bundle.bundle import Bundle

pytest_plugins = ["tests.support.gpu.fixtures"]

# Without a deadline: how long an example takes depends on how busy the machine is.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


LONGEST_FIRST = ("service/supervisor", "service/http_worker", "deploy", "service", "export")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first. At the end, two processes then share short ones, and neither waits long."""

    def place(item: pytest.Item) -> int:
        directory = item.path.relative_to(ROOT / "tests").as_posix()
        ranks = [rank for rank, name in enumerate(LONGEST_FIRST) if directory.startswith(f"{name}/")]
        return ranks[0] if ranks else len(LONGEST_FIRST)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """The imported modules stay until the end. From now on, the garbage collector does not visit their objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled engines and exported bundles are cached in a directory of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same one in all processes of this run."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture(scope="session", autouse=True)
def kept_traces(shared_directory: Path) -> Iterator[None]:
    """No network is traced twice, not even by two processes of this run."""
    from tests.support.traces import traces_in

    with traces_in(shared_directory):
        yield


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> None:
    """Small networks run faster on one thread: waiting threads spin, on the cores that the servers need."""
    import torch

    torch.set_num_threads(1 if request.node.get_closest_marker("slow") is None else os.cpu_count() or 1)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from tests.support.networks import checkpoint
    from vitserve.export.build_bundle import build_bundle

    return build_bundle(checkpoint(), tmp_path_factory.mktemp("bundles") / "tiny", name="tiny")


@pytest.fixture(scope="session")
def slow_bundle(shared_directory: Path) -> Bundle:
    """Takes tens of milliseconds per image, so that a test can act while a batch runs."""
    from tests.support import bundles

    return bundles.built_once(shared_directory / "slow", bundles.slow_bundle)


@pytest.fixture(scope="session")
def int8_bundle(shared_directory: Path) -> Bundle:
    """With calibrated int8."""
    from tests.support import bundles

    pytest.importorskip("nncf", reason="nncf is not installed")
    return bundles.built_once(shared_directory / "int8", bundles.int8_bundle)


@pytest.fixture(scope="session")
def fp8_bundle(shared_directory: Path) -> Bundle:
    from tests.support import bundles

    return bundles.built_once(shared_directory / "fp8", bundles.fp8_bundle)


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    paths = sorted(PHOTOS.glob("*.jpg"))
    if not paths:
        pytest.skip("TEST_PHOTOS does not name a directory with photos")
    return paths


@pytest.fixture(scope="session")
def timm() -> Iterator[ModuleType]:
    """timm, to compare with. Optional: `pip install --no-deps timm torchvision`.

    timm imports torchvision, whose compiled operators do not fit a CPU build of torch. They are declared here, and
    never called.
    """
    if importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None:
        pytest.skip("timm and torchvision are not installed")
    import torch

    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of timm about itself
        import timm as imported
        import timm.data
    yield imported
    del library


@pytest.fixture(scope="session")
def transformers(timm: ModuleType) -> ModuleType:
    """After timm's fixture, which declares torchvision's operators."""
    imported: ModuleType = pytest.importorskip("transformers", reason="transformers is not installed")
    return imported


@pytest.fixture(scope="session")
def server(bundle: Bundle) -> Iterator[Server]:
    running = start_server("--bundle", str(bundle.path), "--max-images", "64", "--timeout-ms", "60000")
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made
