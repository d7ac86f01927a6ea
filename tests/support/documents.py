"""Reads Markdown: code blocks, shell commands, links, and the anchors of headings."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

_FENCED = re.compile(r"^( *)```([\w-]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"(^|\s+)#\s.*$")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class CodeBlock:
    language: str
    text: str

    @property
    def is_shell(self) -> bool:
        return self.language in ("sh", "bash", "shell", "console")

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, without comments, lines that continue joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [command for line in lines if (command := _COMMENT.sub("", line).strip())]


def markdown_files() -> list[Path]:
    patterns = ("*.md", ".github/**/*.md", "benchmarks/**/*.md", "docs/*.md", "examples/**/*.md", "service/**/*.md")
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def code_blocks(text: str) -> list[CodeBlock]:
    return [CodeBlock(language, body) for _, language, body in _FENCED.findall(text)]


def prose(text: str) -> str:
    """The text without its code blocks and without inline code."""
    return re.sub(r"`[^`\n]+`", "", _FENCED.sub("", text))


def links(text: str) -> list[str]:
    """Targets of links to other files and to headings; links to the web are omitted."""
    targets: list[str] = _LINK.findall(prose(text))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def named_files(text: str) -> list[str]:
    """Files and directories of the repository in inline code. Names with placeholders in capitals are omitted."""
    top = "model|export|service|bench|benchmarks|tests|docs|docker|k8s|vitserve|examples"
    names: list[str] = re.findall(rf"`((?:{top})/[\w./-]*)`", _FENCED.sub("", text))
    return [name for name in names if not re.search(r"\b[A-Z]{4,}", name)]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings, as html-pipeline's TableOfContentsFilter computes them."""
    seen, names = Counter[str](), set()
    for heading in re.findall(r"^#+ +(.+?) *$", _FENCED.sub("", text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        names.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return names
