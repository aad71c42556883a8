"""Write the generated parts of README.md: the chapter table with run times measured just now, its picture, and the table of speed.

python docs/readme.py    (make readme executes what is stale first)
"""

from __future__ import annotations

import base64
import json
import re
import sys

import nbformat

import book
from book import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.run import write_table

START, END = "<!-- chapters: make readme -->", "<!-- end of chapters -->"
SPEED, SPEED_END = "<!-- speed: make readme -->", "<!-- end of speed -->"
FIGURES = ROOT / "docs" / "benchmarks" / "cpu.json"
SHOWN = (
    "loss-8x10",
    "step-4",
    "mixed-8",
    "utterance",
    "minutes-10",
)  # the rest stands in the benchmark chapter
PICTURE = ROOT / "docs" / "_static" / "start.png"


def row(name: str) -> str:
    """One line of the table."""
    cost = json.loads((ROOT / "_build" / "executed" / f"{name}.json").read_text())
    facts = book.card(name)
    needs = ", ".join(re.findall(r"\[([^]]+)\]", facts["Needs"])) or "–"
    able = re.sub(r"\[([^]]*)\]\((?!http)[^)]*\)", r"\1", facts["You will be able to"]).rstrip(".")
    return f"| [{name.rsplit('/', maxsplit=1)[-1]}](nbs/{name}.ipynb) | {able} | {cost['seconds']:.0f} s | {needs} |"


def table() -> str:
    """The chapter table, part by part."""
    head = "| chapter | you will be able to | run time | needs |\n| --- | --- | --- | --- |\n"
    return head + "\n".join(row(name) for name in book.chapters())


def picture() -> bytes:
    """The timeline of the start chapter: the last picture that it stores."""
    nb = nbformat.read(ROOT / "nbs" / "00_start.ipynb", as_version=4)
    found = [
        match
        for cell in nb.cells
        if cell.cell_type == "code" and "timeline(" in cell.source
        for out in cell.outputs
        for match in re.findall(
            r"data:image/png;base64,([A-Za-z0-9+/=\s]+)", "".join(out.get("data", {}).get("text/html", ""))
        )
    ]
    return base64.b64decode(found[-1])


def fill(text: str, start: str, end: str, content: str) -> str:
    """Put something new between two marks."""
    before, rest = text.split(start)
    return f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = fill(readme.read_text(encoding="utf-8"), START, END, table())
    text = fill(text, SPEED, SPEED_END, write_table(json.loads(FIGURES.read_text(encoding="utf-8")), SHOWN))
    readme.write_text(text, encoding="utf-8")
    PICTURE.write_bytes(picture())
    print(f"README.md and {PICTURE.relative_to(ROOT)} are up to date")
