"""Recordings of people: layouts, texts, splits, all-or-nothing fetching, and what happens where a source is missing."""

from __future__ import annotations

import gzip
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from w2vc.data import recordings as R
from w2vc.data.corpus import SpeechUnavailableError, load_speech

soundfile = pytest.importorskip("soundfile")
SPLITS = ("train", "dev", "test")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W2VC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("W2VC_SPEECH", raising=False)


def tone(seconds: float = 0.5, rate: int = 16000, hertz: float = 440.0) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def g722(path: Path, audio: np.ndarray) -> None:
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            (audio * 32767).astype(np.int16)[None], format="s16", layout="mono"
        )
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


@pytest.fixture
def asterisk(tmp_path: Path) -> Path:
    """Unpacked packages in miniature."""
    voice = tmp_path / "root/usr/share/asterisk/sounds/en_US_f_Allison"
    for key in ("hello", "digits/4", "letters/dot", "silence/1", "beep", "confbridge-join", "untold"):
        g722(voice / f"{key}.g722", tone())
    (voice / "empty.g722").write_bytes(b"")
    doc = tmp_path / "root/usr/share/doc/asterisk-core-sounds-en"
    doc.mkdir(parents=True)
    lines = ["; a remark", "hello: Hello, press 1 (please)!", "digits/4: four", "letters/dot: dot [.]", "silence/1: (1 second)",
             "beep: [a beep]", "confbridge-join: <beep ascending>", "empty: nothing"]  # fmt: skip
    (doc / "core-sounds-en.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return tmp_path / "root"


def test_asterisk_layout(asterisk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = R.fetch_speech("asterisk-en", asterisk)
    assert "CC-BY-SA-3.0" in capsys.readouterr().out
    every = load_speech("asterisk-en", "all")  # from the cache: nothing is fetched
    assert {u.id: (u.text, u.kind) for u in every} == {
        "hello": ("hello press one", "prompt"), "digits/4": ("four", "digits"), "letters/dot": ("dot", "letter"),
    }  # fmt: skip
    assert every.speakers == ("allison",)
    assert every[0].language == "en"
    assert "Allison Smith" in every.about["licence"]
    spectrum = np.abs(np.fft.rfft(every[0].audio[:8000]))  # half a second: bins of 2 Hz
    assert spectrum.argmax() * 2 == pytest.approx(440, abs=4)
    assert every[0].audio.std() == pytest.approx(tone().std(), rel=0.1)
    assert sorted(p.name for p in where.parent.iterdir()) == ["asterisk-en"]  # no temporary folder is left


def test_fetching_from_a_source_again_replaces_the_set(asterisk: Path) -> None:
    R.fetch_speech("asterisk-en", asterisk)
    (asterisk / "usr/share/asterisk/sounds/en_US_f_Allison/hello.g722").unlink()
    R.fetch_speech("asterisk-en", asterisk)
    assert {u.id for u in load_speech("asterisk-en", "all")} == {"digits/4", "letters/dot"}


def test_other_layouts(tmp_path: Path) -> None:
    data = tmp_path / "usr/share/pocketsphinx/test/data/librivox"
    data.mkdir(parents=True)
    soundfile.write(data / "x-1.wav", tone(), 16000)
    (data / "transcription").write_text("<s> he was  not </s> (x-1)\n")
    R.fetch_speech("librivox", tmp_path)
    (u,) = load_speech("librivox")
    assert (u.id, u.text, u.n_samples) == ("x-1", "he was  not".replace("  ", " "), 8000)
    game = tmp_path / "usr/share/games/fillets-ng"
    for level, key in (("city", "one"), ("city", "two"), ("border", "cry"), ("city", "untold")):
        path = game / f"sound/{level}/cs/{key}.ogg"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(rate=22050), 22050, format="OGG")
    for level, text in (
        (
            "city",
            'dialogId("one", "font_small", "Hi \\"you\\"!")\ndialogStr("Ahoj, \\"ty\\"!")\n\ndialogId("two", "font_big", "1")\ndialogStr("Mám 2.")\n',
        ),
        ("share", 'dialogId("cry", "font_big", "x")\ndialogStr("Áá")\n'),
    ):
        (game / f"script/{level}").mkdir(parents=True)
        (game / f"script/{level}/my_dialogs_cs.lua").write_text(text)
    R.fetch_speech("fillets-cs", tmp_path)
    found = {u.id: (u.speaker, u.text) for u in load_speech("fillets-cs", "all")}
    assert found == {"city/one": ("small", "ahoj ty"), "city/two": ("big", ""), "border/cry": ("big", "áá")}
    assert abs(load_speech("fillets-cs", "all")[0].n_samples - 8000) <= 1


def test_splits_depend_on_the_group_alone() -> None:
    groups = [f"group {i}" for i in range(2000)]
    split = {g: R._split_of(g) for g in groups}
    shares = [sum(v == s for v in split.values()) / 2000 for s in SPLITS]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.03)


def test_missing_source_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="holds no recording of librivox"):
        R.fetch_speech("librivox", tmp_path)
    with pytest.raises(ValueError, match="the human sets are"):
        R.fetch_speech("nobody")
    monkeypatch.setattr(R.shutil, "which", lambda tool: None)
    with pytest.raises(SpeechUnavailableError, match=r"no apt-get.*pocketsphinx-testdata.*source=FOLDER"):
        load_speech("librivox")
    with pytest.raises(SpeechUnavailableError, match=r"asterisk-en.*librivox"):
        load_speech("human")
    capsys.readouterr()
    monkeypatch.setenv("W2VC_SPEECH", "human")
    speech = load_speech()
    assert speech.name == "builtin"
    assert "The built-in corpus is used instead" in capsys.readouterr().out
    assert load_speech("builtin", "test").split == "test"
    assert not [path for path in tmp_path.joinpath("cache").rglob("*") if path.is_file()]


def test_human_prefers_what_is_here(asterisk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    R.fetch_speech("asterisk-en", asterisk)
    monkeypatch.setattr(R.shutil, "which", lambda tool: None)
    monkeypatch.setenv("W2VC_SPEECH", "human")
    assert load_speech(split="all").name == "asterisk-en"


def test_a_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(R.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(R, "_run", lambda *command, cwd: "E: no network here")
    with pytest.raises(SpeechUnavailableError, match="no network here"):
        R.fetch_speech("librivox")
    assert not [path for path in tmp_path.joinpath("cache").rglob("*") if path.is_file()]


def test_a_failed_decode_leaves_nothing(
    asterisk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    R.fetch_speech("asterisk-en", asterisk)
    before = sorted((p.name, p.read_bytes()) for p in (tmp_path / "cache/speech/asterisk-en").iterdir())

    def broken(path: Path) -> np.ndarray:
        raise OSError("disk full")

    monkeypatch.setattr(R, "_decode", broken)
    with pytest.raises(OSError, match="disk full"):
        R.fetch_speech("asterisk-en", asterisk)
    assert (
        sorted((p.name, p.read_bytes()) for p in (tmp_path / "cache/speech/asterisk-en").iterdir()) == before
    )


def test_fetch_librivox_for_real() -> None:
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not here: human speech comes from Debian packages")
    try:
        speech = load_speech("librivox")
    except SpeechUnavailableError as error:
        pytest.skip(f"the source cannot be reached: {error}")
    assert len(speech) == 5
    assert speech.seconds == pytest.approx(24.7, abs=0.1)
    assert any("dashwood" in u.text for u in speech)
    assert all(0.02 < u.audio.std() < 0.5 for u in speech)


@pytest.mark.slow
def test_fetch_asterisk_for_real() -> None:
    pytest.importorskip("av")
    try:
        every = (
            load_speech("asterisk-en")
            + load_speech("asterisk-en", "dev")
            + load_speech("asterisk-en", "test")
        )
    except SpeechUnavailableError as error:
        pytest.skip(f"the source cannot be reached: {error}")
    assert len(every) == 551
    assert 24 < every.seconds / 60 < 25
    by_text = {}
    for split in SPLITS:
        for u in load_speech("asterisk-en", split):
            assert by_text.setdefault(u.text, split) == split  # a prompt is in one split


def test_missing_decoder_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"w2vc\[human\]"):
        R._decode(tmp_path / "x.g722")


def test_spoken_form() -> None:
    for text, want in {
        "Press 1, now!": "press one now", "[beep]": "", "It’s (a note) 3D": "it's three d", "<beep> H.323": "h three two three",
        "Buď rád… 'cause": "buď rád cause", "rock-n_roll": "rock n roll",
    }.items():  # fmt: skip
        assert R.spoken_form(text) == want
    assert R.spoken_form("Mám 2 ryby", "cs") == ""
    assert R.spoken_form("Mám dvě ryby.", "cs") == "mám dvě ryby"


def test_registered() -> None:
    for name in (*R.HUMAN, "human"):
        assert name in R.SOURCES
    for human in R.HUMAN.values():
        assert human.licence
        assert human.packages


def test_human_without_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "usr/share/pocketsphinx/test/data/librivox"
    data.mkdir(parents=True)
    soundfile.write(data / "x-1.wav", tone(), 16000)
    (data / "transcription").write_text("<s> he was </s> (x-1)\n")
    R.fetch_speech("librivox", tmp_path)
    monkeypatch.setenv("W2VC_SPEECH", "human")
    assert [u.text for u in load_speech(split="test")] == ["he was"]  # better than none
