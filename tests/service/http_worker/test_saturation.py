"""A real service in light load and at three times what it can do, while a real Prometheus watches: the signal, and what is made of it."""

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

from benchmarks.overload import ImageClient
from tests.support.images import encoded, random_image
from tests.support.paths import ROOT
from tests.support.prometheus import Prometheus, prometheus
from tests.support.promql import COMPONENTS, Panel, as_truth, grouped_by, panels, read, rules, selectors
from tests.support.server import start_server
from vitserve.bench.client import Client
from vitserve.bench.request import EncodedImage
from vitserve.model.bundle.bundle import sha256
from vitserve.service.engine_worker.tuning_cache import TuningResult, save_tuning_result
from vitserve.service.settings import DEFAULT_BUNDLE

IMAGE = encoded(random_image(120, 90), "JPEG")
WELL_ABOVE = 2.0
SEEN = 1.5  # by Prometheus, which looks seldom
FROM_TARGETS = {"job", "instance", "namespace", "pod"}  # labels that Prometheus gives


@dataclass
class Seen:
    """What /metrics said of the saturation in either load, and all that it said in the end."""

    light: float
    overloaded: float
    exposition: str
    prometheus: Prometheus | None


def value(exposition: str, name: str) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
        if sample.name == name
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """The model that comes along, and two HTTP workers. The engine that was found to be the fastest is damaged, so that a rejected one is to be seen as well."""
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


@contextlib.asynccontextmanager
async def offered(caller: ImageClient, rate: float, timeout_ms: int) -> AsyncIterator[None]:
    """So many images a second meanwhile, whatever becomes of them. Afterwards all have been answered."""
    chance, replies, enough = random.Random(0), [], asyncio.Event()

    async def offer() -> None:
        due = asyncio.get_running_loop().time()
        while not enough.is_set():
            due += chance.expovariate(rate)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(enough.wait(), max(0.0, due - asyncio.get_running_loop().time()))
            replies.append(asyncio.create_task(caller.post(timeout_ms)))

    offering = asyncio.create_task(offer())
    try:
        yield
    finally:
        enough.set()
        await offering
        await asyncio.gather(*replies)


async def observe(target: str, watching: Prometheus | None) -> Seen:
    host, port = target.split(":")
    caller = ImageClient(Client(host, int(port)), EncodedImage(IMAGE, "image/jpeg"))

    async with httpx.AsyncClient(base_url=f"http://{target}", timeout=60) as reader:

        async def exposition(after_seconds: float = 0.0) -> str:
            await asyncio.sleep(after_seconds)
            return (await reader.get("/metrics")).text

        last, able = "", await caller.capacity(1)
        async with offered(caller, able / 5, 10_000):
            light = overloaded = value(await exposition(after_seconds=2), "vitserve_saturation")
        for _ in range(6):
            able = await caller.capacity(1)  # again: what a machine that others use too can do changes
            async with offered(caller, 3 * able, 500):
                for _ in range(50):
                    overloaded = value(await exposition(after_seconds=0.2), "vitserve_saturation")
                    if overloaded >= WELL_ABOVE:
                        if watching is not None:
                            watching.at = await asyncio.to_thread(watched, watching)
                        last = await exposition()
                        break
            if overloaded >= WELL_ABOVE:
                break
    caller.client.close()
    return Seen(light, overloaded, last, watching)


def watched(watching: Prometheus) -> float:
    """A moment at which every rule had been evaluated and overload had been seen."""
    for expression in [
        *(rule["record"] for rule in rules("record")),
        f"job:vitserve_saturation:avg >= {SEEN}",
        f"vitserve_saturation >= {SEEN}",
    ]:
        watching.wait_for(expression)
    return float(watching.ask("query", query="time()")["result"][1])


def test_saturation_is_far_below_one_in_light_load_and_well_above_in_overload(seen: Seen) -> None:
    assert 0 < seen.light < 0.5
    assert seen.overloaded >= WELL_ABOVE
    assert value(seen.exposition, "vitserve_images_shed_total") > 0


def test_the_lint_of_prometheus_has_nothing_to_say_of_the_exposition(seen: Seen) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=seen.exposition, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_metric_explains_itself(seen: Seen) -> None:
    for family in text_string_to_metric_families(seen.exposition):
        assert re.fullmatch(r"[A-Z0-9].{10,}\.", family.documentation), f"{family.name}: {family.documentation!r}"


# -- names


def places() -> Iterator[tuple[str, str]]:
    for rule in [*rules("record"), *rules("alert")]:
        yield rule.get("record") or rule["alert"], rule["expr"]
    for panel in panels():
        yield f"{panel.dashboard}: {panel.title}", panel.query
    for path in [
        *COMPONENTS.rglob("*.yaml"),
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("*.md"),
        ROOT / "docker" / "prometheus" / "rules.yml",
    ]:
        yield str(path.relative_to(ROOT)), path.read_text()


def test_every_name_and_label_that_is_asked_for_is_exposed(seen: Seen) -> None:
    exposed: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(seen.exposition):
        for sample in family.samples:
            exposed.setdefault(sample.name, set()).update(sample.labels)
    exposed |= {rule["record"]: grouped_by(rule["expr"]) for rule in rules("record")}
    for place, text in places():
        # test_gpu_gauges.py looks at those of GPUs: here there is no device.
        wanted = [(name, labels) for name, labels in selectors(text) if not name.startswith("vitserve_gpu_")]
        for name, labels in wanted:
            assert name in exposed, f"{place} asks for {name}, which nobody exposes"
            assert labels <= exposed[name] | FROM_TARGETS, f"{place} asks for {name} by {labels}"
        asked = {label for name, _ in wanted for label in exposed[name]}
        if not place.endswith((".yaml", ".yml", ".md")):
            assert grouped_by(text) <= asked | FROM_TARGETS, place


def test_every_counter_of_the_code_is_watched(seen: Seen) -> None:
    """What nobody looks at need not be counted."""
    looked_at = {
        name for place, text in places() if not place.endswith((".md", ".yaml", ".yml")) for name, _ in selectors(text)
    }
    for family in text_string_to_metric_families(seen.exposition):
        assert {family.name, *(sample.name for sample in family.samples)} & looked_at, family.name


# -- what Prometheus makes of it


@pytest.fixture
def watching(seen: Seen) -> Prometheus:
    if seen.prometheus is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    return seen.prometheus


def test_prometheus_sees_the_same_saturation(seen: Seen, watching: Prometheus) -> None:
    assert min(watching.query("vitserve_saturation")) >= SEEN
    assert watching.query("min_over_time(up[1m])") == [1.0]
    (asked, average) = (watching.query(f"job:vitserve_saturation:{how}") for how in ("sum", "avg"))
    assert asked == average, "of one replica"


def test_the_counters_say_the_same_as_the_gauge(watching: Prometheus) -> None:
    """Over the same ten seconds, roughly: the gauge looks back with decreasing weight."""
    (counted,) = watching.query(
        'max(rate(vitserve_offered_load_seconds_total{stage="inference"}[10s]) / on (instance, stage) vitserve_stage_capacity)'
    )
    (gauge,) = watching.query("vitserve_saturation")
    assert gauge / 3 < counted < gauge * 3


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: f"{panel.dashboard}-{panel.title}")
def test_every_panel_shows_something_or_says_when_it_is_empty(watching: Prometheus, panel: Panel) -> None:
    found = watching.query(panel.query)
    assert found or "Empty" in panel.description, panel.query
    assert all(not math.isnan(each) for each in found), panel.query


@pytest.mark.parametrize("rule", rules("record"), ids=lambda rule: rule["record"])
def test_every_recording_rule_gives_a_number(watching: Prometheus, rule: dict[str, str]) -> None:
    (found,) = watching.query(f"count({rule['record']} >= 0)")
    assert found >= 1


@pytest.mark.parametrize("rule", rules("alert"), ids=lambda rule: rule["alert"])
def test_every_alert_looks_at_something(watching: Prometheus, rule: dict[str, str]) -> None:
    """Golden gate: at nothing, as long as none fails, and alerts.test.yml shows the rest."""
    found = watching.query(as_truth(rule["expr"]))
    assert found or 'cause="golden_check"' in rule["expr"], as_truth(rule["expr"])


def test_prometheus_evaluates_every_rule_without_an_error(watching: Prometheus) -> None:
    evaluated = [rule for group in watching.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in evaluated} == {"ok"}
    assert len(evaluated) == len(rules("record")) + len(rules("alert"))


# The others are up to how punctual a machine is that others use too.
CERTAIN = {rule["alert"] for rule in rules("alert")} - {
    "VitserveErrorBudgetBurnsFast",
    "VitserveErrorBudgetBurnsSlowly",
    "VitserveQueueLong",
}


@pytest.mark.parametrize("alert", sorted(CERTAIN))
def test_overload_and_a_damaged_engine_are_about_to_raise_what_they_should_and_no_more(
    watching: Prometheus, alert: str
) -> None:
    """They hold for minutes before they fire; meanwhile they are pending."""
    raised = watching.query(f'count(ALERTS{{alertname="{alert}"}})') != []
    assert raised == (alert in {"VitserveSaturated", "VitserveSheds", "VitserveFallbackEngine"})


def test_what_the_autoscalers_ask_gives_the_number_of_replicas(watching: Prometheus) -> None:
    (trigger,) = read(COMPONENTS / "keda" / "scaledobject.yaml")["spec"]["triggers"]
    (rule,) = read(COMPONENTS / "hpa" / "adapter.yaml")["rules"]["custom"]
    adapted = (
        rule["metricsQuery"]
        .replace("<<.Series>>", "vitserve_saturation")
        .replace("<<.LabelMatchers>>", 'job="vitserve"')
        .replace("<<.GroupBy>>", "pod")
    )
    (asked,), (of_pod,) = watching.query(trigger["metadata"]["query"]), watching.query(adapted)
    assert asked == of_pod, "of one replica"
    assert math.ceil(asked / float(trigger["metadata"]["threshold"])) >= 3
