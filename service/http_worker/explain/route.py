"""POST /v1/explain: which parts of an image a prediction comes from."""

from __future__ import annotations

import asyncio
import io

import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vitserve.model.arrays import Floats
from vitserve.service import errors
from vitserve.service.http_worker.explain.explainer import Explainer, Explanation
from vitserve.service.http_worker.explain.options import Format, read_options
from vitserve.service.http_worker.inference.request_parsing import check_length
from vitserve.service.http_worker.state import State

ROUTE = "/v1/explain"
_LEAST_SIDE = 256  # pixels of a PNG: those of the network may be 32
# From dark blue to yellow, readable with color blindness: https://bids.github.io/colormap/
_COLORS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], np.float32)


async def explain(state: State, explainer: Explainer, request: Request) -> Response:
    """The body is one image. Raises ServiceError."""
    state.clients.check(request.headers.raw)
    options, form = read_options(dict(request.query_params))
    model_info = state.serving().model_info
    explainer.check_room()
    encoded = await _body(state, request)
    explanation = await explainer.explain(encoded, options, model_info.identity)
    if form != "json":
        png = await asyncio.to_thread(rendered, explanation, form)
        return Response(png, media_type="image/png")
    about = {"model": model_info.name, "version": model_info.version, **explanation.description}
    return JSONResponse(about | {"grid": explanation.grid.round(6).tolist()})


async def _body(state: State, request: Request) -> bytes:
    """Within the memory for bodies. Raises ServiceError."""
    memory, chunks, length = state.body_memory, list[bytes](), 0
    try:
        async for chunk in request.stream():
            check_length(length + len(chunk), state.settings)
            if not memory.fits(length, len(chunk)):
                raise errors.OverloadedError("other request bodies take all of the memory for them", "memory", 1.0)
            memory.used += len(chunk)
            length += len(chunk)
            chunks.append(chunk)
        return b"".join(chunks)
    finally:
        memory.used -= length


def rendered(explanation: Explanation, form: Format) -> bytes:
    """PNG: the map in colors, alone or over the pixels that the network sees."""
    pixels = explanation.pixels
    shades = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    factor = max(1, -(-_LEAST_SIDE // min(shades.size)))
    size = (shades.width * factor, shades.height * factor)
    gray = Image.fromarray(np.uint8(255 * explanation.grid)).resize(size, Image.Resampling.BICUBIC)
    values: Floats = np.asarray(gray, np.float32) / np.float32(255)
    colors = _colored(values)
    if form == "overlay":
        below = np.asarray(shades.convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32)
        opacity = (0.2 + 0.5 * values)[:, :, None].astype(np.float32)
        colors = (1 - opacity) * below + opacity * colors
    buffer = io.BytesIO()
    Image.fromarray(np.uint8(colors.round())).save(buffer, "PNG")
    return buffer.getvalue()


def _colored(values: Floats) -> Floats:
    """[height, width] from 0 to 1 → colors [height, width, 3]."""
    places = np.linspace(0, 1, len(_COLORS))
    return np.stack([np.interp(values, places, _COLORS[:, channel]) for channel in range(3)], axis=-1).astype(
        np.float32
    )
