"""The options of an explanation, in the query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from vitserve.service import errors
from vitserve.service.http_worker.inference.options import choice, reject_unknown, whole_number

Method = Literal["auto", "rollout", "attention", "occlusion"]
Format = Literal["json", "heatmap", "overlay"]
METHODS: tuple[Method, ...] = get_args(Method)
FORMATS: tuple[Format, ...] = get_args(Format)
_OPTIONS = ("method", "layer", "head_index", "class", "format")
_NEEDS: dict[str, tuple[Method, ...]] = {
    "layer": ("rollout", "attention"),
    "head_index": ("attention",),
    "class": ("occlusion",),
}


def read_options(values: Mapping[str, str]) -> tuple[dict[str, Any], Format]:
    """For the process, and the format. Raises BadRequestError."""
    reject_unknown("query parameter", values, _OPTIONS)
    method: Method = choice("method", values.get("method", "auto"), METHODS)
    for name, methods in (
        ("layer", ("rollout", "attention")),
        ("head_index", ("attention",)),
        ("class", ("occlusion",)),
    ):
        if name in values and method not in methods:
            raise errors.BadRequestError(f"{name} has no effect with method={method}; it needs {' or '.join(methods)}")
    numbers = {
        name: whole_number(name, values[name], least, 1_000_000) if name in values else None
        for name, least in (("layer", 1), ("head_index", 1), ("class", 0))
    }
    options = {"method": method, "layer": numbers["layer"], "head": numbers["head_index"], "class": numbers["class"]}
    return options, choice("format", values.get("format", "json"), FORMATS)
