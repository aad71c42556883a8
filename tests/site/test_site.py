"""The site: built from the executed chapters, complete, offline, accessible; then opened in a browser.

W2VC_BOOK=DIR tests a site that is already there (for those who work on its looks).
"""

from __future__ import annotations

import functools
import html
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import nbformat
import pytest

import book as nbs

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS, SOLUTIONS = nbs.chapters(), nbs.solutions()
PHONE = {"width": 360, "height": 780}
# One page of each kind; the checks that take seconds a page look at these, and `make test-all` at every page.
KINDS = [
    "index.html",
    "00_start.html",
    "training/demo.html",
    "api/model.attention.html",
    "solutions/index.html",
    "search.html?q=quantizer",
]


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built from what test_programs.py (or make) executed."""
    if os.environ.get("W2VC_BOOK"):
        return Path(os.environ["W2VC_BOOK"]).resolve()
    missing = [c for c in CHAPTERS if not (ROOT / "_build" / "executed" / f"{c}.ipynb").is_file()]
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

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.images_without_alt: list[str] = []
        self.players_without_label = 0
        self.headings: list[int] = []  # levels, in the article
        self.marks: dict[str, list[dict[str, str | None]]] = {}  # of the tags that order a page
        self.text = text
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        a = dict(attrs)
        if a.get("id"):
            self.ids.append(a["id"] or "")
        if tag == "a" and a.get("href"):
            self.links.append(a["href"] or "")
        if tag in {"script", "img", "audio", "source", "iframe"} and a.get("src"):
            self.loads.append(a["src"] or "")
        if tag == "link" and a.get("rel") in {"stylesheet", "preload", "icon"}:
            self.loads.append(a.get("href") or "")
        if tag == "img" and not a.get("alt"):
            self.images_without_alt.append((a.get("src") or "")[:60])
        if tag == "audio" and not a.get("aria-label"):
            self.players_without_label += 1
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag in {"html", "article", "aside", "nav", "main", "header", "footer"}:
            self.marks.setdefault(tag, []).append(a)


@functools.cache
def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def pages(book: Path) -> list[Path]:
    return sorted(p for p in book.rglob("*.html") if "_static" not in p.parts)


# What is there


def test_every_chapter_is_a_page(book: Path) -> None:
    for chapter in [*CHAPTERS, *SOLUTIONS]:
        assert (book / f"{chapter}.html").is_file()
    assert (book / "searchindex.js").is_file()


def test_every_chapter_has_a_card(book: Path) -> None:
    text = page(book / "index.html").text
    cards = dict(re.findall(r'<li class="card"><a href="([\w/]+)\.html">(.*?)</li>', text, re.S))
    assert list(cards) == CHAPTERS, "each chapter once, in the order of the book"
    for name in CHAPTERS:
        assert "<p>" in cards[name], f"{name}: no promise on its card"
        if (ROOT / "_build" / "executed" / f"{name}.json").is_file():
            assert re.search(r"runs in \d+ s, \d+ MB</p>", cards[name]), name
        assert f'class="cost">{nbs.kind(name)} · {nbs.minutes(name)} min to read' in cards[name]
    for caption in nbs.parts():
        assert re.search(rf">{re.escape(caption)}<", text), "the cards are grouped by the parts of the book"


def test_each_page_says_where_it_stands_and_what_it_asks(book: Path) -> None:
    for kind in nbs.KINDS:
        names = [name for part in nbs.parts(kind).values() for name in part]
        for k, name in enumerate(names, 1):
            said = f"{kind.capitalize()}, chapter {k} of {len(names)} · {nbs.minutes(name)} min to read"
            assert f'<p class="cost">{said}' in page(book / f"{name}.html").text, name
        captions = [f"{kind.capitalize()}: {c[0].lower()}{c[1:]}" for c in nbs.parts(kind)]
        sidebar = page(book / "model" / "masking.html").text
        assert [c for c in captions if f">{c}<" not in sidebar] == []


def test_map_leads_to_the_chapters(book: Path) -> None:
    text = page(book / "index.html").text
    (area,) = re.findall(r'<div class="map".*?</div></div>', text, re.S)
    named = dict(
        re.findall(r'<a href="([\w/]+)\.html" title="[^"]+" style="[^"]+" aria-label="([^"]+)', area)
    )
    assert {"model/features", "model/attention", "model/pretraining", "model/ctc"} <= set(named)
    assert all(html.unescape(title) == nbs.heading(name)[0] for name, title in named.items())


def test_explorer_on_the_landing_page(book: Path) -> None:
    if not (find_spec("w2vc.explore.attention") and find_spec("w2vc.training.demo")):
        pytest.skip("no explorer in this package")
    assert 'class="w2vc-explorer' in page(book / "index.html").text


def test_chapters_are_linked_in_order(book: Path) -> None:
    for before, after in pairwise(CHAPTERS):
        text = page(book / f"{after}.html").text
        assert f'<a class="prev-page" href="{nbs.link(before, after)}.html">' in text
        text = page(book / f"{before}.html").text
        assert f'<a class="next-page" href="{nbs.link(after, before)}.html">' in text


@pytest.fixture(scope="module")
def builder() -> Any:
    """docs/build.py as a module."""
    spec = spec_from_file_location("build", ROOT / "docs" / "build.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_chapter_names_the_later_ones_that_use_it(book: Path, builder: Any) -> None:
    users = builder.used_later()
    assert "model/negatives" in users["model/masking"]
    assert "model/masking" not in users["model/negatives"], "later ones alone"
    for chapter, later in users.items():
        if later and not chapter.startswith("appendix/"):
            last = page(book / f"{chapter}.html").text.rpartition("The code of later chapters")[2]
            found = re.findall(r'href="([^"]+)\.html"', last.partition("</p>")[0])
            assert found == [nbs.link(name, chapter) for name in later], chapter


def test_words_of_other_chapters_are_linked_to_their_line(book: Path, builder: Any) -> None:
    words = {"frame mask": builder.Word("word-frame-mask", "which frames are real", "model/features")}
    linked = builder.link_words(
        "`frame mask`, [frame mask](x.md), $frame mask$, two Frame masks, a frame mask.",
        words,
        "model/masking",
    )
    link = '<a class="word" href="../appendix/notation.html#word-frame-mask" title="frame mask: which frames are real">'
    assert (
        linked == f"`frame mask`, [frame mask](x.md), $frame mask$, two {link}Frame masks</a>, a frame mask."
    )
    assert not words, "the first use alone"
    assert "padding invariance" in builder.glossary()
    for name in CHAPTERS[2:]:
        links = [u for u in page(book / f"{name}.html").links if "notation.html#word-" in u]
        assert len(links) == len(set(links)), f"{name}: a word is linked twice"
        assert links or name.startswith("appendix/"), f"{name}: no word is linked"


def answers(name: str) -> list[str]:
    """The guesses whose answers a chapter shows."""
    cells = [c.source for c in nbformat.read(nbs.path_of(name), as_version=4).cells if c.cell_type == "code"]
    shown = [cell for cell in cells if not cell.startswith("#| export")]
    return [found[1] for cell in shown if (found := re.search(r'^\s*reveal\("([^"]+)"', cell, re.M))]


def test_answers_are_folded(book: Path) -> None:
    """A cell with an answer, and what it prints, lie in a closed element that opens without JavaScript."""
    assert answers("model/quantizer")[:3] == ["a", "b", "c"]
    for name in CHAPTERS:
        folded = re.findall(
            r'<details class="admonition hide[^>]*>\s*<summary>(.*?)</summary>',
            page(book / f"{name}.html").text,
            re.S,
        )
        said = [re.findall(r"Show the answer to (\w+)", summary) for summary in folded]
        assert said == [[question] for question in answers(name)], name
        outside = re.sub(r"<details.*?</details>", "", page(book / f"{name}.html").text, flags=re.S)
        assert 'class="n">reveal</span><span class="p">(' not in outside, name


def test_contents_for_programs(book: Path) -> None:
    """llms.txt: a title, a summary, and a link to every chapter, in order."""
    text = (book / "llms.txt").read_text(encoding="utf-8")
    assert re.match(r"# w2vc\n\n> .+\n", text)
    links = re.findall(r"^- \[[^]]+\]\((\S+)\): \S", text, re.M)
    assert links == [*(f"{name}.html" for name in CHAPTERS), "api/index.html", "solutions/index.html"]
    assert all((book / link).is_file() for link in links)


def test_exported_code_is_visible(book: Path) -> None:
    for chapter in CHAPTERS:
        if "#| export" in nbs.code(chapter):
            assert "tag_export" in page(book / f"{chapter}.html").text, chapter


def test_every_public_name_is_documented_with_its_source(book: Path) -> None:
    for module in nbs.modules():
        found = page(book / "api" / f"{module}.html")
        source = (ROOT / "w2vc" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        for name in re.findall(r"^(?:def|class) ([A-Za-z]\w*)", source, re.M):
            full = f"w2vc.{module}.{name}"
            assert full in found.ids, f"{full} is missing"
            (link,) = {u for u in found.links if u.endswith(f"#code-{name}")}
            assert unquote(urlparse(link).path).startswith("../"), link
    words = re.sub("<[^>]+>", "", page(book / "api" / "model.features.html").text)
    assert "[B, T, C]" in words, "shapes are shown"


# What every page keeps to


def test_pages_are_valid(book: Path) -> None:
    from justhtml import JustHTML

    def errors(text: str) -> list[str]:
        return [str(error) for error in JustHTML(text, collect_errors=True).errors]

    assert errors("<!doctype html><title>x</title><p><div></p></div>"), (
        "the validator notices a wrong nesting"
    )
    for path in pages(book):
        text = re.sub(r"base64,[A-Za-z0-9+/=\s]{99,}", "base64,AAAA", page(path).text)
        assert not errors(text), f"{path.name}: {errors(text)[:5]}"
        ids = [i for i in page(path).ids if not i.startswith(("svg-", "MathJax"))]
        assert len(ids) == len(set(ids)), f"{path.name}: {sorted(i for i in set(ids) if ids.count(i) > 1)}"


def test_pages_have_a_language_landmarks_and_headings_in_order(book: Path) -> None:
    for path in pages(book):
        found = page(path)
        assert found.marks["html"][0]["lang"] == "en", path.name
        assert [a.get("role") for a in found.marks["article"]] == ["main"], path.name
        names = [a.get("aria-label") for a in found.marks["aside"]]
        assert len(names) == len(set(names)), f"{path.name}: two side columns with one name"
        assert all(names), f"{path.name}: a side column without a name"
        assert 'class="skip-to-content' in found.text
        assert found.headings[:1] == [1], f"{path.name}: starts with {found.headings[:1]}"
        assert found.headings.count(1) == 1, f"{path.name}: {found.headings.count(1)} titles"
        assert all(b <= a + 1 for a, b in pairwise(found.headings)), f"{path.name}: a level is left out"


def test_nothing_is_loaded_from_elsewhere(book: Path) -> None:
    for path in pages(book):
        outside = [
            u for u in page(path).loads if urlparse(u).scheme in {"http", "https"} or u.startswith("//")
        ]
        assert not outside, f"{path.name} loads {outside}"


def test_pictures_and_players_say_what_they_are(book: Path) -> None:
    for path in pages(book):
        assert not page(path).images_without_alt, f"{path.name}: {page(path).images_without_alt}"
        assert not page(path).players_without_label, f"{path.name}: a player without a label"


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_picture_is_followed_by_what_to_see(name: str) -> None:
    cells = nbformat.read(nbs.path_of(name), as_version=4).cells
    for i, cell in enumerate(cells):
        drawn = re.search(
            r"\bdrawing\b|Schematic\(|^draw_\w+\(", cell.source, re.M
        )  # a schematic speaks for itself
        if cell.cell_type != "code" or "show_map(" in cell.source or drawn:
            continue
        shown = ["".join(o.get("data", {}).get("text/html", "")) for o in cell.outputs]
        if any(
            "<img" in part and "w2vc-explorer" not in part for part in shown
        ):  # an explorer says it itself
            text = next((c.source for c in cells[i + 1 :] if c.cell_type == "markdown"), "")
            assert re.search(r"\*What to (see|hear)\b", text), f"cell {i}: {cell.source[-80:]!r}"


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


# Colours


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """The ratio that WCAG 2 defines: from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_our_own_colours() -> None:
    """AA asks for 4.5 in text and for 3 in the edges of what can be used."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    css = (ROOT / "docs" / "_static" / "w2vc.css").read_text()
    conf = (ROOT / "docs" / "conf.py").read_text()
    blocks = [
        dict(re.findall(r"--w2vc-(\w+): (#[0-9a-f]{6});", b))
        for b in re.findall(r"body[^{},]*\{([^{}]*)\}", css)
    ]
    light, *dark = [b for b in blocks if b]
    assert len(dark) == 2, "dark by the switch of the page, and dark by the system"
    assert dark[0] == dark[1]
    brands = re.findall(r'"color-brand-(?:primary|content)": "(#[0-9a-f]{6})"', conf)
    for name, colours, ground, brand in (
        ("light", light, "#ffffff", brands[:2]),
        ("dark", dark[0], "#131416", brands[2:]),
    ):
        for text in (colours["accent"], colours["quiet"], *brand):
            for below in (ground, colours["card"]):
                assert contrast(text, below) >= 4.5, (
                    f"{name}: {text} on {below} has {contrast(text, below):.2f}"
                )
        assert contrast(colours["edge"], ground) >= 3, f"{name}: the edge of a card"


# In a browser


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
def test_pages_in_a_browser(book: Path, browser: Any, over: str, request: pytest.FixtureRequest) -> None:
    """No error, no request to elsewhere, and nothing wider than a phone: on every page over file://."""
    base = book.as_uri() if over == "file" else request.getfixturevalue("served")
    problems: list[str] = []
    tab = browser.new_page(viewport=PHONE)
    tab.on("console", lambda m: problems.append(f"console: {m.text}") if m.type == "error" else None)
    tab.on("pageerror", lambda e: problems.append(f"error: {e}"))
    tab.on(
        "request",
        lambda r: (
            None if r.url.startswith((base, "data:", "blob:")) else problems.append(f"request: {r.url}")
        ),
    )
    everything = [str(p.relative_to(book)) for p in pages(book)]
    for path in everything if over == "file" else [*KINDS, *(f"{name}.html" for name in CHAPTERS[::6])]:
        tab.goto(f"{base}/{path}", wait_until="load")
        assert tab.locator("h1").count() == 1
        width = tab.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"], f"{path} is {width} px wide on a screen of {PHONE['width']}"
        assert not problems, f"{path}: {problems}"
    tab.goto(f"{base}/model/features.html", wait_until="load")
    tab.wait_for_selector("mjx-container", timeout=20_000)  # the mathematics was typeset without a network
    tab.goto(f"{base}/search.html?q=quantizer", wait_until="load")
    tab.wait_for_selector("ul.search li a", timeout=20_000)
    assert re.search(r"quantizer", tab.locator("ul.search").inner_text(), re.I)
    assert not problems, problems
    tab.close()


def barriers(tab: Any) -> list[str]:
    """What axe-core finds: contrast, names, roles, order, landmarks."""
    from axe_playwright_python.sync_playwright import Axe

    # The switches of the menus stand outside all landmarks: the theme's own style sheet needs them there.
    found = (
        Axe()
        .run(
            tab,
            context={"exclude": [[".sidebar-toggle"]]},
            options={"resultTypes": ["violations"], "preload": False},
        )
        .response
    )
    return [f"{v['id']}: {node['html'][:160]}" for v in found["violations"] for node in v["nodes"]]


@pytest.mark.browser
def test_the_accessibility_checker_notices(browser: Any) -> None:
    tab = browser.new_page()
    tab.set_content(
        '<!doctype html><title>x</title><main><h1>a</h1><h3 style="color:#999">pale words</h3><img src="data:,"></main>'
    )
    kinds = {line.split(":")[0] for line in barriers(tab)}
    assert {"html-has-lang", "color-contrast", "image-alt", "heading-order"} <= kinds
    tab.close()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", KINDS)
def test_no_barrier(book: Path, browser: Any, path: str, scheme: str) -> None:
    tab = browser.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 900})
    tab.goto(f"{book.as_uri()}/{path}", wait_until="load")
    assert barriers(tab) == []
    tab.close()


@pytest.mark.browser
@pytest.mark.slow
def test_no_barrier_anywhere(book: Path, browser: Any) -> None:
    tab = browser.new_page(viewport=PHONE)
    found = {}
    for path in pages(book):
        tab.goto(path.as_uri(), wait_until="load")
        found[path.name] = barriers(tab)
    assert not {name: lines[:3] for name, lines in found.items() if lines}
    tab.close()


def focused(tab: Any) -> dict[str, Any]:
    """What the keyboard is on, and whether one sees it."""
    return tab.evaluate(
        """() => { const e = document.activeElement, s = getComputedStyle(e), c = e.closest('.card');
        const outline = (x) => x && getComputedStyle(x).outlineStyle !== 'none' && parseFloat(getComputedStyle(x).outlineWidth) >= 2;
        return {tag: e.tagName, href: e.getAttribute('href'), id: e.id, cls: e.className, seen: Boolean(outline(e) || outline(c))}; }"""
    )


@pytest.mark.browser
def test_an_answer_opens_by_keyboard_and_without_javascript(book: Path, browser: Any) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(f"{book.as_uri()}/model/quantizer.html", wait_until="load")
    fold = tab.locator("details.hide").first
    inside = fold.locator(".highlight").first
    shown = fold.locator(".cell_output")
    assert not inside.is_visible()
    assert not shown.is_visible()
    fold.locator("summary").focus()
    tab.keyboard.press("Enter")
    inside.wait_for(state="visible")
    assert "reveal(" in inside.inner_text()
    assert shown.is_visible()
    assert fold.locator("summary").inner_text().strip() == "Hide the answer to a"
    context.close()


@pytest.mark.browser
def test_landing_page_by_keyboard(book: Path, browser: Any) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(f"{book.as_uri()}/index.html", wait_until="load")
    tab.keyboard.press("Tab")
    assert focused(tab)["href"] == "#furo-main-content", "the first stop leads past the menus"
    tab.keyboard.press("Enter")
    reached, unseen = [], []
    for _ in range(len(CHAPTERS) * 2 + 60):
        tab.keyboard.press("Tab")
        here = focused(tab)
        reached.append(here["href"])
        if not here["seen"] and here["tag"] not in {"BODY", "HTML", "AUDIO"}:  # a player shows it inside
            unseen.append(here)
    assert not unseen, unseen[:3]
    missing = [name for name in CHAPTERS if f"{name}.html" not in reached]
    assert not missing, f"no way to {missing} by keyboard"
    tab.close()


@pytest.mark.browser
def test_menu_of_a_phone_by_keyboard(book: Path, browser: Any) -> None:
    tab = browser.new_page(viewport=PHONE)
    tab.goto(f"{book.as_uri()}/model/attention.html", wait_until="load")
    link = tab.locator('.sidebar-drawer a[href="masking.html"]')
    assert not link.is_visible()
    for _ in range(4):
        tab.keyboard.press("Tab")
        if focused(tab)["id"] == "__navigation":
            break
    assert (
        tab.evaluate("getComputedStyle(document.querySelector('.nav-overlay-icon')).outlineStyle") == "solid"
    )
    tab.keyboard.press("Space")
    link.wait_for(state="visible")
    tab.wait_for_function("document.querySelector('.sidebar-drawer').getBoundingClientRect().left >= 0")
    tab.keyboard.press("Escape")
    link.wait_for(state="hidden")
    tab.close()


@pytest.mark.browser
def test_arrow_keys_stay_with_the_player(book: Path, browser: Any) -> None:
    tab = browser.new_page()
    tab.goto(f"{book.as_uri()}/data/corpus.html", wait_until="load")
    tab.locator("audio").first.focus()
    tab.keyboard.press("ArrowRight")
    tab.wait_for_timeout(300)
    assert tab.url.endswith("data/corpus.html"), "the key left the page"
    tab.close()


@pytest.mark.browser
def test_dark_and_light_by_the_switch(book: Path, browser: Any) -> None:
    tab = browser.new_page(color_scheme="light", viewport={"width": 1280, "height": 900})
    tab.goto(f"{book.as_uri()}/index.html", wait_until="load")
    grounds = set()
    for _ in range(3):  # auto, light, dark
        grounds.add(tab.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor"))
        tab.locator(".theme-toggle:visible").click()
    assert grounds == {"rgb(246, 249, 251)", "rgb(28, 34, 39)"}
    tab.close()
