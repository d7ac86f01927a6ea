"""/openapi.json, and /docs: Swagger UI from the package's own files, so that it works without the internet.

swagger_ui/README.md names their source. They are stored compressed, and sent so to clients that accept it.
"""

from __future__ import annotations

import gzip
from collections.abc import Awaitable, Callable
from functools import cache, partial
from html import escape
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from vitserve.service.http_worker.openapi.document import document
from vitserve.service.http_worker.state import State

_DIRECTORY = Path(__file__).parent / "swagger_ui"
_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "initialize.js": "text/javascript",
}
# Swagger UI sets style attributes, and its icons are data: URLs.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_PAGE = """<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <title>vitserve</title>
  <link rel="icon" href="data:,">
  <link rel="stylesheet" href="{root}/docs/swagger-ui.css">
</head>
<body>
  <div id="swagger-ui" data-document="{root}/openapi.json"></div>
  <script src="{root}/docs/swagger-ui-bundle.js"></script>
  <script src="{root}/docs/initialize.js"></script>
</body>
</html>
"""


def routes(state: State) -> list[Route]:
    assets = [(f"/docs/{name}", partial(_asset, name)) for name in _ASSETS]
    handlers: list[tuple[str, Callable[[Request], Awaitable[Response]]]] = [
        ("/openapi.json", partial(_document, state)),
        ("/docs", partial(_page, state.settings.root_path)),
        *assets,
    ]
    return [Route(path, handler, methods=["GET"]) for path, handler in handlers]


async def _document(state: State, request: Request) -> Response:
    classes = None if state.current is None else len(state.current.model_info.labels)
    body = document(state.settings.root_path, state.settings.max_images, classes)
    return Response(body, media_type="application/json")


async def _page(root_path: str, request: Request) -> Response:
    headers = _HEADERS | {"Content-Security-Policy": _POLICY}
    return Response(_PAGE.format(root=escape(root_path)), headers=headers, media_type="text/html")


async def _asset(name: str, request: Request) -> Response:
    if not (_DIRECTORY / f"{name}.gz").exists():
        headers = _HEADERS | {"Cache-Control": "no-cache"}
        return Response((_DIRECTORY / name).read_bytes(), headers=headers, media_type=_ASSETS[name])
    headers = _HEADERS | {"Cache-Control": "max-age=86400", "Vary": "Accept-Encoding"}
    compressed = "gzip" in request.headers.get("accept-encoding", "")
    if compressed:
        headers["Content-Encoding"] = "gzip"
    return Response(_content(name, compressed), headers=headers, media_type=_ASSETS[name])


@cache
def _content(name: str, compressed: bool) -> bytes:
    """Decompressing takes milliseconds, in which no other request is handled."""
    content = (_DIRECTORY / f"{name}.gz").read_bytes()
    return content if compressed else gzip.decompress(content)
