"""Synthesis: the same call gives the same sound, the shipped corpus is what the script says, and its times are right."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import platform
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from w2vc.data import synthesis as S
from w2vc.data.corpus import DIGITS, KEYWORDS, SILENCE, Speech, load_speech

pytest.importorskip("soundfile")
_spec = importlib.util.spec_from_file_location(
    "make_builtin_corpus", Path(__file__).parents[2] / "tools" / "make_builtin_corpus.py"
)
assert _spec is not None
assert _spec.loader is not None
MAKER = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(MAKER)


@pytest.fixture(scope="module")
def corpus() -> Speech:
    return load_speech("builtin", "all")


def snr(clean: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10((clean**2).sum() / max(((clean - other) ** 2).sum(), 1e-12)))


def test_the_script_is_the_corpus(corpus: Speech) -> None:
    script = {line.id: line for line in MAKER.english_script()}
    assert set(script) == {u.id for u in corpus}
    for u in corpus:
        line = script[u.id]
        assert (u.text, u.kind, u.speaker) == (line.text, line.kind, line.voice.id)


ann = S.Voice("ann", "en-us", "f1")
PINNED = sys.platform == "linux" and platform.machine() == "x86_64"


def test_regenerated_equals_shipped(corpus: Speech) -> None:
    pytest.importorskip("espeakng_loader")
    lines = {line.id: line for line in [*MAKER.english_script(), *MAKER.language_script()]}
    shipped = [
        *corpus.filter(kind="sentence")[::29],
        *corpus.filter(kind="keyword")[::90],
        *load_speech("builtin-languages", "all")[::13],
    ]
    assert len(shipped) > 10
    for u in shipped:
        again = lines[u.id].speak()
        assert again.phones == u.phones, u.id
        assert again.words == u.words, u.id
        assert again.n_samples == u.n_samples
        assert snr(again.audio, u.audio) > 15, u.id  # Vorbis is lossy


@pytest.mark.skipif(not PINNED, reason="samples are pinned for Linux x86_64 alone")
def test_raw_samples_are_pinned() -> None:
    try:
        version = importlib.metadata.version("espeakng-loader")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("espeakng-loader is not installed")
    if version != "0.2.4":
        pytest.skip(f"samples are pinned for espeakng-loader 0.2.4, here is {version}")
    waves = [
        S._espeak("the old king sees a fish", voice, seed=5)[0] for voice in (ann, S.TRAIN_VOICES["m05"])
    ]
    # Lengths and loudness, not bits: the mathematical library of another system may round the last one differently.
    assert [(len(w), round(float(np.abs(w.astype(float)).mean()))) for w in waves] == RAW


RAW = [(43245, 1885), (39341, 2048)]


@pytest.mark.parametrize("name", ["f01", "m01", "m05", "m07"])  # m05 draws its noise from rand() of C
def test_independent_of_what_was_said_before(name: str) -> None:
    pytest.importorskip("espeakng_loader")
    voice = S.TRAIN_VOICES[name]
    one = S._espeak("seven blue zebras", voice, seed=3)
    for other in ("m05", "f04"):
        S._espeak("visions of guten morgen", S.TRAIN_VOICES[other], seed=9)
    two = S._espeak("seven blue zebras", voice, seed=3)
    assert np.array_equal(one[0], two[0])
    assert one[1] == two[1]
    u = S.synthesize("seven blue zebras", voice, seed=3)
    assert np.array_equal(u.audio, S.synthesize("seven blue zebras", voice, seed=3).audio)
    v = S.synthesize("seven blue zebras", voice, seed=4)
    assert u.n_samples != v.n_samples or not np.array_equal(u.audio, v.audio)


def test_synthesiser_refuses_what_it_would_misread() -> None:
    pytest.importorskip("espeakng_loader")
    for text in ("room 42", "", "wait, what", "two  spaces"):
        with pytest.raises(ValueError, match="text="):
            S.synthesize(text, ann)
    with pytest.raises(ValueError, match="no language 'xx'"):
        S.synthesize("hello", S.Voice("x", "xx", "f1"))


def test_missing_tool_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(S.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(ImportError, match=r"w2vc\[synth\]"):
        S.synthesize("hello", ann)


def test_the_maker_writes_a_corpus_and_leaves_equal_sound_alone(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    lines = [
        line for line in MAKER.english_script() if line.kind == "keyword" and line.voice.id in {"f01", "f11"}
    ][:12]
    MAKER.build(tmp_path, lines)
    shipped = {u.id: u for u in load_speech("builtin", "all")}
    made = load_speech(tmp_path, "all")
    assert sorted(u.id for u in made) == sorted(line.id for line in lines)
    for u in made:
        other = shipped[u.id]
        assert (u.text, u.words, u.phones, u.turns) == (other.text, other.words, other.phones, other.turns)
        assert snr(other.audio, u.audio) > 12, u.id  # both are lossy, and were encoded in other company
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "gone.ogg").write_bytes(b"of a voice that is not in the script any more")
    MAKER.build(tmp_path, lines)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_build_makes_the_same_corpus(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    MAKER.main(["--folder", str(tmp_path)])
    for name, folder in (("builtin", "english"), ("builtin-languages", "languages")):
        for a, b in zip(load_speech(tmp_path / folder, "all"), load_speech(name, "all"), strict=True):
            assert (a.id, a.text, a.words, a.phones, a.turns) == (b.id, b.text, b.words, b.phones, b.turns)
            assert snr(a.audio, b.audio) > 40


def test_stops_own_their_closure() -> None:
    """The first part of a "t" inside a word is quiet, its end is not."""
    pytest.importorskip("espeakng_loader")
    u = S.synthesize("later potato water attack again", S.Voice("x", "en", "m3"))
    stops = [p for p in u.phones if p.label in {"t", "k"}]
    assert len(stops) >= 4
    for p in stops:
        closure, burst = u.cut(p.start + 0.002, p.start + 0.015), u.cut(p.end - 0.02, p.end)
        assert closure.std() < 0.6 * burst.std(), p


def test_dark_l_and_linking() -> None:
    pytest.importorskip("espeakng_loader")
    u = S.synthesize("old wall three eight seven eight", S.TRAIN_VOICES["m04"])
    assert all(p.end - p.start > 0.03 for p in u.phones if p.label == "l")
    assert [p.label for p in u.phones].count(SILENCE) == 2  # at the ends alone
    assert all(p.end - p.start > 0.012 for p in u.phones)


def test_the_systems_library_is_the_second_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(S.ctypes.util, "find_library", lambda name: f"lib{name}.so.1")
    assert S._espeak_files() == ("libespeak-ng.so.1", None)


def test_grammar() -> None:
    words = {w for group in S.GRAMMAR.values() for w in group} | {"an", "the"}
    for k in range(200):
        sentence = S.make_sentence(S.random.Random(k)).split()
        assert set(sentence) <= words
        assert not [a for a, b in pairwise(sentence) if (a == "a") == (b[0] in "aeiou") and a in {"a", "an"}]
        assert set(S.make_digits(S.random.Random(k)).split()) <= set(DIGITS)
    variants = [v.variant for v in (*S.TRAIN_VOICES.values(), *S.TEST_VOICES.values())]
    assert len(set(variants)) == len(variants) == 24
    assert len(KEYWORDS) == 10


def test_pairs_are_not_read_as_one_word() -> None:
    pytest.importorskip("espeakng_loader")
    u = S.synthesize("a boat with the girl of the house", S.Voice("x", "en", "m3"))
    assert [w.label for w in u.words] == u.text.split()


# ------------------------------------------------------------------------------------------ hours of it, on demand


def first(split: str, n: int) -> list[S.Line]:
    return list(itertools.islice(S.large_script(split), n))


def test_large_script_keeps_its_voices_and_texts_apart() -> None:
    parts = {split: first(split, 300) for split in ("train", "dev", "test")}
    variants = {split: {line.voice.variant for line in lines} for split, lines in parts.items()}
    assert variants["test"] == {voice.variant for voice in S.TEST_VOICES.values()}
    assert not variants["train"] & variants["dev"]
    assert not (variants["train"] | variants["dev"]) & variants["test"]
    builtin = {line.text for line in MAKER.english_script() if line.kind != "keyword"}
    for lines in parts.values():
        assert not builtin & {line.text for line in lines if line.kind != "keyword"}
        assert {line.kind for line in lines} == set(S._MAKERS)
    assert first("train", 300) == parts["train"]  # the same script every time
    assert len({line.voice.id for line in parts["train"]}) == 2 * len(S._SCRIPT["train variants"])


def test_synthetic_speech_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("espeakng_loader")
    monkeypatch.setenv("W2VC_CACHE", str(tmp_path))
    train = load_speech("synthetic", hours=0.005)
    assert 18 <= train.seconds < 25  # the last utterance may go over
    assert [u.text for u in train] == [line.text for line in first("train", len(train))]
    assert [u.phones for u in train[:2]] == [line.speak().phones for line in first("train", 2)]
    monkeypatch.setattr(S, "synthesize", None)  # nothing is spoken again
    assert len(load_speech("synthetic", "dev", hours=0.005)) >= 1
    np.testing.assert_array_equal(load_speech("synthetic", hours=0.005)[3].audio, train[3].audio)


@pytest.mark.parametrize("hours", [0, -1.0, float("nan")])
def test_synthetic_speech_refuses_no_hours(hours: float) -> None:
    with pytest.raises(ValueError, match="hours="):
        load_speech("synthetic", hours=hours)
    with pytest.raises(ValueError, match=r"'builtin' takes no such option: .*hours"):
        load_speech("builtin", hours=1)


def test_synthetic_mixes_keep_the_splits_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("espeakng_loader")
    monkeypatch.setenv("W2VC_CACHE", str(tmp_path))
    parts = {split: load_speech("synthetic-mixes", split, hours=0.02) for split in ("train", "dev")}
    assert [len(part) for part in parts.values()] == [1200, 60]
    voices = [{name for u in part for name in u.speaker.split("+")} for part in parts.values()]
    assert all(voices)
    assert not voices[0] & voices[1]
    assert {len({turn.label for turn in u.turns}) for u in parts["dev"]} == {2}
    with pytest.raises(ValueError, match="split='valid'"):
        load_speech("synthetic-mixes", "valid")
