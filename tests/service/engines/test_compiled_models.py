"""Compiled models are used again only if they are what was written."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vitserve.model.bundle.bundle import GRAPH, Bundle
from vitserve.service.engines.compiled_models import LIST, compiled_models
from vitserve.service.engines.openvino_engine import OpenVinoEngine


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def run(bundle: Bundle, cache: Path) -> bytes:
    """The engine's logits for the golden images, with its compiled model from the cache if it is there."""
    pixels = bundle.golden().pixels[:4]
    engine = OpenVinoEngine(bundle.path / GRAPH, "fp32", 1, 1, len(pixels), str(cache))
    try:
        return engine.run(0, pixels).logits.tobytes()
    finally:
        engine.close()


def blob_of(cache: Path) -> Path:
    (blob,) = cache.rglob("*.blob")
    return blob


def test_an_unchanged_compiled_model_is_used_again_and_the_list_is_that_of_sha256sum(
    bundle: Bundle, cache: Path
) -> None:
    first = run(bundle, cache)
    blob = blob_of(cache)
    before = blob.stat()
    assert run(bundle, cache) == first
    assert blob_of(cache) == blob
    assert (blob.stat().st_ino, blob.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", LIST], cwd=blob.parent, check=True, capture_output=True)


def flipped(content: bytes, position: float) -> bytes:
    index = int(position * (len(content) - 1))
    return content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "first bit": lambda content: flipped(content, 0),
    "a bit of the weights": lambda content: flipped(content, 0.7),
    "last bit": lambda content: flipped(content, 1),
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_compiled_model_is_compiled_again(
    bundle: Bundle, cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, blob = run(bundle, cache), blob_of(cache)
    blob.write_bytes(DAMAGES[damage](blob.read_bytes()))
    assert run(bundle, cache) == first
    assert f"{blob} is damaged; compiling the model again" in caplog.text
    caplog.clear()
    assert run(bundle, cache) == first
    assert not caplog.records


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"0  x\n"])
def test_without_a_valid_list_nothing_is_used(
    bundle: Bundle, cache: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    first = run(bundle, cache)
    listed = blob_of(cache).with_name(LIST)
    if content is None:
        listed.unlink()
    else:
        listed.write_bytes(content)
    assert run(bundle, cache) == first
    assert "is not listed; compiling the model again" in caplog.text


def test_a_file_that_was_compiled_from_an_earlier_model_is_deleted(cache: Path) -> None:
    for name in ("first", "second"):
        with compiled_models(cache, "model") as directory:
            assert directory is not None
            (directory / f"{name}.blob").write_text(name)
    assert blob_of(cache).name == "second.blob"
    with compiled_models(cache, "model", "other options") as other:
        assert other is not None
        assert other != directory
        assert not list(other.glob("*.blob"))


@pytest.mark.parametrize("name", ["fcntl.flock", "hashlib.file_digest"])
def test_a_cache_that_cannot_be_read_is_not_used(
    bundle: Bundle, cache: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a network drive without locks, or a damaged disk."""
    first = run(bundle, cache)

    def fail(*_: object) -> None:
        raise OSError("no locks available")

    with monkeypatch.context() as patch:
        patch.setattr(name, fail)
        assert run(bundle, cache) == first
    assert "the compiled model is not cached: no locks available" in caplog.text


def test_a_cache_that_others_may_write_to_is_not_used(
    bundle: Bundle, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = run(bundle, cache)
    blob_of(cache).parent.chmod(0o777)
    assert run(bundle, cache) == first
    assert "the compiled model is not cached" in caplog.text
