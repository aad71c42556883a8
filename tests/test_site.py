"""The site: built from the executed chapters, complete, offline, accessible; then opened in a browser."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built from what test_programs.py (or make) executed."""
    missing = [p.stem for p in CHAPTERS if not (ROOT / "_build" / "executed" / p.name).is_file()]
    if missing:
        out = subprocess.run(["make", "executed"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert out.returncode == 0, out.stderr[-3000:]
    target = tmp_path_factory.mktemp("book")
    env = {k: v for k, v in os.environ.items() if k != "W2VC_SPEECH"}
    command = [sys.executable, "docs/build.py", "--out", str(target)]
    out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]
    return target


class Page(HTMLParser):
    """What a page links to, loads and shows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.images_without_alt: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        a = dict(attrs)
        if a.get("id"):
            self.ids.add(a["id"] or "")
        if tag == "a" and a.get("href"):
            self.links.append(a["href"] or "")
        if tag in {"script", "img", "audio", "source", "iframe"} and a.get("src"):
            self.loads.append(a["src"] or "")
        if tag == "link" and a.get("rel") in {"stylesheet", "preload", "icon"}:
            self.loads.append(a.get("href") or "")
        if tag == "img" and not a.get("alt"):
            self.images_without_alt.append((a.get("src") or "")[:60])


@functools.cache
def page(path: Path) -> Page:
    return Page(path)


def pages(book: Path) -> list[Path]:
    return [p for p in book.rglob("*.html") if "_static" not in p.parts]


def test_every_chapter_is_a_page(book: Path) -> None:
    for chapter in [*CHAPTERS, *(ROOT / "nbs" / "solutions").glob("[0-9]*.ipynb")]:
        assert (book / chapter.relative_to(ROOT / "nbs").with_suffix(".html")).is_file()
    assert (book / "searchindex.js").is_file()


def test_exported_code_is_visible(book: Path) -> None:
    for chapter in CHAPTERS:
        if "#| export" in chapter.read_text():
            assert "tag_export" in page(book / f"{chapter.stem}.html").text, chapter.stem


def test_nothing_is_loaded_from_elsewhere(book: Path) -> None:
    for path in pages(book):
        outside = [
            u for u in page(path).loads if urlparse(u).scheme in {"http", "https"} or u.startswith("//")
        ]
        assert not outside, f"{path.name} loads {outside}"


def test_pictures_keep_their_alt_text(book: Path) -> None:
    for path in pages(book):
        assert not page(path).images_without_alt, f"{path.name}: {page(path).images_without_alt}"


def test_links_inside_the_book_resolve(book: Path) -> None:
    for path in pages(book):
        for link in page(path).links:
            parts = urlparse(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name}: dead link {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in page(target).ids, f"{path.name}: dead anchor {link}"


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        if os.environ.get("W2VC_REQUIRE_BROWSER") == "1":
            pytest.fail("W2VC_REQUIRE_BROWSER=1, but there is no Chromium on the PATH")
        pytest.skip("no Chromium on the PATH: the pages were checked as text only")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        chrome = p.chromium.launch(executable_path=chromium, args=FLAGS.split())
        yield chrome
        chrome.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that does not write its requests into the test report."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def served(book: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(book))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.browser
@pytest.mark.parametrize("over", ["file", "http"])
def test_pages_in_a_browser(book: Path, browser: object, over: str, request: pytest.FixtureRequest) -> None:
    base = book.as_uri() if over == "file" else request.getfixturevalue("served")
    problems: list[str] = []
    tab = browser.new_page()  # type: ignore[attr-defined]
    tab.on("console", lambda m: problems.append(f"console: {m.text}") if m.type == "error" else None)
    tab.on("pageerror", lambda e: problems.append(f"error: {e}"))
    tab.on(
        "request",
        lambda r: (
            None if r.url.startswith((base, "data:", "blob:")) else problems.append(f"request: {r.url}")
        ),
    )
    for path in ["index.html", *(f"{c.stem}.html" for c in CHAPTERS)]:
        tab.goto(f"{base}/{path}", wait_until="load")
        assert tab.locator("h1").count() >= 1
        assert not problems, f"{path}: {problems}"
    tab.goto(f"{base}/10_features.html", wait_until="load")
    tab.wait_for_selector("mjx-container", timeout=20_000)  # the mathematics was typeset without a network
    tab.goto(f"{base}/search.html?q=quantizer", wait_until="load")
    tab.wait_for_selector("ul.search li a", timeout=20_000)
    assert re.search(r"quantizer", tab.locator("ul.search").inner_text(), re.I)
    assert not problems, problems
    tab.close()


@pytest.mark.browser
def test_pages_fit_a_phone(book: Path, browser: object) -> None:
    tab = browser.new_page(viewport={"width": 390, "height": 800})  # type: ignore[attr-defined]
    for path in ["index.html", "00_start.html", "22_attention.html"]:
        tab.goto(f"{book.as_uri()}/{path}", wait_until="load")
        width = tab.evaluate("document.documentElement.scrollWidth")
        assert width <= 400, f"{path} is {width} px wide on a screen of 390"
    tab.close()
