"""Pages that stand alone: explorers, the bytes in them, sliders, and asset files that browsers and linters can read."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import w2vc
from helpers import tiny_config
from w2vc.data.corpus import load_speech
from w2vc.explore import attention
from w2vc.explore import page as pages
from w2vc.explore.page import Explorer, save_page, slider
from w2vc.explore.viz import Picture
from w2vc.model.wav2vec2 import Wav2Vec2ConformerModel

STILL = Picture(b"\x89PNG\r\n\x1a\n", "A picture that says enough about itself", 100)
ASSETS = Path(w2vc.__file__).parent / "assets" / "pages"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A page of three small files."""
    for end, text in (
        (".html", '<p class="read">live</p>'),
        (".css", ".w2vc-mine p { color: red; }"),
        (".js", "async function start(w, data) { w.say(data.text); }"),
    ):
        (tmp_path / f"mine{end}").write_text(text)
    return tmp_path / "mine"


# ---- the page


def test_a_page_stands_alone(tmp_path: Path, mine: Path) -> None:
    data = {"text": "</script><b>&\u2028", "n": [1, 2.5, None]}
    one = Explorer("A <title>", mine, data, STILL, note="a & b")
    assert one.size == len(one._repr_html_().encode())
    path = one.save(tmp_path / "page.html")
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert one._repr_html_() in page
    assert page.count("<script>") == page.count("</script>") == 1  # data cannot end the script
    assert "<title>A &lt;title&gt;</title>" in page
    assert "a &amp; b" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "http" not in page
    assert f"{one.size / 1000:.0f} kB" in repr(one)
    packed = json.loads(re.search(r'launch\("w2vc-\w+", (.*)\);\n', page)[1])
    assert packed["data"] == data


def test_equal_content_has_equal_html_and_other_content_another_name(mine: Path) -> None:
    def make(title: str = "t", page: Path = mine, data: object = None, note: str = "") -> Explorer:
        return Explorer(title, page, data or {"a": 1, "b": 2}, STILL, note)

    assert make()._repr_html_() == make(data={"b": 2, "a": 1})._repr_html_()
    others = [make(title="x"), make(data={"a": 2}), make(note="x")]
    for end in (".html", ".css", ".js"):
        other = mine.with_name("other")
        for each in (".html", ".css", ".js"):
            more = "/* */" if each == end else ""
            other.with_suffix(each).write_text(mine.with_suffix(each).read_text() + more)
        others.append(make(page=other))
    assert len({make().name, *(one.name for one in others)}) == 7


def test_the_picture_stands_in_the_html_before_any_script(mine: Path) -> None:
    html = Explorer("t", mine, {}, STILL)._repr_html_()
    before, _, _ = html.partition("<script>")
    assert f'<img alt="{STILL.alt}"' in before
    assert '<p class="read">live</p>' not in html  # what needs the script is not there without it
    assert re.search(r'class="live" hidden', before)


@pytest.mark.parametrize(("title", "alt"), [(" ", STILL.alt), ("t", "too short")])
def test_title_and_description_are_asked_for(title: str, alt: str, mine: Path) -> None:
    with pytest.raises(ValueError, match="title, alt"):
        Explorer(title, mine, {}, Picture(b"", alt, 1))


def test_numbers_that_json_cannot_say_are_refused(mine: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Explorer("t", mine, {"x": float("nan")}, STILL)


def test_several_explorers_share_a_page(tmp_path: Path, mine: Path) -> None:
    parts = [Explorer(t, mine, {}, STILL) for t in ("one", "two")]
    path = save_page(tmp_path / "p.html", [parts[0], "<h2>Between</h2>", parts[1]], title="Both")
    page = path.read_text(encoding="utf-8")
    assert page.index("one") < page.index("Between") < page.index(parts[1].name)


# ---- the files


@pytest.mark.parametrize("path", sorted(ASSETS.glob("*.css")), ids=lambda p: p.name)
def test_styles_touch_nothing_else(path: Path) -> None:
    """Every rule is for explorers, and those of one kind for that kind."""
    wanted = "w2vc-explorer" if path.stem == "base" else f"w2vc-{path.stem}"
    css = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.S)
    assert css.count("{") == css.count("}")
    for selectors in re.findall(r"([^{}]+)\{", css):
        for selector in selectors.split(","):
            assert selector.strip().startswith("@") or re.search(rf"\.{wanted}\b", selector), selector


@pytest.mark.parametrize("path", sorted(ASSETS.glob("*.js")), ids=lambda p: p.name)
def test_scripts_parse(path: Path) -> None:
    if not shutil.which("node"):
        pytest.skip("node is not installed; the browser tests run the scripts")
    out = subprocess.run(["node", "--check", str(path)], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("path", sorted(ASSETS.glob("*.js")), ids=lambda p: p.name)
def test_what_a_script_asks_for_is_there(path: Path) -> None:
    """Every tool `w.x` is one of tools.js, and every element that it looks for by class is in the HTML of the page."""
    tools = set(re.findall(r"\bw\.(\w+) = ", (ASSETS / "tools.js").read_text(encoding="utf-8")))
    script = path.read_text(encoding="utf-8")
    assert set(re.findall(r"\bw\.(\w+)", script)) <= tools
    if path.stem != "tools":
        body = path.with_suffix(".html").read_text(encoding="utf-8")
        classes = {name for names in re.findall(r'class="([^"]+)"', body) for name in names.split()}
        assert set(re.findall(r'w\.find\("\.([\w-]+)', script)) <= classes


# ---- pixels and sound


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (64, 33)])
@pytest.mark.parametrize("smooth", [False, True])
def test_png_gives_the_numbers_back(shape: tuple[int, int], smooth: bool) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, shape).astype(np.uint8)
    if smooth:  # another filter wins
        steps = rng.integers(-1, 2, shape).cumsum(0).cumsum(1)  # neighbours are often equal
        values = (steps % 256).astype(np.uint8)
    data = base64.b64decode(pages.gray_png(values).removeprefix("data:image/png;base64,"))
    image = Image.open(io.BytesIO(data))
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), values)


@pytest.mark.parametrize("values", [np.zeros((2, 2)), np.zeros(3, np.uint8), np.zeros((0, 2), np.uint8)])
def test_png_refuses_what_is_not_bytes(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        pages.gray_png(values)


def test_weights_in_8_bits_are_close() -> None:
    for each in (3 * torch.randn(6, 11, 11, generator=torch.Generator().manual_seed(1))).softmax(-1):
        values, largest = pages.root_bytes(each)
        back = largest * (values.astype(float) / 255) ** 2
        assert values.max() == 255
        assert np.abs(back - each.numpy()).max() <= largest / 255
        faint = each.numpy() < largest / 100
        assert np.abs(back - each.numpy())[faint].max() <= largest / 2000  # a tenth of the steps, near 0


def test_clip_data_holds_the_recording() -> None:
    import soundfile

    utterance = load_speech("builtin", "test")[2]
    data = json.loads(json.dumps(pages.clip_data(utterance)))
    assert data["seconds"] == pytest.approx(utterance.seconds, abs=1e-3)
    audio, rate = soundfile.read(
        io.BytesIO(base64.b64decode(data["sound"].partition(",")[2])), dtype="float32"
    )
    assert (rate, len(audio)) == (utterance.sampling_rate, len(utterance.audio))
    assert np.corrcoef(audio, utterance.audio)[0, 1] > 0.99  # MP3, and nothing is shifted
    assert pages.clip_data(utterance) == data, "equal sound, equal bytes"
    small = pages.clip_data(utterance, strokes=100, spectrogram=False)
    assert len(small["wave"]) <= 200
    assert "spectrogram" not in small
    assert len(data["wave"]) % 2 == 0
    assert max(map(abs, data["wave"])) == 100
    assert [label for label, *_ in data["words"]] == utterance.text.split()
    assert len(data["phones"]) == len(utterance.phones)


def test_spectrogram_puts_a_tone_where_it_belongs() -> None:
    tone = np.sin(2 * np.pi * 2000 * np.arange(16000) / 16000)
    rows = pages._spectrogram(tone, 16000)
    assert rows.shape[0] == 128
    assert abs(int(rows[:, 60].argmax()) - 96) <= 1  # 2 kHz of 8: a quarter of the way up
    assert rows.max() == 255


def test_sound_is_packed_without_soundfile_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    assert pages.sound_uri(np.zeros(800, np.float32)).startswith("data:audio/wav;base64,")


def test_utterances_from_arrays_and_files(tmp_path: Path) -> None:
    import soundfile

    known = load_speech("builtin", "test")[2]
    soundfile.write(tmp_path / "clip.wav", known.audio, 16000)
    for audio in (known.audio, torch.from_numpy(known.audio.copy()), tmp_path / "clip.wav"):
        made = pages.as_utterance(audio)
        assert (made.seconds, made.words) == (known.seconds, ())
    assert pages.as_utterance(tmp_path / "clip.wav").id == "clip"
    assert pages.as_utterance(known) is known


def test_a_slider_holds_its_pictures_and_refuses_what_it_cannot_turn() -> None:
    pages = {
        name: Picture(b"\x89PNG" + name.encode(), f"A picture with the name {name} on it", 100)
        for name in "abc"
    }
    made = slider("Letters", "letter", pages, start=2)
    assert made.fallback is pages["c"]
    text = made._repr_html_()
    for page in pages.values():
        assert base64.b64encode(page.png).decode() in text
    assert text == slider("Letters", "letter", pages, start=2)._repr_html_(), "equal content, equal HTML"
    with pytest.raises(ValueError, match="two pictures"):
        slider("One", "letter", {"a": pages["a"]})
    with pytest.raises(ValueError, match="label"):
        slider("None", " ", pages)
    with pytest.raises(ValueError, match="start=3"):
        slider("Far", "letter", pages, start=3)


# ---- the explorer of attention


@pytest.fixture(scope="module")
def model() -> Wav2Vec2ConformerModel:
    torch.manual_seed(0)
    return Wav2Vec2ConformerModel(tiny_config())


def test_a_page_that_would_be_huge_is_refused_before_any_work(
    model: Wav2Vec2ConformerModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "attention_maps", None)
    with pytest.raises(ValueError, match=r"fewer layers= and heads="):
        pages.attention_explorer(model, np.zeros(16000 * 60, np.float32))
    with pytest.raises(ValueError, match="start"):
        pages.attention_explorer(model, np.zeros(8000, np.float32), layers=[1], start=(0, 0))


def test_explorer_has_a_picture_for_where_scripts_do_not_run(model: Wav2Vec2ConformerModel) -> None:
    one = pages.attention_explorer(model, load_speech("builtin", "test")[2], layers=[1], heads=[2])
    assert "layer 1, head 2" in one.fallback.alt
    assert "every dog" in one.fallback.alt
    assert 10_000 < len(one.fallback.png) < 120_000


def test_explorer_holds_the_maps(model: Wav2Vec2ConformerModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setattr(pages, "render", lambda *_: STILL)
    utterance = load_speech("builtin", "test")[2]
    one = pages.attention_explorer(model, utterance, layers=[0, 1], heads=[0, 2, 3], start=(1, 2))
    again = pages.attention_explorer(model, utterance, layers=[0, 1], heads=[0, 2, 3], start=(1, 2))
    assert one._repr_html_() == again._repr_html_()
    data = one.data
    truth = attention.attention_maps(model, utterance, layers=[0, 1], heads=[0, 2, 3]).flatten(0, 1)
    assert (data["layers"], data["heads"], data["start"], data["frames"]) == (
        [0, 1],
        [0, 2, 3],
        4,
        truth.shape[-1],
    )
    for packed, weights in zip(data["maps"], truth, strict=True):
        values = np.asarray(Image.open(io.BytesIO(base64.b64decode(packed["png"].partition(",")[2]))))
        back = packed["largest"] * (values / 255.0) ** 2
        assert np.abs(back - weights.numpy()).max() <= packed["largest"] / 254
    distance = attention.attention_distance(truth).tolist()
    assert np.ravel(data["summary"]["distance"]) == pytest.approx(distance, abs=1e-3)


def test_explorer_of_the_demo_model_is_small_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    from w2vc.training.demo import load_demo

    still = Picture(bytes(120_000), STILL.alt, 700)  # as large as it may be; drawing it takes long
    monkeypatch.setattr(pages, "render", lambda *_: still)

    test = load_speech("builtin", "test")
    audio = np.concatenate([test[0].audio, test[1].audio])[:80_000]
    one = pages.attention_explorer(load_demo(), audio)
    assert one.size < 2_000_000, f"{one} for 5 s"
