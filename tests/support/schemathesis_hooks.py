"""Properties of valid requests that a schema cannot express: https://schemathesis.readthedocs.io/en/stable/guides/extending/.

Strings of the formats ``byte`` and ``binary`` are image files, options of embeddings need ``embedding``, float16 needs
base64, the model has no further head, and a machine that is busy needs time. Requests that are meant to be invalid
stay invalid.
"""

from __future__ import annotations

import base64
from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis.transport.serialization import Binary

from tests.support.images import encoded, random_image

LONG_TIMEOUT_MS = 60_000
IMAGES = [encoded(random_image(seed=seed), kind) for seed, kind in enumerate(("PNG", "JPEG", "GIF", "WEBP", "BMP"))]

schemathesis.openapi.format("binary", st.sampled_from(IMAGES).map(Binary))
schemathesis.openapi.format("byte", st.sampled_from(IMAGES).map(lambda image: base64.b64encode(image).decode()))


@schemathesis.hook
def map_case(context: schemathesis.HookContext, case: schemathesis.Case[Any]) -> schemathesis.Case[Any]:
    timeout = str((case.query or {}).get("timeout_ms", ""))
    if timeout.isdecimal() and 1 <= int(timeout) < LONG_TIMEOUT_MS:  # a short one bounds the pauses in a body too
        case.query["timeout_ms"] = LONG_TIMEOUT_MS
    if case.operation.path == "/v1/explain" and case.query:
        for name in ("layer", "head_index", "class"):  # each needs a method, and the network limits it
            case.query.pop(name, None)
    if case.meta is not None and case.meta.generation.mode.is_positive:
        places = [place for place in (case.query, case.body) if isinstance(place, dict) and place]  # the body overrides
        if places:
            options = {name: value for place in places for name, value in place.items()}
            if "head" in options:
                for place in places:
                    place.pop("top_k", None)
            _complete(options, places[-1], classify=case.operation.path == "/v1/classify")
    return case


def _complete(options: dict[str, Any], override: dict[str, Any], classify: bool) -> None:
    """Changes in ``override`` the options that contradict each other."""
    if "timeout_ms" in options:
        override["timeout_ms"] = max(int(options["timeout_ms"]), LONG_TIMEOUT_MS)
    if "head" in options:
        override["head"] = "none"
    if options.get("dtype") == "float16":
        override["encoding"] = "base64"
    if options.keys() & {"normalize", "encoding", "dtype"} and classify:
        override["embedding"] = True
