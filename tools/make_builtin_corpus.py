"""Make the built-in corpora again, with espeak-ng: `python tools/make_builtin_corpus.py [--folder DIR]`.

The voices and the words are those of `w2vc/assets/speech/script.json`. A file whose sound would be the same is left alone,
since an Ogg file holds a random number, and equal sound gives unequal bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import w2vc
from w2vc.data.corpus import KEYWORDS, save_speech
from w2vc.data.synthesis import TEST_VOICES, TRAIN_VOICES, Line, about_voices, make_digits, make_sentence

ASSETS = Path(w2vc.__file__).parent / "assets" / "speech"


def english_script() -> list[Line]:
    """Write the script of "builtin": sentences, digits and keywords in turn, so that neighbours differ in speaker."""
    lines, used = [], set(KEYWORDS)
    for split, counts in {"test": (4, 3, 10), "dev": (1, 1, 2), "train": (4, 4, 10)}.items():
        voices = list((TEST_VOICES if split == "test" else TRAIN_VOICES).values())
        for kind, count in zip(("sentence", "digits", "keyword"), counts, strict=True):
            for k in range(count):
                for i, voice in enumerate(voices):
                    rng = random.Random(f"{split} {voice.id} {kind} {k}")
                    text = KEYWORDS[(2 * i + k) % len(KEYWORDS)]
                    while (
                        kind != "keyword" and text in used
                    ):  # no text twice, so none of the test set in training
                        text = make_digits(rng) if kind == "digits" else make_sentence(rng)
                    used.add(text)
                    lines.append(Line(split, f"{split}-{voice.id}-{kind}-{k}", kind, text, voice))
    return lines


def language_script() -> list[Line]:
    """Write the script of "builtin-languages": three voices in six languages each; the test voice says other phrases."""
    all_phrases: dict[str, list[str]] = json.loads((ASSETS / "script.json").read_text(encoding="utf-8"))[
        "phrases"
    ]
    lines = []
    for split, speaker in (("train", "f05"), ("train", "m01"), ("test", "m11")):
        voice = (TRAIN_VOICES | TEST_VOICES)[speaker]
        for language, phrases in all_phrases.items():
            said = replace(voice, language=voice.language if language == "en" else language)
            for k in range(3, 6) if split == "test" else range(3):
                lines.append(Line(split, f"{split}-{speaker}-{language}-{k}", "phrase", phrases[k], said))
    return lines


SCRIPTS: dict[str, Callable[[], list[Line]]] = {"english": english_script, "languages": language_script}


def build(folder: Path, lines: Sequence[Line]) -> None:
    """Speak the lines and write them to a folder, as Ogg Vorbis."""
    splits: dict[str, list[Line]] = {}
    for line in lines:
        splits.setdefault(line.split, []).append(line)
    with tempfile.TemporaryDirectory() as place:
        fresh = Path(place) / "corpus"
        voices = {line.voice.id: line.voice for line in lines}
        spoken = {split: map(Line.speak, part) for split, part in splits.items()}
        save_speech(fresh, spoken, about_voices(voices.values()), suffix=".ogg", compression=0.45)
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*fresh.glob("*.ogg"), fresh / "speech.json"]:
            if not sounds_like(path, folder / path.name):
                shutil.copyfile(path, folder / path.name)
        for path in folder.glob("*.ogg"):
            if not (fresh / path.name).exists():
                path.unlink()


def sounds_like(path: Path, other: Path) -> bool:
    """Say whether two audio files decode to the same samples."""
    import soundfile

    if path.suffix != ".ogg" or not other.is_file():
        return False
    return np.array_equal(soundfile.read(path, dtype="int16")[0], soundfile.read(other, dtype="int16")[0])


def main(arguments: Sequence[str] | None = None) -> None:
    """Make both corpora."""
    parser = argparse.ArgumentParser(description="Make the built-in corpora again.")
    parser.add_argument(
        "--folder", type=Path, default=ASSETS, help="where to write; the package's assets by default"
    )
    folder = parser.parse_args(arguments).folder
    for name, script in SCRIPTS.items():
        build(folder / name, script())


if __name__ == "__main__":
    main()
