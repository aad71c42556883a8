"""The notation chapter is a reference, so it must be right: its tables are read and compared with the modules."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import nbformat
import pytest

from w2vc.config import Wav2Vec2ConformerConfig

NBS = Path(__file__).resolve().parents[2] / "nbs"
PACKAGE = NBS.parent / "w2vc"


def markdown(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]


def table(first: str) -> list[list[str]]:
    """The rows of the table whose first column is headed so."""
    text = "\n\n".join(markdown(NBS / "01_notation.ipynb"))
    found = re.search(rf"^\| {first} \|.*\n\|[-|]+\n((?:\|.*\n?)+)", text, re.M)
    assert found, f"no table headed {first!r}"
    rows = [[c.strip() for c in line.strip().strip("|").split("|")] for line in found[1].strip().splitlines()]
    assert len({len(row) for row in rows}) == 1, "a stray | splits a cell"
    return rows


LETTERS = {row[0]: row for row in table("Letter")}
LOCAL = {(row[0].strip("`"), row[1]) for row in table("Module")}
EQUATIONS = table("Source")
WORDS = table("Word")


@pytest.mark.parametrize("row", [row for row in LETTERS.values() if row[2] != "–"], ids=lambda row: row[0])
def test_each_letter_has_its_place_and_default_in_the_config(row: list[str]) -> None:
    value = eval(row[2].strip("`"), Wav2Vec2ConformerConfig().to_dict())
    assert row[3] == str(value)


def test_letters_are_single_and_all_there() -> None:
    assert all(re.fullmatch("[A-Z]", letter) for letter in LETTERS)
    assert set(LETTERS) >= set("BSTCDHKMNGVL")


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_shapes_in_docstrings_use_these_letters_alone(path: Path) -> None:
    shapes = re.findall(r"`(\[[^`\]]*\])`", path.read_text(encoding="utf-8"))
    for shape in shapes:
        for letter in re.findall(r"(?<![A-Za-z_])([A-Za-z])(?![A-Za-z_])", shape):
            known = letter in LETTERS or letter in "ij" or (path.stem, letter) in LOCAL
            assert known, f"{path.name}: {letter} in {shape} is not a letter of the notation chapter"


@pytest.mark.parametrize("row", EQUATIONS, ids=lambda row: row[3].strip("`"))
def test_each_equation_leads_to_code_that_names_its_source(row: list[str]) -> None:
    source, equation, says, code, chapter = row
    module, name = code.strip("`").split(".")
    symbol = getattr(importlib.import_module(f"w2vc.{module}"), name)
    assert symbol.__doc__, f"{code} has no docstring"
    assert equation.startswith(("$", "time")) or "$" in equation
    assert says
    target = re.fullmatch(r"\[\d\d \w+\]\((\d\d_(\w+)\.ipynb)\)", chapter)
    assert target, chapter
    assert target[2] == module, "the chapter of a module has its name"
    assert (NBS / target[1]).is_file()
    paper = re.sub(r"( §.*| Eq\. .*| et al\..*)$", "", source)
    text = (PACKAGE / f"{module}.py").read_text(encoding="utf-8").casefold() + "".join(
        markdown(NBS / target[1])
    ).casefold()
    assert paper.casefold() in text, f"neither {module}.py nor its chapter names {paper}"


def test_no_equation_of_the_paper_is_left_out() -> None:
    sources = [row[0] for row in EQUATIONS]
    wanted = [
        *(f"wav2vec 2.0 Eq. {n}" for n in (1, 2, 3, 4)),
        "Vaswani et al. Eq. 1",
        "Conformer Eq. 1",
        "RoFormer Eq. 34",
    ]
    assert [w for w in wanted if w not in sources] == []


def terms() -> list[str]:
    return [row[0].strip("*") for row in WORDS]


def test_words_are_in_order_and_unique_and_lead_somewhere() -> None:
    assert terms() == sorted(terms(), key=str.lower)
    assert len({t.lower() for t in terms()}) == len(terms())
    for word, meaning, chapter in WORDS:
        assert re.fullmatch(r"\*\*.+\*\*", word), word
        assert 3 <= len(meaning.split()) <= 30, f"{word}: {meaning}"
        assert not meaning.endswith("."), f"{word}: one line, no full stop"
        target = re.fullmatch(r"\[\d\d \w+\]\((\d\d_\w+\.ipynb)\)", chapter)
        assert target, f"{word}: {chapter}"
        assert (NBS / target[1]).is_file(), f"{word}: {target[1]}"


def new_words(path: Path) -> list[str]:
    """What a chapter's last cell lists after "New words:"."""
    found = re.search(r"New words?: (.+?)\.(?:\s|$)", markdown(path)[-1], re.S)
    plain = re.sub(r"\([^)]*\)|[*`_]", "", found[1]) if found else ""
    return [word for word in (w.strip().lower() for w in re.split(r",|;", plain)) if word]


@pytest.mark.parametrize("path", sorted(NBS.glob("[0-9]*.ipynb")), ids=lambda path: path.stem)
def test_new_words_of_each_chapter_are_explained(path: Path) -> None:
    known = {re.sub(r" \(.*\)", "", t.lower()) for t in terms()}
    missing = [w for w in new_words(path) if w not in known and w.removesuffix("s") not in known]
    assert missing == [], f"add to the table of words in the notation chapter: {missing}"


def test_new_words_are_found_at_all() -> None:
    assert len({w for path in NBS.glob("[0-9]*.ipynb") for w in new_words(path)}) > 40
