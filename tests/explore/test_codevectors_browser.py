"""The codevector explorer in a browser: chosen by mouse and keys, heard, read out, narrow and dark, and without scripts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import tiny_config
from w2vc.data.corpus import load_speech
from w2vc.explore.codevectors import CodeFrames, code_phone_table, code_usage, collect_codes
from w2vc.explore.page import codevector_explorer, save_page
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def frames() -> CodeFrames:
    torch.manual_seed(0)
    model = Wav2Vec2ConformerForPreTraining(tiny_config(num_codevectors_per_group=12))
    return collect_codes(model, load_speech("builtin", split="test").filter(kind="digits")[:8])


@pytest.fixture(scope="module")
def saved(frames: CodeFrames, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return codevector_explorer(frames, per_code=2).save(tmp_path_factory.mktemp("page") / "codes.html")


def open_page(browser: Any, page: Path, problems: list[str], width: int = 1100, **look: Any) -> Any:
    tab = browser.new_context(viewport={"width": width, "height": 900}, **look).new_page()
    tab.on("console", lambda m: problems.append(m.text) if m.type in {"error", "warning"} else None)
    tab.on("pageerror", lambda e: problems.append(str(e)))
    tab.on(
        "request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else problems.append(r.url)
    )
    tab.goto(page.as_uri(), wait_until="load")
    return tab


def test_choosing_and_reading(browser: Any, saved: Path, frames: CodeFrames) -> None:
    problems: list[str] = []
    tab = open_page(browser, saved, problems)
    tab.wait_for_selector("[data-ready=yes]")
    said = lambda: tab.locator(".read").inner_text()  # noqa: E731
    assert not tab.locator(".still").is_visible()
    table, usage = code_phone_table(frames, 0), code_usage(frames)
    tab.locator(".grid").focus()
    tab.keyboard.press("Home")
    for step in (0, 1, 2):
        code = table.codes[step]
        assert f"Group 0, code {code}: {usage.counts[0][code]} frames" in said()
        phone = table.phones[int(table.counts[step].argmax())]
        share = 100 * table.counts[step].max() / table.counts[step].sum()
        assert re.search(rf"Its phones: {phone} {share:.1f} %|Its phones: {phone} {share:.0f} %", said())
        tab.keyboard.press("ArrowRight")
    before = said()
    tab.keyboard.press("ArrowUp")
    assert said() != before
    tab.keyboard.press("End")
    assert f"code {table.codes[-1]}:" in said()
    box = tab.locator(".grid canvas").bounding_box()
    tab.mouse.click(box["x"] + 35, box["y"] + 50)  # the first bar
    assert f"code {table.codes[0]}:" in said()
    tab.get_by_label("Code", exact=True).select_option(index=3)
    assert f"code {table.codes[3]}:" in said()
    near = tab.locator(".near button").first
    number = near.inner_text().split(" ")[0]
    near.click()
    assert f"code {number}:" in said()
    tab.get_by_role("radio", name="group 0").focus()
    tab.keyboard.press("ArrowRight")
    assert said().startswith("Group 1, code")
    assert tab.get_by_role("radio", name="group 1").get_attribute("aria-checked") == "true"
    assert not problems, problems
    tab.context.close()


def test_hearing(browser: Any, saved: Path) -> None:
    problems: list[str] = []
    tab = open_page(browser, saved, problems)
    tab.wait_for_selector("[data-ready=yes]")
    button = tab.locator(".list button").first
    assert re.match(r"Play .+ in .+, speaker \w+, \d+ milliseconds", button.get_attribute("aria-label"))
    button.click()
    tab.wait_for_function(
        "document.querySelector('audio').currentTime > 0 && document.querySelector('audio').paused"
    )
    assert button.get_attribute("aria-pressed") == "true"
    assert tab.evaluate("document.querySelector('audio').error") is None
    assert tab.locator("audio").get_attribute("aria-label").startswith("Sound of utterance")
    tab.locator(".strip").focus()
    said = tab.locator(".read").inner_text()
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    assert tab.locator(".read").inner_text() != said
    tab.keyboard.press("Enter")
    tab.wait_for_function("!document.querySelector('audio').paused")
    assert not problems, problems
    tab.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow(browser: Any, saved: Path, scheme: str) -> None:
    problems: list[str] = []
    tab = open_page(browser, saved, problems, width=360, color_scheme=scheme)
    tab.wait_for_selector("[data-ready=yes]")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    paper = tab.evaluate("getComputedStyle(document.querySelector('.w2vc-explorer')).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]
    assert not problems, problems
    tab.context.close()


def test_two_on_a_page_and_none_without_scripts(browser: Any, frames: CodeFrames, tmp_path: Path) -> None:
    parts = [codevector_explorer(frames, per_code=n, sound_bytes=20_000, title=f"codes {n}") for n in (1, 2)]
    page = save_page(tmp_path / "two.html", parts, title="two")
    problems: list[str] = []
    tab = open_page(browser, page, problems)
    tab.wait_for_function("document.querySelectorAll('[data-ready=yes]').length === 2")
    first, second = (tab.locator(".w2vc-explorer").nth(i) for i in (0, 1))
    other = second.locator(".read").inner_text()
    first.get_by_role("radio", name="group 1").click()
    assert first.locator(".read").inner_text().startswith("Group 1")
    assert second.locator(".read").inner_text() == other
    assert not problems, problems
    tab.context.close()
    tab = open_page(browser, page, problems, java_script_enabled=False)
    image = tab.locator(".still img").first
    assert image.is_visible()
    assert "codes of group 0" in image.get_attribute("alt")
    assert not tab.locator(".live").first.is_visible()
    tab.context.close()
