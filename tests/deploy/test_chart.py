"""The Helm chart, rendered by Helm: it installs what the kustomizations describe, changed only as its values say."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import helm
from tests.support.kustomize import combined, kustomize, validate
from tests.support.manifests import K8S, Manifest, container, pod_spec, read_manifests, settings_env

CHART = K8S / "chart"
# Components that only add objects. model-volume changes the Deployment, which the chart does not do.
COMPONENTS = ("gateway", "hpa", "ingress", "keda", "monitoring")
SOURCES = {name: K8S / "overlays" / name for name in ("cpu", "gpu")}
SOURCES |= {name: K8S / "components" / name for name in COMPONENTS}
SETTINGS = {"log_format": "json", "max_body_bytes": 67_108_864, "hang_seconds": 7.5, "page": False}

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@pytest.fixture(scope="module")
def chart() -> Iterator[helm.HelmChart]:
    if not helm.is_installed():
        pytest.skip("helm-python-sdk is not installed")
    with helm.loaded(CHART) as loaded:
        yield loaded


def by_name(objects: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    """The order of objects has no meaning."""
    named = {(document["kind"], document["metadata"]["name"]): document for document in objects}
    assert len(named) == len(objects)
    return named


def deployment(objects: list[Manifest]) -> Manifest:
    (only,) = (document for document in objects if document["kind"] == "Deployment")
    return only


@pytest.mark.parametrize("name", SOURCES)
def test_the_manifests_of_the_chart_are_up_to_date(name: str) -> None:
    path = CHART / "manifests" / f"{name}.yaml"
    assert read_manifests(path) == kustomize(SOURCES[name]), "run `make chart`"
    assert {path.stem for path in path.parent.iterdir()} == SOURCES.keys()


def test_without_values_it_installs_the_overlay_for_cpus(chart: helm.HelmChart) -> None:
    """Which is k8s/base with the tag of the image."""
    assert by_name(chart.render({})) == by_name(kustomize(K8S / "overlays" / "cpu"))
    base = kustomize(K8S / "base")
    container(deployment(base))["image"] = container(deployment(chart.render({})))["image"]
    assert by_name(chart.render({})) == by_name(base)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
@pytest.mark.parametrize("components", [(), ("gateway", "ingress", "keda", "monitoring"), ("hpa",)])
def test_it_installs_what_kustomize_does(
    target: str, components: tuple[str, ...], chart: helm.HelmChart, tmp_path: Path
) -> None:
    values = {"target": target, "components": dict.fromkeys(components, True)}
    assert by_name(chart.render(values)) == by_name(combined(tmp_path, target, components))


def test_settings_are_those_of_kustomize_with_the_same_name(chart: helm.HelmChart, tmp_path: Path) -> None:
    """The name has a hash of the content, so that a changed setting starts a rolling update."""
    texts = {"log_format": "json", "max_body_bytes": "67108864", "hang_seconds": "7.5", "page": "false"}
    literals = [f"VITSERVE_{name.upper()}={text}" for name, text in texts.items()]
    generator = [{"name": "vitserve-settings", "behavior": "merge", "literals": literals}]
    merged = combined(tmp_path, "cpu", configMapGenerator=generator)
    assert by_name(chart.render({"settings": SETTINGS})) == by_name(merged)


def test_every_hash_is_that_of_kustomize(chart: helm.HelmChart, tmp_path: Path) -> None:
    """Twenty of them have every letter that a hash may have."""
    numbers = range(1, 21)
    literals = [f"{name}={value}" for name, value in settings_env().items()]
    generators = [
        {"name": f"n{number}", "literals": [*literals, f"VITSERVE_MAX_IMAGES={number}"]} for number in numbers
    ]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"configMapGenerator": generators}))
    expected = {hash_of(document) for document in kustomize(tmp_path)}
    rendered = [chart.render({"settings": {"max_images": number}}) for number in numbers]
    maps = [document for objects in rendered for document in objects if document["kind"] == "ConfigMap"]
    assert {hash_of(document) for document in maps} == expected
    assert set("".join(expected)) == set("256789bcdfghkmt4")


def hash_of(document: Manifest) -> str:
    return str(document["metadata"]["name"].rpartition("-")[2])


def test_values_change_the_deployment_and_nothing_else(chart: helm.HelmChart) -> None:
    resources = {"requests": {"cpu": "8", "memory": "4Gi"}, "limits": {"cpu": "8", "memory": "4Gi"}}
    env = [{"name": "VITSERVE_ADMIN_KEY", "valueFrom": {"secretKeyRef": {"name": "secret", "key": "key"}}}]
    image = {"repository": "registry.example.com:5000/vitserve"}
    volume = {"name": "api-keys", "secret": {"secretName": "vitserve-api-keys"}}
    mount = {"name": "api-keys", "mountPath": "/etc/vitserve", "readOnly": True}
    values = {"replicas": 0, "resources": resources, "env": env, "image": image}
    values |= {"volumes": [volume], "volumeMounts": [mount]}
    values["overrides"] = {"Deployment": {"spec": {"template": {"spec": {"nodeSelector": {"pool": "gpu"}}}}}}
    rendered, expected = chart.render(values), chart.render({})
    changed = deployment(expected)
    changed["spec"]["replicas"] = 0
    pod_spec(changed)["nodeSelector"] = {"pool": "gpu"}
    pod_spec(changed)["volumes"].append(volume)
    container(changed)["volumeMounts"].append(mount)
    tag = container(changed)["image"].partition(":")[2]
    container(changed).update(resources=resources, env=env, image=f"registry.example.com:5000/vitserve:{tag}")
    assert by_name(rendered) == by_name(expected)
    for document in rendered:
        validate(document)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ({}, r"vitserve:\d+\.\d+\.\d+-cpu"),
        ({"tag": "mine"}, "vitserve:mine"),
        ({"tag": "mine", "digest": f"sha256:{'0' * 64}"}, f"vitserve@sha256:{'0' * 64}"),
    ],
)
def test_the_image_has_a_digest_or_a_tag(image: dict[str, str], expected: str, chart: helm.HelmChart) -> None:
    assert re.fullmatch(expected, container(deployment(chart.render({"image": image})))["image"])


def test_the_host_is_that_of_gateway_and_ingress(chart: helm.HelmChart) -> None:
    objects = by_name(chart.render({"components": {"gateway": True, "ingress": True}, "host": "images.example.org"}))
    assert objects["Gateway", "vitserve"]["spec"]["listeners"][0]["hostname"] == "images.example.org"
    assert objects["HTTPRoute", "vitserve"]["spec"]["hostnames"] == ["images.example.org"]
    ingress = objects["Ingress", "vitserve"]["spec"]
    assert (ingress["tls"][0]["hosts"], ingress["rules"][0]["host"]) == (["images.example.org"], "images.example.org")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"components": {"hpa": True, "keda": True}}, "components.hpa and components.keda are both true; enable one"),
        ({"components": {"hpa": True}, "replicas": 3}, "replicas is 3, but an autoscaler is enabled"),
        ({"settings": {"admin_key": "k" * 16}}, "would be readable in a ConfigMap; set VITSERVE_ADMIN_KEY in env"),
        ({"settings": {"VITSERVE_PORT": 1}}, "VITSERVE_PORT"),
        ({"target": "tpu"}, "target"),
        ({"replica": 3}, "replica"),
        ({"components": {"model-volume": True}}, "model-volume"),
        ({"image": {"digest": "sha256:0"}}, "digest"),
        ({"overrides": {"Servce": {"spec": {}}}}, "overrides has Servce; the kinds are ConfigMap, Deployment"),
    ],
)
def test_wrong_values_are_rejected_by_name(values: dict[str, Any], message: str, chart: helm.HelmChart) -> None:
    with pytest.raises(helm.HelmFailedError, match=re.escape(message)):
        chart.render(values)


def test_lint_has_no_warnings(chart: helm.HelmChart) -> None:
    assert [message for message in chart.lint if message["severity"] > 1] == []  # 1: information
