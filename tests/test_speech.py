"""Speech: the built-in corpus and its times, the synthesiser, the doors to folders, data sets and recordings of people."""

from __future__ import annotations

import csv
import gzip
import pickle
import platform
import shutil
import subprocess
import sys
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2vc import speech as S
from w2vc.speech import Segment, Speech, Utterance, load_speech

soundfile = pytest.importorskip("soundfile")
SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def corpus() -> Speech:
    return load_speech("builtin", "all")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W2VC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("W2VC_SPEECH", raising=False)


def snr(clean: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10((clean**2).sum() / ((clean - other) ** 2).sum()))


def tone(seconds: float = 0.5, rate: int = 16000, hertz: float = 440.0) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


# The built-in corpus


def test_soundfile_is_enough() -> None:
    code = """
import sys
for name in ("soxr", "datasets", "av", "espeakng_loader", "matplotlib", "scipy"):
    sys.modules[name] = None  # an import of it fails
from w2vc.speech import load_speech
for name in ("builtin", "builtin-mixes", "builtin-languages"):
    u = load_speech(name)[0]
    assert u.audio.dtype == "float32" and u.audio.shape == (u.n_samples,) and u.words and u.text, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_contents(corpus: Speech) -> None:
    parts = {split: load_speech("builtin", split) for split in SPLITS}
    assert [len(parts[s]) for s in SPLITS] == [288, 64, 136]
    assert len(corpus) == 488
    assert len({u.id for u in corpus}) == 488
    assert len(parts["train"].speakers) == 16
    assert len(parts["test"].speakers) == 8
    assert parts["dev"].speakers == parts["train"].speakers
    assert not set(parts["test"].speakers) & set(parts["train"].speakers)
    voices = {**S.TRAIN_VOICES, **S.TEST_VOICES}
    assert len({v.variant for v in voices.values()}) == len(voices)
    for split in ("train", "test"):
        for speaker in parts[split].speakers:
            assert len(parts[split].filter(speaker=speaker)) >= 10
            assert {u.text for u in parts[split].filter(speaker=speaker, kind="keyword")} == set(S.KEYWORDS)
    told = {s: {u.text for u in parts[s] if u.kind != "keyword"} for s in SPLITS}
    assert sum(map(len, told.values())) == len(
        set().union(*told.values())
    )  # no text in two splits, none twice
    assert all("Apache" in load_speech(name).about["licence"] for name in S.BUILTIN)
    sounds = {p.label for u in parts["train"] for p in u.phones}
    assert len(sounds) > 40
    assert {p.label for u in parts["test"] for p in u.phones} <= sounds


def test_small_enough() -> None:
    folder = S._assets()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 5_000_000
    assert (folder / "LICENSE.md").is_file()
    assert "W2VC" not in (folder / "english/speech.json").read_text(encoding="utf-8")


def test_the_script_is_the_corpus(corpus: Speech) -> None:
    script = {line.id: line for line in S.english_script()}
    assert set(script) == {u.id for u in corpus}
    for u in corpus:
        line = script[u.id]
        assert (u.text, u.kind, u.speaker) == (line.text, line.kind, line.voice.id)


@pytest.mark.parametrize("name", ["builtin", "builtin-languages"])
def test_times_are_consistent(name: str) -> None:
    for u in load_speech(name, "all"):
        assert u.text == " ".join(word.label for word in u.words), u.id
        assert u.phones[0].start == 0
        assert u.phones[-1].end == pytest.approx(u.seconds, abs=1e-9)
        assert u.phones[0].label == u.phones[-1].label == S.SILENCE
        assert all(a.end == b.start for a, b in pairwise(u.phones)), u.id
        assert all(p.end > p.start for p in u.phones), u.id
        assert all(a.end <= b.start for a, b in pairwise(u.words)), u.id
        starts, ends = {p.start for p in u.phones}, {p.end for p in u.phones}
        assert all(w.start in starts and w.end in ends for w in u.words), u.id
        assert u.turns == (Segment(u.speaker, u.words[0].start, u.words[-1].end),)


def test_audio_is_sound(corpus: Speech) -> None:
    for u in corpus[::7]:
        audio = u.audio
        assert audio.dtype == np.float32
        assert len(audio) == u.n_samples
        assert 0.5 < np.abs(audio).max() < 1.0
        for p in u.phones:  # noise in the pauses, and little of it: -50 dB
            if p.label == S.SILENCE:
                inner = u.cut(p.start + 0.01, p.end - 0.01)
                assert 0.001 < inner.std() < 0.01, (u.id, p)


def test_labels_lie_on_the_sound(corpus: Speech) -> None:
    """Hiss where "s" is, a pitch where vowels are, quiet in the closures: wrong by 40 ms or more, and this fails."""

    def high(x: np.ndarray) -> float:
        power, hertz = np.abs(np.fft.rfft(x)) ** 2, np.fft.rfftfreq(len(x), 1 / 16000)
        return float(power[hertz > 3000].sum() / power.sum())

    def scores(shift: float) -> tuple[float, float]:
        hiss, closed = [], []
        for u in corpus.filter(kind="sentence")[::2]:
            for before, p in pairwise(u.phones):
                if p.label == "s" and before.label != S.SILENCE:
                    hiss.append(high(u.cut(p.start + shift, p.start + shift + 0.03)) > 0.5)
                    hiss.append(
                        high(u.cut(p.start + shift - 0.03, p.start + shift)) < 0.5 or before.label in "stʃdʒz"
                    )
                if p.label in {"p", "t", "k"} and before.label in {"æ", "ɪ", "ɛ", "ʌ", "iː", "i", "eɪ", "oʊ"}:
                    a, b = (
                        u.cut(p.start + shift - 0.03, p.start + shift),
                        u.cut(p.start + shift + 0.005, p.start + shift + 0.02),
                    )
                    closed.append(b.std() < 0.35 * a.std())
        assert len(hiss) > 60
        assert len(closed) > 15
        return float(np.mean(hiss)), float(np.mean(closed))

    good = scores(0.0)
    assert min(good) > 0.85, good
    for shift in (-0.04, 0.04):
        assert max(scores(shift)) < min(good) - 0.1, "the test would not notice a shift"


def test_languages_share_their_speakers() -> None:
    both = load_speech("builtin-languages", "all")
    assert {u.language for u in both} == set(S.PHRASES)
    for speaker in both.speakers:
        assert {u.language for u in both.filter(speaker=speaker)} == set(S.PHRASES)
    train, test = load_speech("builtin-languages"), load_speech("builtin-languages", "test")
    assert not set(train.speakers) & set(test.speakers)
    assert not {u.text for u in train} & {u.text for u in test}


def test_wrong_names() -> None:
    with pytest.raises(ValueError, match=r"known sets.*librivox"):
        load_speech("no-such-set")
    for name in ("builtin", "builtin-mixes", "builtin-languages"):
        with pytest.raises(ValueError, match=r"split='valid'.*'train'"):
            load_speech(name, "valid")


# The containers


def test_speech_is_a_sequence(corpus: Speech) -> None:
    train = load_speech()
    assert isinstance(train[0], Utterance)
    assert isinstance(train[2:5], Speech)
    assert [u.id for u in train[-2:]] == [train[-2].id, train[-1].id]
    assert len(train + load_speech("builtin", "dev")) == 352
    assert train.seconds == pytest.approx(sum(len(u.audio) for u in train[:]) / 16000)
    some = train.filter(lambda u: u.seconds > 1, speaker=["f01", "m02"], kind="sentence", language="en")
    assert some.speakers == ("f01", "m02")
    assert len(some) == 8
    lengths = [u.seconds for u in train.sort("seconds", reverse=True)]
    assert lengths == sorted(lengths, reverse=True)
    assert [u.id for u in train.sort()] == sorted(u.id for u in train)
    assert "288 utterances" in repr(train)


def test_utterances_travel_to_workers() -> None:
    for u in (load_speech()[3], load_speech("builtin-mixes")[1]):
        there = pickle.loads(pickle.dumps(u))
        assert len(pickle.dumps(u)) < 20_000  # a reference, not the samples
        assert np.array_equal(there.audio, u.audio)
        assert there.words == u.words


def test_audio_is_the_callers_own() -> None:
    u = load_speech()[0]
    u.audio[:] = 0
    assert np.abs(u.audio).max() > 0.1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.3), st.floats(0.001, 0.3)), max_size=8), st.integers(0, 80))
def test_frame_labels(pieces: list[tuple[float, float]], n_frames: int) -> None:
    segments, now = [], 0.0
    for i, (gap, length) in enumerate(pieces):
        segments.append(Segment(str(i), now + gap, now + gap + length))
        now += gap + length
    slow = []
    for t in range(n_frames):
        time = t * 0.02 + 0.0125
        slow.append("".join(s.label for s in segments if s.start <= time < s.end))
    assert S.frame_labels(segments, n_frames) == slow


# Storage


def test_save_and_load(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = [
        Utterance(f"u{i}", (rng.integers(-9000, 9000, 4000 + i) / 32768).astype(np.float32), text="a b", speaker=speaker,
                  words=[Segment("a", 0.1, 0.12), Segment("b", 0.12, 0.2)], kind="x", language="en")
        for i, speaker in enumerate(["a/b", "a/b", "a_b", "", "å"])
    ]  # fmt: skip
    S.save_speech(
        tmp_path, {"train": made[:3], "test": iter(made[3:])}, {"licence": "none"}, seconds_per_file=0.3
    )
    assert len(list(tmp_path.glob("*.flac"))) == 4  # two clips fill a file
    for back, u in zip(load_speech(tmp_path, "all"), made, strict=True):
        assert np.array_equal(back.audio, u.audio)
        assert (back.id, back.text, back.speaker, back.words, back.phones) == (
            u.id,
            u.text,
            u.speaker,
            u.words,
            (),
        )
    assert [u.id for u in load_speech(tmp_path, "test")] == ["u3", "u4"]
    first = tmp_path / "a_b-0.flac"
    first.write_bytes(first.read_bytes()[:-4000])
    with pytest.raises((ValueError, soundfile.LibsndfileError)):
        [u.audio for u in load_speech(tmp_path)]


def test_ogg_is_close_and_unchanged_sound_is_not_rewritten(tmp_path: Path) -> None:
    u = load_speech()[0]
    S.save_speech(tmp_path, {"train": [u]}, {}, format="OGG", compression=0.45)
    path = tmp_path / f"{u.speaker}-0.ogg"
    before = path.read_bytes()
    assert snr(u.audio, load_speech(tmp_path)[0].audio) > 15
    S.save_speech(tmp_path, {"train": [u]}, {}, format="OGG", compression=0.45)
    assert path.read_bytes() == before
    loud = Utterance(u.id, u.audio * 0.5, speaker=u.speaker)
    S.save_speech(tmp_path, {"train": [loud]}, {}, format="OGG", compression=0.45)
    assert path.read_bytes() != before
    assert np.abs(load_speech(tmp_path)[0].audio).max() < 0.4  # nothing stale is remembered


# The synthesiser


ann = S.Voice("ann", "en-us", "f1")
PINNED = sys.platform == "linux" and platform.machine() == "x86_64"


def test_regenerated_equals_shipped(corpus: Speech) -> None:
    pytest.importorskip("espeakng_loader")
    lines = {line.id: line for line in [*S.english_script(), *S.language_script()]}
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
    loader = pytest.importorskip("importlib.metadata")
    try:
        version = loader.version("espeakng-loader")
    except loader.PackageNotFoundError:
        pytest.skip("espeakng-loader is not installed")
    if version != "0.2.4":
        pytest.skip(f"samples are pinned for espeakng-loader 0.2.4, here is {version}")
    sums = [
        zlib.crc32(S._espeak("the old king sees a fish", voice, seed=5)[0].tobytes())
        for voice in (ann, S.TRAIN_VOICES["m05"])
    ]
    assert sums == RAW_SUMS


RAW_SUMS = [1988673669, 119026677]


def test_independent_of_what_was_said_before() -> None:
    pytest.importorskip("espeakng_loader")
    one = S.synthesize("seven blue boats", ann, seed=3)
    S.synthesize("guten morgen", S.Voice("x", "de", "m5"))
    two = S.synthesize("seven blue boats", ann, seed=3)
    assert np.array_equal(one.audio, two.audio)
    assert one.phones == two.phones
    assert not np.array_equal(
        one.audio, S.synthesize("seven blue boats", ann, seed=4).audio[: len(one.audio)]
    )


def test_synthesiser_refuses_what_it_would_misread() -> None:
    pytest.importorskip("espeakng_loader")
    for text in ("room 42", "", "wait, what", "two  spaces"):
        with pytest.raises(ValueError, match="text="):
            S.synthesize(text, ann)
    with pytest.raises(ValueError, match="no language 'xx'"):
        S.synthesize("hello", S.Voice("x", "xx", "f1"))


def test_missing_tools_name_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(S.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(ImportError, match=r"w2vc\[synth\]"):
        S.synthesize("hello", ann)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"w2vc\[data"):
        load_speech()[:1].to_dataset()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"w2vc\[human\]"):
        S._decode(tmp_path / "x.g722")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    S._decode_whole.cache_clear()
    with pytest.raises(ImportError, match=r"w2vc\[audio\]"):
        load_speech()[0].audio  # noqa: B018


@pytest.mark.slow
def test_build_makes_the_same_corpus(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    S._main(["build", "--folder", str(tmp_path)])
    for name, (folder, _) in S.BUILTIN.items():
        for a, b in zip(load_speech(tmp_path / folder, "all"), load_speech(name, "all"), strict=True):
            assert (a.id, a.text, a.words, a.phones, a.turns) == (b.id, b.text, b.words, b.phones, b.turns)
            assert snr(a.audio, b.audio) > 40


# Mixes


def test_mix_is_a_sum() -> None:
    a, b = load_speech()[0], load_speech()[1]
    both = S.mix([a, b], [0.5, 0.0], gain=0.5)
    assert both.turns[0].label == b.speaker
    want = np.zeros(both.n_samples, np.float32)
    want[8000 : 8000 + a.n_samples] += 0.5 * a.audio
    want[: b.n_samples] += 0.5 * b.audio
    assert np.allclose(both.audio, want, atol=1e-7)
    assert both.n_samples == max(8000 + a.n_samples, b.n_samples)
    assert [w.start for w in both.words] == sorted(w.start for w in both.words)
    for word in a.words:
        assert Segment(word.label, word.start + 0.5, word.end + 0.5) in both.words
    assert both.speaker == "+".join(sorted([a.speaker, b.speaker]))
    for starts in ([0.0], [-0.1, 0.0]):
        with pytest.raises(ValueError, match="starts="):
            S.mix([a, b], starts)
    with pytest.raises(ValueError, match="16000 Hz"):
        S.mix([Utterance("x", tone(), 8000)], [0.0])


def test_built_in_mixes() -> None:
    parts = {split: load_speech("builtin-mixes", split) for split in SPLITS}
    assert [len(p) for p in parts.values()] == [48, 16, 24]
    assert len(load_speech("builtin-mixes", "all")) == 88
    assert not set(parts["train"].speakers) & set(parts["test"].speakers)
    overlaps, gaps = 0, 0
    for u in parts["test"]:
        assert len(u.turns) == 4
        assert len({t.label for t in u.turns}) == 2
        assert np.abs(u.audio).max() <= 1
        overlaps += any(b.start < a.end for a, b in pairwise(u.turns))
        gaps += any(b.start > a.end for a, b in pairwise(u.turns))
    assert overlaps > 5
    assert gaps > 5
    assert [u.text for u in load_speech("builtin-mixes", "test")] == [u.text for u in parts["test"]]
    with pytest.raises(ValueError, match="needs two"):
        S.two_speaker_mixes(load_speech().filter(speaker="f01"), 1)


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A nested folder with every way of writing a transcript, and files that are none of our business."""
    root = tmp_path / "recordings"
    for name in (
        "a/one.wav",
        "a/b/two.flac",
        "c/three.ogg",
        "84/121/84-121-0000.flac",
        "84/121/84-121-0001.flac",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name, tone(), 16000)
    (root / "a/one.txt").write_text("First one.\n")
    (root / "84/121/84-121.trans.txt").write_text("84-121-0000 GO ON\n84-121-0001 STOP\n")
    (root / "c/metadata.csv").write_text("file_name,text,speaker\nthree.ogg,dritte,carla\n")
    (root / ".hidden").mkdir()
    soundfile.write(root / ".hidden/no.wav", tone(), 16000)
    (root / "notes.md").write_text("nothing")
    return root


def test_folder_with_transcripts(folder: Path) -> None:
    found = {u.id: u for u in load_speech(folder, language="xx")}
    assert list(found) == ["84-121-0000", "84-121-0001", "a/b/two", "a/one", "c/three"]
    assert [u.text for u in found.values()] == ["GO ON", "STOP", "", "First one.", "dritte"]
    assert [u.speaker for u in found.values()] == ["84", "84", "", "", "carla"]
    assert {u.language for u in found.values()} == {"xx"}
    for u in found.values():
        assert u.audio.shape == (u.n_samples,) == (8000,)
        assert u.audio.dtype == np.float32
    assert [u.speaker for u in load_speech(folder / "a", subfolders="speaker")] == ["b", "a"]
    assert [u.text for u in load_speech(folder / "a", subfolders="text")] == ["b", "First one."]
    alone = load_speech(folder / "a/one.wav")
    assert (len(alone), alone[0].id, alone[0].text) == (1, "one.wav", "")


def test_folder_at_other_rates(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", np.stack([tone(rate=44100), -0.5 * tone(rate=44100)], 1), 44100)
    (u,) = load_speech(tmp_path)
    assert abs(len(u.audio) - 8000) <= 1
    assert len(u.audio) == u.n_samples
    assert np.abs(u.audio[1000:7000] - 0.25 * tone()[1000:7000]).max() < 0.01


def test_folder_splits(tmp_path: Path) -> None:
    for name in ("train/x.wav", "test/y.wav"):
        (tmp_path / name).parent.mkdir()
        soundfile.write(tmp_path / name, tone(), 16000)
    assert [u.id for u in load_speech(tmp_path)] == ["x"]
    assert [u.id for u in load_speech(tmp_path, "test")] == ["y"]
    assert [u.id for u in load_speech(tmp_path, "all")] == ["test/y", "train/x"]
    with pytest.raises(ValueError, match="split='dev'"):
        load_speech(tmp_path, "dev")


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        S.load_folder(tmp_path / "nowhere")
    (tmp_path / "a.m4a").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no audio.*\.wav.*found \['.m4a'\]"):
        load_speech(tmp_path)
    soundfile.write(tmp_path / "a.wav", tone(), 16000)
    soundfile.write(tmp_path / "a.flac", tone(), 16000)
    with pytest.raises(ValueError, match=r"two files.*'a'"):
        load_speech(tmp_path)
    (tmp_path / "a.flac").unlink()
    for rows, message in (
        ([["file_name", "text"], ["b.wav", "x"]], "not there.*b.wav"),
        ([["name", "text"], ["a.wav", "x"]], "needs file_name"),
    ):
        with (tmp_path / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        with pytest.raises(ValueError, match=message):
            load_speech(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "a.wav").write_bytes(b"RIFF no sound")
    (u,) = load_speech(tmp_path)
    for look in (lambda: u.n_samples, lambda: u.audio):
        with pytest.raises(ValueError, match=r"a\.wav"):
            look()
    with pytest.raises(ValueError, match="subfolders="):
        load_speech(tmp_path, subfolders="words")


# datasets


def released(root: Path) -> Path:
    """A data set in the layout in which it is published: a README with the configuration, parquet with the files inside."""
    import datasets

    rows = [
        {
            "id": f"1272-{3 - i}",
            "audio": {"bytes": S._encode(u.audio), "path": f"{i}.flac"},
            "text": u.text.upper(),
        }
        for i, u in enumerate(load_speech()[:3])
    ]
    features = datasets.Features(
        {"id": datasets.Value("string"), "audio": datasets.Audio(16000), "text": datasets.Value("string")}
    )
    (root / "clean").mkdir(parents=True)
    datasets.Dataset.from_list(rows).cast(features).to_parquet(
        str(root / "clean/validation-00000-of-00001.parquet")
    )
    config = (
        "configs:\n- config_name: clean\n  data_files:\n  - split: validation\n    path: clean/validation-*\n"
    )
    (root / "README.md").write_text(f"---\n{config}---\n")
    return root


def test_the_documentations_lines(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    dataset = S.load_dataset(
        released(tmp_path / "demo"), "clean", split="validation", cache_dir=str(tmp_path / "hf")
    )
    dataset = dataset.sort("id")
    assert dataset.features["audio"].sampling_rate == 16000
    train = load_speech()
    assert [d["text"] for d in dataset] == [u.text.upper() for u in (train[2], train[1], train[0])]
    array = dataset[0]["audio"]["array"]
    assert dataset[0]["audio"]["sampling_rate"] == 16000
    assert np.abs(array - train[2].audio).max() < 1e-4
    assert [len(d["array"]) for d in dataset[:2]["audio"]] == [train[2].n_samples, train[1].n_samples]
    assert [len(d["array"]) for d in dataset["audio"]] == [u.n_samples for u in reversed(train[:3])]
    assert dataset["text"][0] == train[2].text.upper()
    assert len(dataset.select([0, 2])) == 2
    assert len(dataset.train_test_split(test_size=1, seed=0)["test"][0]["audio"]["array"]) > 0
    with pytest.raises(AttributeError):
        dataset.no_such_thing  # noqa: B018


def test_map_and_filter_see_arrays(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    dataset = S.AudioDataset(load_speech()[:4].to_dataset(), sampling_rate=8000)
    loud = dataset.map(
        lambda row: {"peak": float(np.abs(row["audio"]["array"]).max()), "n": len(row["audio"]["array"])}
    )
    assert [abs(n - u.n_samples / 2) <= 1 for n, u in zip(loud["n"], load_speech()[:4], strict=True)] == [
        True
    ] * 4
    assert all(0.4 < peak < 1 for peak in loud["peak"])
    assert len(loud[0]["audio"]["array"]) == loud[0]["n"]

    def pass_through(row: dict) -> dict:  # gives the decoded row back, as users do
        row["long"] = len(row["audio"]["array"])
        return row

    assert dataset.map(pass_through)["long"] == loud["n"]
    batched = dataset.map(
        lambda rows: {"n": [len(a["array"]) for a in rows["audio"]]}, batched=True, remove_columns=["audio"]
    )
    assert list(batched["n"]) == list(loud["n"])
    assert "audio" not in batched[0]
    assert len(dataset.filter(lambda row: len(row["audio"]["array"]) == loud[1]["n"])) == 1


def test_streaming(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    stream = S.load_dataset(
        released(tmp_path / "demo"),
        "clean",
        split="validation",
        streaming=True,
        cache_dir=str(tmp_path / "hf"),
    )
    (row,) = list(stream.skip(1).take(1))
    assert np.abs(row["audio"]["array"] - load_speech()[1].audio).max() < 1e-4


def test_load_dataset_of_plain_speech(folder: Path) -> None:
    pytest.importorskip("datasets")
    rows = S.load_dataset(folder)
    assert rows[0]["text"] == "GO ON"
    assert rows[0]["audio"]["array"].shape == (8000,)
    assert rows._rows[0]["audio"]["bytes"] is None  # a path, not a copy
    ours = S.load_dataset("builtin", split="test")
    assert len(ours) == 136
    test = load_speech("builtin", "test")
    assert [w["label"] for w in ours[5]["words"]] == test[5].text.split()
    assert ours[5]["phones"][3]["start"] == test[5].phones[3].start
    every = S.load_dataset(released(folder / "r"), "clean", cache_dir=str(folder / "hf"))
    assert list(every) == ["validation"]


# People


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
    where = S.fetch_speech("asterisk-en", asterisk)
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


def test_other_layouts(tmp_path: Path) -> None:
    data = tmp_path / "usr/share/pocketsphinx/test/data/librivox"
    data.mkdir(parents=True)
    soundfile.write(data / "x-1.wav", tone(), 16000)
    (data / "transcription").write_text("<s> he was  not </s> (x-1)\n")
    S.fetch_speech("librivox", tmp_path)
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
    S.fetch_speech("fillets-cs", tmp_path)
    found = {u.id: (u.speaker, u.text) for u in load_speech("fillets-cs", "all")}
    assert found == {"city/one": ("small", "ahoj ty"), "city/two": ("big", ""), "border/cry": ("big", "áá")}
    assert abs(load_speech("fillets-cs", "all")[0].n_samples - 8000) <= 1


def test_splits_depend_on_the_group_alone() -> None:
    groups = [f"group {i}" for i in range(2000)]
    split = {g: S._split_of(g) for g in groups}
    shares = [sum(v == s for v in split.values()) / 2000 for s in SPLITS]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.03)


def test_missing_source_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="holds no recording of librivox"):
        S.fetch_speech("librivox", tmp_path)
    with pytest.raises(ValueError, match="the human sets are"):
        S.fetch_speech("nobody")
    monkeypatch.setattr(S.shutil, "which", lambda tool: None)
    with pytest.raises(S.SpeechUnavailableError, match=r"no apt-get.*pocketsphinx-testdata.*source=FOLDER"):
        load_speech("librivox")
    with pytest.raises(S.SpeechUnavailableError, match=r"asterisk-en.*librivox"):
        load_speech("human")
    capsys.readouterr()
    monkeypatch.setenv("W2VC_SPEECH", "human")
    speech = load_speech()
    assert speech.name == "builtin"
    assert "The built-in corpus is used instead" in capsys.readouterr().out
    assert load_speech("builtin", "test").split == "test"
    assert not list((tmp_path / "cache/speech").iterdir())


def test_human_prefers_what_is_here(asterisk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    S.fetch_speech("asterisk-en", asterisk)
    monkeypatch.setattr(S.shutil, "which", lambda tool: None)
    monkeypatch.setenv("W2VC_SPEECH", "human")
    assert load_speech(split="all").name == "asterisk-en"


def test_a_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(S.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(S, "_run", lambda *command, cwd: "E: no network here")
    with pytest.raises(S.SpeechUnavailableError, match="no network here"):
        S.fetch_speech("librivox")
    assert not list((tmp_path / "cache/speech").iterdir())


def test_a_failed_decode_leaves_nothing(
    asterisk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    S.fetch_speech("asterisk-en", asterisk)
    before = sorted((p.name, p.read_bytes()) for p in (tmp_path / "cache/speech/asterisk-en").iterdir())

    def broken(path: Path) -> np.ndarray:
        raise OSError("disk full")

    monkeypatch.setattr(S, "_decode", broken)
    with pytest.raises(OSError, match="disk full"):
        S.fetch_speech("asterisk-en", asterisk)
    assert (
        sorted((p.name, p.read_bytes()) for p in (tmp_path / "cache/speech/asterisk-en").iterdir()) == before
    )


@pytest.mark.network
def test_fetch_librivox_for_real() -> None:
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not here: human speech comes from Debian packages")
    try:
        speech = load_speech("librivox")
    except S.SpeechUnavailableError as error:
        pytest.skip(f"the source cannot be reached: {error}")
    assert len(speech) == 5
    assert speech.seconds == pytest.approx(24.7, abs=0.1)
    assert any("dashwood" in u.text for u in speech)
    assert all(0.02 < u.audio.std() < 0.5 for u in speech)


@pytest.mark.network
@pytest.mark.slow
def test_fetch_asterisk_for_real() -> None:
    pytest.importorskip("av")
    try:
        every = (
            load_speech("asterisk-en")
            + load_speech("asterisk-en", "dev")
            + load_speech("asterisk-en", "test")
        )
    except S.SpeechUnavailableError as error:
        pytest.skip(f"the source cannot be reached: {error}")
    assert len(every) == 551
    assert 24 < every.seconds / 60 < 25
    by_text = {}
    for split in SPLITS:
        for u in load_speech("asterisk-en", split):
            assert by_text.setdefault(u.text, split) == split  # a prompt is in one split


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    S._main(["list"])
    out = capsys.readouterr().out
    assert "488 utterances" in out
    assert "CC-BY-SA-3.0" in out
    with pytest.raises(SystemExit, match="holds no recording"):
        S._main(["fetch", "librivox", "--source", str(tmp_path)])
