"""That Dockerfiles, compose and Kubernetes objects say what the code says: settings, ports, paths, users, times, versions, and what the images hold."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT
from vitserve import __version__
from vitserve.service.settings import Settings
from vitserve.service.supervisor.supervisor import ENGINE_EXIT_SECONDS

K8S = ROOT / "k8s"
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SETTINGS = {f"VITSERVE_{each.name.upper()}" for each in dataclasses.fields(Settings)}
TARGETS = ("cpu", "gpu", "export")


def documents(path: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(path.read_text()) if each]


def one(path: str) -> dict[str, Any]:
    (document,) = documents(K8S / path)
    return document


def container(deployment: dict[str, Any], name: str = "vitserve") -> dict[str, Any]:
    (found,) = [each for each in deployment["spec"]["template"]["spec"]["containers"] if each["name"] == name]
    return found


def settings_env() -> dict[str, str]:
    lines = [
        line for line in (K8S / "base" / "settings.env").read_text().splitlines() if line and not line.startswith("#")
    ]
    return dict(line.split("=", 1) for line in lines)


def dockerfile_env(text: str = DOCKERFILE) -> dict[str, str]:
    return dict(re.findall(r"(VITSERVE_\w+)=(\S+)", text))


def environments() -> Iterator[tuple[str, set[str]]]:
    """By where it is written: the names of the environment that the service is started with."""
    yield "Dockerfile", set(dockerfile_env())
    yield "own-model.Dockerfile", set(dockerfile_env((ROOT / "docker" / "own-model.Dockerfile").read_text()))
    yield "settings.env", set(settings_env())
    for name in ("vitserve", "vitserve-gpu"):
        yield f"compose {name}", set(COMPOSE["services"][name]["environment"])
    for path in K8S.rglob("deployment.yaml"):
        for each in documents(path)[0]["spec"]["template"]["spec"]["containers"]:
            yield f"{path} {each['name']}", {variable["name"] for variable in each.get("env", [])}


def test_every_setting_that_is_deployed_is_a_setting() -> None:
    named = list(environments())
    assert sum(len(names) for _, names in named) > 10
    for where, names in named:
        assert names <= SETTINGS, where


def test_the_deployed_settings_agree_with_one_another() -> None:
    types = {f"VITSERVE_{each.name.upper()}": (each.name, type(each.default)) for each in dataclasses.fields(Settings)}
    values = {types[name][0]: types[name][1](value) for name, value in settings_env().items()}
    assert Settings(**values).host == "0.0.0.0"


def test_one_port_everywhere() -> None:
    port = dockerfile_env()["VITSERVE_PORT"]
    assert port == settings_env()["VITSERVE_PORT"] == str(Settings().port)
    assert f"EXPOSE {port}\n" in DOCKERFILE
    for name in ("vitserve", "vitserve-gpu"):
        assert [each.rpartition(":")[2] for each in COMPOSE["services"][name]["ports"]] == [port]
    (opened,) = container(one("base/deployment.yaml"))["ports"]
    (offered,) = one("base/service.yaml")["spec"]["ports"]
    assert (opened["name"], str(opened["containerPort"])) == ("http", port)
    assert (offered["name"], str(offered["port"]), offered["targetPort"]) == ("http", port, "http")
    assert one("base/networkpolicy.yaml")["spec"]["ingress"][0]["ports"][0]["port"] == "http"
    for rule in one("components/gateway/route.yaml")["spec"]["rules"]:
        assert all((each["name"], str(each["port"])) == ("vitserve", port) for each in rule["backendRefs"])
    for rule in one("components/ingress/ingress.yaml")["spec"]["rules"]:
        assert all(
            each["backend"]["service"] == {"name": "vitserve", "port": {"name": "http"}}
            for each in rule["http"]["paths"]
        )


def test_probes_ask_what_the_service_answers(client: httpx.Client) -> None:
    served = container(one("base/deployment.yaml"))
    probes = {name: served[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: each["path"] for name, each in probes.items()} == {
        "startup": "/livez",
        "readiness": "/readyz",
        "liveness": "/livez",
    }
    (health,) = re.findall(r"HEALTHCHECK .*?(/\w+)'", DOCKERFILE, re.DOTALL)
    for path in {each["path"] for each in probes.values()} | {health}:
        assert client.get(path).status_code == 200
    assert all(each["port"] == "http" for each in probes.values())


def test_the_outside_is_offered_routes_that_exist_and_no_others(client: httpx.Client) -> None:
    ingress = {
        each["path"]
        for rule in one("components/ingress/ingress.yaml")["spec"]["rules"]
        for each in rule["http"]["paths"]
    }
    route = {
        each["path"]["value"]
        for rule in one("components/gateway/route.yaml")["spec"]["rules"]
        for each in rule["matches"]
    }
    assert ingress == route == {"/v1/classify", "/v1/model"}
    assert client.get("/v1/model").status_code == 200
    assert client.post("/v1/classify").status_code != 404


def test_whoever_ends_the_service_gives_it_the_time_to_drain() -> None:
    deployment = one("base/deployment.yaml")
    drain = float(settings_env()["VITSERVE_DRAIN_SECONDS"]) + ENGINE_EXIT_SECONDS
    until_sigterm = container(deployment)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert until_sigterm > 0
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > until_sigterm + drain
    for name in ("vitserve", "vitserve-gpu"):
        service = COMPOSE["services"][name]
        assert (
            float(service["stop_grace_period"].removesuffix("s"))
            > float(service["environment"]["VITSERVE_DRAIN_SECONDS"]) + ENGINE_EXIT_SECONDS
        )


def test_the_links_of_a_service_called_vitserve_cannot_become_settings() -> None:
    """Kubernetes would set VITSERVE_PORT=tcp://10.0.0.1:8000 for it."""
    assert one("base/deployment.yaml")["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_bodies_that_the_service_takes_pass_the_ingress() -> None:
    annotations = one("components/ingress/ingress.yaml")["metadata"]["annotations"]
    assert int(annotations["nginx.ingress.kubernetes.io/proxy-body-size"]) == Settings().max_body_bytes


def test_nobody_runs_as_root_or_writes_outside_the_cache() -> None:
    user, cache = (
        re.findall(r"^USER (\d+):", DOCKERFILE, re.MULTILINE),
        re.findall(r"^VOLUME (\S+)$", DOCKERFILE, re.MULTILINE),
    )
    assert (user, cache) == (["10001"], ["/var/cache/vitserve"])
    pod = one("base/deployment.yaml")["spec"]["template"]["spec"]
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["fsGroup"]) == (10001, 10001)
    assert [each["mountPath"] for each in pod["containers"][0]["volumeMounts"]] == cache
    for deployment in (one("base/deployment.yaml"), one("components/model-volume/deployment.yaml")):
        for each in deployment["spec"]["template"]["spec"]["containers"]:
            hardened = each.get("securityContext")
            assert hardened is None or (hardened["readOnlyRootFilesystem"], hardened["capabilities"]) == (
                True,
                {"drop": ["ALL"]},
            )
    assert container(one("components/model-volume/deployment.yaml"), "reload")["securityContext"]
    for name, service in COMPOSE["services"].items():
        assert (service["read_only"], service["cap_drop"], service["restart"]) == (True, ["ALL"], "unless-stopped"), (
            name
        )
        assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}, name
        assert not any("docker.sock" in each for each in service["volumes"]), name
    for name in ("vitserve", "vitserve-gpu"):
        assert f"cache:{cache[0]}" in COMPOSE["services"][name]["volumes"]


def test_as_many_threads_as_the_pod_has_cpus() -> None:
    """cores() rounds the quota down, and a request below the limit would have them wait for one another."""
    for path in ("base/deployment.yaml", "overlays/gpu/deployment.yaml"):
        resources = container(one(path))["resources"]
        assert resources["requests"]["cpu"] == resources["limits"]["cpu"]
        assert int(resources["limits"]["cpu"]) >= 1


def test_images_are_of_this_version() -> None:
    assert f"ARG VERSION={__version__}\n" in DOCKERFILE
    for overlay in ("cpu", "gpu"):
        assert one(f"overlays/{overlay}/kustomization.yaml")["images"] == [
            {"name": "vitserve", "newTag": f"{__version__}-{overlay}"}
        ]
    assert (ROOT / "docker" / "own-model.Dockerfile").read_text().startswith(f"FROM vitserve:{__version__}-cpu\n")
    images = {name: COMPOSE["services"][name]["image"] for name in COMPOSE["services"]}
    assert (images["vitserve"], images["vitserve-gpu"]) == (
        f"vitserve:{__version__}-cpu",
        f"vitserve:{__version__}-gpu",
    )
    labels = one("base/kustomization.yaml")["labels"]
    assert labels[1]["pairs"]["app.kubernetes.io/version"] == __version__
    for image in [*images.values(), *re.findall(r"^ARG BASE=(\S+)", DOCKERFILE, re.MULTILINE)]:
        assert re.search(r":[\w.-]*\d[\w.-]*$", image), f"{image} may be another one tomorrow"


def test_compose_serves_on_a_cpu_unless_told() -> None:
    profiles = {name: service.get("profiles") for name, service in COMPOSE["services"].items()}
    assert profiles == {"vitserve": ["cpu"], "vitserve-gpu": ["gpu"], "prometheus": None, "grafana": None}
    assert "COMPOSE_PROFILES=cpu\n" in (ROOT / ".env").read_text()
    for name, target in (("vitserve", "cpu"), ("vitserve-gpu", "gpu")):
        build = COMPOSE["services"][name]["build"]
        assert (build["dockerfile"], build["target"]) == ("docker/Dockerfile", target)
    (device,) = COMPOSE["services"]["vitserve-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert COMPOSE["services"]["vitserve-gpu"]["networks"]["default"]["aliases"] == ["vitserve"]


def test_what_the_dockerfile_copies_is_there_and_not_ignored() -> None:
    *rules, last = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith(("!", "*"))
    ]
    assert (rules[0], last) == ("*", "**/__pycache__")
    copied = {
        each for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE) for each in line.split()[:-1]
    }
    assert {"service", "model", "vitserve"} <= copied
    for each in copied:
        assert (ROOT / each).exists(), each
        assert any(fnmatch.fnmatch(each, rule) for rule in rules[1:]), f"{each} is ignored"


def lock(name: str) -> dict[str, Requirement]:
    """Each of the file's requirements by name, once it is certain that all have hashes."""
    found = {}
    for entry in re.split(r"\n(?=\S)", (ROOT / "docker" / name).read_text()):
        line = "\n".join(part for part in entry.splitlines() if not part.lstrip().startswith("#"))
        if line.strip():
            pinned, *hashes = re.split(r"\s+\\?\s*--hash=", line)
            assert hashes, f"{pinned} of {name} has no hash"
            requirement = Requirement(pinned.strip())
            assert str(requirement.specifier).startswith("=="), pinned
            found[canonicalize_name(requirement.name)] = requirement
    return found


def wanted(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [
        Requirement(each)
        for each in [
            *project["dependencies"],
            *(each for extra in extras for each in project["optional-dependencies"][extra]),
        ]
    ]


@pytest.mark.parametrize(
    ("target", "extras", "files", "skipped"),
    [
        ("cpu", (), (), {"openvino-telemetry"}),
        ("gpu", ("gpu", "tensorrt"), ("requirements-tensorrt.txt",), {"onnxruntime", "openvino", "openvino-telemetry"}),
        ("export", ("export", "int8", "train"), ("torch.txt",), {"openvino-telemetry"}),
    ],
)
def test_the_locks_hold_what_the_project_asks_for(
    target: str, extras: tuple[str, ...], files: tuple[str, ...], skipped: set[str]
) -> None:
    locked = {name: pin for file in (f"requirements-{target}.txt", *files) for name, pin in lock(file).items()}
    excluded = {
        line
        for line in (ROOT / "docker" / f"excludes-{target}.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    assert skipped <= excluded
    assert not locked.keys() & excluded
    assert "dumb-init" in locked
    for each in wanted(*extras):
        name = canonicalize_name(each.name)
        if name not in skipped:
            assert name in locked, f"{target} lacks {each}: make lock"
            (pinned,) = locked[name].specifier
            assert each.specifier.contains(pinned.version), (
                f"{target} has {name} {pinned.version}, and {each} is asked for: make lock"
            )
    for file in (f"requirements-{target}.txt", *files):
        assert f"COPY docker/{file} " in DOCKERFILE
        assert re.search(rf"--require-hashes .*-r /src/docker/{file}$", DOCKERFILE, re.MULTILINE)


def test_the_image_to_serve_with_holds_no_torch() -> None:
    assert not lock("requirements-cpu.txt").keys() & {"torch", "onnx", "onnxscript", "transformers", "timm", "triton"}
    assert not any(name.startswith("nvidia-") for name in lock("requirements-cpu.txt"))


def test_one_onnxruntime_in_each_image() -> None:
    """Both packages install `onnxruntime`; the last one unpacked would win."""
    assert {
        target: sorted(each for each in lock(f"requirements-{target}.txt") if each.startswith("onnxruntime"))
        for target in TARGETS
    } == {
        "cpu": ["onnxruntime"],
        "gpu": ["onnxruntime-gpu"],
        "export": ["onnxruntime"],
    }


def test_every_part_of_k8s_is_used_by_somebody() -> None:
    for path in K8S.rglob("kustomization.yaml"):
        said = documents(path)[0]
        named = [
            *said.get("resources", []),
            *said.get("components", []),
            *(each["path"] for each in said.get("patches", []) if "path" in each),
        ]
        named += [
            each
            for generator in said.get("configMapGenerator", [])
            for each in (*generator.get("files", []), *generator.get("envs", []))
        ]
        for each in named:
            assert (path.parent / each).exists(), f"{path} names {each}"
        mine = {each.name for each in path.parent.iterdir() if each.is_file()} - {"kustomization.yaml"}
        assert mine <= {*named, "adapter.yaml"}, f"{path} leaves out {mine - set(named)}"
