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


@cache
def parts() -> dict[str, list[str]]:
    """Caption -> the chapters of that part, such as `model/attention`, in reading order."""
    read = tomllib.loads((ROOT / "docs" / "path.toml").read_text(encoding="utf-8"))
    return {part["caption"]: part["chapters"] for part in read["part"]}


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


def heading(name: str) -> tuple[str, str]:
    """Title and promise of a chapter: its first text cell."""
    title = re.findall(r"^# (.+)$", texts(name)[0], re.M)[0]
    promise = re.findall(r"^> (.+)$", texts(name)[0], re.M)
    return title, promise[0] if promise else ""


def card(name: str) -> dict[str, str]:
    """The four lines of a chapter's card, by their bold names."""
    text = next((text for text in texts(name) if text.startswith("- **You will")), "")
    return dict(re.findall(r"^- \*\*(.+?)\*\* (.+)$", text, re.M))


def modules() -> dict[str, str]:
    """The module that each chapter writes, such as `model.attention` -> `model/attention`."""
    found = {name: re.search(r"^#\s*\| default_exp ([\w.]+)", code(name), re.M) for name in chapters()}
    return {match[1]: name for name, match in found.items() if match}
