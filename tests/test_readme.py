"""The README keeps its word: its library example runs as printed, its table is complete, its picture exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_library_example_runs_as_printed(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    hidden, attention = re.findall(r"\[[^\]]+\]", out.stdout)
    batch, frames, _ = map(int, hidden.strip("[]").split(","))
    assert batch == 3
    assert attention.endswith(f"{frames}, {frames}]")


def test_table_lists_every_chapter_with_a_measured_time() -> None:
    rows = dict(re.findall(r"^\| \[(\d\d \w+)\].*\| (\d+) s \|", README, re.M))
    assert set(rows) == {p.stem.replace("_", " ", 1) for p in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    assert all(0 < int(seconds) <= 60 for seconds in rows.values()), rows


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for alt in re.findall(r"!\[([^\]]*)\]", README):
        assert len(alt) > 25


def test_commands_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", README, re.M)
    assert {"book", "test", "lab", "chapter"} <= {a or b for a, b in named} <= targets
