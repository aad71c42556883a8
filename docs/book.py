"""The book as data: its order (path.toml), its chapters, and the module that each one writes."""

from __future__ import annotations

import posixpath
import re
import tomllib
from functools import cache
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"


KINDS = ("spine", "library")


@cache
def path() -> tuple[dict, ...]:
    """The parts as path.toml has them: each with `caption`, `kind` and `chapters`."""
    return tuple(tomllib.loads((ROOT / "docs" / "path.toml").read_text(encoding="utf-8"))["part"])


def parts(kind: str | None = None) -> dict[str, list[str]]:
    """Caption -> the chapters of that part, such as `model/attention`, in reading order; of one kind, if it is named."""
    return {part["caption"]: part["chapters"] for part in path() if kind in (None, part["kind"])}


def kind(name: str) -> str:
    """What sort of chapter it is: "spine" (read in order) or "library" (opened when needed)."""
    return next(part["kind"] for part in path() if name in part["chapters"])


def chapters() -> list[str]:
    """Every chapter, in reading order."""
    return [name for names in parts().values() for name in names]


def solutions() -> list[str]:
    """The worked exercises, such as `solutions/model/attention`, in the order of their chapters."""
    return [f"solutions/{name}" for name in chapters() if path_of(f"solutions/{name}").is_file()]


def path_of(name: str) -> Path:
    """The notebook of a chapter."""
    return NBS / f"{name}.ipynb"


def link(target: str, page: str) -> str:
    """The way from one page to another: link("appendix/notation.html", "model/attention") is "../appendix/notation.html"."""
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


@cache
def texts(name: str) -> tuple[str, ...]:
    """The text cells of a chapter."""
    cells = nbformat.read(path_of(name), as_version=4).cells
    return tuple(cell.source for cell in cells if cell.cell_type == "markdown")


@cache
def code(name: str) -> str:
    """All code of a chapter."""
    cells = nbformat.read(path_of(name), as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


WORDS, LINES = 45, 35  # read in a minute


@cache
def amount(name: str) -> tuple[int, int]:
    """What there is to read in a chapter: words of running text, and lines of code on the page, blank ones left out."""
    prose = [line for text in texts(name) for line in text.splitlines() if not line.startswith("|")]
    cells = [c.source for c in nbformat.read(path_of(name), as_version=4).cells if c.cell_type == "code"]
    shown = [cell for cell in cells if not re.search(r"^#\s*\|\s*(?:default_exp|hide)", cell, re.M)]
    code = [
        line for cell in shown for line in cell.splitlines() if line.strip() and not line.startswith("#|")
    ]
    return sum(len(line.split()) for line in prose), len(code)


def minutes(name: str) -> int:
    """Minutes to read a chapter and to follow its code, in steps of five.

    45 words of running text, or 35 lines of code, take a minute. The two rates fit what a reader noted for 23 chapters of an earlier
    edition (tests/fixtures/reading_times.csv; 29 hours): the sum is right within 2 %, a chapter within 8 minutes on average (R² 0.82),
    and at worst within 31. They are the rates of somebody who stops to think: pictures have no time of their own, since they made no
    difference beside the words that explain them. Tables are for looking things up, and count nothing.
    """
    words, lines = amount(name)
    return max(5, 5 * round((words / WORDS + lines / LINES) / 5))


def duration(minutes: int) -> str:
    """Minutes as text: "about 40 minutes", "about 12 hours"."""
    return f"about {minutes} minutes" if minutes < 120 else f"about {minutes / 60:.0f} hours"


def time_of(kind: str) -> str:
    """How long the spine or the library takes to read."""
    return duration(sum(minutes(name) for names in parts(kind).values() for name in names))


def heading(name: str) -> tuple[str, str]:
    """Title and promise of a chapter: its first text cell."""
    title = re.findall(r"^# (.+)$", texts(name)[0], re.M)[0]
    promise = re.findall(r"^> (.+)$", texts(name)[0], re.M)
    return title, promise[0] if promise else ""


def card(name: str) -> dict[str, str]:
    """The four lines of a chapter's card, by their bold names."""
    text = next((text for text in texts(name) if re.search(r"^- \*\*You will", text, re.M)), "")
    return dict(re.findall(r"^- \*\*(.+?)\*\* (.+)$", text, re.M))


def modules() -> dict[str, str]:
    """The module that each chapter writes, such as `model.attention` -> `model/attention`."""
    found = {name: re.search(r"^#\s*\| default_exp ([\w.]+)", code(name), re.M) for name in chapters()}
    return {match[1]: name for name, match in found.items() if match}
