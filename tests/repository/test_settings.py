"""Settings: the README's table, options, environment variables, and contradictions."""

from __future__ import annotations

import dataclasses
import re
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.support.paths import ROOT
from vitserve.cli.main import app
from vitserve.service.ipc.control_messages import StartHttpWorker
from vitserve.service.settings import LEAST_IMAGE_MEMORY_BYTES, Settings, SettingsError

FIELDS = {setting.name: setting for setting in dataclasses.fields(Settings)}


def row(setting: dataclasses.Field[object]) -> str:
    default = setting.default if setting.default != "" else " "
    return f"| `{setting.name}` | `{default}` | {setting.metadata['help']} |"


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_a_row_of_the_readme(name: str) -> None:
    assert row(FIELDS[name]) in (ROOT / "README.md").read_text().splitlines(), row(FIELDS[name])


def test_the_readme_has_no_other_rows() -> None:
    _, _, after = (ROOT / "README.md").read_text().partition("\n## Settings\n")
    names = re.findall(r"^\| `(\w+)` \|", after.partition("\n## ")[0], re.MULTILINE)
    assert names == list(FIELDS)


def test_every_setting_is_an_option_and_an_environment_variable() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    for name in FIELDS:
        assert f"--{name.replace('_', '-')}" in shown
        assert f"VITSERVE_{name.upper()}" in shown


@pytest.mark.parametrize("name", [name for name, setting in FIELDS.items() if setting.metadata["choices"]])
def test_choices_are_in_the_help_text_and_include_the_default(name: str) -> None:
    setting = FIELDS[name]
    assert setting.default in setting.metadata["choices"]
    for choice in setting.metadata["choices"]:
        assert re.search(rf"\b{choice}\b", setting.metadata["help"]), choice
        Settings(**{name: choice})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"slots": 0}, "slots is 0; it must be at least 1"),
        ({"threads": -1}, "threads is -1; it must be at least 0 (0: automatic)"),
        ({"engines": -1}, "engines is -1; it must be at least 0 (0: automatic)"),
        ({"port": 65536}, "port is 65536; it must be from 0 to 65535"),
        ({"admin_port": -1}, "admin_port is -1; it must be from 0 to 65535"),
        (
            {"port": 8001, "admin_port": 8001},
            "admin_port and port are both 8001; they must differ (0: no port of its own)",
        ),
        ({"grpc_port": 70000}, "grpc_port is 70000; it must be from 0 to 65535"),
        (
            {"probe_port": 8001, "grpc_port": 8001},
            "grpc_port and probe_port are both 8001; they must differ (0: no port of its own)",
        ),
        ({"probe_port": -1}, "probe_port is -1; it must be from 0 to 65535"),
        ({"header_seconds": 0.0}, "header_seconds is 0.0; it must be greater than 0"),
        ({"max_header_bytes": 100}, "max_header_bytes is 100; it must be at least 1024"),
        ({"max_headers": 3}, "max_headers is 3; it must be at least 16"),
        ({"max_connections": 0}, "max_connections is 0; it must be at least 1"),
        (
            {"image_memory_bytes": 1000},
            "image_memory_bytes is 1000; it must be at least 67108864 (0: automatic)",
        ),
        ({"hang_seconds": 0.0}, "hang_seconds is 0.0; it must be greater than 0"),
        (
            {"engine": "tpu"},
            "engine is 'tpu'; it must be one of auto, tensorrt, onnxruntime-cuda, torch, openvino, onnxruntime",
        ),
        ({"precision": "int4"}, "precision is 'int4'; it must be one of auto, fp8, int8, bf16, fp16, fp32"),
        ({"decode": "tpu"}, "decode is 'tpu'; it must be one of cpu, gpu"),
        ({"request_log_sample": 1.5}, "request_log_sample is 1.5; it must be from 0 to 1"),
        ({"root_path": "/vision/"}, "root_path is '/vision/'; it must be like /vision, without a / at the end"),
        ({"root_path": "vision"}, "root_path is 'vision'; it must be like /vision"),
        ({"cors_origins": "*, app.example"}, "cors_origins has 'app.example'; an origin is like https://app.example"),
        ({"cors_origins": "https://app.example/"}, "cors_origins has 'https://app.example/'; an origin is like"),
        (
            {"engine": "onnxruntime", "precision": "bf16"},
            "engine onnxruntime does not support bf16; it supports int8, fp32",
        ),
        (
            {"engine": "tensorrt", "precision": "int8"},
            "engine tensorrt does not support int8; it supports fp8, bf16, fp16",
        ),
        (
            {"engine": "openvino", "precision": "fp16"},
            "engine openvino does not support fp16; it supports int8, bf16, fp32",
        ),
        (
            {"engine": "onnxruntime-cuda", "plan_dir": "none"},
            "engine onnxruntime-cuda requires plan_dir, but plan_dir is none",
        ),
        (
            {"engine": "openvino", "torch_compile": True},
            "torch_compile requires engine torch, but engine is openvino",
        ),
        (
            {"slots": 4, "max_images": 4},
            "slots is 4; streams × max_batch is 1 × 8 and needs at least 8 slots",
        ),
        (
            {"slots": 15, "streams": 2, "max_images": 4},
            "slots is 15; streams × max_batch is 2 × 8 and needs at least 16 slots",
        ),
        (
            {"slots": 32},
            "max_images is 64, but slots / workers is 32 / 1 and leaves 32 slots per HTTP worker",
        ),
        (
            {"workers": 8},
            "max_images is 64, but slots / workers is 256 / 8 and leaves 32 slots per HTTP worker",
        ),
    ],
)
def test_contradictions_are_rejected_with_both_values(values: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        Settings(**values)  # type: ignore[arg-type]  # a dict of mixed types


def test_the_command_line_rejects_contradictions_in_one_line() -> None:
    result = CliRunner().invoke(app, ["serve", "--slots", "4", "--max-images", "4"])
    assert result.exit_code == 2
    assert "vitserve: slots is 4; streams × max_batch is 1 × 8" in result.output


def test_the_admin_key_is_in_no_repr_and_no_traceback() -> None:
    settings = Settings(admin_key="0123456789abcdef")
    assert settings.admin_key == "0123456789abcdef"
    start = StartHttpWorker("http-worker-0", 1, settings, worker=0, decode_threads=1)
    key = settings.admin_key  # a local variable of the frame
    try:
        raise ValueError(repr(start))
    except ValueError as error:
        text = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    assert "admin_key='***'" in text
    assert key not in text


def test_a_short_admin_key_is_rejected_and_not_shown() -> None:
    with pytest.raises(SettingsError) as raised:
        Settings(admin_key="k" * 15)
    assert str(raised.value) == "admin_key has 15 characters; it must have at least 16"


@given(st.integers(LEAST_IMAGE_MEMORY_BYTES, 2**40), st.integers(1, 64), st.integers(1, 64))
def test_the_memory_for_images_is_divided_completely(memory: int, workers: int, threads: int) -> None:
    settings = Settings(image_memory_bytes=memory, decode_threads=threads)
    of_threads = workers * threads * settings.thread_memory_bytes(workers)
    of_processes = settings.process_memory_bytes(workers)
    assert settings.body_memory_bytes + of_threads + of_processes == memory
    assert of_processes >= of_threads >= 0
