"""Settings, ports, routes and timeouts in deployment files agree with one another and with the code."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import httpx

from tests.support.manifests import (
    COMPOSE,
    COMPOSE_SERVICES,
    DOCKERFILE,
    K8S,
    OWN_MODEL_DOCKERFILE,
    container,
    dockerfile_env,
    manifest,
    pod_spec,
    read_manifests,
    settings_env,
)
from vitserve.service.http_worker.inference.request_parsing import PRIORITY_HEADER
from vitserve.service.settings import Settings
from vitserve.service.supervisor.supervisor import ENGINE_EXIT_SECONDS

FIELDS = {f"VITSERVE_{field.name.upper()}": field for field in dataclasses.fields(Settings)}


def environments() -> Iterator[tuple[str, set[str]]]:
    """Every place that sets the service's environment, with the names of its variables."""
    yield "Dockerfile", set(dockerfile_env())
    yield "own-model.Dockerfile", set(dockerfile_env(OWN_MODEL_DOCKERFILE))
    yield "settings.env", set(settings_env())
    for name in COMPOSE_SERVICES:
        yield f"compose {name}", set(COMPOSE["services"][name]["environment"])
    for path in K8S.rglob("deployment.yaml"):
        for candidate in pod_spec(read_manifests(path)[0])["containers"]:
            yield f"{path} {candidate['name']}", {variable["name"] for variable in candidate.get("env", [])}


def backends() -> Iterator[tuple[str, object]]:
    """Service name and port of every backend that the gateway and the ingress route to."""
    for rule in manifest("components/gateway/route.yaml")["spec"]["rules"]:
        yield from ((backend["name"], backend["port"]) for backend in rule["backendRefs"])
    for rule in manifest("components/ingress/ingress.yaml")["spec"]["rules"]:
        services = [path["backend"]["service"] for path in rule["http"]["paths"]]
        yield from ((service["name"], service["port"]["name"]) for service in services)


def test_every_environment_variable_is_a_setting() -> None:
    variables = list(environments())
    assert sum(len(names) for _, names in variables) > 10
    for place, names in variables:
        assert names <= FIELDS.keys(), place


def test_kubernetes_settings_are_valid_together() -> None:
    values: dict[str, Any] = {}
    for variable, text in settings_env().items():
        values[FIELDS[variable].name] = type(getattr(Settings(), FIELDS[variable].name))(text)
    assert Settings(**values).host == "0.0.0.0"


def test_every_file_uses_the_same_port() -> None:
    port = dockerfile_env()["VITSERVE_PORT"]
    assert port == settings_env()["VITSERVE_PORT"] == str(Settings().port)
    assert f"EXPOSE {port}\n" in DOCKERFILE
    for name in COMPOSE_SERVICES:
        assert [mapping.rpartition(":")[2] for mapping in COMPOSE["services"][name]["ports"]] == [port]
    admin_port = settings_env()["VITSERVE_ADMIN_PORT"]
    assert {COMPOSE["services"][name]["environment"]["VITSERVE_ADMIN_PORT"] for name in COMPOSE_SERVICES} == {
        admin_port
    }
    container_ports = container(manifest("base/deployment.yaml"))["ports"]
    named = {each["name"]: str(each["containerPort"]) for each in container_ports}
    assert named == {"http": port, "admin": admin_port, "probes": settings_env()["VITSERVE_PROBE_PORT"]}
    (service_port,) = manifest("base/service.yaml")["spec"]["ports"]
    assert (service_port["name"], str(service_port["port"]), service_port["targetPort"]) == ("http", port, "http")
    assert set(backends()) == {("vitserve", int(port)), ("vitserve", "http")}


def test_only_namespaces_with_a_label_may_connect_and_only_prometheus_to_the_admin_port() -> None:
    requests, administration = manifest("base/networkpolicy.yaml")["spec"]["ingress"]
    assert [port["port"] for port in requests["ports"]] == ["http"]
    clients = {"namespaceSelector": {"matchLabels": {"vitserve-clients": "true"}}}
    assert requests["from"] == [{"podSelector": {}}, clients]
    assert [port["port"] for port in administration["ports"]] == ["admin"]
    (source,) = administration["from"]  # both conditions apply
    assert source["namespaceSelector"] == {"matchLabels": {"vitserve-metrics": "true"}}
    assert source["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}
    assert manifest("base/networkpolicy.yaml")["spec"]["egress"] == []


def test_clients_outside_the_cluster_cannot_set_the_priority() -> None:
    for rule in manifest("components/gateway/route.yaml")["spec"]["rules"]:
        (header_filter,) = rule["filters"]
        assert header_filter["type"] == "RequestHeaderModifier"
        assert header_filter["requestHeaderModifier"] == {"remove": [PRIORITY_HEADER]}
    assert manifest("components/ingress/headers.yaml")["data"] == {PRIORITY_HEADER: ""}


def test_probes_and_health_check_request_existing_routes(client: httpx.Client) -> None:
    deployed = container(manifest("base/deployment.yaml"))
    probes = {name: deployed[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    paths = {name: probe["path"] for name, probe in probes.items()}
    assert paths == {"startup": "/livez", "readiness": "/readyz", "liveness": "/livez"}
    (health_check,) = re.findall(r"HEALTHCHECK .*?(/\w+)'", DOCKERFILE, re.DOTALL)
    for path in {*paths.values(), health_check}:
        assert client.get(path).status_code == 200
    ports = {name: probe["port"] for name, probe in probes.items()}
    assert ports == {"startup": "probes", "readiness": "http", "liveness": "probes"}


def test_ingress_and_gateway_expose_only_public_routes(client: httpx.Client) -> None:
    ingress_rules = manifest("components/ingress/ingress.yaml")["spec"]["rules"]
    gateway_rules = manifest("components/gateway/route.yaml")["spec"]["rules"]
    ingress = {path["path"] for rule in ingress_rules for path in rule["http"]["paths"]}
    gateway = {match["path"]["value"] for rule in gateway_rules for match in rule["matches"]}
    assert ingress == gateway == {"/v1/classify", "/v1/embed", "/v1/model"}
    assert client.get("/v1/model").status_code == 200
    assert client.post("/v1/classify").status_code != 404


def test_grace_periods_are_longer_than_the_drain() -> None:
    deployment = manifest("base/deployment.yaml")
    stop_seconds = float(settings_env()["VITSERVE_DRAIN_SECONDS"]) + ENGINE_EXIT_SECONDS
    pre_stop_seconds = container(deployment)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pre_stop_seconds > 0
    assert pod_spec(deployment)["terminationGracePeriodSeconds"] > pre_stop_seconds + stop_seconds
    for name in COMPOSE_SERVICES:
        service = COMPOSE["services"][name]
        drain_seconds = float(service["environment"]["VITSERVE_DRAIN_SECONDS"])
        assert float(service["stop_grace_period"].removesuffix("s")) > drain_seconds + ENGINE_EXIT_SECONDS


def test_service_links_cannot_override_settings() -> None:
    """Kubernetes would set VITSERVE_PORT=tcp://10.0.0.1:8000 for a Service called vitserve."""
    assert pod_spec(manifest("base/deployment.yaml"))["enableServiceLinks"] is False


def test_ingress_accepts_the_largest_body() -> None:
    annotations = manifest("components/ingress/ingress.yaml")["metadata"]["annotations"]
    assert int(annotations["nginx.ingress.kubernetes.io/proxy-body-size"]) == Settings().max_body_bytes
