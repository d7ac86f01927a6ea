"""A real server under light load and at three times its capacity, scraped by a real Prometheus.

Checks the saturation, and every rule, panel and autoscaler query that uses the metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.http.retry_after import ImageClient
from tests.support.images import encoded, random_image
from tests.support.paths import ROOT
from tests.support.prometheus import Prometheus, prometheus
from tests.support.promql import COMPONENTS, Panel, as_truth, grouped_by, panels, read_yaml, rules, selectors
from tests.support.server import start_server
from vitserve.bench.client import Client
from vitserve.bench.load import closed_loop
from vitserve.bench.report import throughput
from vitserve.bench.request import EncodedImage
from vitserve.model.bundle.bundle import sha256
from vitserve.service.engine_worker.tuning_cache import TuningResult, save_tuning_result
from vitserve.service.settings import DEFAULT_BUNDLE

IMAGE = encoded(random_image(120, 90), "JPEG")
OVERLOADED = 2.0
OVERLOADED_SCRAPED = 1.5  # as Prometheus must see it at one of its scrapes
TARGET_LABELS = {"job", "instance", "namespace", "pod"}  # added by Prometheus

pytestmark = pytest.mark.slow


@dataclass
class Observation:
    light: float  # saturation under light load
    overloaded: float  # saturation under overload
    exposition: str  # /metrics under overload
    prometheus: Prometheus | None


def value(exposition: str, name: str) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
        if sample.name == name
    )


@pytest.fixture(scope="module")
def observation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observation]:
    """Of the default model with two HTTP workers. The preferred engine is damaged, so that one engine is rejected."""
    directory = tmp_path_factory.mktemp("saturation")
    bundle = shutil.copytree(DEFAULT_BUNDLE, directory / "bundle")
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("XDG_CACHE_HOME", str(directory))
        with (bundle / "model.onnxruntime.onnx").open("ab") as file:
            file.write(b"one byte too many")
        save_tuning_result(sha256(bundle / "bundle.json"), TuningResult("onnxruntime", "fp32", 1, 1, 1.0))
        running = start_server("--bundle", str(bundle), "--workers", "2", "--threads", "1")
        stack.callback(running.stop)
        target = running.url.removeprefix("http://")
        watching = stack.enter_context(prometheus(target, directory)) if shutil.which("prometheus") else None
        if watching is not None:
            watching.wait_for("up == 1")
        yield asyncio.run(observe(target, watching))


async def measured_capacity(client: ImageClient, seconds: float) -> float:
    """Responses per second in a closed loop."""
    return throughput(await closed_loop(client.client, [client.request(60_000)], 32, 1.0, seconds))


@contextlib.asynccontextmanager
async def offered(client: ImageClient, rate: float, timeout_ms: int) -> AsyncIterator[None]:
    """Sends ``rate`` images per second inside the ``with`` block, and waits for all responses afterwards."""
    generator, replies, stop = random.Random(0), [], asyncio.Event()

    async def offer() -> None:
        due = asyncio.get_running_loop().time()
        while not stop.is_set():
            due += generator.expovariate(rate)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), max(0.0, due - asyncio.get_running_loop().time()))
            replies.append(asyncio.create_task(client.post(timeout_ms)))

    offering = asyncio.create_task(offer())
    try:
        yield
    finally:
        stop.set()
        await offering
        await asyncio.gather(*replies)


async def observe(target: str, watching: Prometheus | None) -> Observation:
    host, port = target.split(":")
    client = ImageClient(Client(host, int(port)), EncodedImage(IMAGE, "image/jpeg"))

    async with httpx.AsyncClient(base_url=f"http://{target}", timeout=60) as reader:

        async def exposition(after_seconds: float = 0.0) -> str:
            await asyncio.sleep(after_seconds)
            return (await reader.get("/metrics")).text

        last, capacity = "", await measured_capacity(client, 1)
        async with offered(client, capacity / 5, 10_000):
            light = overloaded = value(await exposition(after_seconds=2), "vitserve_saturation")
        for attempt in range(6):
            if attempt:  # measured again, because other processes use the machine too
                capacity = await measured_capacity(client, 1)
            async with offered(client, 3 * capacity, 500):
                for _ in range(50):
                    overloaded = value(await exposition(after_seconds=0.2), "vitserve_saturation")
                    if overloaded >= OVERLOADED:
                        if watching is not None:
                            watching.at = await asyncio.to_thread(time_of_overload, watching)
                        last = await exposition()
                        break
            if overloaded >= OVERLOADED:
                break
    client.client.close()
    return Observation(light, overloaded, last, watching)


def time_of_overload(watching: Prometheus) -> float:
    """A time at which every rule has been evaluated and overload has been scraped."""
    for expression in [
        *(rule["record"] for rule in rules("record")),
        f"job:vitserve_saturation:avg >= {OVERLOADED_SCRAPED}",
        f"vitserve_saturation >= {OVERLOADED_SCRAPED}",
    ]:
        watching.wait_for(expression)
    return float(watching.get("query", query="time()")["result"][1])


def test_saturation_separates_light_load_from_overload(observation: Observation) -> None:
    assert 0 < observation.light < 0.5
    assert observation.overloaded >= OVERLOADED
    assert value(observation.exposition, "vitserve_images_shed_total") > 0


def test_promtool_accepts_the_exposition(observation: Observation) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=observation.exposition, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_metric_has_a_help_text(observation: Observation) -> None:
    for family in text_string_to_metric_families(observation.exposition):
        assert re.fullmatch(r"[A-Z0-9].{10,}\.", family.documentation), f"{family.name}: {family.documentation!r}"


# -- names


def queries_and_documents() -> Iterator[tuple[str, str]]:
    """All texts that name metrics, each with its place."""
    for rule in [*rules("record"), *rules("alert")]:
        yield rule.get("record") or rule["alert"], rule["expr"]
    for panel in panels():
        yield f"{panel.dashboard}: {panel.title}", panel.query
    for path in [
        *COMPONENTS.rglob("*.yaml"),
        *(path for path in (ROOT / "docs").glob("*.md") if path.name != "clients.md"),  # it names packages
        *ROOT.glob("*.md"),
        ROOT / "docker" / "prometheus" / "rules.yml",
    ]:
        yield str(path.relative_to(ROOT)), path.read_text()


def test_every_queried_metric_and_label_exists(observation: Observation) -> None:
    exposed: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(observation.exposition):
        for sample in family.samples:
            exposed.setdefault(sample.name, set()).update(sample.labels)
        exposed.setdefault(family.name, set())  # documents name a histogram without the suffix of its samples
    exposed |= {rule["record"]: grouped_by(rule["expr"]) for rule in rules("record")}
    for place, text in queries_and_documents():
        # test_gpu_gauges.py checks the metrics of GPUs.
        wanted = [(name, labels) for name, labels in selectors(text) if not name.startswith("vitserve_gpu_")]
        for name, labels in wanted:
            assert name in exposed, f"{place} queries {name}, which does not exist"
            assert labels <= exposed[name] | TARGET_LABELS, f"{place} queries {name} by {labels}"
        existing = {label for name, _ in wanted for label in exposed[name]}
        if not place.endswith((".yaml", ".yml", ".md")):
            assert grouped_by(text) <= existing | TARGET_LABELS, place


def test_every_metric_is_used(observation: Observation) -> None:
    """By a rule, an alert or a panel. Metrics without a use are not collected."""
    used = {
        name
        for place, text in queries_and_documents()
        if not place.endswith((".md", ".yaml", ".yml"))
        for name, _ in selectors(text)
    }
    for family in text_string_to_metric_families(observation.exposition):
        assert {family.name, *(sample.name for sample in family.samples)} & used, family.name


# -- rules, panels and autoscalers in Prometheus


@pytest.fixture
def watching(observation: Observation) -> Prometheus:
    if observation.prometheus is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    return observation.prometheus


def test_prometheus_records_the_saturation(observation: Observation, watching: Prometheus) -> None:
    assert min(watching.query("vitserve_saturation")) >= OVERLOADED_SCRAPED
    assert watching.query("min_over_time(up[1m])") == [1.0]
    total, average = (watching.query(f"job:vitserve_saturation:{how}") for how in ("sum", "avg"))
    assert total == average, "there is one replica"


def test_the_counters_agree_with_the_gauge(watching: Prometheus) -> None:
    """Roughly, because the gauge is an exponentially weighted average."""
    offered = 'rate(vitserve_offered_load_seconds_total{stage="inference"}[10s])'
    (counted,) = watching.query(f"max({offered} / on (instance, stage) vitserve_stage_capacity)")
    (gauge,) = watching.query("vitserve_saturation")
    assert gauge / 3 < counted < gauge * 3


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: f"{panel.dashboard}-{panel.title}")
def test_every_panel_has_data_or_explains_when_it_is_empty(watching: Prometheus, panel: Panel) -> None:
    values = watching.query(panel.query)
    assert values or "Empty" in panel.description, panel.query
    assert not any(map(math.isnan, values)), panel.query


@pytest.mark.parametrize("rule", rules("record"), ids=lambda rule: rule["record"])
def test_every_recording_rule_has_a_value(watching: Prometheus, rule: dict[str, str]) -> None:
    (series,) = watching.query(f"count({rule['record']} >= 0)")
    assert series >= 1


@pytest.mark.parametrize("rule", rules("alert"), ids=lambda rule: rule["alert"])
def test_every_alert_matches_a_metric(watching: Prometheus, rule: dict[str, str]) -> None:
    """Except the one for failed golden checks, whose series exists only after a failure: see alerts.test.yml."""
    series = watching.query(as_truth(rule["expr"]))
    assert series or 'cause="golden_check"' in rule["expr"], as_truth(rule["expr"])


def test_every_rule_is_evaluated_without_an_error(watching: Prometheus) -> None:
    evaluated = [rule for group in watching.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in evaluated} == {"ok"}
    assert len(evaluated) == len(rules("record")) + len(rules("alert"))


# The other alerts depend on the load that other processes put on the machine.
DETERMINISTIC = {rule["alert"] for rule in rules("alert")} - {
    "VitserveErrorBudgetBurnsFast",
    "VitserveErrorBudgetBurnsSlowly",
    "VitserveQueueLong",
}


@pytest.mark.parametrize("alert", sorted(DETERMINISTIC))
def test_exactly_the_expected_alerts_are_pending(watching: Prometheus, alert: str) -> None:
    """Overload and a rejected engine. The alerts are pending for minutes before they fire."""
    pending = watching.query(f'count(ALERTS{{alertname="{alert}"}})') != []
    assert pending == (alert in {"VitserveSaturated", "VitserveHighRejectionRate", "VitserveFallbackEngine"})


def test_the_autoscalers_get_the_number_of_replicas(watching: Prometheus) -> None:
    (trigger,) = read_yaml(COMPONENTS / "keda" / "scaledobject.yaml")["spec"]["triggers"]
    (rule,) = read_yaml(COMPONENTS / "hpa" / "adapter.yaml")["rules"]["custom"]
    adapted = (
        rule["metricsQuery"]
        .replace("<<.Series>>", "vitserve_saturation")
        .replace("<<.LabelMatchers>>", 'job="vitserve"')
        .replace("<<.GroupBy>>", "pod")
    )
    (total,), (of_pod,) = watching.query(trigger["metadata"]["query"]), watching.query(adapted)
    assert total == of_pod, "there is one replica"
    assert math.ceil(total / float(trigger["metadata"]["threshold"])) >= 3
