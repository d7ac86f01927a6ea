"""Which models can be exported, and how fast they run: the table of docs/models.md.

    python -m benchmarks.models export DIRECTORY [--seconds 150] [--only swin]   # repeat until nothing is left
    python -m benchmarks.models quantize DIRECTORY [--seconds 150]               # int8, for its speed
    python -m benchmarks.models measure DIRECTORY                                # on an idle machine
    python -m benchmarks.models table DIRECTORY                                  # Markdown

Every step continues where the previous run of it ended. Needs timm and transformers.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.models.families import FAMILIES, Family
from benchmarks.models.measure import (
    Result,
    declare_torchvision_operators,
    export,
    images_per_second,
    to_json,
    write_int8,
)
from benchmarks.models.table import markdown
from vitserve.model.arrays import Precision
from vitserve.model.bundle.bundle import GRAPH, Bundle, open_bundle


def main() -> None:
    arguments = _parser().parse_args()
    directory: Path = arguments.directory
    directory.mkdir(parents=True, exist_ok=True)
    library = declare_torchvision_operators()
    results = _read(directory)
    families = [family for family in FAMILIES if arguments.only in key(family)]
    match arguments.step:
        case "export":
            _export(families, directory, results, arguments.seconds)
        case "quantize":
            _quantize(families, directory, results, arguments.seconds)
        case "measure":
            _measure(families, directory, results, arguments.seconds)
        case "table":
            print(markdown([results[key(family)] for family in FAMILIES if key(family) in results]))  # noqa: T201
    del library


def key(family: Family) -> str:
    return f"{family.library} {family.name}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("export", "quantize", "measure", "table"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", default="", help="families whose library and name contain this")
    parser.add_argument("--seconds", type=float, default=150, help="start nothing new after this time")
    return parser


def _export(families: list[Family], directory: Path, results: dict[str, Result], seconds: float) -> None:
    start = time.monotonic()
    for family in families:
        if key(family) in results or time.monotonic() - start > seconds:
            continue
        results[key(family)] = export(family, directory / _name(family))
        _write(directory, results)
        print(results[key(family)], flush=True)  # noqa: T201
    print(f"{len([each for each in families if key(each) not in results])} left")  # noqa: T201


def _measure(families: list[Family], directory: Path, results: dict[str, Result], seconds: float) -> None:
    start = time.monotonic()
    for family in families:
        result = results.get(key(family))
        if result is None or result.message or time.monotonic() - start > seconds:
            continue
        int8 = directory / f"{_name(family)}-int8.xml"
        if result.fp32 is not None and (result.int8 is not None or not int8.exists()):
            continue
        bundle = open_bundle(directory / _name(family))
        # Both, so that they are of the same machine in the same state.
        float32 = _speed(bundle, bundle.path / GRAPH, "fp32")
        speed = _speed(bundle, int8, "int8") if int8.exists() else None
        results[key(family)] = replace(result, fp32=float32, int8=speed)
        _write(directory, results)


def _speed(bundle: Bundle, graph: Path, precision: Precision) -> float:
    """0 if OpenVINO cannot compile the graph. The bundle is then served by ONNX Runtime, or has no such artifact."""
    try:
        return images_per_second(bundle, graph, precision)
    except RuntimeError as error:
        print(f"{graph.name}: {str(error).splitlines()[-1]}", flush=True)  # noqa: T201
        return 0.0


def _quantize(families: list[Family], directory: Path, results: dict[str, Result], seconds: float) -> None:
    start = time.monotonic()
    for family in families:
        result = results.get(key(family))
        if result is not None and not result.message and time.monotonic() - start < seconds:
            try:
                write_int8(open_bundle(directory / _name(family)))
            except Exception as error:  # NNCF has no error of its own
                print(f"{key(family)} cannot be quantized: {error!r}", flush=True)  # noqa: T201


def _name(family: Family) -> str:
    return "".join(character if character.isalnum() else "-" for character in key(family))


def _read(directory: Path) -> dict[str, Result]:
    path = directory / "results.json"
    return {name: Result(**fields) for name, fields in json.loads(path.read_text()).items()} if path.exists() else {}


def _write(directory: Path, results: dict[str, Result]) -> None:
    (directory / "results.json").write_text(json.dumps({name: to_json(each) for name, each in results.items()}))


if __name__ == "__main__":
    main()
