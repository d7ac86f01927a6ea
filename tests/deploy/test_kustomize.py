"""What kubectl makes of k8s/: every overlay with every component, each object held strictly against the schemas of Kubernetes and of others' resources."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.support.paths import ROOT

K8S = ROOT / "k8s"
OVERLAYS = sorted(each.name for each in (K8S / "overlays").iterdir())
COMPONENTS = sorted(each.name for each in (K8S / "components").iterdir())
APART = ({"hpa", "keda"},)  # two autoscalers of one Deployment would pull in turns
KUBERNETES = "1.33"
# Of the Gateway there is no schema here; tests/deploy/test_deployment.py and the reference below are what is known of it.
OURS_TO_TRUST = {"Gateway"}

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")

Objects = list[dict[str, Any]]


def combinations() -> list[tuple[str, tuple[str, ...]]]:
    """Each overlay with no component, with each, and with as many as go together; each two components once, for a patch that hides another's."""
    most = tuple(each for each in COMPONENTS if each != "hpa")
    pairs = [each for each in itertools.combinations(COMPONENTS, 2) if set(each) not in APART]
    return [(overlay, each) for overlay in OVERLAYS for each in [(), *((one,) for one in COMPONENTS), most]] + [
        (OVERLAYS[0], each) for each in pairs
    ]


def rendered(directory: Path, overlay: str, components: tuple[str, ...]) -> Objects:
    def relative(part: str, name: str) -> str:
        return os.path.relpath(K8S / part / name, directory.resolve())

    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [relative("overlays", overlay)],
        "components": [relative("components", each) for each in components],
    }
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    made = subprocess.run(["kubectl", "kustomize", str(directory)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert not made.stderr, made.stderr  # warnings of what is deprecated
    return list(yaml.safe_load_all(made.stdout))


@pytest.fixture(scope="module", params=combinations(), ids=lambda each: "+".join((each[0], *each[1])))
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Objects:
    return rendered(tmp_path_factory.mktemp("kustomize"), *request.param)


def closed(schema: Any) -> Any:
    """The schema, refusing fields it does not name, as `kubectl --validate=strict` does."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        name: {field: closed(each) for field, each in value.items()} if name == "properties" else closed(value)
        for name, value in schema.items()
    }
    if (
        "properties" in schema
        and "additionalProperties" not in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        made["additionalProperties"] = False
    return made


def custom() -> dict[str, Any]:
    """By kind: the schemas of others' resources. Their metadata is Kubernetes' own."""
    schemas = {}
    for path in sorted((ROOT / "tests" / "crds").glob("*.json")):
        schema = closed(json.loads(path.read_text()))
        schema["properties"]["metadata"] = {"type": "object"}
        schemas[path.stem.rpartition("_")[0]] = schema
    return schemas


CUSTOM = custom()


def check(document: dict[str, Any]) -> None:
    if (kind := document["kind"].lower()) in CUSTOM:
        jsonschema.Draft202012Validator(CUSTOM[kind]).validate(document)
    elif document["kind"] not in OURS_TO_TRUST:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def of_kind(objects: Objects, kind: str) -> Iterator[dict[str, Any]]:
    return (each for each in objects if each["kind"] == kind)


def test_every_object_is_valid_strictly(objects: Objects) -> None:
    for each in objects:
        check(each)


def test_the_check_refuses_what_no_schema_names() -> None:
    """A check that let everything pass would be worth nothing."""
    (service,) = yaml.safe_load_all((K8S / "base" / "service.yaml").read_text())
    (route,) = yaml.safe_load_all((K8S / "components" / "gateway" / "route.yaml").read_text())
    check(service)
    check(route)
    service["spec"]["selektor"] = {}
    route["spec"]["rules"][0]["backendRefs"][0]["prot"] = 8000
    with pytest.raises(kubernetes_validate.ValidationError):
        check(service)
    with pytest.raises(jsonschema.ValidationError):
        check(route)


def test_whatever_is_referred_to_is_there(objects: Objects) -> None:
    (deployment,) = of_kind(objects, "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    there = {(each["kind"], each["metadata"]["name"]) for each in objects}
    assert ("ServiceAccount", pod["serviceAccountName"]) in there
    volumes = {each["name"]: each for each in pod["volumes"]}
    for each in volumes.values():
        assert len(each) == 2, f"one volume of two kinds: {each}"
        if "configMap" in each:
            assert ("ConfigMap", each["configMap"]["name"]) in there
        if "persistentVolumeClaim" in each:
            assert ("PersistentVolumeClaim", each["persistentVolumeClaim"]["claimName"]) in there
    for each in pod["containers"]:
        assert ("ConfigMap", each["envFrom"][0]["configMapRef"]["name"]) in there
        assert {mount["name"] for mount in each["volumeMounts"]} <= volumes.keys()
        assert each["image"] == pod["containers"][0]["image"] != "vitserve", "no tag, so another image tomorrow"
    for route in of_kind(objects, "HTTPRoute"):
        (gateway,) = of_kind(objects, "Gateway")
        (parent,) = route["spec"]["parentRefs"]
        listener = {each["name"]: each for each in gateway["spec"]["listeners"]}[parent["sectionName"]]
        assert (parent["name"], listener["hostname"]) == (gateway["metadata"]["name"], route["spec"]["hostnames"][0])
        assert (listener["protocol"], listener["tls"]["mode"]) == ("HTTPS", "Terminate")
    for ingress in of_kind(objects, "Ingress"):
        assert {host for each in ingress["spec"]["tls"] for host in each["hosts"]} == {
            each["host"] for each in ingress["spec"]["rules"]
        }


def test_selectors_select_our_pods_and_no_others(objects: Objects) -> None:
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
        *(
            each["labelSelector"]["matchLabels"]
            for each in deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
        ),
    ]
    for each in selectors:
        assert each, "an empty selector is one that selects every pod of the namespace"
        assert each.items() <= labels


def test_every_pod_is_restricted(objects: Objects) -> None:
    """Kubernetes' own Pod Security Standard of that name."""
    (deployment,) = of_kind(objects, "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all(each.keys() & {"configMap", "emptyDir", "persistentVolumeClaim"} for each in pod["volumes"])
    for each in pod["containers"]:
        assert each["securityContext"]["allowPrivilegeEscalation"] is False
        assert each["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("example", sorted(each.name for each in (K8S / "examples").iterdir()))
def test_the_examples_render(example: str) -> None:
    made = subprocess.run(
        ["kubectl", "kustomize", str(K8S / "examples" / example)], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    for each in yaml.safe_load_all(made.stdout):
        check(each)
