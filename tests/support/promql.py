"""What the shipped rules, dashboards and manifests ask of Prometheus. Used by test_monitoring.py, which reads them, and test_saturation.py, which asks."""

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
# Of a metric of ours, or of a recording rule: the name, and the labels that it is asked for.
_SELECTOR = re.compile(r"\b((?:\w+:)?vitserve_\w+(?::\w+)?)(?:\{([^}]*)\})?")
_LABEL = re.compile(r"(?:^|,)\s*(\w+)")
_GROUPED = re.compile(r"\bby \(([^)]*)\)")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def groups() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read(RULES)["groups"]
    return found


def rules(kind: str) -> list[dict[str, Any]]:
    """``kind`` is record or alert."""
    return [rule for group in groups() for rule in group["rules"] if kind in rule]


@dataclass(frozen=True)
class Panel:
    """Of a dashboard, with one of its queries."""

    dashboard: str
    title: str
    description: str
    query: str


def panels() -> list[Panel]:
    """With what Grafana puts in the place of its variables when everything is chosen."""
    found = []
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                query = (
                    target["expr"].replace("$__rate_interval", "1m").replace("$job", ".*").replace("$instance", ".*")
                )
                found.append(Panel(path.stem, panel["title"], panel["description"], query))
    return found


def selectors(text: str) -> list[tuple[str, set[str]]]:
    """Each metric that an expression or a page of prose names, with the labels that it is asked for."""
    return [(name, set(_LABEL.findall(labels))) for name, labels in _SELECTOR.findall(text)]


def grouped_by(expression: str) -> set[str]:
    return {label.strip() for labels in _GROUPED.findall(expression) for label in labels.split(",")}


def as_truth(expression: str) -> str:
    """An alert's expression that answers 1 or 0 instead of something or nothing, wherever its metrics are there."""
    return re.sub(r" (==|>|<) ", r" \1 bool ", expression)
