"""Print how large each module of the package is, beside an older version: python tools/sizes.py [REVISION].

Code is what is neither blank, comment, docstring, import nor `__all__`; public names are those in `__all__`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What a module of the flat tree (before the parts became folders) has become, where the name changed or the module was divided.
BECAME = {
    "attention": "model.attention", "audio": "data.audio", "speech": "data.corpus", "model": "model.wav2vec2", "text": "text.tokenizer", "health": "training.monitoring",
    "training": "training.trainer + training.objectives + training.distributed", "evaluation": "evaluation.reports + evaluation.probes",
    "config": "config + files.atomic + files.hub", "explore": "explore.attention + explore.page",
}  # fmt: skip


def measure(source: str) -> list[int]:
    """Count lines, lines of code, definitions and public names."""
    tree, lines = ast.parse(source), source.splitlines()
    skipped: set[int] = set()
    public = 0
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        doc = body[0] if isinstance(body, list) and body and isinstance(body[0], ast.Expr) else None
        if doc is not None and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str):
            skipped.update(range(doc.lineno, (doc.end_lineno or doc.lineno) + 1))
        listing = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        if listing and isinstance(node, ast.Assign):
            public = len(ast.literal_eval(node.value))
        if isinstance(node, ast.Import | ast.ImportFrom) or listing:
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    code = [
        n for n, line in enumerate(lines, 1) if n not in skipped and line.strip() and line.strip()[0] != "#"
    ]
    definitions = sum(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(tree))
    return [len(lines), len(code), definitions, public]


def git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def module_of(path: str) -> str:
    return path.removeprefix("w2vc/").removesuffix(".py").replace("/", ".")


def is_module(path: str) -> bool:
    return path.endswith(".py") and not path.endswith(("_modidx.py", "/__init__.py"))


def now() -> dict[str, list[int]]:
    paths = [p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "w2vc").rglob("*.py"))]
    return {module_of(p): measure((ROOT / p).read_text(encoding="utf-8")) for p in paths if is_module(p)}


def before(revision: str) -> dict[str, list[int]]:
    paths = [p for p in git("ls-tree", "-r", "--name-only", revision, "w2vc").splitlines() if is_module(p)]
    return {module_of(p): measure(git("show", f"{revision}:{p}")) for p in paths}


def total(rows: list[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)] if rows else [0, 0, 0, 0]


def main() -> None:
    new = now()
    if len(sys.argv) < 2:
        print("| module | lines | code | definitions | public names |\n| --- | --- | --- | --- | --- |")
        for name, row in new.items():
            print(f"| {name} |", " | ".join(map(str, row)), "|")
        print("| together |", " | ".join(map(str, total(list(new.values())))), "|")
        return
    old = before(sys.argv[1])
    last = {name.split(".")[-1]: name for name in reversed(new)}
    print(
        "| before | lines | code | public | now | lines | code | public |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    seen: set[str] = set()
    for name, (lines, code, _, public) in old.items():
        names = BECAME.get(name, name if name in new else last.get(name.split(".")[-1], "")).split(" + ")
        names = [n for n in names if n in new]
        seen.update(names)
        row = total([new[n] for n in names])
        print(
            f"| {name} | {lines} | {code} | {public} | {' + '.join(names) or '–'} | {row[0]} | {row[1]} | {row[3]} |"
        )
    for name in [n for n in new if n not in seen]:
        print(f"| – | | | | {name} | {new[name][0]} | {new[name][1]} | {new[name][3]} |")
    (a, b, _, c), (d, e, _, f) = total(list(old.values())), total(list(new.values()))
    print(f"| together | {a} | {b} | {c} | | {d} | {e} | {f} |")


if __name__ == "__main__":
    main()
