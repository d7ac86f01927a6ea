"""The changelog, the README's first screen, and what must not be committed."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.support.paths import ROOT
from vitserve import __version__

PRIVATE = re.compile(r"/(work|root|home)/\w|https?://(?!127\.0\.0\.1|localhost)[\w.-]*(pypi|npm)[\w.-]*")


def test_the_changelog_has_this_version() -> None:
    assert re.search(rf"^## \[?{re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_readme_starts_with_the_commands() -> None:
    head = "\n".join((ROOT / "README.md").read_text().splitlines()[:20])
    assert "make serve" in head
    assert "curl" in head


def test_make_targets_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)\b", (ROOT / "README.md").read_text())) <= targets


def test_no_file_names_a_machine_or_a_registry() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split()]
    text = [path for path in paths if path.suffix in {".py", ".md", ".toml", ".lua", ".json", ".yml", ".yaml"}]
    text += [path for path in paths if path.name in {"Makefile", "run"}]
    assert not [str(path) for path in text if path.is_file() and PRIVATE.search(path.read_text())]
