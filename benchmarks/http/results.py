"""The results of all rounds, read from and written to JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.http.idle import Idle
from benchmarks.http.overload import Overload
from benchmarks.http.retry_after import RetryAfter
from benchmarks.http.throughput import Throughput
from benchmarks.http.vit_b16 import VitB16
from vitserve.bench.report import describe_machine

Measured = Throughput | Overload | RetryAfter | Idle | VitB16
_KINDS = {kind.__name__: kind for kind in (Throughput, Overload, RetryAfter, Idle, VitB16)}

Groups = dict[tuple[str, str], dict[str, list["Row"]]]  # the rounds by scenario and load, then by server


@dataclass(frozen=True)
class Row:
    """One server in one round under one load."""

    scenario: str
    load: str
    server: str
    round: int
    measured: Measured


@dataclass
class Results:
    commands: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    titles: dict[str, str] = field(default_factory=dict)  # of the servers
    skipped: dict[str, str] = field(default_factory=dict)  # reasons
    machine: dict[str, Any] = field(default_factory=describe_machine)

    def next_round(self, scenario: str) -> int:
        return max((row.round for row in self.rows if row.scenario == scenario), default=0) + 1

    def groups(self) -> Groups:
        grouped: Groups = {}
        for row in self.rows:
            grouped.setdefault((row.scenario, row.load), {}).setdefault(row.server, []).append(row)
        return grouped

    def save(self, path: Path) -> None:
        rows = [asdict(row) | {"kind": type(row.measured).__name__} for row in self.rows]
        path.write_text(json.dumps(vars(self) | {"rows": rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(path: Path) -> Results:
    """Raises OSError, and ValueError if the file is not a result of this version of the benchmark."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        rows = [_row(**row) for row in document.pop("rows")]
        return Results(rows=rows, **document)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of this version of the benchmark: {error}") from error


def _row(kind: str, measured: dict[str, Any], **fields: Any) -> Row:
    return Row(measured=_KINDS[kind](**measured), **fields)
