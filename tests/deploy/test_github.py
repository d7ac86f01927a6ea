"""Workflows, issue forms and Dependabot's configuration refer to things that exist."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
MAKE = re.compile(r"^\s*make ([a-z-]+)", re.MULTILINE)
# yaml reads the key `on` as the boolean True.
TRIGGERS = True

Workflow = dict[Any, Any]


def read(path: Path) -> Workflow:
    workflow: Workflow = yaml.safe_load(path.read_text())
    return workflow


def steps(workflow: Workflow) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job.get("steps", [])


def make_targets(text: str) -> set[str]:
    return set(MAKE.findall(text))


def test_there_are_workflows_for_tests_images_and_releases() -> None:
    assert {path.stem for path in WORKFLOWS} == {"test", "image", "release"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_complete_and_limited(path: Path) -> None:
    workflow = read(path)
    assert workflow["name"] == path.stem
    assert workflow[TRIGGERS]
    assert workflow["permissions"] == {"contents": "read"}, "jobs that need more request it"
    for name, job in workflow["jobs"].items():
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file(), name
            assert "workflow_call" in read(ROOT / job["uses"])[TRIGGERS], name
        else:
            assert re.fullmatch(r"ubuntu-\d\d\.\d\d", job["runs-on"]), name
            assert job["timeout-minutes"] > 0, name
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= workflow["jobs"].keys(), name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_steps_run_one_thing_and_name_a_version(path: Path) -> None:
    for step in steps(read(path)):
        assert ("run" in step) != ("uses" in step), step
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[\w./-]+", step["uses"]), step


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_existing_make_targets(path: Path) -> None:
    targets = {target for step in steps(read(path)) for target in make_targets(step.get("run", ""))}
    assert targets
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=True)


def test_ci_script_and_test_workflow_run_the_same_targets() -> None:
    workflow = set()
    for step in steps(read(GITHUB / "workflows" / "test.yml")):
        workflow |= make_targets(step.get("run", ""))
    assert make_targets((ROOT / ".ci" / "run").read_text()) == workflow - {"test-slow"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_valid(path: Path) -> None:
    form = read(path)
    assert form["name"]
    assert form["description"].endswith(".")
    assert form["body"]
    identifiers = [element["id"] for element in form["body"] if element["type"] != "markdown"]
    assert len(set(identifiers)) == len(identifiers) > 0
    for element in form["body"]:
        assert element["type"] in {"markdown", "textarea", "input"}
        assert element["attributes"].get("label") or element["attributes"].get("value")


def test_dependabot_watches_existing_directories() -> None:
    configuration = read(GITHUB / "dependabot.yml")
    assert {update["package-ecosystem"] for update in configuration["updates"]} == {"github-actions", "docker", "pip"}
    for update in configuration["updates"]:
        assert (ROOT / update["directory"].removeprefix("/")).is_dir()


def test_security_policy_and_templates_exist() -> None:
    assert "## Report a vulnerability" in (ROOT / "SECURITY.md").read_text()
    assert (GITHUB / "PULL_REQUEST_TEMPLATE.md").is_file()
    assert read(GITHUB / "ISSUE_TEMPLATE" / "config.yml")["contact_links"]
