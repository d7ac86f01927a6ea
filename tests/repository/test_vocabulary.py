"""One concept, one name: the words that docs/glossary.md replaces do not come back."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# Each with the word to use. Whole words, in any case.
WORDS = {
    r"fronts?(?!([ -]matter|-?end))": "HTTP worker",
    r"lanes?": "stream",
    r"ring": "slot table",
    r"knee": "preferred batch size",
    r"outlook": "completion estimate",
    r"cautio(n|us)": "safety factor",
    r"promis(e|es|ed|ing)": "estimate, or guarantee",
    r"demand(s|ed)?": "offered load",
    r"urgenc(y|ies)": "priority",
    r"artefacts?": "artifact",
    r"canonical graph": "reference graph",
    r"typed graphs?": "cast graph",
    r"dialects?": "runtime-specific graph",
    r"golden gate": "golden check",
    r"(un)?proven|proves?": "verified",
    r"left out": "skipped",
    r"refus(e|es|ed|al|als|ing)": "reject",
    r"callers?": "client",
    r"folders?": "directory",
    r"pictures?": "image, or plot",
    r"contenders?": "server under test",
    r"run again": "retried",
    r"asked for": "requested",
    r"anybody|nobody|somebody|whoever": "client, operator, or the thing itself",
    r"anew": "again",
    r"comes? along": "bundled",
    r"ask(s|ed|ing)?": "request",
    r"d(ies|ied)": "exits",
    r"of late": "recently",
    r"of ours": "our",
    r"unless told": "default:",
    r"in the house|at ease|the log knows": "plain words",
    r"(de|un)?(normal|quant|optim|recogn|serial|initial|synchron|minim|maxim|util)is(e|ed|es|er|ing|ation)": "-ize",
    r"coloured|colours?|behaviours?|neighbours?|grey|labelled|licence|centres?|catalogues?": "American spelling",
    r"who (asks|waits|sends)|what (waits|serves|runs|arrives|is read)|it is (its|theirs)": "the noun that is meant",
    r"(hears|obeys|is told|are told|tells|lone|told)": "receives, reports, single",
    r"[\d.]+ %": "a percent sign without a space",
}
PATTERN = re.compile(r"(?<![\w-])(?:" + "|".join(WORDS) + r")(?![\w-])", re.IGNORECASE)
# Written by others, or by tools.
EXCLUDED = re.compile(
    r"^(LICENSE|tests/repository/test_vocabulary\.py|tests/deploy/crds/.*|docker/requirements-.*|docker/torch\.txt|examples/javascript/.*\.mjs"
    r"|service/http_worker/openapi/swagger_ui/(LICENSE|LICENSE-bundled\.txt|NOTICE|.*\.gz)"
    r"|.*imagenet_labels\.txt|.*\.(onnx|data|npz|bin|binpb|xml|safetensors|jpg|jpeg|png|gif))$"
)


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.splitlines() if not EXCLUDED.match(name)]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def replaced_words(text: str) -> list[str]:
    lines = enumerate(text.splitlines(), start=1)
    return [
        f"line {number}: {match[0]!r}" for number, line in lines for match in PATTERN.finditer(line.replace("_", " "))
    ]


def test_replaced_words_do_not_come_back() -> None:
    uses = {str(path.relative_to(ROOT)): replaced_words(path.read_text(encoding="utf-8")) for path in tracked_files()}
    assert not {path: words for path, words in uses.items() if words}


@pytest.mark.parametrize(
    "text",
    ["the front process", "Two lanes.", "a proven artefact", "at 90.61 % now", "who asked for it", "made_picture"],
)
def test_a_replaced_word_is_found(text: str) -> None:
    assert replaced_words(text)


@pytest.mark.parametrize("text", ["a string", "the frontend", "90.61%", "verified", "ringing", "front matter"])
def test_other_words_are_accepted(text: str) -> None:
    assert not replaced_words(text)
