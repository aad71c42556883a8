"""The notebooks as data: what a reader meets before running anything."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

NBS = Path(__file__).resolve().parents[2] / "nbs"
CHAPTERS = sorted(NBS.glob("[0-9]*.ipynb"))
SOLUTIONS = sorted((NBS / "solutions").glob("[0-9]*.ipynb"))
CARD = ["You will be able to", "Needs", "Sources", "In → out"]
WITH_EXERCISES = [p for p in CHAPTERS if 2 <= int(p.name[:2]) < 90]


def ident(path: Path) -> str:
    return path.relative_to(NBS).with_suffix("").as_posix()


def read(path: Path) -> nbformat.NotebookNode:
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    return nb


def outputs(path: Path) -> list[tuple[int, nbformat.NotebookNode]]:
    return [(i, out) for i, c in enumerate(read(path).cells) if c.cell_type == "code" for out in c.outputs]


def html(out: nbformat.NotebookNode) -> str:
    return "".join(out.get("data", {}).get("text/html", ""))


every = pytest.mark.parametrize("path", CHAPTERS + SOLUTIONS, ids=ident)
chapters = pytest.mark.parametrize("path", CHAPTERS, ids=ident)
exercised = pytest.mark.parametrize("path", WITH_EXERCISES, ids=ident)


def test_the_plan_is_complete() -> None:
    slugs = "start notation config audio speech features masking negatives quantizer positions attention convolution conformer"
    assert {p.stem[3:] for p in CHAPTERS} >= set(slugs.split()) | {
        "pretrained",
        "model",
        "pretraining",
        "viz",
        "exercises",
    }


@every
def test_opens_with_a_title_and_a_promise(path: Path) -> None:
    text = next(c.source for c in read(path).cells if c.cell_type == "markdown")
    assert re.match(r"# \S", text), "the first text cell starts with a title"
    if path in CHAPTERS:
        assert re.search(r"^> .*[.!?]$", text, re.M), "the title is followed by a one-line promise"


@chapters
def test_card(path: Path) -> None:
    card = next((c.source for c in read(path).cells if c.source.startswith("- **You will")), "")
    assert re.findall(r"^- \*\*(.+?)\*\*", card, re.M) == CARD


@every
def test_outputs_are_stored_and_clean(path: Path) -> None:
    found = outputs(path)
    assert found, "committed without outputs: a reader on the web sees no result"
    for i, out in found:
        assert out.output_type != "error", f"cell {i}: {out.get('ename')}: {out.get('evalue')}"
        assert out.get("name") != "stderr", f"cell {i} writes to stderr: {out.text[:200]}"
        shown = out.get("text", "") + "".join(out.get("data", {}).get("text/plain", ""))
        assert not re.search(r"0x[0-9a-f]{8}", shown), f"cell {i} shows a memory address: {shown[:120]}"


@every
def test_pictures_have_alt_text(path: Path) -> None:
    for i, out in outputs(path):
        assert not any(kind.startswith("image/") for kind in out.get("data", {})), (
            f"cell {i}: use w2vc.explore.viz.show"
        )
        for tag in re.findall(r"<img\b[^>]*>", html(out)):
            alt = re.search(r'alt="([^"]+)"', tag)
            assert alt, f"cell {i}: a picture without alt text"
            assert len(alt[1]) >= 25, f"cell {i}: alt text says too little: {alt[1]!r}"
            assert not re.search(r"[{}]|PLACEHOLDER", alt[1]), (
                f"cell {i}: alt text was not filled in: {alt[1]!r}"
            )
        for tag in re.findall(r"<audio\b[^>]*>", html(out)):
            assert "aria-label=" in tag, f"cell {i}: a player without a label"


@pytest.mark.parametrize(
    "path", [p for p in CHAPTERS if 2 <= int(p.name[:2]) <= 32 or p.stem == "00_start"], ids=ident
)
def test_shows_something(path: Path) -> None:
    assert sum("<img" in html(out) for _, out in outputs(path)) >= 3, (
        "a chapter shows at least its map and two pictures"
    )


@every
def test_size(path: Path) -> None:
    assert path.stat().st_size <= 1_500_000
    for i, out in outputs(path):
        assert len(str(out)) <= 400_000, f"cell {i}: an output of {len(str(out)) // 1000} kB"


@every
def test_links_resolve(path: Path) -> None:
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)\s#]+\.ipynb)(?:#[^)]*)?\)", cell.source):
                assert (path.parent / target).resolve().is_file(), f"dead link: {target}"


@every
def test_imports_are_explicit(path: Path) -> None:
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert not re.search(r"^\s*from \S+ import \*", cell.source, re.M), "no star imports"


@exercised
def test_exercises_and_solutions(path: Path) -> None:
    text = "\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")
    numbers = re.findall(rf"^### Exercise ({int(path.name[:2])}\.\d+)", text, re.M)
    assert 2 <= len(numbers) <= 4, numbers
    solved = (NBS / "solutions" / path.name).read_text(encoding="utf-8")
    for number in numbers:
        assert number in solved, f"exercise {number} has no solution"
    assert solved.count("assert check") >= len(numbers), "a solution is asserted, not only shown"


@exercised
def test_ends_with_what_was_built(path: Path) -> None:
    last = [c.source for c in read(path).cells if c.cell_type == "markdown"][-1]
    assert last.startswith("## What you built")


# Chapters whose questions are answered by the text below them alone. The others seal a guess and open it.
@chapters
def test_each_question_seals_and_opens_a_guess(path: Path) -> None:
    cells = read(path).cells
    asked = sum(c.source.count("**Predict") for c in cells if c.cell_type == "markdown")
    code = "\n".join(
        c.source for c in cells if c.cell_type == "code" and not c.source.startswith("#| export")
    )
    sealed, opened = (re.findall(rf'^\s*{verb}\("([^"]+)"', code, re.M) for verb in ("predict", "reveal"))
    assert len(set(sealed)) >= asked, f"{asked} questions, {len(set(sealed))} sealed"
    assert set(sealed) == set(opened), "what is sealed is opened"
    for question in set(sealed):
        assert code.index(f'predict("{question}"') < code.index(f'reveal("{question}"')


def imported(source: str) -> set[str]:
    return set(re.findall(r"^\s*(?:from|import) (?:w2vc)?\.(\w+)", source, re.M))


def modules_behind(names: set[str]) -> set[str]:
    """The modules that some modules import, directly or through others; and they themselves."""
    seen: set[str] = set()
    while names - seen:
        name = (names - seen).pop()
        seen.add(name)
        path = NBS.parent / "w2vc" / f"{name}.py"
        names = names | (imported(path.read_text(encoding="utf-8")) if path.is_file() else set())
    return seen


def later_chapters(text: str) -> list[str]:
    """The chapters that the sentence "Used later in …" of a last cell links to."""
    sentence = re.search(r"Used later(.+?)(?=Next:|\n- |\n\n|\Z)", text, re.S)
    return re.findall(r"\]\((\d\d_\w+)\.ipynb\)", sentence[1]) if sentence else []


def test_later_chapters_are_found() -> None:
    text = "- New words: x. Used later in [a](nbs/model/masking.ipynb) and\n[b](nbs/model/negatives.ipynb). Next: [c](nbs/model/quantizer.ipynb)."
    assert later_chapters(text) == ["12_masking", "14_negatives"]
    assert later_chapters("- Next: [c](nbs/model/quantizer.ipynb).") == []
    assert "config" in modules_behind({"model"})
    assert "model" not in modules_behind({"config"})


@chapters
def test_used_later_is_true(path: Path) -> None:
    """A chapter named there comes later, and its code needs this one's, or it points back to it."""
    cells = read(path).cells
    exported = re.search(r"^#\| default_exp (\w+)", "\n".join(c.source for c in cells), re.M)
    for later in later_chapters(cells[-1].source if cells[-1].cell_type == "markdown" else ""):
        assert later > path.stem, f"{later} does not come later"
        theirs = read(NBS / f"{later}.ipynb").cells
        code = "\n".join(c.source for c in theirs if c.cell_type == "code")
        needs = exported is not None and exported[1] in modules_behind(imported(code))
        back = any(f"({path.name})" in c.source for c in theirs if c.cell_type == "markdown")
        assert needs or back, f"{later} neither imports nor mentions {path.stem}"


@chapters
def test_next_is_the_next_chapter(path: Path) -> None:
    text = [c.source for c in read(path).cells if c.cell_type == "markdown"][-1]
    target = re.search(r"Next:.*?\]\((\d\d_\w+)\.ipynb\)", text, re.S)
    following = [p.stem for p in CHAPTERS if p.stem > path.stem]
    if target and following and int(path.name[:2]) < 90:
        assert target[1] == following[0], f"Next leads to {target[1]}, but {following[0]} comes next"
    assert target or path.stem in {"94_cli"}, "no way on"
