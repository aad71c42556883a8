"""Looking inside: pages that stand alone, maps in 8 bits, and the numbers that sum a head up."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import tiny_config
from w2vc.data.corpus import Segment, frame_labels, load_speech
from w2vc.explore import attention as explore
from w2vc.explore.attention import Explorer, slider
from w2vc.explore.viz import Picture
from w2vc.model.wav2vec2 import Wav2Vec2ConformerModel

STILL = Picture(b"\x89PNG\r\n\x1a\n", "A picture that says enough about itself", 100)


@pytest.fixture(scope="module")
def model() -> Wav2Vec2ConformerModel:
    torch.manual_seed(0)
    model = Wav2Vec2ConformerModel(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def maps() -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return (3 * torch.randn(2, 3, 11, 11, generator=g)).softmax(-1)


# ---- the page


def test_a_page_stands_alone(tmp_path: Path) -> None:
    data = {"text": "</script><b>&\u2028", "n": [1, 2.5, None]}
    one = Explorer(
        "A <title>", '<p class="read"></p>', "w.say(data.text);", data, fallback=STILL, note="a & b"
    )
    assert one.size == len(one._repr_html_().encode())
    path = one.save(tmp_path / "page.html")
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert one._repr_html_() in page
    assert page.count("<script>") == page.count("</script>") == 1  # data cannot end the script
    assert "<title>A &lt;title&gt;</title>" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "http" not in page
    assert f"{round(one.size / 1000)} kB" in one._repr_html_()
    assert f"{round(one.size / 1000)} kB" in repr(one)


def test_equal_content_has_equal_html_and_other_content_another_name() -> None:
    def make(**changes: object) -> Explorer:
        parts: dict = {
            "title": "t",
            "body": "b",
            "script": "s",
            "data": {"a": 1, "b": 2},
            "css": "",
            "note": "",
        }
        return Explorer(**{**parts, **changes}, fallback=STILL)

    assert make()._repr_html_() == make(data={"b": 2, "a": 1})._repr_html_()
    names = [
        make(**{key: {"a": 2} if key == "data" else "x"}).name
        for key in ("title", "body", "script", "data", "css", "note")
    ]
    assert len({make().name, *names}) == 7


def test_the_picture_stands_in_the_html_before_any_script() -> None:
    html = Explorer("t", "<p>live</p>", "", {}, fallback=STILL)._repr_html_()
    before, _, _ = html.partition("<script>")
    assert f'<img alt="{STILL.alt}"' in before
    assert "<p>live</p>" not in html  # what needs the script is not there without it
    assert re.search(r'class="live" hidden', before)


def test_styles_touch_nothing_else() -> None:
    css = Explorer(
        "t",
        "b",
        "",
        {},
        fallback=STILL,
        css="& .x, & .y { color:red; }\n@media (max-width:9px) { & .x { a:b; } }",
    )._css
    css = re.sub(r"/\*.*?\*/", "", css)
    assert "&" not in css
    for selectors in re.findall(r"([^{}]+)\{", css):
        for selector in selectors.split(","):
            assert selector.strip().startswith("@") or re.search(r"\.w2vc-[0-9a-f]{10}", selector), selector
    assert css.count("color-scheme:dark") == 2  # once asked for by the page, once by the system
    assert re.search(r"prefers-color-scheme: dark\) \{ body:not\(\[data-theme=\"light\"\]\)", css)


@pytest.mark.parametrize(("title", "alt"), [(" ", STILL.alt), ("t", "too short")])
def test_title_and_description_are_asked_for(title: str, alt: str) -> None:
    with pytest.raises(ValueError, match=r"title|alt"):
        Explorer(title, "", "", {}, fallback=Picture(b"", alt, 1))


def test_numbers_that_json_cannot_say_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        Explorer("t", "", "", {"x": float("nan")}, fallback=STILL)


def test_several_explorers_share_a_page(tmp_path: Path) -> None:
    parts = [Explorer(t, "", "", {}, fallback=STILL) for t in ("one", "two")]
    page = explore.save_page(
        tmp_path / "p.html", [parts[0], "<h2>Between</h2>", parts[1]], title="Both"
    ).read_text()
    assert page.index("one") < page.index("Between") < page.index(parts[1].name)


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
    data = base64.b64decode(explore.gray_png(values).removeprefix("data:image/png;base64,"))
    image = Image.open(io.BytesIO(data))
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), values)


@pytest.mark.parametrize("values", [np.zeros((2, 2)), np.zeros(3, np.uint8), np.zeros((0, 2), np.uint8)])
def test_png_refuses_what_is_not_bytes(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        explore.gray_png(values)


def test_maps_in_8_bits_are_close(maps: torch.Tensor) -> None:
    for each in maps.flatten(0, 1):
        values, largest = explore.squeeze_map(each)
        back = largest * (values.astype(float) / 255) ** 2
        assert values.max() == 255
        assert np.abs(back - each.numpy()).max() <= largest / 255
        faint = each.numpy() < largest / 100
        assert np.abs(back - each.numpy())[faint].max() <= largest / 2000  # a tenth of the steps, near 0


def test_clip_data_holds_the_recording() -> None:
    import soundfile

    utterance = load_speech("builtin", "test")[2]
    data = json.loads(json.dumps(explore.clip_data(utterance)))
    assert data["seconds"] == pytest.approx(utterance.seconds, abs=1e-3)
    audio, rate = soundfile.read(
        io.BytesIO(base64.b64decode(data["sound"].partition(",")[2])), dtype="float32"
    )
    assert rate == utterance.sampling_rate
    assert np.abs(audio - utterance.audio).max() < 1e-4
    assert len(data["wave"]) % 2 == 0
    assert max(map(abs, data["wave"])) == 100
    assert [label for label, *_ in data["words"]] == utterance.text.split()
    assert len(data["phones"]) == len(utterance.phones)


def test_spectrogram_puts_a_tone_where_it_belongs() -> None:
    tone = np.sin(2 * np.pi * 2000 * np.arange(16000) / 16000)
    rows = explore.spectrogram_bytes(tone, 16000)
    assert rows.shape[0] == 128
    assert abs(int(rows[:, 60].argmax()) - 96) <= 1  # 2 kHz of 8: a quarter of the way up
    assert rows.max() == 255


def test_utterances_from_arrays_files_and_segments(tmp_path: Path) -> None:
    import soundfile

    known = load_speech("builtin", "test")[2]
    soundfile.write(tmp_path / "clip.wav", known.audio, 16000)
    words = (Segment("a", 0.0, 0.5),)
    for audio in (known.audio, torch.from_numpy(known.audio.copy()), tmp_path / "clip.wav"):
        made = explore.as_utterance(audio, {"words": words})
        assert made.seconds == known.seconds
        assert (made.words, made.phones) == (words, ())
    assert explore.as_utterance(tmp_path / "clip.wav").id == "clip"
    assert explore.as_utterance(known, words).phones == words
    assert explore.as_utterance(known).phones == known.phones
    with pytest.raises(ValueError, match="segments"):
        explore.as_utterance(known, {"syllables": words})


# ---- maps of a model


def test_maps_are_those_of_the_model(model: Wav2Vec2ConformerModel) -> None:
    from w2vc.data.audio import normalise

    audio = load_speech("builtin", "test")[2].audio[:8000]
    model.train()
    found = explore.attention_maps(model, audio)
    assert model.training  # left as it was
    model.eval()
    with torch.no_grad():
        truth = model(torch.from_numpy(normalise(audio))[None], output_attentions=True).attentions
    assert torch.equal(found, torch.cat(truth))
    some = explore.attention_maps(model, audio, layers=[1], heads=[3, 0])
    assert torch.equal(some, found[[1]][:, [3, 0]])
    some.add_(1)  # an ordinary tensor, not one of inference mode


@pytest.mark.parametrize(
    ("layers", "heads"),
    [
        ([2], None),
        ([-1], None),
        ([], None),
        (None, [4]),
        (None, [0, 0]),
        ([True], None),
        ("01", None),
        (None, [0.0]),
    ],
)
def test_layers_and_heads_are_checked(model: Wav2Vec2ConformerModel, layers: object, heads: object) -> None:
    name = "layers" if layers is not None else "heads"
    for call in (explore.attention_maps, explore.attention_explorer):
        with pytest.raises(ValueError, match=name):
            call(model, np.zeros(8000, np.float32), layers=layers, heads=heads)


def test_a_page_that_would_be_huge_is_refused_before_any_work(
    model: Wav2Vec2ConformerModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explore, "attention_maps", None)
    with pytest.raises(ValueError, match=r"fewer layers= and heads="):
        explore.attention_explorer(model, np.zeros(16000 * 60, np.float32))
    with pytest.raises(ValueError, match="start"):
        explore.attention_explorer(model, np.zeros(8000, np.float32), layers=[1], start=(0, 0))


def test_explorer_has_a_picture_for_where_scripts_do_not_run(model: Wav2Vec2ConformerModel) -> None:
    one = explore.attention_explorer(model, load_speech("builtin", "test")[2], layers=[1], heads=[2])
    assert "layer 1, head 2" in one.fallback.alt
    assert "every dog" in one.fallback.alt
    assert 10_000 < len(one.fallback.png) < 120_000


def test_explorer_holds_the_maps(model: Wav2Vec2ConformerModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setattr(explore, "_still", lambda *_: STILL)
    utterance = load_speech("builtin", "test")[2]
    one = explore.attention_explorer(model, utterance, layers=[0, 1], heads=[0, 2, 3], start=(1, 2))
    again = explore.attention_explorer(model, utterance, layers=[0, 1], heads=[0, 2, 3], start=(1, 2))
    assert one._repr_html_() == again._repr_html_()
    data = json.loads(re.search(r"data = (\{.*\});\nconst table", one._repr_html_())[1])
    truth = explore.attention_maps(model, utterance, layers=[0, 1], heads=[0, 2, 3]).flatten(0, 1)
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
    distance = explore.attention_distance(truth).tolist()
    assert np.ravel(data["summary"]["distance"]) == pytest.approx(distance, abs=1e-3)


def test_explorer_of_the_demo_model_is_small_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    from w2vc.training.demo import load_demo

    still = Picture(bytes(120_000), STILL.alt, 700)  # as large as it may be; drawing it takes long
    monkeypatch.setattr(explore, "_still", lambda *_: still)

    test = load_speech("builtin", "test")
    audio = np.concatenate([test[0].audio, test[1].audio])[:80_000]
    one = explore.attention_explorer(load_demo(), audio)
    assert one.size < 2_000_000, f"{one} for 5 s"


# ---- heads in numbers


def test_numbers_of_heads_that_we_know() -> None:
    n = 50
    equal, itself = torch.full((n, n), 1 / n), torch.eye(n)
    ahead = torch.eye(n).roll(3, dims=1)  # 3 frames later, at the end round to the start
    assert explore.attention_distance(equal) == pytest.approx((n * n - 1) / (3 * n) * 20, rel=1e-5)
    assert explore.attention_distance(itself) == 0
    assert explore.attention_distance(ahead, hop=0.01) == pytest.approx(10 * ((n - 3) * 3 + 3 * (n - 3)) / n)
    assert explore.attention_entropy(equal) == pytest.approx(1)
    assert explore.attention_entropy(itself) == 0
    assert explore.attention_entropy(equal, relative=False) == pytest.approx(math.log(n))
    assert explore.diagonality(itself) == 1
    assert explore.diagonality(ahead, reach=2) == 0
    assert explore.diagonality(ahead, reach=3) == pytest.approx((n - 3) / n)
    assert explore.diagonality(equal, reach=2) == pytest.approx((5 * n - 6) / n**2)


def test_numbers_against_loops(maps: torch.Tensor) -> None:
    n = maps.shape[-1]
    labels = [*"aabbca", "", "b", "b", "", "a"]
    known = [i for i in range(n) if labels[i]]
    for each, distance, entropy, same in zip(
        maps.flatten(0, 1), explore.attention_distance(maps).flatten(), explore.attention_entropy(maps).flatten(),
        explore.same_label_share(maps, labels).flatten(), strict=True,
    ):  # fmt: skip
        w = each.tolist()
        assert distance == pytest.approx(
            sum(w[i][j] * abs(i - j) for i in range(n) for j in range(n)) / n * 20, rel=1e-5
        )
        assert entropy == pytest.approx(
            -sum(v * math.log(v) for row in w for v in row) / n / math.log(n), rel=1e-5
        )
        share = sum(w[i][j] for i in known for j in range(n) if labels[i] == labels[j]) / len(known)
        assert same == pytest.approx(share, rel=1e-5)
    profile = explore.offset_profile(maps, 4)
    for o in range(-4, 5):
        pairs = [(i, i + o) for i in range(n) if 0 <= i + o < n]
        assert profile[1, 2, 4 + o] == pytest.approx(
            sum(float(maps[1, 2, i, j]) for i, j in pairs) / len(pairs), rel=1e-5
        )


def test_distance_only_knows_distances_and_nothing_else(maps: torch.Tensor) -> None:
    n = maps.shape[-1]
    deaf = explore.distance_only(maps)
    assert torch.allclose(deaf.sum(-1), torch.ones(2, 3, n))
    assert torch.allclose(explore.distance_only(torch.eye(n)), torch.eye(n))
    table = torch.randn(2 * n - 1)
    frames = torch.arange(n)
    scores = table[frames - frames[:, None] + n - 1]
    already = scores.exp()  # constant along diagonals before rows are made to sum to one
    assert torch.allclose(explore.distance_only(already), scores.softmax(-1), atol=1e-6)
    equal = torch.full((n, n), 1 / n)
    labels = list("aabbcaabbca")
    assert explore.same_label_share(explore.distance_only(equal), labels) == pytest.approx(
        float(explore.same_label_share(equal, labels))
    )


def test_summary_and_its_picture(maps: torch.Tensor) -> None:
    labels = list("aabbcaabbca")
    summary = explore.head_summary(maps, labels)
    assert {k: tuple(v.shape) for k, v in summary.items()} == dict.fromkeys(
        ("distance", "entropy", "near", "same", "by_chance"), (2, 3)
    )
    assert torch.equal(summary["by_chance"], explore.same_label_share(explore.distance_only(maps), labels))
    assert (
        set(explore.head_summary(maps))
        == set(explore.head_summary(maps, [""] * 11))
        == {"distance", "entropy", "near"}
    )
    for shown, each in ((4, summary), (3, explore.head_summary(maps))):
        axes = explore.plot_heads(each, layers=[4, 5]).axes
        assert sum(bool(ax.get_title()) for ax in axes) == shown
        assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["4", "5"]


@pytest.mark.parametrize("labels", [["a"] * 10, [""] * 11])
def test_labels_are_checked(maps: torch.Tensor, labels: list[str]) -> None:
    with pytest.raises(ValueError, match="labels"):
        explore.same_label_share(maps, labels)


@pytest.mark.parametrize("reach", [-1, 11])
def test_reach_is_checked(maps: torch.Tensor, reach: int) -> None:
    with pytest.raises(ValueError, match="reach"):
        explore.offset_profile(maps, reach)


def test_position_profile_is_the_attention_of_a_head_deaf_to_content(model: Wav2Vec2ConformerModel) -> None:
    import copy

    deaf = copy.deepcopy(model)
    for block in deaf.encoder.layers:
        torch.nn.init.zeros_(block.self_attn.linear_q.weight)  # its bias stays: every frame asks the same
        torch.nn.init.zeros_(block.self_attn.linear_k.weight)
        torch.nn.init.zeros_(block.self_attn.linear_k.bias)
    maps = explore.attention_maps(deaf, load_speech("builtin", "test")[2].audio[:16000])
    n = maps.shape[-1]
    assert n % 2 == 1, "the middle frame has as many before as after"
    profile = explore.position_profile(deaf, n // 2)
    assert torch.allclose(maps[:, :, n // 2], profile, atol=1e-6)
    assert profile.std() > 0.001
    assert torch.equal(explore.position_profile(model, n // 2), profile)  # content has no part in it


@pytest.mark.parametrize("kind", ["rotary", None])
def test_other_kinds_have_no_position_profile(kind: str | None) -> None:
    with pytest.raises(ValueError, match="relative"):
        explore.position_profile(Wav2Vec2ConformerModel(tiny_config(position_embeddings_type=kind)))


def test_frame_clock(model: Wav2Vec2ConformerModel) -> None:
    from w2vc.config import Wav2Vec2ConformerConfig

    class Sized:
        config = Wav2Vec2ConformerConfig()

    assert explore.frame_clock(Sized()) == (0.02, 0.0125)  # type: ignore[arg-type]
    hop, middle = explore.frame_clock(model)
    utterance = load_speech("builtin", "test")[2]
    labels = frame_labels(utterance.phones, 40, hop, middle)
    assert labels[0] == "sil"


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
