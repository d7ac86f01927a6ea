"""The repository's deployment files as data: Dockerfile, compose file, Kubernetes manifests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tests.support.paths import ROOT

Manifest = dict[str, Any]

K8S = ROOT / "k8s"
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
OWN_MODEL_DOCKERFILE = (ROOT / "docker" / "own-model.Dockerfile").read_text()
COMPOSE: Manifest = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
COMPOSE_SERVICES = ("vitserve", "vitserve-gpu")
AUTOSCALERS = {"hpa", "keda"}  # components that exclude one another


def read_manifests(path: Path) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def manifest(path: str) -> Manifest:
    """The only document of a file under k8s/."""
    (document,) = read_manifests(K8S / path)
    return document


def pod_spec(deployment: Manifest) -> dict[str, Any]:
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def container(deployment: Manifest, name: str = "vitserve") -> dict[str, Any]:
    found: dict[str, Any]
    (found,) = (candidate for candidate in pod_spec(deployment)["containers"] if candidate["name"] == name)
    return found


def settings_env() -> dict[str, str]:
    lines = (K8S / "base" / "settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def dockerfile_env(text: str = DOCKERFILE) -> dict[str, str]:
    return dict(re.findall(r"(VITSERVE_\w+)=(\S+)", text))
