"""Pictures: they keep their words, show the right numbers on the right axes, and weigh little."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.explore import viz
from w2vc.explore.viz import (
    MAP_BLOCKS,
    OKABE_ITO,
    Sound,
    draw_map,
    figure,
    player,
    plot_attention,
    plot_codes,
    plot_frames,
    plot_mask,
    plot_matrix,
    plot_segments,
    plot_spectrogram,
    plot_waveform,
    render,
    show,
    show_map,
    timeline,
)

ALT = "Three points on a line, rising to the right."


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What would have been displayed."""
    things: list[object] = []
    monkeypatch.setattr(viz, "display", things.append)
    return things


def test_show_keeps_the_words_in_every_form(shown: list[viz.Picture]) -> None:
    fig, ax = figure()
    ax.plot([1, 2, 3])
    show(fig, alt='A "line" & more, rising\n to the right.')
    html = shown[0]._repr_html_()
    assert 'alt="A &quot;line&quot; &amp; more, rising to the right."' in html
    assert 'width="700"' in html
    data = re.search(r"base64,([^\"]+)", html)
    assert data
    assert base64.b64decode(data[1]).startswith(b"\x89PNG")
    assert "rising to the right" in repr(shown[0])


def test_show_takes_axes_and_closes_pyplot_figures(shown: list[viz.Picture]) -> None:
    from matplotlib import pyplot

    fig, ax = pyplot.subplots()
    show(ax, alt=ALT)
    assert not pyplot.fignum_exists(fig.number)
    assert shown[0].width == 640


@pytest.mark.parametrize("alt", ["", "figure", " " * 40, None, 3])
def test_a_picture_without_words_is_refused(alt: object, shown: list[object]) -> None:
    with pytest.raises(ValueError, match="must describe"):
        show(figure()[0], alt=alt)
    assert not shown


def test_equal_figures_give_equal_bytes() -> None:
    def draw() -> bytes:
        return render(draw_map("masking")[0], ALT).png

    assert draw() == draw()


def test_figure_sizes_are_inches() -> None:
    fig, axes = figure(2, 3, width=6, height=3, sharex=True)
    assert axes.shape == (2, 3)
    assert tuple(fig.get_size_inches()) == (6, 3)
    with pytest.raises(ValueError, match="inches"):
        figure(width=700)
    with pytest.raises(ValueError, match="inches"):
        figure(height=0)


def test_the_palette_has_names_and_an_order() -> None:
    assert OKABE_ITO[0] == OKABE_ITO.blue == "#0072B2"
    assert len(set(OKABE_ITO)) == 8
    _, ax = figure()
    assert ax.plot([0, 1])[0].get_color() == OKABE_ITO.blue


@pytest.mark.parametrize("samples", [1, 400, 16_000, 48_000])
def test_waveform_spans_its_seconds_and_keeps_its_peak(samples: int) -> None:
    audio = np.zeros(samples)
    audio[samples // 2] = 0.7
    ax = plot_waveform(torch.tensor(audio), 16_000)
    assert ax.get_xlim() == (0, samples / 16_000)
    assert ax.dataLim.y1 == pytest.approx(0.7), "the single peak survives the thinning"
    assert "(s)" in ax.get_xlabel()


@pytest.mark.parametrize("hz", [513, 2020, 6006])
def test_spectrogram_puts_a_tone_at_its_frequency_and_time(hz: int) -> None:
    rate = 16_000
    audio = np.zeros(rate)
    audio[rate // 2 :] = np.sin(2 * np.pi * hz * np.arange(rate // 2) / rate)
    image = plot_spectrogram(audio, rate).images[0]
    picture, (left, right, bottom, top) = image.get_array(), image.get_extent()
    row, column = np.unravel_index(picture[:, -40:-10].argmax(), picture[:, -40:-10].shape)
    assert (bottom + (row + 0.5) * (top - bottom) / picture.shape[0]) * 1000 == pytest.approx(hz, abs=40)
    assert (left, right) == (0, pytest.approx(1.0))
    halfway = picture.shape[1] // 2
    assert picture[:, : halfway - 5].max() < picture[:, halfway + 5 :].max() - 50, "silence, then the tone"
    assert column >= 0
    loud = picture[:, halfway + 5]
    far = abs(np.arange(loud.size) * (top - bottom) / loud.size * 1000 - hz) > 1000
    assert loud[far].max() < picture.max() - 58, "a window without edges keeps a tone in its place"


def test_matrix_is_not_turned_and_zero_is_white() -> None:
    matrix = torch.tensor([[0.0, 1.0, 2.0], [-3.0, 0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    image = plot_matrix(matrix, center=0, values=True).images[0]
    assert image.get_array().tolist() == matrix.float().tolist()
    assert image.origin == "upper"
    assert image.get_clim() == (-3, 3)
    red, green, blue, _ = image.to_rgba(0.0)
    assert min(red, green, blue) > 0.95
    assert plot_matrix(matrix, vmin=-1).images[0].get_clim() == (-1, 2)


def test_matrix_with_values_writes_each_where_it_belongs() -> None:
    ax = plot_matrix([[1, 2], [3, -0.0]], values=".1f", extent=(0.0, 4.0, 2.0, 0.0))
    found = {text.get_text(): text.get_position() for text in ax.texts}
    assert found == {"1.0": (1, 0.5), "2.0": (3, 0.5), "3.0": (1, 1.5), "0.0": (3, 1.5)}


def test_frames_have_time_to_the_right_in_seconds() -> None:
    frames = torch.arange(15.0).reshape(5, 3)  # [T, C]
    image = plot_frames(frames, hop=0.02).images[0]
    assert image.get_array().tolist() == frames.T.tolist()
    assert image.get_extent()[:2] == [0, pytest.approx(0.1)]


def test_mask_bars_cover_exactly_the_hidden_frames() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    ax = plot_mask(mask, hop_seconds=0.02)
    dark = [c for c in ax.collections if tuple(np.round(c.get_facecolor()[0][:3], 2)) == (0.0, 0.22, 0.42)]
    spans = sorted(
        (round(p.get_extents().x0, 3), round(p.get_extents().x1, 3), round(p.get_extents().y0))
        for c in dark
        for p in c.get_paths()
    )
    assert spans == [(0.02, 0.06, 0), (0.08, 0.1, 0)]
    assert ax.get_xlim() == (0, pytest.approx(0.1))
    assert plot_mask(mask[0], hop_seconds=None).get_xlabel() == "frame"


def test_segments_stand_where_they_are_said() -> None:
    segments = [SimpleNamespace(label="no", start=0.1, end=0.4), ("yes", 0.5, 0.9)]
    ax = plot_segments(segments)
    assert [(round(p.get_x(), 3), round(p.get_width(), 3)) for p in ax.patches] == [(0.1, 0.3), (0.5, 0.4)]
    assert {t.get_text() for t in ax.texts} == {"no", "yes"}
    assert plot_segments([]) is not None


def test_long_labels_shrink_or_go() -> None:
    fig, ax = figure()
    ax.set_xlim(0, 10)
    plot_segments([("a", 0, 5), ("twenty-one characters", 5, 6.8), ("endless" * 9, 7, 7.1)], ax)
    fig.canvas.draw()
    sizes = [t.get_fontsize() for t in ax.texts]
    assert sizes[0] == 9
    assert 5.5 <= sizes[1] < 9
    renderer = fig.canvas.get_renderer()
    for text, patch in zip(ax.texts, ax.patches, strict=True):
        if 5.5 <= text.get_fontsize() < 9:
            assert text.get_window_extent(renderer).width <= patch.get_window_extent(renderer).width


def test_a_label_without_room_is_left_out() -> None:
    def draw(label: str) -> bytes:
        fig, ax = figure()
        plot_segments([("a", 0, 9), (label, 9, 9.1), ("b", 9.1, 10)], ax)
        return render(fig, ALT).png

    assert draw("endless" * 9) == draw("")


def test_attention_rows_look_and_columns_are_looked_at() -> None:
    attention = torch.zeros(4, 4)
    attention[3, 0] = 1.0
    ax = plot_attention(attention, hop=0.02)
    assert ax.images[0].get_array()[3, 0] == 1
    assert ax.images[0].get_extent() == [0, 0.08, 0.08, 0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("looked at (s)", "looking (s)")
    assert plot_attention(attention + 0.25, vmin=None).images[0].get_clim()[0] == 0.25


def test_codes_join_equal_neighbours() -> None:
    codes = torch.tensor([[0, 5], [0, 5], [3, 5], [3, 1]])
    ax = plot_codes(codes, hop=0.02)
    boxes = [(round(p.get_x(), 2), round(p.get_width(), 2), round(p.get_y() + 0.42)) for p in ax.patches]
    assert boxes == [(0.0, 0.04, 0), (0.04, 0.04, 0), (0.0, 0.06, 1), (0.06, 0.02, 1)]
    assert [t.get_text() for t in ax.texts] == ["0", "3", "5", "1"]
    tints = [p.get_facecolor() for p in plot_codes(torch.tensor([0, 1, 7, 0, 8])).patches]
    assert tints[0] == tints[3] == tints[4], "equal codes have equal tints; eight take turns"
    assert len(set(tints)) == 3
    with pytest.raises(ValueError, match=r"must lie in 0\.\.4"):
        plot_codes(codes, n_codes=5)


def test_timeline_has_one_axis_of_time() -> None:
    audio, n_frames = np.random.default_rng(0).normal(size=8000) * 0.1, 24
    segments = {"words": [("one", 0.1, 0.3)], "phones": [("w", 0.1, 0.2)]}
    maps = {"head 0": torch.full((n_frames, n_frames), 1 / n_frames)}
    fig = timeline(
        audio, 16_000, segments=segments, mask=torch.ones(n_frames, dtype=torch.bool), attention=maps,
        codes=torch.zeros(n_frames, 2, dtype=torch.long), frames=torch.randn(n_frames, 6),
    )  # fmt: skip
    rows = [ax for ax in fig.axes if ax.get_subplotspec()]
    assert len(rows) == 8
    assert {ax.get_xlim() for ax in rows} == {(0, 0.5)}
    assert [ax.get_xlabel() for ax in rows] == [""] * 7 + ["time (s)"]
    fig.canvas.draw()
    assert len({round(ax.get_position().x0, 3) for ax in rows}) == 1, "rows are aligned on the page"
    assert len({round(ax.get_position().x1, 3) for ax in rows}) == 1
    assert len(timeline(audio, 16_000, spectrogram=False).axes) == 1


@pytest.mark.parametrize("draw", [plot_frames, plot_matrix, plot_attention])
def test_wrong_dimensions_are_named(draw: object) -> None:
    with pytest.raises(ValueError, match=r"has shape \[2, 3, 4\]; allowed are 2 dimensions"):
        draw(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="audio has shape"):
        plot_waveform(torch.zeros(2, 3), 16_000)


def test_plots_draw_on_the_axes_they_are_given() -> None:
    fig, axes = figure(2, 4)
    frames = torch.rand(5, 5)
    drawn = [
        plot_waveform(frames[0], 5, axes[0, 0]), plot_spectrogram(torch.rand(500), 1000, axes[0, 1]),
        plot_matrix(frames, axes[0, 2]), plot_frames(frames, axes[0, 3]), plot_mask(frames > 0.5, axes[1, 0]),
        plot_segments([("a", 0, 1)], axes[1, 1]), plot_attention(frames, axes[1, 2]), plot_codes(frames.long(), axes[1, 3]),
    ]  # fmt: skip
    assert drawn == list(axes.flat)
    assert all(ax.get_figure() is fig for ax in drawn)


def wav_samples(audio: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    monkeypatch.setitem(sys.modules, "soundfile", None)  # as if it were not installed
    kind, data = Sound(audio, 16_000, "a tone").encoded()
    assert kind == "audio/wav"
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16_000)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def test_player_without_soundfile(monkeypatch: pytest.MonkeyPatch) -> None:
    audio = np.array([0.0, 0.5, -1.0, 1.0])
    assert wav_samples(audio, monkeypatch).tolist() == [0, 16384, -32767, 32767]
    assert wav_samples(4 * audio, monkeypatch).tolist() == [0, 16384, -32767, 32767], (
        "too loud is scaled, not clipped"
    )


def test_player_with_soundfile_is_light_and_sounds_alike() -> None:
    soundfile = pytest.importorskip("soundfile")
    times = np.arange(32_000) / 16_000
    audio = 0.4 * np.sin(2 * np.pi * 220 * times) + 0.3 * np.sin(2 * np.pi * 1700 * times)
    kind, data = Sound(audio, 16_000, "two tones").encoded()
    if kind == "audio/wav":
        pytest.skip("this libsndfile writes no MP3")
    assert kind == "audio/mpeg"
    assert len(data) < 20_000, "under 10 kB a second; plain samples have 32"
    assert Sound(audio, 16_000, "two tones").encoded()[1] == data
    back, rate = soundfile.read(io.BytesIO(data))
    assert rate == 16_000
    assert ((back[:32_000] - audio) ** 2).mean() < 0.01 * (audio**2).mean()
    assert Sound(audio, 12_345, "a rate that MP3 has not").encoded()[0] == "audio/wav"


def test_player_is_labelled_and_short(shown: list[Sound]) -> None:
    player(torch.zeros(16_000 * 5), 16_000, 'say "hello" <now>')
    html = shown[0]._repr_html_()
    assert "<audio controls" in html
    assert 'aria-label="say &quot;hello&quot; &lt;now&gt; (the first 3 s of 5.0 s)"' in html
    assert shown[0].audio.size == 48_000
    assert html.count("(the first 3 s of 5.0 s)") == 2, "seen and read out"
    player(torch.zeros(1600), 16_000, "short")
    assert "first" not in shown[1].label
    with pytest.raises(ValueError, match="label"):
        player(torch.zeros(10), 16_000, " ")
    with pytest.raises(ValueError, match="seconds"):
        player(torch.zeros(10), 16_000, "long", seconds=10)


@pytest.mark.parametrize("block", [None, *MAP_BLOCKS])
def test_map_lights_one_block_by_more_than_colour(block: str | None) -> None:
    fig, alt = draw_map(block)
    ax = fig.axes[0]
    thick = [p for p in ax.patches if isinstance(p, FancyBboxPatch) and p.get_linewidth() > 2]
    tags = [t for t in ax.texts if t.get_text() == "you are here"]
    bold = [t for t in ax.texts if t.get_weight() == "bold" and t not in tags]
    assert bool(thick) == bool(bold) == (block is not None)
    assert len(tags) == (block is not None)
    assert ("Lit: nothing" in alt) == (block is None)
    fig.canvas.draw()
    page = fig.bbox
    for text in ax.texts:
        box = text.get_window_extent()
        assert page.x0 <= box.x0 <= box.x1 <= page.x1, f"{text.get_text()!r} leaves the page"
        assert page.y0 <= box.y0 <= box.y1 <= page.y1, f"{text.get_text()!r} leaves the page"


def test_map_takes_its_sizes_from_the_config() -> None:
    config = Wav2Vec2ConformerConfig.tiny(hidden_size=48, num_attention_heads=4, num_hidden_layers=3)
    fig, alt = draw_map("conformer", config)
    words = " ".join(t.get_text() for t in fig.axes[0].texts)
    assert "[B, T, 48]" in words
    assert "× 3 blocks" in words
    assert "2 × 8 codes" in words
    assert "width 48" in alt


def test_map_refuses_unknown_blocks(shown: list[object]) -> None:
    with pytest.raises(
        ValueError, match=r"'attenton' is not on the map; allowed are config, audio, .*pretraining"
    ):
        show_map("attenton")
    assert not shown
    show_map("attention")
    assert len(shown[0]._repr_html_()) < 80_000, "the map stands in every chapter"


def test_slugs_on_the_map_are_modules() -> None:
    package = Path(viz.__file__).parents[1]
    assert [slug for slug in MAP_BLOCKS if not list(package.rglob(f"{slug}.py"))] == []


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path) -> None:
    code = "import sys; sys.modules['matplotlib'] = None\ntry:\n    import w2vc.explore.viz\nexcept ImportError as e:\n    print(e)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert 'pip install "w2vc[viz]"' in done.stdout


def test_viz_draws_without_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys, w2vc.explore.viz as v, numpy as np\nf, a = v.figure()\nv.plot_matrix(np.eye(3), a)\nv.render(f, 'x')\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "False", "no global state, no backend, no window"
    assert isinstance(figure()[0], Figure)
