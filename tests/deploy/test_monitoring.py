"""What is shipped to watch and to scale by: rules, dashboards, runbook, the cluster's components. test_saturation.py asks a real Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT
from tests.support.promql import COMPONENTS, CONFIGURATION, DASHBOARDS, RULES, groups, panels, read, rules, selectors

ALERTS = {rule["alert"]: rule for rule in rules("alert")}
CASES = [ROOT / "tests" / "alerts.test.yml", ROOT / "tests" / "budget.test.yml"]
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
    done = subprocess.run(["promtool", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- rules


def test_prometheus_accepts_its_configuration_and_the_rules() -> None:
    promtool("check", "config", "--lint=all", "--lint-fatal", str(CONFIGURATION))
    assert f"{len(rules('record')) + len(rules('alert'))} rules found" in promtool(
        "check", "rules", "--lint=all", "--lint-fatal", str(RULES)
    )


@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_only_then(cases: Path) -> None:
    assert "SUCCESS" in promtool("test", "rules", str(cases))


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_is_shown_firing_and_keeping_still(alert: str) -> None:
    """On series that it looks at, once it fires and once it does not."""
    recorded = {rule["record"]: {name for name, _ in selectors(rule["expr"])} for rule in rules("record")}
    named = {name for name, _ in selectors(ALERTS[alert]["expr"])} or {"up"}
    looked_at = {source for name in named for source in recorded.get(name, {name})}
    seen = set()
    for group in (group for path in CASES for group in read(path)["tests"]):
        if looked_at <= {series["series"].split("{")[0] for series in group["input_series"]}:
            seen |= {
                any(alert in sample["labels"] for sample in test["exp_samples"]) for test in group["promql_expr_test"]
            }
    assert seen == {True, False}


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_has_a_section_of_the_runbook(alert: str) -> None:
    assert ALERTS[alert]["annotations"]["runbook_url"] == f"docs/runbook.md#{alert.lower()}"
    section = RUNBOOK.partition(f"\n## {alert}\n")[2].partition("\n## ")[0]
    assert [word for word in ("**Means.**", "**Look.**", "**Do.**") if word not in section] == []
    severity = ALERTS[alert]["labels"]["severity"]
    assert severity in ("page", "ticket")
    assert f"| [{alert}](#{alert.lower()}) | {severity} |" in RUNBOOK


def test_the_runbook_has_no_other_sections() -> None:
    assert set(re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE)) == set(ALERTS)


def test_the_runbook_speaks_of_panels_that_there_are() -> None:
    titles = {json.loads(path.read_text())["title"] for path in DASHBOARDS} | {panel.title for panel in panels()}
    assert set(re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", RUNBOOK.replace("\n", " "))) <= titles


def test_the_operators_rules_are_the_same() -> None:
    assert read(COMPONENTS / "monitoring" / "rules.yaml")["spec"]["groups"] == groups(), "`make rules` writes them"


# -- dashboards


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_one_that_grafana_takes(path: Path) -> None:
    """The classic model, of which each panel asks the data source that its reader chooses. Grafana itself is not in Debian, so it is not run."""
    board = json.loads(path.read_text())
    assert board["uid"] == f"vitserve-{path.stem}"
    assert board["schemaVersion"] >= 39
    assert {"datasource", "job", "instance"} == {variable["name"] for variable in board["templating"]["list"]}
    source = {"type": "prometheus", "uid": "${datasource}"}
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        assert panel["datasource"] == source
        assert all(target["datasource"] == source for target in panel["targets"])
        assert panel["type"] in {"timeseries", "stat", "table", "heatmap"}
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies over another"
        assert max(x for x, _ in cells) < 24
        taken |= cells
    for unique in ("id", "title"):
        assert len({panel[unique] for panel in board["panels"]}) == len(board["panels"])


def test_grafana_is_told_of_both_and_of_prometheus() -> None:
    provisioning = ROOT / "docker" / "grafana" / "provisioning"
    (source,) = read(provisioning / "datasources" / "prometheus.yml")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    assert source["jsonData"]["timeInterval"] == read(CONFIGURATION)["global"]["scrape_interval"]
    (provider,) = read(provisioning / "dashboards" / "vitserve.yml")["providers"]
    assert provider["type"] == "file"
    assert {path.stem for path in DASHBOARDS} == {"service", "capacity"}


# -- the cluster's components


def built(component: str, directory: Path) -> list[dict[str, Any]]:
    """Of a deployment of three replicas with the component, as kustomize gives it."""
    if (
        shutil.which("kubectl") is None
        or "Kustomize Version"
        not in subprocess.run(["kubectl", "version", "--client"], capture_output=True, text=True).stdout
    ):
        pytest.skip("kubectl 1.21 or newer, which has a kustomize that knows components in it, is not installed")
    shutil.copytree(COMPONENTS, directory / "components")
    (directory / "deployment.yaml").write_text(yaml.safe_dump(DEPLOYMENT))
    (directory / "kustomization.yaml").write_text(
        yaml.safe_dump({"resources": ["deployment.yaml"], "components": [f"components/{component}"]})
    )
    done = subprocess.run(["kubectl", "kustomize", str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize(
    ("component", "kinds"),
    [
        ("monitoring", {"PodMonitor", "PrometheusRule"}),
        ("hpa", {"HorizontalPodAutoscaler"}),
        ("keda", {"ScaledObject"}),
    ],
)
def test_a_component_adds_its_resources_and_leaves_replicas_to_the_autoscaler(
    component: str, kinds: set[str], tmp_path: Path
) -> None:
    resources = built(component, tmp_path)
    assert {each["kind"] for each in resources} == kinds | {"Deployment"}
    (deployment,) = (each for each in resources if each["kind"] == "Deployment")
    assert ("replicas" in deployment["spec"]) == (component == "monitoring")


def resources() -> list[Path]:
    return [
        COMPONENTS / component / name
        for component in ("monitoring", "hpa", "keda")
        for name in read(COMPONENTS / component / "kustomization.yaml")["resources"]
    ]


@pytest.mark.parametrize("path", resources(), ids=lambda path: path.stem)
def test_a_resource_fits_its_schema(path: Path) -> None:
    """Kubernetes' own, or the custom resource's with unknown fields rejected."""
    resource = read(path)
    group, _, version = resource["apiVersion"].partition("/")
    schema = ROOT / "tests" / "crds" / f"{resource['kind'].lower()}_{version}.json"
    if schema.exists():
        pytest.importorskip("jsonschema").Draft7Validator(json.loads(schema.read_text())).validate(resource)
    else:
        assert group == "autoscaling"
        pytest.importorskip("kubernetes_validate").validate(resource, "1.32", strict=True)


@pytest.mark.parametrize("component", ["monitoring", "hpa", "keda"])
def test_a_component_is_one(component: str) -> None:
    kustomization = read(COMPONENTS / component / "kustomization.yaml")
    assert (kustomization["apiVersion"], kustomization["kind"]) == ("kustomize.config.k8s.io/v1alpha1", "Component")


def test_both_autoscalers_aim_at_the_same_and_scale_what_there_is() -> None:
    hpa, scaled = read(COMPONENTS / "hpa" / "hpa.yaml")["spec"], read(COMPONENTS / "keda" / "scaledobject.yaml")["spec"]
    (metric,), (trigger,) = hpa["metrics"], scaled["triggers"]
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "700m"}
    assert (trigger["metricType"], trigger["metadata"]["threshold"]) == ("AverageValue", "0.7")
    assert hpa["behavior"] == scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert (
        (hpa["minReplicas"], hpa["maxReplicas"]) == (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (1, 10)
    ), "not to zero"
    assert hpa["scaleTargetRef"]["name"] == scaled["scaleTargetRef"]["name"] == "vitserve"


def test_the_adapter_serves_the_metric_that_the_autoscaler_asks_for() -> None:
    (metric,) = read(COMPONENTS / "hpa" / "hpa.yaml")["spec"]["metrics"]
    (rule,) = read(COMPONENTS / "hpa" / "adapter.yaml")["rules"]["custom"]
    assert rule["seriesQuery"].split("{")[0] == metric["pods"]["metric"]["name"]
    assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}


def test_the_job_is_called_the_same_everywhere() -> None:
    (scraped,) = read(CONFIGURATION)["scrape_configs"]
    monitor = read(COMPONENTS / "monitoring" / "podmonitor.yaml")["spec"]
    assert scraped["job_name"] == monitor["selector"]["matchLabels"][monitor["jobLabel"]] == "vitserve"
    assert scraped["static_configs"] == [{"targets": ["vitserve:8000"]}]
    assert read(CONFIGURATION)["global"]["scrape_interval"] == monitor["podMetricsEndpoints"][0]["interval"]
