"""The lock files hold what pyproject.toml and the images require, with hashes."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.manifests import DOCKERFILE
from tests.support.paths import ROOT

TARGETS = ("cpu", "gpu", "export")
TELEMETRY = "openvino-telemetry"


def locked_requirements(file: str) -> dict[str, Requirement]:
    """The requirements of a lock file by name. Fails unless every one is pinned and has hashes."""
    requirements: dict[str, Requirement] = {}
    for entry in re.split(r"\n(?=\S)", (ROOT / "docker" / file).read_text()):
        text = "\n".join(line for line in entry.splitlines() if not line.lstrip().startswith("#"))
        if text.strip():
            pin, *hashes = re.split(r"\s+\\?\s*--hash=", text)
            assert hashes, f"{pin} in {file} has no hash"
            requirement = Requirement(pin.strip())
            assert str(requirement.specifier).startswith("=="), pin
            requirements[canonicalize_name(requirement.name)] = requirement
    return requirements


def project_requirements(*extras: str) -> list[Requirement]:
    """The dependencies of pyproject.toml with those extras, and with the extras that they name of vitserve itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(line) for line in project["dependencies"]]
    for extra in extras:
        for requirement in map(Requirement, project["optional-dependencies"][extra]):
            own = requirement.name == "vitserve"
            requirements += project_requirements(*sorted(requirement.extras)) if own else [requirement]
    return requirements


def exclusions(target: str) -> set[str]:
    lines = (ROOT / "docker" / "requirements" / f"excludes-{target}.txt").read_text().splitlines()
    return {line for line in lines if not line.startswith("#")}


@pytest.mark.parametrize(
    ("target", "extras", "other_files", "excluded"),
    [
        ("cpu", (), (), {TELEMETRY}),
        (
            "gpu",
            ("gpu", "tensorrt", "tensorrt-rtx"),
            ("requirements-tensorrt.txt",),
            {"onnxruntime", "openvino", TELEMETRY},
        ),
        ("export", ("export", "int8", "train"), ("torch.txt",), {TELEMETRY}),
    ],
)
def test_locks_satisfy_the_project(
    target: str, extras: tuple[str, ...], other_files: tuple[str, ...], excluded: set[str]
) -> None:
    files = (f"requirements-{target}.txt", *other_files)
    locked = {name: pin for file in files for name, pin in locked_requirements(file).items()}
    assert excluded <= exclusions(target)
    assert not locked.keys() & exclusions(target)
    assert "dumb-init" in locked
    for requirement in project_requirements(*extras):
        name = canonicalize_name(requirement.name)
        if name in excluded:
            continue
        assert name in locked, f"the lock for {target} lacks {requirement}: run `make lock`"
        (pin,) = locked[name].specifier
        assert requirement.specifier.contains(pin.version), (
            f"{name} {pin.version} is not {requirement}: run `make lock`"
        )
    for file in files:
        assert f"COPY docker/{file} " in DOCKERFILE
        assert re.search(rf"--require-hashes .*-r /src/docker/{re.escape(file)}$", DOCKERFILE, re.MULTILINE)


def test_cpu_image_installs_nothing_for_training_or_gpus() -> None:
    locked = locked_requirements("requirements-cpu.txt").keys()
    assert not locked & {"torch", "onnx", "onnxscript", "transformers", "timm", "triton"}
    assert not [name for name in locked if name.startswith("nvidia-")]


def test_images_install_at_most_one_onnxruntime() -> None:
    """Both packages install the module ``onnxruntime``; the one installed last would overwrite the other."""
    assert {
        target: [name for name in locked_requirements(f"requirements-{target}.txt") if name.startswith("onnxruntime")]
        for target in TARGETS
    } == {"cpu": [], "gpu": ["onnxruntime-gpu"], "export": ["onnxruntime"]}


def test_cpu_image_strips_openvino() -> None:
    """tests/deploy/test_wheel.py runs the script; test_image.py checks the image."""
    assert re.search(r"^RUN \S+/python /src/docker/strip_openvino.py /opt/vitserve$", DOCKERFILE, re.MULTILINE)
