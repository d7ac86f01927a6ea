"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.models.measure import Result

_HEAD = """\
| family | library | network | exported as | difference of logits | attention fused | images/s fp32 | images/s int8 |
|---|---|---|---|---|---|---|---|"""


def markdown(results: Sequence[Result]) -> str:
    accepted, rejected = [each for each in results if not each.message], [each for each in results if each.message]
    rows = [_row(result) for result in accepted]
    lines = [f"{len(accepted)} of {len(results)} networks are exported.", "", _HEAD, *rows]
    if rejected:
        lines += ["", "| family | library | network | message |", "|---|---|---|---|"]
        lines += [
            f"| {each.family} | {each.library} | `{each.architecture}` | {_cell(each.message)} |" for each in rejected
        ]
    return "\n".join(lines)


def _row(result: Result) -> str:
    cells = (
        result.family,
        result.library,
        f"`{result.architecture}`",
        {"ours": "our network", "library": "the library's network"}[result.path],
        f"{result.parity:.0e}",
        _attention(result),
        _speed(result.fp32),
        _speed(result.int8),
    )
    return f"| {' | '.join(cells)} |"


def _attention(result: Result) -> str:
    if not result.fused and not result.softmax and not result.attention:
        return "no attention operator"
    whole = max(result.attention, result.fused + result.softmax)
    return f"{result.fused} of {whole}"


def _speed(images_per_second: float | None) -> str:
    if images_per_second is None:
        return "–"
    return f"{images_per_second:.0f}" if images_per_second >= 10 else f"{images_per_second:.1f}"


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")
