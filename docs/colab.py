"""Let every chapter open on Google Colab, where the project has an address: `Repository` in [project.urls] of pyproject.toml.

python docs/colab.py

With an address, a badge under each title opens the chapter there, and a first cell installs the package from the address; elsewhere that
cell does nothing. Without an address, both are taken away. What is right already stays as it is.
"""

from __future__ import annotations

import json
import tomllib
from typing import Any

import book

CELL_ID = "colab"
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
# What a chapter imports beyond torch. The chapters of the spine need little; none of it replaces a package that Colab has.
EXTRAS = {"spine": "audio,viz,eval", "library": "all,onnx"}


def address() -> str | None:
    """Where the project is published; None where nobody has said so."""
    project = tomllib.loads((book.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository", "").rstrip("/") or None


def badge(name: str, url: str) -> str:
    """The badge of a chapter: a picture that links to the chapter on Colab."""
    place = url.removeprefix("https://github.com/")
    return f"{BADGE}(https://colab.research.google.com/github/{place}/blob/main/nbs/{name}.ipynb)"


def first_cell(name: str, url: str) -> dict[str, Any]:
    """The cell that installs the package on Colab."""
    source = f"""#| hide
import sys

if "google.colab" in sys.modules:  # on Colab alone; elsewhere the package is there already
    %pip install -q "w2vc[{EXTRAS[book.kind(name)]}] @ git+{url}"
"""
    lines = source.rstrip("\n").splitlines(keepends=True)
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": CELL_ID,
        "metadata": {},
        "outputs": [],
        "source": lines,
    }


def fit(nb: dict[str, Any], name: str, url: str | None) -> dict[str, Any]:
    """A notebook with badge and first cell for an address, or without both."""
    cells = [dict(cell) for cell in nb["cells"] if cell.get("id") != CELL_ID]
    title = next(cell for cell in cells if cell["cell_type"] == "markdown")
    text = "\n".join(
        line for line in "".join(title["source"]).split("\n") if not line.startswith(BADGE)
    ).rstrip("\n")
    if url:
        cells.insert(0, first_cell(name, url))
        text += f"\n\n{badge(name, url)}"
    title["source"] = text.splitlines(keepends=True)
    return {**nb, "cells": cells}


def main() -> None:
    """Fit every chapter to the address."""
    url = address()
    for name in book.chapters():
        path = book.path_of(name)
        raw = path.read_text(encoding="utf-8")
        new = json.dumps(fit(json.loads(raw), name, url), indent=1, ensure_ascii=False) + "\n"
        if new != raw:
            path.write_text(new, encoding="utf-8")
            print(name)
    print(f"chapters open on Colab from {url}" if url else "no address: no badge, no first cell")


if __name__ == "__main__":
    main()
