"""Files that are wrong, truncated or hostile are rejected. None of their code is executed."""

from __future__ import annotations

import io
import json
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.load import load_checkpoint


class TouchOnLoad:
    """A pickle that creates a file when it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["weights.pth", "pytorch_model.bin", "weights.pkl"])
def test_code_in_a_pickle_is_not_executed(name: str, tmp_path: Path) -> None:
    executed = tmp_path / "executed"
    if name.endswith("pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(TouchOnLoad(executed), protocol=2))
    else:
        torch.save({"head.weight": TouchOnLoad(executed)}, tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"contains (builtins\.getattr|.*), which is not loaded because .* could execute code"
    ):
        load_checkpoint(tmp_path if name.endswith("bin") else tmp_path / name)
    assert not executed.exists()


def test_objects_in_an_archive_are_not_executed(tmp_path: Path) -> None:
    executed = tmp_path / "executed"
    np.savez(tmp_path / "release.npz", cls=np.array([TouchOnLoad(executed)], dtype=object))
    with pytest.raises(CheckpointError, match=r"cls.npy contains Python objects"):
        load_checkpoint(tmp_path / "release.npz")
    assert not executed.exists()


def save_archive_with_false_shape(path: Path) -> None:
    """Claims an array of 10 GB."""
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": (2_500_000_000,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cls.npy", array.getvalue())


def save_zip_bomb(path: Path) -> None:
    """200 MB of zeros, compressed."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (200_000_000,)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("cls.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(200):
            member.write(bytes(1_000_000))


def save_safetensors_with_false_length(path: Path) -> None:
    """Claims a header of 10 GB."""
    path.write_bytes(struct.pack("<Q", 10_000_000_000) + b"{}")


def save_safetensors_with_false_offsets(path: Path) -> None:
    """Claims a tensor of 10 GB."""
    tensor = {"dtype": "F32", "shape": [2_500_000_000], "data_offsets": [0, 10_000_000_000]}
    header = json.dumps({"head.weight": tensor}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


@pytest.mark.parametrize(
    ("save", "name", "message"),
    [
        (save_archive_with_false_shape, "weights.npz", "claims 10,000,000,000 bytes"),
        (save_zip_bomb, "weights.npz", "claims 200,000,000 bytes"),
        (save_safetensors_with_false_length, "weights.safetensors", "is not a safetensors file"),
        (save_safetensors_with_false_offsets, "weights.safetensors", "is not a safetensors file"),
    ],
)
def test_a_false_size_takes_no_memory(save: Callable[[Path], None], name: str, message: str, tmp_path: Path) -> None:
    save(tmp_path / name)
    before_kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kilobytes < 100_000


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_a_truncated_file_is_rejected(suffix: str, tmp_path: Path) -> None:
    weights = {"head.weight": torch.randn(50, 50)}
    whole, truncated = tmp_path / f"whole{suffix}", tmp_path / f"truncated{suffix}"
    if suffix == ".pth":
        torch.save(weights, whole)
    elif suffix == ".safetensors":
        save_file(weights, whole)
    else:
        np.savez(whole, cls=weights["head.weight"].numpy())
    data = whole.read_bytes()
    truncated.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(CheckpointError, match="truncated"):  # also in the path
        load_checkpoint(truncated)


@pytest.mark.parametrize("noise", [b"", b"\x80\x02", b"PK", b"noise" * 100])
def test_noise_is_rejected(noise: bytes, tmp_path: Path) -> None:
    (tmp_path / "noise.pth").write_bytes(noise)
    with pytest.raises(CheckpointError, match=r"noise\.pth"):
        load_checkpoint(tmp_path / "noise.pth")


def test_an_unknown_layout_is_rejected(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=rf"unrecognized checkpoint layout: {tmp_path}/weights\.pth"):
        load_checkpoint(tmp_path / "weights.pth")


def test_a_directory_without_weights_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no weights: none of model\.safetensors, .*pytorch_model\.bin"):
        load_checkpoint(tmp_path)


def test_an_index_must_not_leave_its_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"names a file outside its directory"):
        load_checkpoint(tmp_path)
