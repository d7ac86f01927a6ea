"""Prometheus rules, Grafana dashboards, the runbook, and the components that monitor and scale in a cluster.

tests/service/http_worker/test_saturation.py evaluates the queries in a real Prometheus.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from prometheus_client import CollectorRegistry

from tests.support.manifests import settings_env
from tests.support.paths import ROOT
from tests.support.promql import (
    COMPONENTS,
    CONFIGURATION,
    DASHBOARDS,
    RULES,
    groups,
    panels,
    read_yaml,
    rules,
    selectors,
)
from vitserve.service.metrics import Metrics

ALERTS = {rule["alert"]: rule for rule in rules("alert")}
CASES = sorted(Path(__file__).parent.glob("*.test.yml"))
SCHEMAS = Path(__file__).parent / "crds"
SCALING = ("monitoring", "hpa", "keda")
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
DEPLOYMENT = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "vitserve"},
    "spec": {
        "replicas": 3,
        "selector": {"matchLabels": {"a": "b"}},
        "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c"}]}},
    },
}


def promtool(*arguments: str) -> str:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    result = subprocess.run(["promtool", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_promtool_accepts_configuration_and_rules() -> None:
    promtool("check", "config", "--lint=all", "--lint-fatal", str(CONFIGURATION))
    output = promtool("check", "rules", "--lint=all", "--lint-fatal", str(RULES))
    assert f"{len(rules('record')) + len(rules('alert'))} rules found" in output


@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_alerts_fire_exactly_when_expected(cases: Path) -> None:
    assert "SUCCESS" in promtool("test", "rules", str(cases))


@pytest.mark.parametrize("alert", ALERTS)
def test_cases_cover_each_alert_firing_and_not_firing(alert: str) -> None:
    recorded = {rule["record"]: {name for name, _ in selectors(rule["expr"])} for rule in rules("record")}
    names = {name for name, _ in selectors(ALERTS[alert]["expr"])} or {"up"}
    sources = {source for name in names for source in recorded.get(name, {name})}
    outcomes = set()
    for group in (group for path in CASES for group in read_yaml(path)["tests"]):
        if sources <= {series["series"].split("{")[0] for series in group["input_series"]}:
            outcomes |= {
                any(alert in sample["labels"] for sample in test["exp_samples"]) for test in group["promql_expr_test"]
            }
    assert outcomes == {True, False}


@pytest.mark.parametrize("alert", ALERTS)
def test_runbook_has_a_section_for_each_alert(alert: str) -> None:
    assert ALERTS[alert]["annotations"]["runbook_url"] == f"docs/runbook.md#{alert.lower()}"
    section = RUNBOOK.partition(f"\n## {alert}\n")[2].partition("\n## ")[0]
    assert [part for part in ("**Meaning.**", "**Diagnosis.**", "**Action.**") if part not in section] == []
    severity = ALERTS[alert]["labels"]["severity"]
    assert severity in ("page", "ticket")
    assert f"| [{alert}](#{alert.lower()}) | {severity} |" in RUNBOOK


def test_runbook_has_no_section_for_other_alerts() -> None:
    assert set(re.findall(r"^## (Vitserve\w+)$", RUNBOOK, re.MULTILINE)) == set(ALERTS)


def test_runbook_names_existing_panels() -> None:
    titles = {json.loads(path.read_text())["title"] for path in DASHBOARDS} | {panel.title for panel in panels()}
    names = set(re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", RUNBOOK))
    assert len(names) > 10
    assert names <= titles


def test_operator_rules_equal_prometheus_rules() -> None:
    assert read_yaml(COMPONENTS / "monitoring" / "rules.yaml")["spec"]["groups"] == groups(), "run `make rules`"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_are_valid(path: Path) -> None:
    """Grafana's classic dashboard model. Grafana itself is not run: Debian does not package it."""
    dashboard = json.loads(path.read_text())
    assert dashboard["uid"] == f"vitserve-{path.stem}"
    assert dashboard["schemaVersion"] >= 39
    assert {"datasource", "job", "instance"} == {variable["name"] for variable in dashboard["templating"]["list"]}
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in dashboard["panels"]:
        assert panel["datasource"] == source
        assert all(target["datasource"] == source for target in panel["targets"])
        assert panel["type"] in {"timeseries", "stat", "table", "heatmap"}
        assert panel["description"].endswith(".")
    for unique in ("id", "title"):
        assert len({panel[unique] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_do_not_overlap(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(path.read_text())["panels"]:
        position = panel["gridPos"]
        columns = range(position["x"], position["x"] + position["w"])
        cells = {(x, y) for x in columns for y in range(position["y"], position["y"] + position["h"])}
        assert not cells & taken, f"{panel['title']} overlaps another panel"
        assert columns[-1] < 24
        taken |= cells


def test_grafana_is_provisioned_with_dashboards_and_prometheus() -> None:
    provisioning = ROOT / "docker" / "grafana" / "provisioning"
    (source,) = read_yaml(provisioning / "datasources" / "prometheus.yml")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    assert source["jsonData"]["timeInterval"] == read_yaml(CONFIGURATION)["global"]["scrape_interval"]
    (provider,) = read_yaml(provisioning / "dashboards" / "vitserve.yml")["providers"]
    assert provider["type"] == "file"
    assert {path.stem for path in DASHBOARDS} == {"service", "capacity"}


def render_with(component: str, directory: Path) -> list[dict[str, Any]]:
    """A deployment of three replicas with the component, as kustomize renders it."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    version = subprocess.run(["kubectl", "version", "--client"], capture_output=True, text=True, check=False).stdout
    if "Kustomize Version" not in version:
        pytest.skip("kubectl is older than 1.21, the first version whose kustomize supports components")
    shutil.copytree(COMPONENTS, directory / "components")
    (directory / "deployment.yaml").write_text(yaml.safe_dump(DEPLOYMENT))
    kustomization = {"resources": ["deployment.yaml"], "components": [f"components/{component}"]}
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    result = subprocess.run(["kubectl", "kustomize", directory], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return list(yaml.safe_load_all(result.stdout))


@pytest.mark.parametrize(
    ("component", "kinds"),
    [
        ("monitoring", {"PodMonitor", "PrometheusRule"}),
        ("hpa", {"HorizontalPodAutoscaler"}),
        ("keda", {"ScaledObject"}),
    ],
)
def test_autoscalers_take_control_of_the_replicas(component: str, kinds: set[str], tmp_path: Path) -> None:
    resources = render_with(component, tmp_path)
    assert {resource["kind"] for resource in resources} == kinds | {"Deployment"}
    (deployment,) = (resource for resource in resources if resource["kind"] == "Deployment")
    assert ("replicas" in deployment["spec"]) == (component == "monitoring")


def resource_files() -> list[Path]:
    return [
        COMPONENTS / component / name
        for component in SCALING
        for name in read_yaml(COMPONENTS / component / "kustomization.yaml")["resources"]
    ]


@pytest.mark.parametrize("path", resource_files(), ids=lambda path: path.stem)
def test_resources_match_their_schema(path: Path) -> None:
    resource = read_yaml(path)
    group, _, version = resource["apiVersion"].partition("/")
    schema = SCHEMAS / f"{resource['kind'].lower()}_{version}.json"
    if schema.exists():
        jsonschema.Draft7Validator(json.loads(schema.read_text())).validate(resource)
    else:
        assert group == "autoscaling"
        kubernetes_validate.validate(resource, "1.32", strict=True)


@pytest.mark.parametrize("component", SCALING)
def test_each_is_a_kustomize_component(component: str) -> None:
    kustomization = read_yaml(COMPONENTS / component / "kustomization.yaml")
    assert (kustomization["apiVersion"], kustomization["kind"]) == ("kustomize.config.k8s.io/v1alpha1", "Component")


def test_both_autoscalers_have_the_same_target_and_limits() -> None:
    hpa = read_yaml(COMPONENTS / "hpa" / "hpa.yaml")["spec"]
    keda = read_yaml(COMPONENTS / "keda" / "scaledobject.yaml")["spec"]
    (metric,), (trigger,) = hpa["metrics"], keda["triggers"]
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "700m"}
    assert (trigger["metricType"], trigger["metadata"]["threshold"]) == ("AverageValue", "0.7")
    assert hpa["behavior"] == keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (1, 10)
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (1, 10)
    assert hpa["scaleTargetRef"]["name"] == keda["scaleTargetRef"]["name"] == "vitserve"


def test_adapter_provides_the_metric_of_the_autoscaler() -> None:
    (metric,) = read_yaml(COMPONENTS / "hpa" / "hpa.yaml")["spec"]["metrics"]
    (rule,) = read_yaml(COMPONENTS / "hpa" / "adapter.yaml")["rules"]["custom"]
    assert rule["seriesQuery"].split("{")[0] == metric["pods"]["metric"]["name"]
    assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}


def test_scrape_job_has_the_same_name_everywhere() -> None:
    (job,) = read_yaml(CONFIGURATION)["scrape_configs"]
    monitor = read_yaml(COMPONENTS / "monitoring" / "podmonitor.yaml")["spec"]
    assert job["job_name"] == monitor["selector"]["matchLabels"][monitor["jobLabel"]] == "vitserve"
    assert job["static_configs"] == [{"targets": [f"vitserve:{settings_env()['VITSERVE_ADMIN_PORT']}"]}]
    assert monitor["podMetricsEndpoints"][0]["port"] == "admin"
    assert read_yaml(CONFIGURATION)["global"]["scrape_interval"] == monitor["podMetricsEndpoints"][0]["interval"]


def test_every_stored_metric_is_in_a_rule_or_a_panel() -> None:
    """Metrics without a use are not collected. tests/service/http_worker/test_saturation.py checks the gauges too."""
    texts = [rule["expr"] for kind in ("alert", "record") for rule in rules(kind)]
    texts += [panel.query for panel in panels()]
    used = {name for text in texts for name, _ in selectors(text)}
    registry = CollectorRegistry()
    Metrics(registry)
    for family in registry.collect():
        names = {f"{family.name}{suffix}" for suffix in ("", "_total", "_bucket", "_sum", "_count")}
        assert names & used, family.name
