"""Chapters open on Google Colab where the project has an address, and carry nothing of it where it has none."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from IPython.core.inputtransformer2 import TransformerManager

import book
import colab

URL = "https://github.com/someone/w2vc"


def read(name: str) -> dict[str, Any]:
    return json.loads(book.path_of(name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", book.chapters())
def test_chapters_are_as_the_address_says(name: str) -> None:
    nb = read(name)
    assert colab.fit(nb, name, colab.address()) == nb, "run python docs/colab.py"


@pytest.mark.parametrize("name", ["00_start", "model/masking", "training/trainer"])
def test_an_address_gives_badge_and_first_cell_and_taking_it_away_leaves_no_trace(name: str) -> None:
    plain = colab.fit(read(name), name, None)
    fitted = colab.fit(plain, name, URL)
    assert fitted["cells"][0]["id"] == colab.CELL_ID
    title = next(cell for cell in fitted["cells"] if cell["cell_type"] == "markdown")
    link = f"(https://colab.research.google.com/github/someone/w2vc/blob/main/nbs/{name}.ipynb)"
    assert "".join(title["source"]).endswith(link)
    assert len(fitted["cells"]) == len(plain["cells"]) + 1
    assert colab.fit(fitted, name, URL) == fitted, "again, and nothing changes"
    assert colab.fit(fitted, name, None) == plain


def run_first_cell(name: str) -> list[tuple[str, str]]:
    """The magics that the first cell runs."""
    source = TransformerManager().transform_cell("".join(colab.first_cell(name, URL)["source"]))
    ran: list[tuple[str, str]] = []
    shell = types.SimpleNamespace(run_line_magic=lambda *words: ran.append(words))
    exec(source, {"get_ipython": lambda: shell})
    return ran


def test_first_cell_installs_on_colab_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_first_cell("model/masking") == []
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    wanted = f'install -q "w2vc[audio,viz,eval] @ git+{URL}"'
    assert run_first_cell("model/masking") == [("pip", wanted)]
    assert run_first_cell("files/export") == [("pip", wanted.replace("audio,viz,eval", "all,onnx"))]


def test_the_address_is_read_from_the_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (book.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    text = text.replace("# [project.urls]", "[project.urls]").replace(
        '# Repository = "https://github.com/NAME/w2vc"', f'Repository = "{URL}/"'
    )
    (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(book, "ROOT", tmp_path)
    assert colab.address() == URL
