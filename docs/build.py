"""Stage the executed chapters and build the site: _build/executed -> _build/site -> _book/index.html.

The chapters were executed once, by make; here only their notebook directives become page layout:
`#| default_exp` and `#| hide` cells are left out, `#| echo: false` hides the code, `#| export` keeps it, labelled.
Beside them stand the landing page (a live explorer, the map of the model, a card per chapter) and one page per module.

python docs/build.py                         what `make book` runs, after it has executed what is stale
python docs/build.py --stored --out DIR      a quick look: the outputs as they are stored in nbs/
"""

from __future__ import annotations

import argparse
import ast
import html
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nbformat
from markdown_it import MarkdownIt

import book
from book import NBS, ROOT, heading

DIRECTIVE = re.compile(r"^#\s*\|\s*(.+?)\s*\n?$")
ANSWER = re.compile(r'^\s*reveal\("([^"]+)"', re.M)
EXPLORER_BYTES = 2_000_000


def executed_folder() -> Path:
    """Where make put the executed copies; a book rendered on other speech has a folder of its own."""
    speech = os.environ.get("W2VC_SPEECH")
    return ROOT / "_build" / (f"executed-{speech}" if speech else "executed")


def stage_cell(cell: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """Turn the directives of one cell into tags; None for a cell that no page shows."""
    if (
        cell.cell_type != "code"
    ):  # a badge is a picture from elsewhere; the site loads nothing, and has a link instead
        cell.source = re.sub(r"\[!\[([^]]+)\]\(https://[^)]+\)\]\(", r"[\1](", cell.source)
        return cell
    lines = cell.source.splitlines(keepends=True)
    directives = [m.group(1) for m in map(DIRECTIVE.match, lines) if m]
    if not cell.source.strip() or any(d.startswith(("default_exp", "hide")) for d in directives):
        return None
    cell.source = "".join(line for line in lines if not DIRECTIVE.match(line)).lstrip("\n")
    tags = {"export" for d in directives if d.startswith("export")}
    tags |= {"remove-input" for d in directives if d.replace(" ", "") == "echo:false"}
    if question := ANSWER.search(cell.source):  # folded until it is asked for
        tags |= {"hide-output" if "remove-input" in tags else "hide-cell"}
        prompts = {
            f"code_prompt_{verb}": f"{verb.capitalize()} the answer to {question[1]}"
            for verb in ("show", "hide")
        }
        cell.metadata["mystnb"] = prompts
    cell.metadata["tags"] = sorted(tags | set(cell.metadata.get("tags", [])))
    return cell


def defined(cell: nbformat.NotebookNode) -> list[str]:
    """The functions and classes that an exported cell defines."""
    if cell.cell_type != "code" or "export" not in cell.metadata.get("tags", []):
        return []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = [node.name for node in ast.parse(cell.source).body if isinstance(node, kinds)]
    return list(dict.fromkeys(names))  # an overloaded function once


def stage_notebook(source: Path, target: Path) -> list[str]:
    """Copy one notebook into the site's source folder; returns the names that its cells can be found by."""
    nb = nbformat.read(source, as_version=4)
    cells, names = [], []
    for cell in filter(None, map(stage_cell, nb.cells)):
        found = [name for name in defined(cell) if name not in names]
        if found:  # the API pages link to these
            anchors = "".join(f'<span class="anchor" id="code-{name}"></span>' for name in found)
            cells.append(nbformat.v4.new_markdown_cell(anchors))
            names += found
        cells.append(cell)
    nb.cells = cells
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, target)
    age = max(source.stat().st_mtime, Path(__file__).stat().st_mtime)
    os.utime(target, (age, age))  # so that Sphinx reads again only what has changed
    return names


# Words of the glossary that are common words, too: a link would often be wrong.
COMMON = set(
    """
    alarm alias attention band base batch beam blank block bucket buffer burst channel chunk clip closure code collapse
    collar commit confidence context distance eager edit excess explorer fault filter frame gate greedy half head hook
    hop kernel key labels lazy lock loss map margin mask miss model negative objective offsets padding
    parameter path plane positive prefix property query reach recipe reference resume revision same sample schedule
    score span spike split start state stretch surprise target turn twin update value view
    """.split()  # noqa: SIM905
)


class Word(NamedTuple):
    """A row of the glossary."""

    anchor: str  # of its row on the page of the notation chapter
    meaning: str
    chapter: str  # number of the chapter that explains it


NOTATION = "appendix/notation"


def glossary() -> dict[str, Word]:
    """The words of the notation's table that can be found in a text without mistaking another word for them."""
    rows = re.findall(
        r"^\| \*\*([^*$(]+)\*\* \| (.+) \| \[[^]]+\]\((\S+)\.ipynb\) \|$",
        "\n".join(book.texts(NOTATION)),
        re.M,
    )
    return {
        word: Word(
            word_anchor(word), re.sub(r"[`$*]", "", meaning), posixpath.normpath(f"appendix/{chapter}")
        )
        for word, meaning, chapter in rows
        if word not in COMMON and " and " not in word
    }


def word_anchor(word: str) -> str:
    """The id of a word's row."""
    return "word-" + re.sub(r"\W+", "-", word.strip().lower())


def link_words(text: str, words: dict[str, Word], page: str) -> str:
    """Link the first use of each word in running text to its row in the glossary, and take it out of `words`.

    Code, formulas, links, tags, bold words, headings, tables and quotes stay as they are.
    """
    whole = re.compile(r"```.*?```|<details>.*?</details>|^(?:#|\||>|- \*\*|!).*?$|\$\$.*?\$\$", re.S | re.M)
    inside = re.compile(r"`[^`]*`|\$[^$]*\$|!?\[[^\]]*\]\([^)]*\)|<[^>]*>|\*\*[^*]*\*\*|https?://\S+")
    kept = [m.span() for pattern in (whole, inside) for m in pattern.finditer(text)]
    for word in re.findall(r"\*\*([^*]+)\*\*", text):  # explained here
        words.pop(word.lower(), None)
    found = []
    for word, row in list(words.items()):
        taken = [*kept, *(place[:2] for place in found)]
        uses = re.finditer(rf"(?<![\w-]){re.escape(word)}s?(?![\w-])", text, re.I)
        at = next((m for m in uses if not any(a < m.end() and m.start() < b for a, b in taken)), None)
        if at:
            title = html.escape(f"{word}: {row.meaning}", quote=True)
            target = book.link(f"{NOTATION}.html", page)
            link = f'<a class="word" href="{target}#{row.anchor}" title="{title}">{at[0]}</a>'
            found.append((*at.span(), link))
            del words[word]
    for start, end, link in sorted(found, reverse=True):
        text = text[:start] + link + text[end:]
    return text


def edit_page(page: Path, edit: Callable[[nbformat.NotebookNode], None]) -> None:
    """Change a staged notebook and keep its age, so that Sphinx reads again only what has changed."""
    nb, stamp = nbformat.read(page, as_version=4), page.stat().st_mtime
    edit(nb)
    nbformat.write(nb, page)
    os.utime(page, (stamp, stamp))


def link_glossary(nb: nbformat.NotebookNode, name: str, words: dict[str, Word]) -> None:
    """Link the words that a staged chapter uses and another one explains; the notation itself gets the anchors."""
    mine = {word: row for word, row in words.items() if row.chapter != name}
    row = r"^\| \*\*([^*]+)\*\* \|"
    for cell in [cell for cell in nb.cells if cell.cell_type == "markdown"][
        1:
    ]:  # not the title and the promise
        if name == NOTATION:
            cell.source = re.sub(row, lambda m: f'| <span id="{word_anchor(m[1])}"></span>**{m[1]}** |', cell.source, flags=re.M)  # fmt: skip
        else:
            cell.source = link_words(cell.source, mine, name)


def used_later() -> dict[str, list[str]]:
    """For each chapter that writes a module: the later chapters whose code imports from it."""
    names = book.chapters()
    imports = {
        name: set(re.findall(r"^(?:from|import) w2vc\.([\w.]+)", book.code(name), re.M)) for name in names
    }
    return {
        chapter: [later for later in names[names.index(chapter) + 1 :] if module in imports[later]]
        for module, chapter in book.modules().items()
    }


def add_used_later(nb: nbformat.NotebookNode, name: str, users: list[str]) -> None:
    """Close a staged chapter with links to the later chapters that use what it built."""
    links = ", ".join(f"[{user.split('/')[-1]}]({book.link(user, name)}.ipynb)" for user in users)
    nb.cells.append(
        nbformat.v4.new_markdown_cell(f"*The code of later chapters that uses this one:* {links}.")
    )


def inline(text: str) -> str:
    """One line of Markdown as HTML."""
    return MarkdownIt().renderInline(text)


def cost(name: str) -> str:
    """What the chapter asks of a reader, and what running it took when it was last executed."""
    path = executed_folder() / f"{name}.json"
    said = f"{book.kind(name)} · {book.minutes(name)} min to read"
    if path.is_file():
        measured = json.loads(path.read_text())
        said += f" · runs in {measured['seconds']:.0f} s, {measured['megabytes']} MB"
    return said


def card(name: str) -> str:
    """One chapter on the landing page: title, promise, cost. The whole card is one link."""
    title, promise = heading(name)
    words = (
        f'<a href="{name}.html">{inline(title)}</a><p>{inline(promise)}</p><p class="cost">{cost(name)}</p>'
    )
    return f'<li class="card">{words}</li>'


def add_facts(nb: nbformat.NotebookNode, name: str) -> None:
    """Say under the title of a staged chapter where it stands in the path, and what it asks of a reader."""
    names = [other for names in book.parts(book.kind(name)).values() for other in names]
    kind, _, rest = cost(name).partition(" · ")
    place = f"{kind.capitalize()}, chapter {names.index(name) + 1} of {len(names)}"
    nb.cells[0].source += f'\n\n<p class="cost">{place} · {rest}</p>'


def toctree(caption: str, entries: list[str]) -> str:
    """A part of the book in the sidebar."""
    return "\n".join([f"```{{toctree}}\n:caption: {caption}\n:hidden:\n", *entries, "```\n"])


def part(caption: str, names: list[str]) -> str:
    """One part of the book: in the sidebar, and as cards on the page."""
    tree = [f"{heading(name)[0]} <{name}>" for name in names]
    if caption == list(book.parts())[-1]:
        tree += ["Every class and function <api/index>", "Solutions <solutions/index>"]
    cards = ['<ul class="cards">', *map(card, names), "</ul>\n"]
    sort = book.kind(names[0]).capitalize()
    return "\n".join(
        [toctree(f"{sort}: {caption[0].lower()}{caption[1:]}", tree), f"### {caption}\n", *cards]
    )


def chapter_list(kind: str) -> str:
    """All parts of one kind under a heading that says how they are read."""
    parts = book.parts(kind)
    time = book.time_of(kind)
    how = {
        "spine": f"Read it from front to back, {time}. Each chapter needs only those before it.",
        "library": f"Open a chapter when you need it; all of it would take {time}. It stands on the spine.",
    }[kind]
    return "\n".join(
        [f"## The {kind}\n\n{how}\n", *(part(caption, names) for caption, names in parts.items())]
    )


def landing_map(static: Path) -> str:
    """The map of the model as a picture whose boxes are links to their chapters."""
    from w2vc.explore import viz

    fig, alt = viz.draw_map()
    (static / "map.png").write_bytes(viz.render(fig, alt).png)
    # A box bears the last name of its module; an explorer may have the same one.
    chapter = {m.split(".")[-1]: name for m, name in book.modules().items() if not m.startswith("explore.")}
    spots, seen = [], set()
    for key, (x, y, w, h, *_) in viz._MAP["boxes"].items():
        slug = key.split("/")[0]
        if slug not in chapter:
            continue
        place = f"left:{x / 7:.2f}%;top:{y / 5.5:.2f}%;width:{w / 7:.2f}%;height:{h / 5.5:.2f}%"
        title = html.escape(heading(chapter[slug])[0], quote=True)
        twin = ' tabindex="-1" aria-hidden="true"' if slug in seen else f' aria-label="{title}"'
        spots.append(f'<a href="{chapter[slug]}.html" title="{title}" style="{place}"{twin}></a>')
        seen.add(slug)
    picture = f'<img src="_static/map.png" width="700" height="550" alt="{html.escape(alt, quote=True)}">'
    return (
        '<div class="map" role="region" aria-label="Map of the model" tabindex="0"><div>'
        + "\n".join([picture, *spots])
        + "</div></div>"
    )


def landing_explorer() -> str:
    """The attention explorer of the demo model on one built-in sentence; nothing where either is missing."""
    try:
        from w2vc.explore.attention import attention_maps, diagonality
        from w2vc.explore.page import attention_explorer
        from w2vc.training.demo import load_demo
    except ImportError:
        return ""
    from w2vc.data.corpus import load_speech

    short = min(load_speech("builtin"), key=lambda u: abs(len(u.audio) / u.sampling_rate - 2.0))
    model = load_demo()
    near = diagonality(attention_maps(model, short))  # [L, H]; begin with a head that is easy to read
    start = divmod(int(near.argmax()), near.shape[1])
    shown = attention_explorer(model, short, start=start)._repr_html_()
    if len(shown) > EXPLORER_BYTES:
        raise ValueError(f"the landing page's explorer has {len(shown)} bytes; allowed are {EXPLORER_BYTES}")
    return shown


def stage_landing(site: Path) -> None:
    """Write the landing page: docs/index.md with its places filled."""
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    shown = landing_explorer()
    if shown:
        (site / "explorer.html").write_text(shown, encoding="utf-8")
        text = text.replace("<!-- explorer", "").replace("end of explorer -->", "")
    text = text.replace("{map}", landing_map(site / "_static"))
    (site / "index.md").write_text("\n".join([text, *map(chapter_list, book.KINDS)]), encoding="utf-8")


def stage_llms(site: Path) -> None:
    """Write llms.txt, the book's contents for programs that read: https://llmstxt.org."""
    lines = [
        "# w2vc",
        "",
        "> Wav2Vec2-Conformer from scratch: a book of notebooks that is also a library.",
        "",
    ]
    lines += ["Read the spine from front to back; open the library when you need it.", ""]
    for kind in book.KINDS:
        lines += [f"## The {kind}", ""]
        for names in book.parts(kind).values():
            lines += [f"- [{heading(name)[0]}]({name}.html): {heading(name)[1]}" for name in names]
        lines += [""]
    lines += ["## Reference", "", "- [Every class and function](api/index.html): one page for each module"]
    lines += ["- [Solutions](solutions/index.html): worked answers to the exercises", ""]
    (site / "llms.txt").write_text("\n".join(lines), encoding="utf-8")


def stage_api(site: Path) -> None:
    """Write one page per module, which Sphinx fills from the docstrings, and their list."""
    chapter = book.modules()
    folder = site / "api"
    folder.mkdir()
    rows = [
        f"- [{slug}]({slug}.rst), [{heading(name)[0]}](../{name}.ipynb). {heading(name)[1]}"
        for slug, name in chapter.items()
    ]
    (folder / "index.md").write_text(
        "# Every class and function\n\nShapes are written in the letters of [the notation chapter](../appendix/notation.ipynb). "
        "*[source]* leads to the cell of the chapter where the code is written and explained.\n\n"
        + "\n".join(rows)
        + "\n\n```{toctree}\n:hidden:\n\n"
        + "\n".join(chapter)
        + "\n```\n",
        encoding="utf-8",
    )
    for slug, name in chapter.items():
        title = f"w2vc.{slug}"
        (folder / f"{slug}.rst").write_text(
            f"{title}\n{'=' * len(title)}\n\nBuilt and explained in chapter :doc:`/{name}`.\n\n"
            f".. automodule:: w2vc.{slug}\n   :members:\n   :member-order: bysource\n",
            encoding="utf-8",
        )


def stage_solutions(site: Path, answers: list[str]) -> None:
    """Write the list of solutions."""
    tree = [f"{heading(a)[0]} <{a.removeprefix('solutions/')}>" for a in answers]
    (site / "solutions" / "index.md").write_text(
        "# Solutions\n\nWorked answers to the exercises of each chapter, executed and checked.\n\n"
        "```{toctree}\n\n" + "\n".join(tree) + "\n```\n",
        encoding="utf-8",
    )


def stage(site: Path, *, stored: bool = False) -> None:
    """Write the site's source folder anew, from the executed copies or from what is stored in nbs/."""
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    names, answers = book.chapters(), book.solutions()
    folder = NBS if stored else executed_folder()
    anchors = {}
    for name in [*names, *answers]:
        anchors[name] = stage_notebook(folder / f"{name}.ipynb", site / f"{name}.ipynb")
    words, users = glossary(), used_later()
    for name in names:

        def edit(nb: nbformat.NotebookNode, name: str = name) -> None:
            link_glossary(nb, name, words)
            add_facts(nb, name)
            if users.get(name) and not name.startswith("appendix/"):
                add_used_later(nb, name, users[name])

        edit_page(site / f"{name}.ipynb", edit)
    found = {module: [name, anchors[name]] for module, name in book.modules().items()}
    (site / "anchors.json").write_text(json.dumps(found))
    shutil.copy(ROOT / "docs" / "conf.py", site)
    for part_of_site in ("_static", "_templates"):
        shutil.copytree(ROOT / "docs" / part_of_site, site / part_of_site)
    stage_landing(site)
    stage_llms(site)
    stage_api(site)
    stage_solutions(site, answers)


def build(work: Path, out: Path, *, strict: bool = True) -> int:
    """Run Sphinx; where `strict`, warnings are errors, so a dead link or a bad heading fails the build."""
    if out.exists() and any(out.iterdir()) and not (out / ".buildinfo").is_file():
        raise SystemExit(f"{out} is not empty and holds no site: it is left as it is")
    pages = work / "html"  # a folder of its own: what is no longer in the book leaves _book too
    shutil.rmtree(pages, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-b",
        "html",
        *(["-W", "--keep-going"] if strict else []),
    ]
    command += ["-d", str(work / "doctrees"), str(work / "site"), str(pages)]
    code = subprocess.run(command, check=False).returncode
    if code == 0:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(pages, out)
    return code


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "_book", help="where the site goes")
    parser.add_argument("--work", type=Path, default=ROOT / "_build", help="where it is staged")
    parser.add_argument("--stored", action="store_true", help="show the outputs stored in nbs/ as they are")
    options = parser.parse_args()
    stage(options.work / "site", stored=options.stored)
    raise SystemExit(build(options.work, options.out, strict=not options.stored))
