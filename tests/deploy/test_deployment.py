"""Users, volumes, versions and file references of the Dockerfile, the compose file and the Kubernetes manifests."""

from __future__ import annotations

import fnmatch
import re

from tests.support.manifests import (
    COMPOSE,
    COMPOSE_SERVICES,
    DOCKERFILE,
    K8S,
    OWN_MODEL_DOCKERFILE,
    container,
    manifest,
    pod_spec,
    read_manifests,
)
from tests.support.paths import ROOT
from vitserve import __version__


def test_image_runs_as_a_user_that_writes_only_to_the_cache() -> None:
    assert re.findall(r"^USER (\d+):", DOCKERFILE, re.MULTILINE) == ["10001"]
    assert re.findall(r"^VOLUME (\S+)$", DOCKERFILE, re.MULTILINE) == ["/var/cache/vitserve"]


def test_pods_run_as_that_user_on_a_read_only_root() -> None:
    pod = pod_spec(manifest("base/deployment.yaml"))
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["fsGroup"]) == (10001, 10001)
    assert [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]] == ["/var/cache/vitserve"]
    volume = manifest("components/model-volume/deployment.yaml")
    contexts = [container(manifest("base/deployment.yaml")).get("securityContext")]
    contexts += [candidate.get("securityContext") for candidate in pod_spec(volume)["containers"]]
    for context in filter(None, contexts):
        assert (context["readOnlyRootFilesystem"], context["capabilities"]) == (True, {"drop": ["ALL"]})
    assert contexts[0]
    assert container(volume, "reload")["securityContext"]


def test_compose_services_are_hardened_and_limited() -> None:
    for name, service in COMPOSE["services"].items():
        hardening = (service["read_only"], service["cap_drop"], service["restart"])
        assert hardening == (True, ["ALL"], "unless-stopped"), name
        assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory", "pids"}, name
        assert not any("docker.sock" in volume for volume in service["volumes"]), name
    for name in COMPOSE_SERVICES:
        assert "cache:/var/cache/vitserve" in COMPOSE["services"][name]["volumes"]


def test_cpu_requests_equal_limits_in_whole_cpus() -> None:
    """The service rounds its CPU limit down to a number of threads; a smaller request would let the threads starve."""
    for path in ("base/deployment.yaml", "overlays/gpu/deployment.yaml"):
        resources = container(manifest(path))["resources"]
        assert resources["requests"]["cpu"] == resources["limits"]["cpu"]
        assert int(resources["limits"]["cpu"]) >= 1


def test_every_image_tag_is_of_this_version() -> None:
    assert f"ARG VERSION={__version__}\n" in DOCKERFILE
    for overlay in ("cpu", "gpu"):
        image = {"name": "vitserve", "newTag": f"{__version__}-{overlay}"}
        assert manifest(f"overlays/{overlay}/kustomization.yaml")["images"] == [image]
    assert OWN_MODEL_DOCKERFILE.startswith(f"FROM vitserve:{__version__}-cpu\n")
    images = {name: service["image"] for name, service in COMPOSE["services"].items()}
    assert images["vitserve"] == f"vitserve:{__version__}-cpu"
    assert images["vitserve-gpu"] == f"vitserve:{__version__}-gpu"
    assert manifest("base/kustomization.yaml")["labels"][1]["pairs"]["app.kubernetes.io/version"] == __version__
    kserve = manifest("kserve/kustomization.yaml")
    assert kserve["images"] == [{"name": "vitserve", "newTag": f"{__version__}-cpu"}]
    assert kserve["labels"][0]["pairs"]["app.kubernetes.io/version"] == __version__
    chart = manifest("chart/Chart.yaml")
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)


def test_every_image_tag_names_a_version() -> None:
    images = [service["image"] for service in COMPOSE["services"].values()]
    for image in [*images, *re.findall(r"^ARG BASE=(\S+)", DOCKERFILE, re.MULTILINE)]:
        assert re.search(r":[\w.-]*\d[\w.-]*$", image), f"the tag of {image} may move to another image"


def test_compose_serves_on_a_cpu_by_default() -> None:
    profiles = {name: service.get("profiles") for name, service in COMPOSE["services"].items()}
    assert profiles == {"vitserve": ["cpu"], "vitserve-gpu": ["gpu"], "prometheus": None, "grafana": None}
    assert "COMPOSE_PROFILES=cpu\n" in (ROOT / ".env").read_text()
    for name, target in (("vitserve", "cpu"), ("vitserve-gpu", "gpu")):
        build = COMPOSE["services"][name]["build"]
        assert (build["dockerfile"], build["target"]) == ("docker/Dockerfile", target)
    (device,) = COMPOSE["services"]["vitserve-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert COMPOSE["services"]["vitserve-gpu"]["networks"]["default"]["aliases"] == ["vitserve"]


def test_dockerfile_copies_only_existing_files_that_are_not_ignored() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    ignored, *allowed, caches = [line for line in lines if line.startswith(("!", "*"))]
    assert (ignored, caches) == ("*", "**/__pycache__")
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert {"service", "model", "vitserve"} <= copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern.removeprefix("!")) for pattern in allowed), f"{source} is ignored"


def test_every_directory_that_vitserve_links_to_is_copied() -> None:
    links = {path.name for path in (ROOT / "vitserve").iterdir() if path.is_symlink()}
    assert links == {"bench", "export", "model", "service"}
    for link in links:
        assert (ROOT / "vitserve" / link).readlink().as_posix() == f"../{link}"
        assert f"\nCOPY {link} {link}\n" in DOCKERFILE


def test_kustomizations_use_every_file_and_name_no_other() -> None:
    for path in K8S.rglob("kustomization.yaml"):
        (kustomization,) = read_manifests(path)
        references = [*kustomization.get("resources", []), *kustomization.get("components", [])]
        references += [patch["path"] for patch in kustomization.get("patches", []) if "path" in patch]
        for generator in kustomization.get("configMapGenerator", []):
            references += [*generator.get("files", []), *generator.get("envs", [])]
        for reference in references:
            assert (path.parent / reference).exists(), f"{path} refers to {reference}"
        files = {file.name for file in path.parent.iterdir() if file.is_file()} - {"kustomization.yaml"}
        assert files <= {*references, "adapter.yaml"}, f"{path} does not use {files - set(references)}"
