"""The page at /: static files, which use the API of this service and nothing else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_DIRECTORY = Path(__file__).parent / "static"
_SAMPLES = tuple(f"samples/{path.name}" for path in sorted((_DIRECTORY / "samples").glob("*.jpg")))
_FILES = {"/": "index.html", **{f"/page/{name}": name for name in ("page.js", "page.css", "icon.svg", *_SAMPLES)}}
_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def routes() -> list[Route]:
    handlers: dict[str, Callable[[Request], Awaitable[Response]]]
    handlers = {path: partial(_file, name) for path, name in _FILES.items()}
    return [Route(path, handler, methods=["GET"]) for path, handler in handlers.items()]


async def _file(name: str, request: Request) -> Response:
    path = _DIRECTORY / name
    return Response(path.read_bytes(), headers=_HEADERS, media_type=_TYPES[path.suffix])
