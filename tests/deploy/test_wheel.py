"""The distributions: what they contain, that they serve from any working directory, and how much serving installs."""

from __future__ import annotations

import importlib.metadata
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import threading
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.http import post_jpeg
from tests.support.paths import ROOT
from tests.support.server import Server

MAX_SERVE_ONLY_BYTES = 300_000_000
SOURCES = ("bench", "export", "model", "service", "vitserve")
FILES = ("pyproject.toml", "README.md", "LICENSE")
STRIP_OPENVINO = runpy.run_path(str(ROOT / "docker" / "strip_openvino.py"))
UNUSED: tuple[str, ...] = STRIP_OPENVINO["UNUSED"]
strip: Callable[[Path], int] = STRIP_OPENVINO["strip"]


def run(*command: str | Path, directory: Path) -> None:
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def build_wheel(source: Path, directory: Path) -> Path:
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(directory))
    run(sys.executable, "-m", "pip", "wheel", "--quiet", *options, str(source), directory=directory)
    (wheel,) = directory.glob("*.whl")
    return wheel


def run_backend(step: str, source: Path, directory: Path) -> None:
    """Without pip, which calls the same function."""
    script = f"from setuptools.build_meta import {step}; {step}({str(directory)!r})"
    run(sys.executable, "-W", "ignore", "-c", script, directory=source)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: building writes into the directory of the sources."""
    directory = tmp_path_factory.mktemp("checkout")
    for name in (*SOURCES, "tests", "benchmarks"):
        shutil.copytree(ROOT / name, directory / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sdist")
    run_backend("build_sdist", checkout, directory)
    (archive,) = directory.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with vitserve from the wheel, and with the dependencies of this one."""
    directory = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", str(directory), directory=directory)
    (packages,) = directory.glob("lib/python3*/site-packages")
    pip = (sys.executable, "-m", "pip", "--python", str(directory))
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel), directory=directory)
    # A path file appends the dependencies' directory without running its own path files: no editable vitserve.
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return directory


@pytest.fixture
def foreign_directory(tmp_path: Path) -> Path:
    """A working directory with a user's modules that have the names of vitserve's directories."""
    for name in ("service.py", "export.py", "bench.py", "model/__init__.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise SystemExit('the file of the user was imported')\n")
    return tmp_path


@contextmanager
def serving(*command: str, directory: Path) -> Iterator[Server]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [*command, "serve", "--port", "0"],
        cwd=directory,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    server = Server(process)
    threading.Thread(target=server.read, daemon=True).start()
    try:
        server.url = server.wait_for(r"running on (http://[\d.:]+)")
        server.wait_for("vitserve.http_worker: ready")
        yield server
        assert server.stop() == 0
    finally:
        process.kill()
        process.wait()


def members(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def tracked_modules() -> set[str]:
    modules = {f"vitserve/{path.relative_to(ROOT)}" for name in SOURCES[:-1] for path in (ROOT / name).rglob("*.py")}
    own = (path for pattern in ("*.py", "cli/*.py", "client/*.py") for path in (ROOT / "vitserve").glob(pattern))
    return modules | {str(path.relative_to(ROOT)) for path in own}


def test_wheel_contains_only_the_package(wheel: Path) -> None:
    assert {name.split("/")[0].split("-")[0] for name in members(wheel)} == {"vitserve"}
    assert {name.split("/")[0] for name in members(wheel) if "dist-info" not in name} == {"vitserve"}
    assert not [name for name in members(wheel) if "tests" in name or "benchmarks" in name]


def test_wheel_contains_every_module_and_data_file(wheel: Path) -> None:
    names = set(members(wheel))
    assert tracked_modules() <= names
    assert "vitserve/py.typed" in names
    bundle = ROOT / "service" / "default_bundle"
    assert {f"vitserve/service/default_bundle/{path.name}" for path in bundle.iterdir()} <= names
    assert "vitserve/export/checkpoint/imagenet_labels.txt" in names
    pages = ROOT / "service" / "http_worker" / "openapi" / "swagger_ui"
    assert {f"vitserve/service/http_worker/openapi/swagger_ui/{path.name}" for path in pages.iterdir()} <= names


def test_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    run_backend("build_wheel", source, tmp_path)
    (built,) = tmp_path.glob("*.whl")
    assert set(members(built)) == set(members(wheel))


@pytest.mark.parametrize("command", [("bin/vitserve",), ("bin/python", "-m", "vitserve")], ids=" ".join)
def test_installed_package_ignores_modules_in_the_working_directory(
    command: tuple[str, ...], environment: Path, foreign_directory: Path
) -> None:
    with serving(str(environment / command[0]), *command[1:], directory=foreign_directory) as server:
        response = post_jpeg(server.url)
    assert response.status_code == 200
    assert len(response.json()["results"][0]["predictions"]) == 5


def base_distributions() -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions that the base dependencies of pyproject.toml need, directly and indirectly."""
    distributions: dict[str, importlib.metadata.Distribution] = {}
    pending = [
        Requirement(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if needed and name not in distributions:
            distributions[name] = importlib.metadata.distribution(name)
            pending += [Requirement(line) for line in distributions[name].requires or ()]
    return distributions


def test_serve_only_environment_stays_small() -> None:
    """What `make serve` installs: the base dependencies, without the parts of OpenVINO that it deletes."""
    distributions = base_distributions()
    assert "openvino" in distributions
    assert not distributions.keys() & {"onnxruntime", "torch", "onnx", "matplotlib", "pyyaml"}
    unused = [f"openvino/{pattern}" for pattern in UNUSED] + [f"openvino/{pattern}/*" for pattern in UNUSED]
    files = {
        Path(str(distribution.locate_file(file)))
        for distribution in distributions.values()
        for file in distribution.files or ()
        if not any(fnmatch(str(file), pattern) for pattern in unused)
    }
    files |= {path for name in SOURCES[:-1] for path in (ROOT / name).rglob("*")}
    assert sum(path.stat().st_size for path in files if path.is_file()) < MAX_SERVE_ONLY_BYTES


def test_strip_openvino_deletes_only_unused_files(tmp_path: Path) -> None:
    package = tmp_path / "lib" / "python3.13" / "site-packages" / "openvino"
    unused = ("libs/libopenvino_intel_gpu_plugin.so", "libs/libopenvino_intel_npu_plugin.so", "include/tbb/tbb.h")
    used = ("libs/libopenvino_intel_cpu_plugin.so", "libs/libopenvino_onnx_frontend.so.2641", "__init__.py")
    for name in (*unused, *used):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_bytes(b"12345")
    assert strip(tmp_path) == 5 * len(unused)
    assert {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()} == set(used)
    assert strip(tmp_path) == 0


def test_stripped_openvino_runs_the_default_bundle(tmp_path: Path) -> None:
    source = Path(sysconfig.get_path("purelib")) / "openvino"
    copy = tmp_path / "lib" / "python3" / "site-packages" / "openvino"
    shutil.copytree(source, copy)
    strip(tmp_path)
    script = (
        "import openvino; print(openvino.__file__); core = openvino.Core(); assert core.available_devices == ['CPU'];"
        f"core.compile_model({str(ROOT / 'service' / 'default_bundle' / 'model.onnx')!r}, 'CPU')"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(copy.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert str(copy) in result.stdout
