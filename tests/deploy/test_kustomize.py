"""Every overlay with every component, rendered by kubectl and validated strictly against the schemas of its objects."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator

import jsonschema
import kubernetes_validate
import pytest

from tests.support.kustomize import SCHEMAS, combined, kustomize, validate
from tests.support.manifests import AUTOSCALERS, K8S, Manifest, manifest, pod_spec

OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")

Combination = tuple[str, tuple[str, ...]]


def combinations() -> list[Combination]:
    """Every overlay with no, each and all components; one overlay with every pair, because patches may clash."""
    compatible = tuple(name for name in COMPONENTS if name != "hpa")
    single = [(overlay, (name,)) for overlay in OVERLAYS for name in COMPONENTS]
    pairs = [pair for pair in itertools.combinations(COMPONENTS, 2) if set(pair) != AUTOSCALERS]
    return [
        *((overlay, names) for overlay in OVERLAYS for names in ((), compatible)),
        *single,
        *((OVERLAYS[0], pair) for pair in pairs),
    ]


@pytest.fixture(
    scope="module", params=combinations(), ids=lambda combination: "+".join((combination[0], *combination[1]))
)
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    overlay, components = request.param
    return combined(tmp_path_factory.mktemp("kustomize"), overlay, components)


def of_kind(objects: list[Manifest], kind: str) -> Iterator[Manifest]:
    return (document for document in objects if document["kind"] == kind)


def test_every_object_matches_its_schema(objects: list[Manifest]) -> None:
    for document in objects:
        validate(document)


def test_validation_rejects_unknown_fields() -> None:
    service, route = manifest("base/service.yaml"), manifest("components/gateway/route.yaml")
    validate(service)
    validate(route)
    service["spec"]["selektor"] = {}
    route["spec"]["rules"][0]["backendRefs"][0]["prot"] = 8000
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(service)
    with pytest.raises(jsonschema.ValidationError):
        validate(route)


def test_custom_resource_schemas_are_present() -> None:
    assert SCHEMAS.keys() == {
        "httproute",
        "inferenceservice",
        "podmonitor",
        "prometheusrule",
        "scaledobject",
        "servingruntime",
    }


def test_pod_references_resolve(objects: list[Manifest]) -> None:
    (deployment,) = of_kind(objects, "Deployment")
    pod = pod_spec(deployment)
    names = {(document["kind"], document["metadata"]["name"]) for document in objects}
    assert ("ServiceAccount", pod["serviceAccountName"]) in names
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for volume in volumes.values():
        assert len(volume) == 2, f"a volume has a name and one source: {volume}"
        if "configMap" in volume:
            assert ("ConfigMap", volume["configMap"]["name"]) in names
        if "persistentVolumeClaim" in volume:
            assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
    for container in pod["containers"]:
        assert ("ConfigMap", container["envFrom"][0]["configMapRef"]["name"]) in names
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
        assert container["image"] == pod["containers"][0]["image"] != "vitserve", "the image has no tag"


def test_route_and_ingress_references_resolve(objects: list[Manifest]) -> None:
    for route in of_kind(objects, "HTTPRoute"):
        (gateway,) = of_kind(objects, "Gateway")
        (parent,) = route["spec"]["parentRefs"]
        listeners = {listener["name"]: listener for listener in gateway["spec"]["listeners"]}
        listener = listeners[parent["sectionName"]]
        assert (parent["name"], listener["hostname"]) == (gateway["metadata"]["name"], route["spec"]["hostnames"][0])
        assert (listener["protocol"], listener["tls"]["mode"]) == ("HTTPS", "Terminate")
    for ingress in of_kind(objects, "Ingress"):
        tls_hosts = {host for entry in ingress["spec"]["tls"] for host in entry["hosts"]}
        assert tls_hosts == {rule["host"] for rule in ingress["spec"]["rules"]}


def test_selectors_match_only_pods_of_vitserve(objects: list[Manifest]) -> None:
    (deployment,) = of_kind(objects, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    (service,), (budget,), (policy,) = (
        of_kind(objects, kind) for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy")
    )
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        budget["spec"]["selector"].get("matchLabels"),
        policy["spec"]["podSelector"].get("matchLabels"),
        *(spread["labelSelector"]["matchLabels"] for spread in pod_spec(deployment)["topologySpreadConstraints"]),
    ]
    for selector in selectors:
        assert selector, "an empty selector matches every pod of the namespace"
        assert selector.items() <= labels


def test_pods_meet_the_restricted_security_standard(objects: list[Manifest]) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    (deployment,) = of_kind(objects, "Deployment")
    pod = pod_spec(deployment)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all(volume.keys() & {"configMap", "emptyDir", "persistentVolumeClaim"} for volume in pod["volumes"])
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("example", sorted(path.name for path in (K8S / "examples").iterdir()))
def test_examples_render_valid_objects(example: str) -> None:
    for document in kustomize(K8S / "examples" / example):
        validate(document)
