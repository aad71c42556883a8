"""Stage the executed chapters and build the site: _build/executed -> _build/site -> _book/index.html.

The chapters were executed once, by make; here only their notebook directives become page layout:
`#| default_exp` and `#| hide` cells are left out, `#| echo: false` hides the code, `#| export` keeps it, labelled.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "site"
PARTS = {  # caption: the chapters whose number lies in this range
    "Begin": range(0, 10),
    "From sound to targets": range(10, 20),
    "From frames to context": range(20, 32),
    "Learning without labels": range(32, 40),
    "Writing down what was said": range(40, 44),
    "What it is, who speaks, and when": range(44, 47),
    "At work": range(47, 50),
    "Learning for real": range(50, 60),
    "Looking inside": range(60, 70),
    "Fast and large": range(70, 80),
    "Reference": range(90, 100),
}
DIRECTIVE = re.compile(r"^#\s*\|\s*(.+?)\s*\n?$")


def executed_folder() -> Path:
    """Where make put the executed copies; a book rendered on other speech has a folder of its own."""
    speech = os.environ.get("W2VC_SPEECH")
    return ROOT / "_build" / (f"executed-{speech}" if speech else "executed")


def stage_cell(cell: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """Turn the directives of one cell into tags; None for a cell that no page shows."""
    if cell.cell_type != "code":
        return cell
    lines = cell.source.splitlines(keepends=True)
    directives = [m.group(1) for m in map(DIRECTIVE.match, lines) if m]
    if not cell.source.strip() or any(d.startswith(("default_exp", "hide")) for d in directives):
        return None
    cell.source = "".join(line for line in lines if not DIRECTIVE.match(line)).lstrip("\n")
    tags = {"export" for d in directives if d.startswith("export")}
    tags |= {"remove-input" for d in directives if d.replace(" ", "") == "echo:false"}
    cell.metadata["tags"] = sorted(tags | set(cell.metadata.get("tags", [])))
    return cell


def stage_notebook(source: Path, target: Path) -> None:
    """Copy one executed notebook into the site's source folder."""
    nb = nbformat.read(source, as_version=4)
    nb.cells = [cell for cell in map(stage_cell, nb.cells) if cell is not None]
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, target)


def heading(name: str) -> tuple[str, str]:
    """Title and promise of a chapter: its first text cell."""
    nb = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4)
    text = next(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    title = re.findall(r"^# (.+)$", text, re.M)[0]
    promise = re.findall(r"^> (.+)$", text, re.M)
    return title, promise[0] if promise else ""


def contents(caption: str, names: list[str]) -> str:
    """One part of the book: a hidden toctree for the sidebar, and a table with promises and costs for the page."""
    tree = [f"```{{toctree}}\n:caption: {caption}\n:hidden:\n"]
    table = [f"\n## {caption}\n", "| chapter | | runs in |", "| --- | --- | --- |"]
    for name in names:
        title, promise = heading(name)
        number = Path(name).name[:2]
        tree.append(f"{number} {title} <{name}>")
        cost = executed_folder() / f"{name}.json"
        seconds = f"{json.loads(cost.read_text())['seconds']:.0f} s" if cost.is_file() else ""
        table.append(f"| [{number} {title}]({name}.ipynb) | {promise} | {seconds} |")
    return "\n".join([*tree, "```", *(table if caption != "Solutions" else [])]) + "\n"


def stage() -> None:
    """Write the site's source folder anew."""
    shutil.rmtree(SITE, ignore_errors=True)
    SITE.mkdir(parents=True)
    names = sorted(p.stem for p in (ROOT / "nbs").glob("[0-9]*.ipynb"))
    answers = sorted(f"solutions/{p.stem}" for p in (ROOT / "nbs" / "solutions").glob("[0-9]*.ipynb"))
    for name in [*names, *answers]:
        stage_notebook(executed_folder() / f"{name}.ipynb", SITE / f"{name}.ipynb")
    shutil.copy(ROOT / "docs" / "conf.py", SITE)
    shutil.copytree(ROOT / "docs" / "_static", SITE / "_static")
    parts = [
        contents(caption, [n for n in names if int(n[:2]) in numbers]) for caption, numbers in PARTS.items()
    ]
    landing = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    (SITE / "index.md").write_text(
        "\n".join([landing, *parts, contents("Solutions", answers)]), encoding="utf-8"
    )


def build(out: Path) -> int:
    """Run Sphinx; warnings are errors, so a dead link or a bad heading fails the build."""
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        "-d",
        str(ROOT / "_build" / "doctrees"),
    ]
    return subprocess.run([*command, str(SITE), str(out)], check=False).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "_book")
    options = parser.parse_args()
    stage()
    raise SystemExit(build(options.out))
