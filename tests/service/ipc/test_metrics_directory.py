"""The metrics files have storage before any process writes them, wherever there is room."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from vitserve.service import errors
from vitserve.service.ipc import metrics_directory
from vitserve.service.ipc.metrics_directory import DECODE_MEMORY, DECODE_MEMORY_BYTES, FILE_BYTES, process_names

ROUTES = ("/v1/classify", "/v1/model", "/v1/admin/reload", "/livez", "/readyz", "/metrics", "other")


def in_small_shared_memory(*command: str, kibibytes: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command where /dev/shm has this size, in a mount namespace of its own."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare")
    mount = f'mount -t tmpfs -o size={kibibytes}k tmpfs /dev/shm && exec "$@"'
    complete = os.environ | environment
    inner = ["unshare", "-m", "sh", "-c", mount, "sh", *command]
    return subprocess.run(inner, cwd=ROOT, env=complete, capture_output=True, text=True, timeout=60, check=False)


def test_all_files_are_allocated(tmp_path: Path) -> None:
    names = list(process_names(workers=2, engines=1))
    directory = Path(metrics_directory.create(names, [tmp_path]))
    assert len(names) == 4
    files = {f"{kind}_{name}.db" for name in names for kind in ("counter", "histogram")}
    assert {file.name for file in directory.iterdir()} == {*files, DECODE_MEMORY}
    assert (directory / DECODE_MEMORY).stat().st_blocks * 512 >= DECODE_MEMORY_BYTES
    for file in directory.glob("*.db"):
        assert (file.stat().st_size, file.stat().st_mode & 0o777) == (FILE_BYTES, 0o600)
        assert file.stat().st_blocks * 512 >= FILE_BYTES
    assert directory.stat().st_mode & 0o777 == 0o700


def test_the_files_of_a_process_with_every_series_do_not_grow(tmp_path: Path) -> None:
    directory = metrics_directory.create(["http-worker-0"], [tmp_path])
    statuses = sorted(
        {str(each.status) for each in all_errors(errors.ServiceError)} | {"200", "405", "408", "431", "499"}
    )
    code = "import sys\nfrom vitserve.service.metrics import in_files\nmetrics = in_files('http-worker-0')\n"
    code += f"for route in {ROUTES!r}:\n    metrics.request_seconds.labels(route).observe(1)\n"
    code += f"    for status in {statuses!r}:\n        metrics.requests.labels(route, status).inc()\n"
    code += f"for outcome in {sorted(each.code for each in all_errors(errors.ServiceError))!r}:\n"
    code += "    metrics.images.labels(outcome).inc()\n"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": directory}, check=True)
    for file in Path(directory).glob("*.db"):
        used = int.from_bytes(file.read_bytes()[:4], sys.byteorder)
        assert 0 < used < FILE_BYTES / 2, file.name
        assert file.stat().st_size == FILE_BYTES


def all_errors(kind: type[errors.ServiceError]) -> set[type[errors.ServiceError]]:
    return {kind}.union(*(all_errors(each) for each in kind.__subclasses__()))


def test_a_full_shared_memory_is_left_for_a_directory_with_room(tmp_path: Path) -> None:
    code = "from vitserve.service.ipc import metrics_directory as m; print(m.create(['engine-worker-0-a']))"
    result = in_small_shared_memory(sys.executable, "-c", code, kibibytes=40, TMPDIR=str(tmp_path))
    assert Path(result.stdout.strip()).parent == tmp_path
    assert f"the metrics files are in {tmp_path}, because /dev/shm: it is full (320 KiB are needed)" in result.stderr


def test_the_service_does_not_start_without_room_and_says_what_to_do() -> None:
    command = [sys.executable, "-m", "vitserve", "serve", "--port", "0", "--workers", "1"]
    result = in_small_shared_memory(*command, kibibytes=300, TMPDIR="/dev/shm")
    assert result.returncode == 2
    message = (
        "vitserve: 832 KiB are needed for the metrics files, but there is no room (/dev/shm: it is full; /dev/shm:"
    )
    assert message in result.stderr
    assert "--shm-size" in result.stderr
    assert "Traceback" not in result.stderr
