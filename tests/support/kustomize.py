"""Kubernetes manifests rendered by kubectl, and their validation against the schemas of their objects."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.support.manifests import K8S, Manifest
from tests.support.paths import ROOT

KUBERNETES_VERSION = "1.33"
CUSTOM_RESOURCES = ROOT / "tests" / "deploy" / "crds"
WITHOUT_SCHEMA = {"Gateway"}  # test_references_resolve checks what the other objects need of it


def kustomize(directory: Path) -> list[Manifest]:
    rendering = subprocess.run(["kubectl", "kustomize", directory], capture_output=True, text=True, check=False)
    assert rendering.returncode == 0, rendering.stderr
    assert not rendering.stderr, rendering.stderr  # deprecation warnings
    return list(yaml.safe_load_all(rendering.stdout))


def combined(directory: Path, overlay: str, components: tuple[str, ...] = (), **more: Any) -> list[Manifest]:
    """An overlay with components, as in a kustomization of a user, which is written to ``directory``."""

    def relative(part: str, name: str) -> str:
        return os.path.relpath(K8S / part / name, directory.resolve())

    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [relative("overlays", overlay)],
        "components": [relative("components", name) for name in components],
        **more,
    }
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return kustomize(directory)


def closed(schema: Any) -> Any:
    """The schema with unknown fields rejected, as ``kubectl --validate=strict`` does."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {
        key: {field: closed(item) for field, item in value.items()} if key == "properties" else closed(value)
        for key, value in schema.items()
    }
    extensible = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in schema and not extensible:
        copy["additionalProperties"] = False
    return copy


def custom_schemas() -> dict[str, Any]:
    """Schemas of custom resources by kind. Kubernetes itself validates their metadata."""
    schemas = {}
    for path in sorted(CUSTOM_RESOURCES.glob("*.json")):
        schema = closed(json.loads(path.read_text()))
        schema["properties"]["metadata"] = {"type": "object"}
        schemas[path.stem.rpartition("_")[0]] = schema
    return schemas


SCHEMAS = custom_schemas()


def validate(document: Manifest) -> None:
    if (kind := document["kind"].lower()) in SCHEMAS:
        jsonschema.Draft202012Validator(SCHEMAS[kind]).validate(document)
    elif document["kind"] not in WITHOUT_SCHEMA:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
