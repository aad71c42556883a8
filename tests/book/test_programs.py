"""The notebooks as programs: every chapter and every solution runs from top to bottom in a kernel of its own.

`make` decides what is stale, so a chapter that `make book` or `make test` has just executed is not executed again.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import book
from w2vc.data.corpus import SpeechUnavailableError, load_speech

ROOT = book.ROOT


@pytest.mark.parametrize("name", book.chapters() + book.solutions())
def test_runs(name: str) -> None:
    target = Path("_build/executed") / f"{name}.ipynb"
    make = shutil.which("make")
    assert make, "the tests need make, as the README says"
    env = {k: v for k, v in os.environ.items() if k not in {"W2VC_SPEECH", "MAKEFLAGS", "MAKELEVEL"}}
    env["OMP_NUM_THREADS"] = "1"
    out = subprocess.run(
        [make, "-s", str(target)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr[-4000:]
    nb = nbformat.read(ROOT / target, as_version=4)
    errors = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
    assert not errors
    ran = [c.execution_count for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    assert ran == list(range(1, len(ran) + 1)), "every cell ran once, in order"
    assert set(json.loads((ROOT / target).with_suffix(".json").read_text())) == {"seconds", "megabytes"}


def test_start_runs_on_human_speech(tmp_path: Path) -> None:
    """The start chapter on recordings of people, fetched where their source can be reached."""
    try:
        people = load_speech("human", "test")
    except (SpeechUnavailableError, ImportError) as reason:
        pytest.skip(f"no human speech here: {reason}")
    env = {**os.environ, "W2VC_SPEECH": "human", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "docs/execute.py",
        "nbs/00_start.ipynb",
        "--out",
        str(tmp_path / "start.ipynb"),
    ]
    out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-4000:]
    shown = (tmp_path / "start.ipynb").read_text(encoding="utf-8")
    clip = re.search(r"The clip &#x27;(.+?)&#x27; on one time axis", shown)
    assert clip, "the timeline names its clip"
    assert html.unescape(clip[1]) in {u.text for u in people}


def test_a_failing_cell_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    """What a contributor sees after a mistake: the chapter, the cell and the error; and no copy that looks finished."""
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in ("x = 0", "1 / x", "x")]
    )
    nbformat.write(nb, tmp_path / "07_wrong.ipynb")
    command = [
        sys.executable,
        "docs/execute.py",
        str(tmp_path / "07_wrong.ipynb"),
        "--out",
        str(tmp_path / "out.ipynb"),
    ]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.returncode == 1
    for part in ("07_wrong", "1 / x", "ZeroDivisionError"):
        assert part in out.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["07_wrong.ipynb"]
