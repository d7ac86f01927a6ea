"""The page at / in Chromium: predictions, attention, errors in words, small and large screens, and accessibility."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.images import encoded, random_image
from tests.support.processes import serving
from tests.support.server import Server

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
SERIOUS = ("serious", "critical")

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed (Debian: chromium)")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--precision", "fp32") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(360, 740)])
def page(request: pytest.FixtureRequest, browser: Any, server: Server) -> Iterator[Any]:
    """The test fails if the page logs an error."""
    width, height = request.param
    problems: list[str] = []
    scheme = "dark" if width < 500 else "light"
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"{server.url}/")
    sync_api.expect(page.get_by_text("compact-hybrid-cifar10, version")).to_be_visible()
    yield page
    expected = ("the server responded with a status of 422",)  # of the test that sends a text
    assert not [problem for problem in problems if not any(text in problem for text in expected)]
    page.close()


def choose(page: Any, path: Path) -> None:
    page.locator("#files").set_input_files(str(path))


@pytest.mark.parametrize("page", [(360, 740), (1920, 1080)], ids=["360 px", "1920 px"], indirect=True)
def test_an_image_gets_bars_and_attention(page: Any, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(encoded(random_image(80, 60)))
    choose(page, tmp_path / "photo.png")
    article = page.locator("article").first
    sync_api.expect(article.locator(".bars li")).to_have_count(5)
    sync_api.expect(article.locator(".bars li").first).to_contain_text("%")
    sync_api.expect(article.locator(".stages li")).to_have_count(4)
    overlay = article.get_by_alt_text("Attention over the image")
    sync_api.expect(overlay).to_be_visible(timeout=30_000)
    slider, first = article.get_by_role("slider"), overlay.get_attribute("src")
    sync_api.expect(slider).to_have_attribute("aria-valuetext", "layer 3 of 3")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    sync_api.expect(article.get_by_text("Attention up to layer 2 of 3")).to_be_visible()
    sync_api.expect(overlay).not_to_have_attribute("src", first)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "the page scrolls sideways"
    serious = [each for each in axe.Axe().run(page).response["violations"] if each["impact"] in SERIOUS]
    assert not serious, serious


def test_a_sample_is_classified_by_keyboard(page: Any) -> None:
    page.get_by_role("button", name="Classify the ship").focus()
    page.keyboard.press("Enter")
    article = page.locator("article").first
    sync_api.expect(article.locator(".bars li").first).to_contain_text("ship")


def test_a_text_gets_an_error_in_words(page: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not an image")
    choose(page, tmp_path / "notes.txt")
    alert = page.get_by_role("alert")
    sync_api.expect(alert).to_contain_text("notes.txt: Not an image in an accepted format")


@pytest.mark.parametrize(
    "event",
    [
        'new DragEvent("drop", { dataTransfer: transfer })',
        'new ClipboardEvent("paste", { clipboardData: transfer })',
    ],
    ids=["dropped", "pasted"],
)
def test_a_dropped_or_pasted_image_is_classified(page: Any, event: str) -> None:
    page.evaluate(
        """async () => {
            const blob = await (await fetch("page/samples/dog.jpg")).blob();
            const transfer = new DataTransfer();
            transfer.items.add(new File([blob], "given.jpg", { type: "image/jpeg" }));
            document.dispatchEvent(EVENT);
        }""".replace("EVENT", event)
    )
    sync_api.expect(page.get_by_role("heading", name="given.jpg")).to_be_visible()
    sync_api.expect(page.locator("article .bars li").first).to_be_visible()


@pytest.mark.parametrize("name", ["Choose images", "Take a photo"])
def test_images_are_chosen_or_photographed(page: Any, name: str, tmp_path: Path) -> None:
    """Where there is no camera, browsers open the dialog for files."""
    (tmp_path / "taken.png").write_bytes(encoded(random_image(80, 60)))
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name=name).click()
    chooser.value.set_files(str(tmp_path / "taken.png"))
    sync_api.expect(page.get_by_role("heading", name="taken.png")).to_be_visible()
    sync_api.expect(page.locator("article .bars li").first).to_be_visible()


def test_the_page_needs_nothing_from_other_hosts(server: Server) -> None:
    page = httpx.get(f"{server.url}/")
    policy = page.headers["content-security-policy"]
    assert "unsafe" not in policy
    for path in ("/", "/page/page.js", "/page/page.css"):
        text = httpx.get(f"{server.url}{path}").text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
