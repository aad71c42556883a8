"""The notebooks as data: what a reader meets before running anything."""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator

import nbformat
import pytest

import book

NBS = book.NBS
CHAPTERS, SOLUTIONS = book.chapters(), book.solutions()
every = pytest.mark.parametrize("name", CHAPTERS + SOLUTIONS)
chapters = pytest.mark.parametrize("name", CHAPTERS)
spine = pytest.mark.parametrize("name", [name for name in CHAPTERS if book.kind(name) == "spine"])


def read(name: str) -> nbformat.NotebookNode:
    nb = nbformat.read(book.path_of(name), as_version=4)
    nbformat.validate(nb)
    return nb


def outputs(name: str) -> list[tuple[int, nbformat.NotebookNode]]:
    return [(i, out) for i, c in enumerate(read(name).cells) if c.cell_type == "code" for out in c.outputs]


def html(out: nbformat.NotebookNode) -> str:
    return "".join(out.get("data", {}).get("text/html", ""))


def test_the_path_holds_every_chapter_once() -> None:
    there = {p.relative_to(NBS).with_suffix("").as_posix() for p in NBS.rglob("*.ipynb")}
    there = {name for name in there if "checkpoints" not in name}
    assert len(set(CHAPTERS)) == len(CHAPTERS)
    assert set(CHAPTERS) == {name for name in there if not name.startswith("solutions/")}, (
        "see docs/path.toml"
    )
    assert set(SOLUTIONS) == there - set(CHAPTERS), "each solution belongs to a chapter"


def test_the_spine_comes_first() -> None:
    """So "needs only what comes before" means: a chapter of the spine needs the spine alone, one of the library both."""
    kinds = [book.kind(name) for name in CHAPTERS]
    assert set(kinds) == set(book.KINDS)
    assert kinds == sorted(kinds, key=book.KINDS.index)
    assert CHAPTERS[0] == "00_start"
    assert book.kind("model/attention") == "spine"
    assert book.kind("files/atomic") == "library"


def test_the_rates_of_reading_fit_what_was_noted() -> None:
    """Words and lines of 23 chapters of an earlier edition, and the minutes that a reader noted."""
    table = (book.ROOT / "tests" / "fixtures" / "reading_times.csv").read_text(encoding="utf-8")
    rows = [[int(n) for n in line.split(",")[1:]] for line in table.splitlines()[1:]]
    noted = [minutes for *_, minutes in rows]
    fitted = [words / book.WORDS + lines / book.LINES for words, lines, _ in rows]
    gaps = [abs(a - b) for a, b in zip(noted, fitted, strict=True)]
    mean = sum(noted) / len(noted)
    unexplained = sum(gap**2 for gap in gaps) / sum((minutes - mean) ** 2 for minutes in noted)
    assert abs(sum(fitted) / sum(noted) - 1) < 0.02
    assert sum(gaps) / len(gaps) < 8.5
    assert max(gaps) < 31
    assert 1 - unexplained > 0.8


def test_minutes_count_running_text_and_code_that_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [
        nbformat.v4.new_markdown_cell("word " * 450 + "\n\n| a | table |\n|---|---|"),
        nbformat.v4.new_code_cell("#| export\n" + "x = 1\n\n" * 350),
        nbformat.v4.new_code_cell("#| hide\n" + "x = 1\n" * 999),
    ]
    for cached in (book.amount, book.texts):
        cached.cache_clear()
    monkeypatch.setattr(book.nbformat, "read", lambda *_, **__: nbformat.v4.new_notebook(cells=cells))
    try:
        assert book.amount("model/attention") == (450, 350)
        assert book.minutes("model/attention") == 20
    finally:
        for cached in (book.amount, book.texts):
            cached.cache_clear()
    assert [book.duration(m) for m in (50, 130)] == ["about 50 minutes", "about 2 hours"]


@every
def test_opens_with_a_title_and_a_promise(name: str) -> None:
    title, promise = book.heading(name)
    assert title
    assert promise or name in SOLUTIONS, "the title is followed by a one-line promise"


@chapters
def test_card_names_what_is_needed(name: str) -> None:
    """Earlier chapters only; `python docs/links.py` leaves out the others."""
    card = book.card(name)
    assert card["You will be able to"]
    before = CHAPTERS[: CHAPTERS.index(name)]
    for target in re.findall(r"\]\(([^)#]+)\.ipynb", card["Needs"]):
        needed = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
        assert needed in before, f"needs {needed}, which comes later"


@every
def test_outputs_are_stored_and_clean(name: str) -> None:
    found = outputs(name)
    assert found, "committed without outputs: a reader on the web sees no result"
    for i, out in found:
        assert out.output_type != "error", f"cell {i}: {out.get('ename')}: {out.get('evalue')}"
        assert out.get("name") != "stderr", f"cell {i} writes to stderr: {out.text[:200]}"
        shown = out.get("text", "") + "".join(out.get("data", {}).get("text/plain", ""))
        assert not re.search(r"0x[0-9a-f]{8}", shown), f"cell {i} shows a memory address: {shown[:120]}"


@every
def test_pictures_have_alt_text(name: str) -> None:
    for i, out in outputs(name):
        kinds = [kind for kind in out.get("data", {}) if kind.startswith("image/")]
        assert not kinds, f"cell {i}: a picture without words; use w2vc.explore.viz.show"
        for tag in re.findall(r"<img\b[^>]*>", html(out)):
            alt = re.search(r'alt="([^"]+)"', tag)
            assert alt, f"cell {i}: a picture without alt text"
            assert not re.search(r"[{}]|PLACEHOLDER", alt[1]), f"cell {i}: not filled in: {alt[1]!r}"
        for tag in re.findall(r"<audio\b[^>]*>", html(out)):
            assert "aria-label=" in tag, f"cell {i}: a player without a label"


@every
def test_size(name: str) -> None:
    assert book.path_of(name).stat().st_size <= 600_000
    for i, out in outputs(name):
        assert len(str(out)) <= 400_000, f"cell {i}: an output of {len(str(out)) // 1000} kB"


@every
def test_links_resolve(name: str) -> None:
    folder = book.path_of(name).parent
    for text in book.texts(name):
        for target in re.findall(r"\]\(([^)\s#]+\.ipynb)(?:#[^)]*)?\)", text):
            assert (folder / target).resolve().is_file(), f"dead link: {target}"


@every
def test_imports_are_explicit(name: str) -> None:
    assert not re.search(r"^\s*from \S+ import \*", book.code(name), re.M), "no star imports"


@chapters
def test_each_exercise_has_a_solution_that_checks_itself(name: str) -> None:
    exercises = re.findall(r"^### (Exercise \d+)", "\n".join(book.texts(name)), re.M)
    if exercises:
        solved = book.path_of(f"solutions/{name}").read_text(encoding="utf-8")
        assert [e for e in exercises if not re.search(rf"{e}\b", solved, re.I)] == []
        assert solved.count("assert check") >= len(exercises), "a solution is asserted, not only shown"


SCREEN, WIDTH = 40, 110  # lines of a cell, characters of a line


def programs(name: str) -> Iterator[tuple[int, str]]:
    """The code cells of a notebook, without the lines that speak to nbdev alone."""
    for i, cell in enumerate(read(name).cells):
        if cell.cell_type == "code" and not re.search(r"^#\s*\|\s*hide", cell.source, re.M):
            lines = [line for line in cell.source.splitlines() if not re.match(r"#\s*\|", line)]
            yield i, "\n".join(lines).strip("\n")


@spine
def test_a_cell_of_the_spine_fits_on_a_screen(name: str) -> None:
    long = {i: len(source.splitlines()) for i, source in programs(name)}
    assert {i: lines for i, lines in long.items() if lines > SCREEN} == {}, f"cells above {SCREEN} lines"


@spine
def test_lines_of_code_are_not_wider_than_the_page(name: str) -> None:
    wide = {i: max(map(len, source.splitlines()), default=0) for i, source in programs(name)}
    assert {i: width for i, width in wide.items() if width > WIDTH} == {}, f"lines above {WIDTH} characters"


@every
def test_guess_and_answer_stand_in_cells_of_their_own(name: str) -> None:
    both = [
        i for i, s in programs(name) if all(re.search(rf"^\s*{v}\(", s, re.M) for v in ("predict", "reveal"))
    ]
    assert both == [], "the answer is seen before anybody can guess"


def unmeasured(source: str) -> list[str]:
    """Alt texts of a cell that state a number which nothing in the cell asserts or fills in."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a cell with a magic
        return []
    if any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
        return []
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    measured = [
        call for call in calls if not isinstance(call.func, ast.Attribute)
    ]  # `Schematic.show`: drawn, not measured
    alts = [k.value for call in measured for k in call.keywords if k.arg == "alt"]
    fixed = [alt.value for alt in alts if isinstance(alt, ast.Constant) and isinstance(alt.value, str)]
    return [text for text in fixed if re.search(r"\d", text)]


def test_a_stated_number_without_a_measurement_is_noticed() -> None:
    assert unmeasured('show(fig, alt="a bar of 3 "\n "and more")') == ["a bar of 3 and more"]
    assert unmeasured('show(fig, alt=f"a bar of {n}")') == []
    assert unmeasured('show(fig, alt="bars")') == []
    assert unmeasured('drawing.show(alt="frames 3 and 4")') == []
    assert unmeasured('assert n == 3\nshow(fig, alt="a bar of 3")') == []


@spine
def test_numbers_of_alt_texts_are_asserted_or_filled_in(name: str) -> None:
    found = {i: texts for i, source in programs(name) if (texts := unmeasured(source))}
    assert found == {}, "assert what the alt text states, or write it as an f-string of what was measured"


@chapters
def test_each_sealed_guess_is_opened_later(name: str) -> None:
    cells = read(name).cells
    code = "\n".join(
        c.source for c in cells if c.cell_type == "code" and not c.source.startswith("#| export")
    )
    sealed, opened = (re.findall(rf'^\s*{verb}\("([^"]+)"', code, re.M) for verb in ("predict", "reveal"))
    assert set(sealed) == set(opened), "what is sealed is opened"
    for question in set(sealed):
        assert code.index(f'predict("{question}"') < code.index(f'reveal("{question}"')


def imported(source: str) -> set[str]:
    return set(re.findall(r"^\s*(?:from|import) w2vc\.([\w.]+)", source, re.M))


@chapters
def test_used_later_is_true(name: str) -> None:
    """A chapter named there comes later, and its code needs this one's, or it points back to it."""
    sentence = re.search(r"Used later(.+?)(?=Next:|\n- |\n\n|\Z)", book.texts(name)[-1], re.S)
    mine = [module for module, chapter in book.modules().items() if chapter == name]
    for target in re.findall(r"\]\(([^)#]+)\.ipynb\)", sentence[1] if sentence else ""):
        later = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
        assert CHAPTERS.index(later) > CHAPTERS.index(name), f"{later} does not come later"
        needs = any(module in modules_behind(imported(book.code(later))) for module in mine)
        back = any(f"({book.link(name, later)}.ipynb" in text for text in book.texts(later))
        assert needs or back, f"{later} neither imports nor mentions {name}"


def modules_behind(names: set[str]) -> set[str]:
    """The modules that some modules import, directly or through others; and they themselves."""
    written, seen = book.modules(), set()
    while names - seen:
        module = (names - seen).pop()
        seen.add(module)
        names = names | (imported(book.code(written[module])) if module in written else set())
    return seen


@chapters
def test_next_is_the_next_chapter(name: str) -> None:
    """As path.toml has it; `python docs/links.py` mends it."""
    text = book.texts(name)[-1]
    found = re.search(r"Next:.*?\]\(([^)#]+)\.ipynb\)", text, re.S)
    following = CHAPTERS[CHAPTERS.index(name) + 1 :]
    if following:
        assert found, "no way on"
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), found[1]))
        assert target == following[0], f"Next leads to {target}, but {following[0]} comes next"


@spine
def test_each_chapter_of_the_spine_replaces_a_line_of_the_skeleton(name: str) -> None:
    if name in {"00_start", "01_skeleton"}:
        return
    opening = "\n".join(book.texts(name)[:5])
    assert "01_skeleton.ipynb" in opening, "it opens with a link to the skeleton"
    line = re.search(r"```python\n(.+?)\n```", opening, re.S)
    assert line, "it opens with the line that it replaces"
    skeleton = re.sub(r"\s+", "", book.code("01_skeleton"))
    assert any(re.sub(r"\s+", "", part.split("  #")[0]) in skeleton for part in line[1].splitlines()), line[1]
    assert "w2vc.skeleton" in book.code(name), "it ends with its part in the skeleton"
