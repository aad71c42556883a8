"""The page of `w2vc explore` and the slider in a browser: no errors, nothing loaded, driven by pointer and keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import tiny_config
from w2vc.data.audio import Wav2Vec2FeatureExtractor
from w2vc.data.corpus import load_speech
from w2vc.explore.page import slider
from w2vc.explore.views import explore_page, read_ctc
from w2vc.explore.viz import figure, render
from w2vc.model.ctc import Wav2Vec2ConformerForCTC
from w2vc.text.tokenizer import Wav2Vec2CTCTokenizer, Wav2Vec2Processor, build_vocabulary

pytestmark = pytest.mark.browser
READY = "[...document.querySelectorAll('.w2vc-explorer')].every((e) => e.dataset.ready === 'yes')"
UTTERANCE = load_speech("builtin", "test").filter(kind="sentence")[2]


def open_page(browser: Any, page: Path, problems: list[str], **look: Any) -> Any:
    tab = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **look}).new_page()
    tab.on("console", lambda m: problems.append(m.text) if m.type in {"error", "warning"} else None)
    tab.on("pageerror", lambda e: problems.append(str(e)))
    tab.on(
        "request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else problems.append(r.url)
    )
    tab.goto(page.as_uri(), wait_until="load")
    tab.wait_for_function(READY)
    return tab


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ctc")
    vocabulary = build_vocabulary(["abcdefghijklmnopqrstuvwxyz '"])
    torch.manual_seed(0)
    model = Wav2Vec2ConformerForCTC(tiny_config(vocab_size=len(vocabulary)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), Wav2Vec2CTCTokenizer(vocabulary)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def page(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return explore_page(UTTERANCE, checkpoint, tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture
def tab(browser: Any, page: Path) -> Iterator[Any]:
    """The open page; at the end no error was written and nothing was loaded."""
    problems: list[str] = []
    tab = open_page(browser, page, problems)
    yield tab
    tab.close()
    assert not problems, problems


def test_frames_are_chosen_by_key_and_pointer_and_told(tab: Any, checkpoint: Path) -> None:
    reading = read_ctc(checkpoint, UTTERANCE)
    box = tab.get_by_role("group", name="Letters over time")
    stage, said = box.locator(".stage"), box.locator(".read")
    stage.focus()
    for key, frame in (("Home", 0), ("ArrowRight", 1), ("ArrowLeft", 0), ("End", len(reading.path) - 1)):
        stage.press(key)
        best = reading.symbols[int(reading.path[frame])]
        assert said.inner_text().startswith(f"Frame {frame}, {frame * 0.02:.2f} s: {best} ")
        assert int(stage.get_attribute("aria-valuenow")) == frame
    assert said.inner_text() == stage.get_attribute("aria-valuetext")
    stage.press("Home")
    stage.press("Shift+ArrowRight")
    start = UTTERANCE.words[0].start
    assert int(stage.get_attribute("aria-valuenow")) * 0.02 == pytest.approx(start, abs=0.025)
    area = box.locator("canvas").bounding_box()
    left, right = area["x"] + 76, area["x"] + area["width"] - 8
    tab.mouse.move(left + (right - left) * 1.0 / UTTERANCE.seconds + 1, area["y"] + 100)
    assert said.inner_text().startswith("Frame 50, 1.00 s")
    picture = "document.querySelector('.stage canvas').toDataURL()"
    paint = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    tab.evaluate(paint)
    before = tab.evaluate(picture)
    stage.press("End")
    tab.evaluate(paint)
    assert tab.evaluate(picture) != before


def test_it_plays_from_the_frame(tab: Any) -> None:
    box = tab.get_by_role("group", name="Letters over time")
    assert box.locator("audio").get_attribute("aria-label") == "the whole recording"
    tab.evaluate(
        "document.querySelector('audio').playbackRate = 0.25"
    )  # slow machines get there in time, too
    box.get_by_role("button", name="Play from here").click()
    tab.wait_for_function("document.querySelector('audio').currentTime > 0.3")
    box.get_by_role("button", name="Stop").click()
    assert tab.evaluate("document.querySelector('audio').paused")
    assert int(box.locator(".stage").get_attribute("aria-valuenow")) > 10, "the frame follows the sound"
    assert box.get_by_role("button", name="Play from here").count() == 1


@pytest.mark.parametrize("look", [{"width": 360}, {"width": 360, "dark": True}])
def test_it_fits_a_phone(browser: Any, page: Path, look: dict[str, Any]) -> None:
    problems: list[str] = []
    scheme = "dark" if look.get("dark") else "light"
    tab = open_page(
        browser, page, problems, viewport={"width": look["width"], "height": 700}, color_scheme=scheme
    )
    assert tab.evaluate("document.documentElement.scrollWidth") <= look["width"]
    assert tab.get_by_role("heading", name="Shapes").count() == 1
    tab.close()
    assert not problems, problems


def test_without_scripts_the_pictures_stay(browser: Any, page: Path) -> None:
    tab = browser.new_context(java_script_enabled=False).new_page()
    tab.goto(page.as_uri())
    assert [still.is_visible() for still in tab.locator(".still").all()] == [True, True]
    assert tab.locator(".stage").count() == 0
    tab.close()


def test_a_slider_turns_the_pictures(browser: Any, tmp_path: Path) -> None:
    pictures = {}
    for width in (1, 2, 4):
        fig, ax = figure(width=3, height=1)
        ax.plot([0, width], [0, 1])
        pictures[str(width)] = render(fig, f"A line that rises by one over {width} steps to the right.")
    problems: list[str] = []
    made = slider("Slopes", "steps", pictures, start=1).save(tmp_path / "s.html")
    tab = open_page(browser, made, problems)
    bar, image = tab.get_by_role("slider", name="steps"), tab.locator(".live img")
    shown = {}
    for key, name in (
        ("Home", "1"),
        ("ArrowRight", "2"),
        ("ArrowRight", "4"),
        ("ArrowRight", "4"),
        ("ArrowLeft", "2"),
    ):
        bar.press(key)
        assert tab.locator("output").inner_text() == name
        assert image.get_attribute("alt") == pictures[name].alt
        assert bar.get_attribute("aria-valuetext") == f"{name}. {pictures[name].alt}"
        shown[name] = image.screenshot()
    assert len(set(shown.values())) == 3, "the picture that is seen changes"
    area = bar.bounding_box()
    tab.mouse.click(area["x"] + area["width"] - 3, area["y"] + area["height"] / 2)
    assert tab.locator("output").inner_text() == "4"
    assert bar.get_attribute("data-lm-suppress-shortcuts") == "true", "JupyterLab would take the arrow keys"
    tab.close()
    assert not problems, problems
