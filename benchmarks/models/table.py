"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.models.measure import Result

_COLUMNS = ("family", "library", "network", "exported as", "difference of logits", "attention fused", "images/s fp32")
_OPTIONAL_COLUMN = "images/s int8"  # only if `quantize` ran


def markdown(results: Sequence[Result]) -> str:
    accepted = [result for result in results if not result.message]
    rejected = [result for result in results if result.message]
    with_int8 = any(result.int8 is not None for result in accepted)
    columns = (*_COLUMNS, _OPTIONAL_COLUMN) if with_int8 else _COLUMNS
    rows = [_row(result)[: len(columns)] for result in accepted]
    lines = [
        f"{len(accepted)} of {len(results)} networks are exported.",
        "",
        _line(columns),
        "|---" * len(columns) + "|",
        *map(_line, rows),
    ]
    if rejected:
        lines += ["", "| family | library | network | message |", "|---|---|---|---|"]
        lines += [
            f"| {result.family} | {result.library} | `{result.architecture}` | {_cell(result.message)} |"
            for result in rejected
        ]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _row(result: Result) -> tuple[str, ...]:
    return (
        result.family,
        result.library,
        f"`{result.architecture}`",
        {"ours": "our network", "library": "the library's network"}[result.path],
        f"{result.parity:.0e}",
        _attention(result),
        _speed(result.fp32),
        _speed(result.int8),
    )


def _attention(result: Result) -> str:
    if not result.fused and not result.softmax and not result.attention:
        return "no attention operator"
    whole = max(result.attention, result.fused + result.softmax)
    return f"{result.fused} of {whole}"


def _speed(images_per_second: float | None) -> str:
    if images_per_second is None:
        return "–"
    if not images_per_second:
        return "not compiled"
    return f"{images_per_second:.0f}" if images_per_second >= 10 else f"{images_per_second:.1f}"


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")
