"""/docs works without the internet: everything that the page loads is on the server."""

from __future__ import annotations

import gzip
import re
from html.parser import HTMLParser

import httpx
import pytest

from tests.support.paths import ROOT


class Page(HTMLParser):
    """The files that a page loads, and the text of its scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = ("src", "href", "data-document")
        self.urls += [value for name, value in attributes if name in names and value is not None]
        self.inline += [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        if self.lasttag in ("script", "style"):
            self.inline += [data.strip()] if data.strip() else []


def test_the_page_loads_nothing_from_another_host(client: httpx.Client) -> None:
    response = client.get("/docs")
    page = Page(response.text)
    urls = [url for url in page.urls if url != "data:,"]
    assert len(urls) == 4
    assert page.inline == []  # the policy forbids it
    assert not re.search(r"https?:|//", response.text)
    for url in urls:
        assert url.startswith("/")
        loaded = client.get(url)
        assert (loaded.status_code, loaded.content != b"") == (200, True)
        assert client.head(url).headers["content-length"] == loaded.headers["content-length"]
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert all(
        set(sources.split()) <= {"'self'", "'none'", "'unsafe-inline'", "data:", "blob:"} for sources in policy.values()
    )
    assert "'unsafe-inline'" not in policy["script-src"]


@pytest.mark.parametrize("coding", ["gzip", "identity"])
def test_assets_are_sent_in_a_coding_that_the_client_accepts(client: httpx.Client, coding: str) -> None:
    for name, begin in {"swagger-ui-bundle.js": "/*!", "swagger-ui.css": "", "initialize.js": "//"}.items():
        response = client.get(f"/docs/{name}", headers={"accept-encoding": coding})
        assert response.text.startswith(begin)
        assert response.headers.get("content-encoding", "identity") in (coding, "identity")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["content-type"].startswith("text/css" if name.endswith("css") else "text/javascript")


def test_swagger_ui_has_the_version_that_the_makefile_names() -> None:
    match = re.search(r"^SWAGGER_UI := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match is not None
    bundle = gzip.decompress((ROOT / "service/http_worker/openapi/swagger_ui/swagger-ui-bundle.js.gz").read_bytes())
    assert f'"{match[1]}"'.encode() in bundle


def test_there_is_no_page_that_needs_another_host(client: httpx.Client) -> None:
    assert client.get("/redoc").status_code == 404
    assert client.get("/docs/oauth2-redirect").status_code == 404
    assert client.get("/docs/../app.py").status_code == 404
