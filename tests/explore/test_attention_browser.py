"""The attention explorer in a browser: it is driven by pointer and keys, and its read-out is compared with the maps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers import tiny_config
from w2vc.data.corpus import load_speech
from w2vc.explore import page
from w2vc.explore.attention import attention_distance, attention_maps
from w2vc.explore.page import Explorer, attention_explorer, save_page
from w2vc.explore.viz import Picture
from w2vc.model.wav2vec2 import Wav2Vec2ConformerModel

pytestmark = pytest.mark.browser
READY = "[...document.querySelectorAll('.w2vc-explorer')].every((e) => e.dataset.ready === 'yes')"
STILL = Picture(b"\x89PNG\r\n\x1a\n", "A picture that says enough about itself", 100)


@pytest.fixture(scope="module")
def maps_and_page(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, Path]:
    torch.manual_seed(0)
    model = Wav2Vec2ConformerModel(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    utterance = load_speech("builtin", "test")[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "render", lambda *_: STILL)  # drawing takes longer than all the rest
        one = attention_explorer(model, utterance)
    return attention_maps(model, utterance), one.save(tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture
def tab(browser: object, maps_and_page: tuple[torch.Tensor, Path]) -> Iterator[object]:
    """The open page; at the end nothing was loaded and no error was written."""
    problems: list[str] = []
    tab = browser.new_page(viewport={"width": 1100, "height": 1400})
    tab.on(
        "console", lambda m: problems.append(f"console: {m.text}") if m.type in {"error", "warning"} else None
    )
    tab.on("pageerror", lambda e: problems.append(f"error: {e}"))
    uri = maps_and_page[1].as_uri()
    tab.on(
        "request",
        lambda r: None if r.url.startswith((uri, "data:", "blob:")) else problems.append(f"request: {r.url}"),
    )
    tab.goto(uri, wait_until="load")
    tab.wait_for_function(READY)
    yield tab
    tab.close()
    assert not problems, problems


def heard(tab: object) -> tuple[int, float]:
    """The frame of the read-out, and the share of its first stretch."""
    text = tab.locator(".read").inner_text()
    found = re.match(r"Frame (\d+), .*?looks most at .*?, ([\d.]+) %", text)
    assert found, text
    return int(found[1]), float(found[2])


def strongest(row: torch.Tensor) -> float:
    """The share of the best of three stretches around peaks, in percent: as the page words it, from the exact map."""
    rest, shares = row.clone(), []
    for _ in range(3):
        best = int(rest.argmax())
        if rest[best] < 1.5 / len(row):
            break
        first = last = best
        while first > 0 and rest[first - 1] >= rest[best] / 2:
            first -= 1
        while last < len(row) - 1 and rest[last + 1] >= rest[best] / 2:
            last += 1
        shares.append(float(rest[first : last + 1].sum()))
        rest[first : last + 1] = 0
    return 100 * max(shares)


def test_keys_choose_a_frame_and_the_read_out_is_true(
    tab: object, maps_and_page: tuple[torch.Tensor, Path]
) -> None:
    maps, stage = maps_and_page[0], tab.locator(".stage")
    stage.focus()
    stage.press("Home")
    for step, frame in (
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", maps.shape[-1] - 1),
        ("ArrowRight", maps.shape[-1] - 1),
    ):
        stage.press(step)
        assert heard(tab)[0] == frame == int(stage.get_attribute("aria-valuenow"))
        assert heard(tab)[1] == pytest.approx(strongest(maps[0, 0, frame]), rel=0.05, abs=0.2)
    stage.press("Home")
    stage.press("Shift+ArrowRight")
    starts = load_speech("builtin", "test")[2].phones[1].start
    assert (heard(tab)[0]) * 0.02 == pytest.approx(starts, abs=0.025)
    stage.press("Shift+ArrowLeft")
    assert heard(tab)[0] == 0
    assert stage.get_attribute("aria-valuetext").startswith("Frame 0, 0.00 s")
    assert stage.get_attribute("data-lm-suppress-shortcuts") == "true", "JupyterLab would take the arrow keys"


def test_layer_and_head_are_chosen_by_click_and_by_key(
    tab: object, maps_and_page: tuple[torch.Tensor, Path]
) -> None:
    maps = maps_and_page[0]
    tab.locator(".stage").press("End")
    tab.get_by_role("radio", name="layer 1, head 2").click()
    assert tab.locator(".head").inner_text() == "Layer 1, head 2"
    assert heard(tab)[1] == pytest.approx(strongest(maps[1, 2, -1]), rel=0.05, abs=0.2)
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowUp")
    assert tab.locator(".head").inner_text() == "Layer 0, head 1"
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')") == "layer 0, head 1"
    assert tab.locator("[role=radio][aria-checked=true]").count() == 1
    assert tab.locator("[role=radio][tabindex='0']").count() == 1
    assert heard(tab)[1] == pytest.approx(strongest(maps[0, 1, -1]), rel=0.05, abs=0.2)
    facts = tab.locator(".facts").inner_text()
    assert f"{float(attention_distance(maps)[0, 1]):.0f} ms away" in facts


def test_pointing_selects_and_a_click_plays(tab: object, maps_and_page: tuple[torch.Tensor, Path]) -> None:
    maps = maps_and_page[0]
    box = tab.locator(".stage canvas").bounding_box()
    left, right = box["x"] + 68, box["x"] + box["width"] - 10
    seconds = load_speech("builtin", "test")[2].seconds
    at = left + (right - left) * 1.0 / seconds + 1
    tab.mouse.move(at, box["y"] + 40)
    assert heard(tab)[0] == 50  # 1 s
    tab.mouse.move(at, box["y"] + box["height"] - 21)
    text = tab.locator(".read").inner_text()
    assert heard(tab)[0] >= maps.shape[-1] - 2, "the last rows of the map"
    weight = re.search(r"To frame 50, 1\.00 s.*: ([\d.]+) %", text)
    assert float(weight[1]) == pytest.approx(100 * float(maps[0, 0, heard(tab)[0], 50]), rel=0.05, abs=0.06)
    tab.mouse.click(at, box["y"] + 40)
    tab.wait_for_function("document.querySelector('audio').currentTime > 1.05")
    assert heard(tab)[0] > 50, "the frame follows the sound"
    assert tab.locator(".here").inner_text() == "Stop"
    tab.locator(".here").click()
    assert tab.evaluate("document.querySelector('audio').paused")
    assert tab.locator("audio").get_attribute("aria-label")
    tab.locator(".there").click()
    tab.wait_for_function("!document.querySelector('audio').paused")
    tab.wait_for_function("document.querySelector('audio').paused")
    assert not tab.evaluate("document.querySelector('audio').ended"), "only the stretch is played"


def test_it_is_drawn_sharply_and_anew(tab: object) -> None:
    picture = "document.querySelector('.stage canvas').toDataURL()"
    paint = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    tab.evaluate(paint)
    before = tab.evaluate(picture)
    tab.locator(".stage").press("ArrowLeft")
    tab.evaluate(paint)
    moved = tab.evaluate(picture)
    assert moved != before
    for name, value in (("theme", "dark"), ("jpThemeLight", "false")):
        tab.evaluate(f"document.body.dataset.{name} = '{value}'")
        tab.evaluate(paint)
        assert tab.evaluate(picture) != moved, f"the page turned dark by {name}"
        assert (
            tab.evaluate("getComputedStyle(document.querySelector('.w2vc-explorer')).backgroundColor")
            == "rgb(20, 24, 29)"
        )
        tab.evaluate(f"delete document.body.dataset.{name}")


@pytest.mark.parametrize("light", ["theme", "jpThemeLight"])
def test_a_page_that_says_light_is_light(
    browser: object, maps_and_page: tuple[torch.Tensor, Path], light: str
) -> None:
    context = browser.new_context(color_scheme="dark")
    tab = context.new_page()
    tab.goto(maps_and_page[1].as_uri())
    colour = "getComputedStyle(document.querySelector('.w2vc-explorer')).backgroundColor"
    assert tab.evaluate(colour) == "rgb(20, 24, 29)"
    tab.evaluate(f"document.body.dataset.{light} = '{'light' if light == 'theme' else 'true'}'")
    assert tab.evaluate(colour) == "rgb(255, 255, 255)"
    context.close()


@pytest.mark.parametrize("ratio", [1, 2])
def test_it_fits_a_phone(browser: object, maps_and_page: tuple[torch.Tensor, Path], ratio: int) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 700}, device_scale_factor=ratio)
    tab = context.new_page()
    tab.goto(maps_and_page[1].as_uri())
    tab.wait_for_function(READY)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    shown, drawn = tab.evaluate(
        "[document.querySelector('.stage canvas').clientWidth, document.querySelector('.stage canvas').width]"
    )
    assert abs(drawn - ratio * shown) <= ratio
    context.close()


def test_without_scripts_the_picture_stays(browser: object, maps_and_page: tuple[torch.Tensor, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(maps_and_page[1].as_uri())
    assert tab.locator(".still").is_visible()
    assert tab.locator(".stage").count() == 0
    context.close()


def test_two_on_a_page_a_broken_one_and_a_twin(browser: object, tmp_path: Path) -> None:
    for name, script in (
        ("count", "let n = data.n; w.find('.b').addEventListener('click', () => w.say(String(++n)));"),
        ("broken", "throw new Error('on purpose');"),
    ):
        page = tmp_path / name
        page.with_suffix(".html").write_text(
            '<button class="b">add</button><p class="read" aria-live="polite">0</p>'
        )
        page.with_suffix(".css").write_text("")
        page.with_suffix(".js").write_text(f"async function start(w, data) {{ {script} }}")
    one, two = (Explorer(f"count from {n}", tmp_path / "count", {"n": n}, STILL) for n in (10, 20))
    broken = Explorer("broken", tmp_path / "broken", {}, STILL)
    path = save_page(tmp_path / "p.html", [one, two, broken, one], title="Four")
    problems: list[str] = []
    tab = browser.new_page()
    tab.on("console", lambda m: problems.append(m.text))
    tab.goto(path.as_uri())
    tab.wait_for_function("document.querySelectorAll('[data-ready=yes]').length === 3")
    for button in tab.locator(".live:not([hidden]) .b").all():
        button.click()
    tab.locator(".b").nth(0).click()
    assert tab.locator(".live:not([hidden]) .read").all_inner_texts() == ["12", "21", "11"]
    assert [still.is_visible() for still in tab.locator(".still").all()] == [False, False, True, False]
    again = "const old = document.querySelector('script'), copy = document.createElement('script'); copy.text = old.text; old.after(copy);"
    tab.evaluate(f"() => {{ {again} }}")  # as when a twin of it is added to the page
    tab.wait_for_timeout(50)
    assert tab.locator(".live:not([hidden]) .read").all_inner_texts() == ["12", "21", "11"], (
        "started once each"
    )
    assert len(problems) == 1, problems
    assert "on purpose" in problems[0]
    tab.close()
