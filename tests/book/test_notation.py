"""The notation chapter is a reference, so it must be right: its tables are read and compared with the modules."""

from __future__ import annotations

import importlib
import posixpath
import re
from pathlib import Path

import pytest

import book
from w2vc.config import Wav2Vec2ConformerConfig

NOTATION = "appendix/notation"
PACKAGE = book.ROOT / "w2vc"


def table(first: str) -> list[list[str]]:
    """The rows of the table whose first column is headed so."""
    found = re.search(rf"^\| {first} \|.*\n\|[-|]+\n((?:\|.*\n?)+)", "\n\n".join(book.texts(NOTATION)), re.M)
    assert found, f"no table headed {first!r}"
    rows = [[c.strip() for c in line.strip().strip("|").split("|")] for line in found[1].strip().splitlines()]
    assert len({len(row) for row in rows}) == 1, "a stray | splits a cell"
    return rows


LETTERS = {row[0]: row for row in table("Letter")}
LOCAL = {(row[0].strip("`"), row[1]) for row in table("Module")}


def chapter_of(link: str) -> str:
    """The chapter that a link of this chapter leads to."""
    target = re.fullmatch(r"\[[^]]+\]\((\S+)\.ipynb\)", link)
    assert target, link
    return posixpath.normpath(posixpath.join(posixpath.dirname(NOTATION), target[1]))


@pytest.mark.parametrize("row", [row for row in LETTERS.values() if row[2] != "–"], ids=lambda row: row[0])
def test_each_letter_has_its_place_and_default_in_the_config(row: list[str]) -> None:
    value = eval(row[2].strip("`"), Wav2Vec2ConformerConfig().to_dict())
    assert row[3] == str(value)


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_shapes_of_the_model_use_these_letters(path: Path) -> None:
    for shape in re.findall(r"`(\[[^`\]]*\])`", path.read_text(encoding="utf-8")):
        for letter in re.findall(r"(?<![A-Za-z_])([A-Za-z])(?![A-Za-z_])", shape):
            known = letter in LETTERS or letter in "ij" or (path.stem, letter) in LOCAL
            assert known, f"{path.name}: {letter} in {shape} is not explained in the notation chapter"


@pytest.mark.parametrize("row", table("Source"), ids=lambda row: row[3].strip("`"))
def test_each_equation_leads_to_code_that_names_its_source(row: list[str]) -> None:
    source, _, _, code, link = row
    chapter = chapter_of(link)
    module = {name: module for module, name in book.modules().items()}[chapter]
    last, name = code.strip("`").split(".")
    assert module.split(".")[-1] == last, f"{code} is said to be written in {chapter}"
    found = importlib.import_module(f"w2vc.{module}")
    assert getattr(found, name).__doc__, f"{code} has no docstring"
    paper = re.sub(r"( §.*| Eq\. .*| et al\..*)$", "", source).casefold()
    text = Path(found.__file__ or "").read_text(encoding="utf-8") + "".join(book.texts(chapter))
    assert paper in text.casefold(), f"neither {module} nor its chapter names {paper}"


def test_no_equation_of_the_paper_is_left_out() -> None:
    sources = [row[0] for row in table("Source")]
    papers = [f"wav2vec 2.0 Eq. {n}" for n in (1, 2, 3, 4)]
    papers += ["Vaswani et al. Eq. 1", "Conformer Eq. 1", "RoFormer Eq. 34"]
    assert [paper for paper in papers if paper not in sources] == []


def test_words_are_unique_and_lead_to_a_chapter() -> None:
    words = [row[0].strip("*").lower() for row in table("Word")]
    assert len(set(words)) == len(words)
    for word, meaning, link in table("Word"):
        assert meaning, word
        assert chapter_of(link) in book.chapters(), word


def new_words(name: str) -> list[str]:
    """What a chapter's last cell lists after "New words:"."""
    found = re.search(r"New words?: (.+?)\.(?:\s|$)", book.texts(name)[-1], re.S)
    plain = re.sub(r"\([^)]*\)|[*`_]", "", found[1]) if found else ""
    return [word for word in (w.strip().lower() for w in re.split(r",|;", plain)) if word]


@pytest.mark.parametrize("name", book.chapters())
def test_new_words_of_each_chapter_are_explained(name: str) -> None:
    known = {re.sub(r" \(.*\)", "", row[0].strip("*").lower()) for row in table("Word")}
    missing = [w for w in new_words(name) if w not in known and w.removesuffix("s") not in known]
    assert missing == [], f"add to the table of words in the notation chapter: {missing}"
