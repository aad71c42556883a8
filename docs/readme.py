"""Write the generated parts of README.md: the chapter tables with minutes to read and run times measured just now, the picture, and the table of speed.

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
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "_static" / "start.png"


def seconds(name: str) -> str:
    """How long the chapter ran just now; where it did not, what README says."""
    measured = ROOT / "_build" / "executed" / f"{name}.json"
    if measured.is_file():
        return f"{json.loads(measured.read_text())['seconds']:.0f} s"
    said = re.search(
        rf"^\| \[[^]]+\]\(nbs/{name}\.ipynb\).*?\| (\d+ s) \|", README.read_text(encoding="utf-8"), re.M
    )
    return said[1] if said else "–"


def row(name: str) -> str:
    """One line of the table."""
    facts = book.card(name)
    needs = ", ".join(re.findall(r"\[([^]]+)\]", facts["Needs"])) or "–"
    able = re.sub(r"\[([^]]*)\]\((?!http)[^)]*\)", r"\1", facts["You will be able to"]).rstrip(".")
    slug = name.rsplit("/", maxsplit=1)[-1]
    return f"| [{slug}](nbs/{name}.ipynb) | {able} | {book.minutes(name)} min | {seconds(name)} | {needs} |"


def table(kind: str) -> str:
    """The chapters of the spine or of the library, part by part."""
    parts = book.parts(kind)
    time = book.time_of(kind)
    how = {
        "spine": f"**The spine**: read it from front to back ({time}). Each chapter needs only those before it.",
        "library": f"**The library**: open a chapter when you need it ({time} for all). It stands on the spine.",
    }[kind]
    head = f"| {kind} | you will be able to | to read | to run | needs |\n| --- | --- | --- | --- | --- |"
    rows = [
        line for caption, names in parts.items() for line in (f"| **{caption}** | | | | |", *map(row, names))
    ]
    return "\n".join([how, "", head, *rows])


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
    text = fill(README.read_text(encoding="utf-8"), START, END, "\n\n".join(map(table, book.KINDS)) + "\n")
    text = fill(text, SPEED, SPEED_END, write_table(json.loads(FIGURES.read_text(encoding="utf-8")), SHOWN))
    README.write_text(text, encoding="utf-8")
    PICTURE.write_bytes(picture())
    print(f"README.md and {PICTURE.relative_to(ROOT)} are up to date")
