"""Print how large the model's modules are, beside an older version: python docs/core_table.py [REVISION]."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE = ("features", "negatives", "quantizer", "positions", "attention", "convolution", "conformer", "model",
        "pretraining", "ctc", "classification", "speaker", "checks", "fast")  # fmt: skip
ENVIRONMENT = re.compile(
    r"is_compiling|is_tracing|is_exporting|device\.type (?:==|!=|in|not)|\.is_cuda|\.is_cpu|is_grad_enabled|_hooks\b|listened_to\(|in_process_group\("
)


def measure(source: str) -> list[int]:
    """Count lines, lines of code, definitions, type-ignores and branches on the environment.

    Code is what is neither blank, comment, docstring, import nor `__all__`. A branch on the environment is a line that asks for
    compiler, exporter, device, gradient mode, hooks or process group.
    """
    tree, lines = ast.parse(source), source.splitlines()
    skipped: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        doc = body[0] if isinstance(body, list) and body and isinstance(body[0], ast.Expr) else None
        if doc is not None and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str):
            skipped.update(range(doc.lineno, doc.end_lineno + 1))
        listing = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        if isinstance(node, ast.Import | ast.ImportFrom) or listing:
            skipped.update(range(node.lineno, node.end_lineno + 1))
    code = [
        line
        for number, line in enumerate(lines, 1)
        if number not in skipped and line.strip() and not line.strip().startswith("#")
    ]
    definitions = sum(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(tree))
    asks = sum(bool(ENVIRONMENT.search(line)) for line in code)
    return [len(lines), len(code), definitions, source.count("type: ignore"), asks]


def read_module(name: str, revision: str | None) -> str:
    """The source of a module now, or at a revision; empty if there is none."""
    if revision is None:
        path = ROOT / "w2vc" / f"{name}.py"
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    command = ["git", "show", f"{revision}:w2vc/{name}.py"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def main() -> None:
    """Print a Markdown table; with a revision, each cell says before and now."""
    before = sys.argv[1] if len(sys.argv) > 1 else None
    print(
        "| module | lines | code | definitions | type-ignores | branches on environment |\n"
        + "|---" * 6
        + "|"
    )
    total = {None: [0] * 5, before: [0] * 5}
    for name in (*CORE, "all"):
        cells = []
        for revision in dict.fromkeys((before, None)):
            counts = total[revision] if name == "all" else measure(read_module(name, revision))
            if name != "all":
                total[revision] = [a + b for a, b in zip(total[revision], counts, strict=True)]
            cells.append([str(n) if counts[0] else "–" for n in counts])
        print(f"| {name} | " + " | ".join(" → ".join(pair) for pair in zip(*cells, strict=True)) + " |")


if __name__ == "__main__":
    main()
