"""The manifests for KServe: valid against KServe's schemas, and the same container as in k8s/base.

The schemas in crds/ have only the fields that a model with a runtime of its own may use.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from tests.support.kustomize import kustomize, validate
from tests.support.manifests import K8S, Manifest, container, manifest, pod_spec, settings_env

MODEL = "/mnt/models"  # where KServe mounts the model

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@pytest.fixture(scope="module")
def objects() -> dict[str, Manifest]:
    return {document["kind"]: document for document in kustomize(K8S / "kserve")}


@pytest.fixture(scope="module")
def deployed(objects: dict[str, Manifest]) -> dict[str, Any]:
    """The container of the runtime."""
    (only,) = objects["ServingRuntime"]["spec"]["containers"]
    assert only["name"] == "kserve-container"  # KServe finds it by this name
    return dict(only)


@pytest.fixture(scope="module")
def predictor(objects: dict[str, Manifest]) -> dict[str, Any]:
    return dict(objects["InferenceService"]["spec"]["predictor"])


def with_port_numbers(probe: Any, ports: list[dict[str, Any]]) -> Any:
    numbers = {port["name"]: port["containerPort"] for port in ports}
    request = probe["httpGet"]
    return probe | {"httpGet": request | {"port": numbers.get(request["port"], request["port"])}}


def test_every_object_matches_its_schema(objects: dict[str, Manifest]) -> None:
    assert objects.keys() == {"ServiceAccount", "NetworkPolicy", "ServingRuntime", "InferenceService"}
    for document in objects.values():
        validate(document)


def test_the_container_is_that_of_the_base(deployed: dict[str, Any]) -> None:
    base = container(manifest("base/deployment.yaml"))
    same = {"args", "imagePullPolicy", "lifecycle", "resources", "securityContext", "volumeMounts"}
    probes = {"startupProbe", "readinessProbe", "livenessProbe"}
    other = {"name", "image", "ports", "env", "envFrom"}
    assert base.keys() | deployed.keys() == same | probes | other
    assert {name: deployed[name] for name in same} == {name: base[name] for name in same}
    expected = {name: with_port_numbers(base[name], base["ports"]) for name in probes}
    assert {name: deployed[name] for name in probes} == expected
    assert deployed["securityContext"]["readOnlyRootFilesystem"] is True
    assert deployed["ports"] == [port for port in base["ports"] if port["name"] == "http"]


def test_the_environment_is_that_of_the_base_with_the_mounted_model(deployed: dict[str, Any]) -> None:
    environment = {variable["name"]: variable["value"] for variable in deployed["env"]}
    assert environment == settings_env() | {"VITSERVE_BUNDLE": MODEL}


def test_the_pod_is_that_of_the_base(objects: dict[str, Manifest], predictor: dict[str, Any]) -> None:
    deployment = manifest("base/deployment.yaml")
    base = pod_spec(deployment)
    by_kserve = {"serving.kserve.io/inferenceservice": objects["InferenceService"]["metadata"]["name"]}
    spreads = [spread | {"labelSelector": {"matchLabels": by_kserve}} for spread in base["topologySpreadConstraints"]]
    assert {name: predictor.get(name) for name in base.keys() - {"containers", "volumes"}} == {
        name: spreads if name == "topologySpreadConstraints" else value
        for name, value in base.items()
        if name not in ("containers", "volumes")
    }
    assert objects["ServingRuntime"]["spec"]["volumes"] == base["volumes"]
    assert predictor["minReplicas"] == deployment["spec"]["replicas"]
    assert predictor["deploymentStrategy"]["rollingUpdate"] == deployment["spec"]["strategy"]["rollingUpdate"]
    assert predictor["serviceAccountName"] == objects["ServiceAccount"]["metadata"]["name"]


def test_the_model_names_the_runtime_and_its_protocol(objects: dict[str, Manifest], predictor: dict[str, Any]) -> None:
    runtime, model = objects["ServingRuntime"], predictor["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"] in runtime["spec"]["supportedModelFormats"]
    assert [model["protocolVersion"]] == runtime["spec"]["protocolVersions"] == ["v2"]
    assert model["storageUri"]


def test_the_network_policy_admits_the_same_clients(objects: dict[str, Manifest]) -> None:
    """Not the egress: KServe downloads the model in the same pod."""
    policy, base = objects["NetworkPolicy"]["spec"], manifest("base/networkpolicy.yaml")["spec"]
    numbers = {"http": int(settings_env()["VITSERVE_PORT"]), "admin": int(settings_env()["VITSERVE_ADMIN_PORT"])}
    for rule, of_base in zip(policy["ingress"], base["ingress"], strict=True):
        assert rule["from"] == of_base["from"]
        assert rule["ports"] == [port | {"port": numbers[port["port"]]} for port in of_base["ports"]]
    assert policy["policyTypes"] == ["Ingress"]
    annotations = objects["ServingRuntime"]["spec"]["annotations"]
    assert annotations["prometheus.kserve.io/port"] == settings_env()["VITSERVE_ADMIN_PORT"]
