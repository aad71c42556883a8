"""Mend what the chapters say about each other, after path.toml or a chapter has changed.

python docs/links.py            "Next", "Used later" and "Needs" of every chapter
python docs/links.py --check    say what would change; the exit code is 1 if anything would

"Next" leads to the next chapter of the path. "Needs" names earlier chapters only, and "Used later" later ones only. Whatever is right
already stays as it is written, so that this can run again at any time.
"""

from __future__ import annotations

import argparse
import json
import posixpath
import re

import book

LINK = re.compile(r"\[[^]]+\]\(([^)#\s]+)\.ipynb(?:#[^)]*)?\)")
NEXT = re.compile(
    r"[ \t]*(?:Here the spine ends\. Open the library when you need it\. )?Next:[^\n]*(?:\n(?![-\n])[^\n]*)*"
)
LATER = re.compile(r"[ \t]*Used later.+?(?=\s*Next:|\n- |\n\n|\Z)", re.S)
END = re.compile(r"\n*This is the end of[^\n]*")


def target(link: str, name: str) -> str:
    """The chapter that a link of another chapter leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), link))


def link_to(other: str, name: str) -> str:
    """A link to a chapter, by its title up to a colon."""
    return f"[{book.heading(other)[0].split(':')[0]}]({book.link(other, name)}.ipynb)"


def mend_needs(text: str, name: str, names: list[str]) -> str:
    """Leave out of the card what does not come before; with nothing left, the spine builds on the chapter before."""
    line = re.search(r"^- \*\*Needs\*\* (.+)$", text, re.M)
    before = names[: names.index(name)]
    links = list(LINK.finditer(line[1])) if line else []
    if not line or all(target(m[1], name) in before for m in links):
        return text
    kept = [m[0] for m in links if target(m[1], name) in before]
    if not kept and book.kind(name) == "spine" and before:
        kept = [f"[{before[-1].split('/')[-1].lstrip('0123456789_')}]({book.link(before[-1], name)}.ipynb)"]
    return text.replace(line[0], f"- **Needs** {', '.join(kept) or 'nothing'}")


def mend_later(text: str, name: str, names: list[str]) -> str:
    """Leave out of "Used later" what does not come later."""
    found = LATER.search(text)
    links = list(LINK.finditer(found[0])) if found else []
    later = names[names.index(name) + 1 :]
    if not found:
        return text
    if not links and "every chapter" in found[0] and book.kind(name) == "library":
        return text.replace("Used later in every", "Used in every")
    if all(target(m[1], name) in later for m in links):
        return text
    kept = ", ".join(m[0] for m in links if target(m[1], name) in later)
    lead = re.match(r"[ \t]*", found[0])[0]
    new = f"{lead}Used later in {kept}." if kept else ""
    text = text[: found.start()] + new + text[found.end() :]
    return re.sub(r"\n- *(?=\n|\Z)|(?<=\n)\n\n+", "", re.sub(r"^-\s+(Next:)", r"- \1", text, flags=re.M))


def mend_next(text: str, name: str, names: list[str]) -> str:
    """Lead on to the next chapter; behind the last one there is none."""
    following = names[names.index(name) + 1 :]
    found = NEXT.search(text)
    there = LINK.search(found[0]) if found else None
    if following and there and target(there[1], name) == following[0]:
        return text
    if not following:
        return text.replace(found[0], "").rstrip(" -\n") if found else text
    new = f"Next: {link_to(following[0], name)}."
    if book.kind(name) != book.kind(following[0]):
        new = f"Here the spine ends. Open the library when you need it. Next: {link_to(following[0], name)}, its first chapter."
    if found:
        lead = re.match(r"[ \t]*", found[0])[0]
        return text[: found.start()] + lead + new + text[found.end() :]
    return END.sub("", text).rstrip() + f"\n\n{new}"


def mend(name: str, names: list[str]) -> str | None:
    """The text of a chapter's notebook with its links mended; None where all are right."""
    raw = book.path_of(name).read_text(encoding="utf-8")
    nb = json.loads(raw)
    cells = [cell for cell in nb["cells"] if cell["cell_type"] == "markdown"]
    card = next(cell for cell in cells if "- **Needs**" in "".join(cell["source"]))
    for cell, mends in ((card, (mend_needs,)), (cells[-1], (mend_later, mend_next))):
        text = "".join(cell["source"])
        for one in mends:
            text = one(text, name, names)
        cell["source"] = text.splitlines(keepends=True)
    new = json.dumps(nb, indent=1, ensure_ascii=False) + "\n"
    return None if new == raw else new


def main() -> int:
    """Mend every chapter, or say which ones need it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    names, changed = book.chapters(), []
    for name in names:
        new = mend(name, names)
        if new is not None:
            changed.append(name)
            if not check:
                book.path_of(name).write_text(new, encoding="utf-8")
    print(f"{'to mend' if check else 'mended'}: {', '.join(changed) or 'nothing'}")
    return int(check and bool(changed))


if __name__ == "__main__":
    raise SystemExit(main())
