"""docs/links.py mends what chapters say about each other, and leaves alone what is right."""

from __future__ import annotations

from typing import Any

import pytest

import book
import links

PATH = ["00_start", "model/a", "model/b", "files/c", "appendix/d"]


@pytest.fixture(autouse=True)
def _small_book(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = dict(zip(PATH, ("spine", "spine", "spine", "library", "library"), strict=True))
    monkeypatch.setattr(book, "kind", kinds.__getitem__)
    monkeypatch.setattr(book, "heading", lambda name: (f"Title of {name[-1]}: a subtitle", ""))


@pytest.mark.parametrize(
    ("mend", "name", "before", "after"),
    [
        (links.mend_needs, "model/b", "- **Needs** [a](a.ipynb), [c](../files/c.ipynb)", "- **Needs** [a](a.ipynb)"),
        (links.mend_needs, "model/b", "- **Needs** [c](../files/c.ipynb)", "- **Needs** [a](a.ipynb)"),
        (links.mend_needs, "files/c", "- **Needs** [d](../appendix/d.ipynb)", "- **Needs** nothing"),
        (links.mend_later, "model/a", "Used later in [b](b.ipynb), of course. Next: x", None),
        (links.mend_later, "files/c", "- Used later in [b](../model/b.ipynb). Next: [d](x)", "- Next: [d](x)"),
        (
            links.mend_later,
            "files/c",
            "- X. Used later in [b](../model/b.ipynb) and [d](../appendix/d.ipynb).\n- Next: x",
            "- X. Used later in [d](../appendix/d.ipynb).\n- Next: x",
        ),
        (links.mend_later, "appendix/d", "Used later in every chapter.", "Used in every chapter."),
        (links.mend_next, "00_start", "- Next: [b](model/b.ipynb), or [c](x.ipynb).", "- Next: [Title of a](model/a.ipynb)."),
        (links.mend_next, "model/a", "Next: [b](b.ipynb), where it goes on.", None),
        (
            links.mend_next,
            "model/b",
            "Done. Next:\n[a](a.ipynb)",
            "Done. Here the spine ends. Open the library when you need it. Next: [Title of c](../files/c.ipynb), its first chapter.",
        ),
        (links.mend_next, "files/c", "Done.\n\nThis is the end of the book.", "Done.\n\nNext: [Title of d](../appendix/d.ipynb)."),
        (links.mend_next, "appendix/d", "- Done.\n- Next: [c](../files/c.ipynb).", "- Done."),
    ],
)  # fmt: skip
def test_mends(mend: Any, name: str, before: str, after: str | None) -> None:
    once = mend(before, name, PATH)
    assert once == (before if after is None else after)
    assert mend(once, name, PATH) == once, "again, and nothing changes"
