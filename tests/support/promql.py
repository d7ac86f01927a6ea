"""The queries of the Prometheus rules, the Grafana dashboards and the Kubernetes components."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.paths import ROOT

RULES = ROOT / "docker" / "prometheus" / "rules.yml"
CONFIGURATION = ROOT / "docker" / "prometheus" / "prometheus.yml"
DASHBOARDS = sorted((ROOT / "docker" / "grafana" / "dashboards").glob("*.json"))
COMPONENTS = ROOT / "k8s" / "components"
# A metric of vitserve or a recording rule: its name and its label matchers.
_SELECTOR = re.compile(r"\b((?:\w+:)?vitserve_\w+(?::\w+)?)(?:\{([^}]*)\})?")
_LABEL = re.compile(r"(?:^|,)\s*(\w+)")
_GROUPED = re.compile(r"\bby \(([^)]*)\)")


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def groups() -> list[dict[str, Any]]:
    rule_groups: list[dict[str, Any]] = read_yaml(RULES)["groups"]
    return rule_groups


def rules(kind: str) -> list[dict[str, Any]]:
    """``kind`` is record or alert."""
    return [rule for group in groups() for rule in group["rules"] if kind in rule]


@dataclass(frozen=True)
class Panel:
    """A panel of a dashboard with one of its queries."""

    dashboard: str
    title: str
    description: str
    query: str


def panels() -> list[Panel]:
    """Every query of every panel, with Grafana's variables replaced as if all jobs and instances were selected."""
    queries = []
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                query = target["expr"].replace("$__rate_interval", "1m")
                query = query.replace("$job", ".*").replace("$instance", ".*")
                queries.append(Panel(path.stem, panel["title"], panel["description"], query))
    return queries


def selectors(text: str) -> list[tuple[str, set[str]]]:
    """The metrics that an expression or a text names, with the labels in their matchers."""
    return [(name, set(_LABEL.findall(labels))) for name, labels in _SELECTOR.findall(text)]


def grouped_by(expression: str) -> set[str]:
    return {label.strip() for labels in _GROUPED.findall(expression) for label in labels.split(",")}


def as_truth(expression: str) -> str:
    """An alert's expression that evaluates to 1 or 0 instead of a value or nothing, if its metrics exist."""
    return re.sub(r" (==|>|<) ", r" \1 bool ", expression)
