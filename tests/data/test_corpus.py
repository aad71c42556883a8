"""Speech: the built-in corpus and its times, the containers, mixes, and the doors to folders and data sets."""

from __future__ import annotations

import csv
import pickle
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from released import released_dataset
from w2vc.data import corpus as S
from w2vc.data.corpus import Segment, Speech, SpeechUnavailableError, Utterance, load_speech

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
from w2vc.data.corpus import load_speech
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
    for split in ("train", "test"):
        for speaker in parts[split].speakers:
            assert len(parts[split].filter(speaker=speaker)) >= 10
            assert {u.text for u in parts[split].filter(speaker=speaker, kind="keyword")} == set(S.KEYWORDS)
    told = {s: {u.text for u in parts[s] if u.kind != "keyword"} for s in SPLITS}
    assert sum(map(len, told.values())) == len(
        set().union(*told.values())
    )  # no text in two splits, none twice
    assert all("Apache" in load_speech(name).about["licence"] for name in ("builtin", "builtin-languages"))
    sounds = {p.label for u in parts["train"] for p in u.phones}
    assert len(sounds) > 40
    assert {p.label for u in parts["test"] for p in u.phones} <= sounds


def test_small_enough() -> None:
    folder = Path(S.__file__).parents[1] / "assets" / "speech"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 5_000_000
    assert (folder / "LICENSE.md").is_file()
    assert "W2VC" not in (folder / "english/speech.json").read_text(encoding="utf-8")


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
    assert {u.language for u in both} == {"en", "de", "fr", "es", "it", "nl"}
    for speaker in both.speakers:
        assert len({u.language for u in both.filter(speaker=speaker)}) == 6
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


def test_a_frame_on_a_boundary_belongs_to_what_begins() -> None:
    assert S.frame_labels([Segment("a", 0.0, 0.0125), Segment("b", 0.0125, 0.03)], 2) == ["b", ""]


def test_several_labels_are_active_at_once() -> None:
    turns = [
        Segment("b", 0.0, 0.05),
        Segment("a", 0.03, 0.09),
        Segment("c", 0.0, 1.0),
        Segment("a", 0.08, 0.1),
    ]
    active = S.frame_activity(turns, ["a", "b"], 6, hop=0.02, middle=0.01)  # middles 0.01, 0.03, … 0.11
    assert active.T.astype(int).tolist() == [[0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]


# Storage


def test_save_and_load(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = [
        Utterance(f"u{i}", (rng.integers(-9000, 9000, 4000 + i) / 32768).astype(np.float32), text="a b", speaker=speaker,
                  words=[Segment("a", 0.1, 0.12), Segment("b", 0.12, 0.2)], kind="x", language="en")
        for i, speaker in enumerate(["a/b", "a/b", "a_b", "", "å"])
    ]  # fmt: skip
    S.save_speech(tmp_path, {"train": made[:3], "test": iter(made[3:])}, {"licence": "none"})
    assert sorted(path.name for path in tmp_path.glob("*.flac")) == ["a_b.flac", "unknown.flac", "å.flac"]
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
    first = tmp_path / "a_b.flac"
    first.write_bytes(first.read_bytes()[:-4000])
    with pytest.raises((ValueError, soundfile.LibsndfileError)):
        [u.audio for u in load_speech(tmp_path)]


def test_ogg_is_close_and_nothing_stale_is_remembered(tmp_path: Path) -> None:
    u = load_speech()[0]
    S.save_speech(tmp_path, {"train": [u]}, {}, suffix=".ogg", compression=0.45)
    assert snr(u.audio, load_speech(tmp_path)[0].audio) > 15
    quiet = Utterance(u.id, u.audio * 0.5, speaker=u.speaker)
    S.save_speech(tmp_path, {"train": [quiet]}, {}, suffix=".ogg", compression=0.45)
    assert np.abs(load_speech(tmp_path)[0].audio).max() < 0.4


def test_a_corpus_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def spoken() -> Iterator[Utterance]:
        yield load_speech()[1]
        raise OSError("disk full")

    folder = tmp_path / "set"
    with pytest.raises(OSError, match="disk full"):
        S.save_speech(folder, {"train": spoken()}, {})
    assert not (folder / "speech.json").exists()
    S.save_speech(folder, {"train": load_speech()[:2]}, {})
    (folder / "mine.flac").write_bytes(b"not in the table")
    S.save_speech(folder, {"train": [load_speech()[0]]}, {})
    assert sorted(path.name for path in folder.iterdir()) == ["f01.flac", "mine.flac", "speech.json"]
    with pytest.raises(OSError, match="disk full"):
        S.save_speech(folder, {"train": spoken()}, {})
    assert [u.text for u in load_speech(folder)] == [load_speech()[0].text]


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


def test_the_documentations_lines(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    dataset = S.load_dataset(
        released_dataset(tmp_path / "demo"), "clean", split="validation", cache_dir=str(tmp_path / "hf")
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
    dataset = load_speech()[:4].to_dataset(sampling_rate=8000)
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

    passed = dataset.map(pass_through)
    assert list(passed["long"]) == list(loud["n"])
    assert [len(row["audio"]["array"]) for row in passed] == list(loud["n"])
    two = dataset.map(lambda row: {"n": len(row["audio"]["array"])}, num_proc=2)
    assert list(two["n"]) == list(loud["n"])
    assert len(two[3]["audio"]["array"]) == loud["n"][3]
    batched = dataset.map(
        lambda rows: {"n": [len(a["array"]) for a in rows["audio"]]}, batched=True, remove_columns=["audio"]
    )
    assert list(batched["n"]) == list(loud["n"])
    assert "audio" not in batched[0]
    assert len(dataset.filter(lambda row: len(row["audio"]["array"]) == loud[1]["n"])) == 1


def test_streaming(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    stream = S.load_dataset(
        released_dataset(tmp_path / "demo"),
        "clean",
        split="validation",
        streaming=True,
        cache_dir=str(tmp_path / "hf"),
    )
    (row,) = list(stream.skip(1).take(1))
    assert np.abs(row["audio"]["array"] - load_speech()[1].audio).max() < 1e-4


def test_load_dataset_of_plain_speech(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = S.load_dataset(folder)
    assert rows[0]["text"] == "GO ON"
    assert rows[0]["audio"]["array"].shape == (8000,)
    plain = rows.cast_column("audio", datasets.Audio(decode=False))
    assert plain[0]["audio"]["bytes"] is None  # a path, not a copy
    ours = S.load_dataset("builtin", split="test")
    assert len(ours) == 136
    test = load_speech("builtin", "test")
    assert [w["label"] for w in ours[5]["words"]] == test[5].text.split()
    assert ours[5]["phones"][3]["start"] == test[5].phones[3].start
    every = S.load_dataset(released_dataset(folder / "r"), "clean", cache_dir=str(folder / "hf"))
    assert list(every) == ["validation"]


def test_missing_tools_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"w2vc\[data"):
        load_speech()[:1].to_dataset()
    monkeypatch.setitem(sys.modules, "soundfile", None)
    S._decode_whole.cache_clear()
    with pytest.raises(ImportError, match=r"w2vc\[audio\]"):
        load_speech()[0].audio  # noqa: B018


# One name for everything that is measured


def test_open_speech(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_speech("builtin", "test")
    assert [u.id for u in S.open_speech("builtin")] == [u.id for u in whole]
    few = S.open_speech("builtin", limit=17)
    assert len(few) == 17
    assert {u.kind for u in few} == {"keyword", "digits", "sentence"}  # from all over the set, not its start
    assert [u.id for u in few] == [u.id for u in S.open_speech("builtin", limit=17)]
    S.save_speech(tmp_path / "packed", {"dev": whole[:2], "test": whole[2:5]}, {})
    assert len(S.open_speech(tmp_path / "packed")) == 3
    assert len(S.open_speech(folder)) == 5
    for bad, split, limit in (
        ("builtin", "tset", None),
        ("builtin", None, 0),
        (folder, "test", None),
        ("none", None, None),
    ):
        with pytest.raises(ValueError, match=r"split=|limit=|known sets"):
            S.open_speech(bad, split, limit)
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    root, train = released_dataset(tmp_path / "demo"), load_speech()
    streamed = S.open_speech(f"hf:{root}:clean:validation", limit=2)
    assert [(u.text, u.n_samples) for u in streamed] == [(u.text.upper(), u.n_samples) for u in train[:2]]
    assert np.abs(streamed[1].audio - train[1].audio).max() < 1e-4


# Choosing by environment


def test_environment_names_the_default(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("W2VC_SPEECH", "builtin-languages")
    assert load_speech().name == "builtin-languages"
    assert load_speech("builtin").name == "builtin"
    monkeypatch.setenv("W2VC_SPEECH", str(folder))
    assert load_speech()[0].text == "GO ON"
    monkeypatch.setenv("W2VC_SPEECH", "humna")
    with pytest.raises(ValueError, match="humna"):  # a typing error is not a missing source
        load_speech()

    def missing(split: str) -> Speech:
        raise SpeechUnavailableError("it is not here.")

    monkeypatch.setitem(S.SOURCES, "far", missing)
    with pytest.raises(SpeechUnavailableError):
        load_speech("far")
    monkeypatch.setenv("W2VC_SPEECH", "far")
    assert load_speech(split="test").split == "test"
    assert (
        "W2VC_SPEECH=far, but it is not here. The built-in corpus is used instead." in capsys.readouterr().out
    )
