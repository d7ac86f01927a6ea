"""Serves the page index.html and forwards its requests to vitserve: ``python serve.py [--port PORT] [--url URL]``.

A page may only send requests to its own origin, and vitserve does not send CORS headers. In production, a reverse proxy
does what this script does, with TLS and authentication.
"""

from __future__ import annotations

import argparse
from functools import partial
from http.client import HTTPResponse
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

ROUTE = "/v1/classify"


class Handler(SimpleHTTPRequestHandler):
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}  # noqa: RUF012

    def __init__(self, *arguments: object, url: str) -> None:
        self.url = url
        super().__init__(*arguments, directory=str(Path(__file__).parent))  # type: ignore[arg-type]

    def do_POST(self) -> None:
        if self.path.partition("?")[0] != ROUTE:
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        headers = {"Content-Type": self.headers.get("Content-Type", "application/octet-stream")}
        try:
            with urlopen(Request(self.url + self.path, data=body, headers=headers)) as response:
                self._forward(response)
        except HTTPError as error:
            self._forward(error)

    def _forward(self, response: HTTPResponse | HTTPError) -> None:
        content = response.read()
        self.send_response(response.status or 502)
        for name in ("Content-Type", "Retry-After", "Server-Timing"):
            if name in response.headers:
                self.send_header(name, response.headers[name])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the example page.")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of vitserve")
    options = parser.parse_args()
    with ThreadingHTTPServer(("127.0.0.1", options.port), partial(Handler, url=options.url)) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)  # noqa: T201
        server.serve_forever()


if __name__ == "__main__":
    main()
