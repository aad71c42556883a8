"""The README keeps its word: its library example runs as printed, its table is complete, its picture exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import book
from released import stand_in, write_released
from w2vc import load_speech

sf = pytest.importorskip("soundfile")
ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def test_library_example_runs_as_printed(tmp_path: Path) -> None:
    code = EXAMPLES[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    hidden, attention = re.findall(r"\[[^\]]+\]", out.stdout)
    batch, frames, _ = map(int, hidden.strip("[]").split(","))
    assert batch == 3
    assert attention.endswith(f"{frames}, {frames}]")


def run(*command: str | Path, cwd: Path) -> str:
    out = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    return out.stdout


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder where the files that the README names exist, with a tiny stand-in for the released checkpoint."""
    (name,) = re.findall(r'name = "(.+)"', EXAMPLES[1])
    write_released(stand_in(), tmp_path / name)
    (tmp_path / "DIR").symlink_to(tmp_path / name)
    (tmp_path / "recordings").mkdir()
    for k, place in enumerate(("talk.flac", "recordings/a.wav")):
        sf.write(tmp_path / place, load_speech("builtin")[k].audio, 16_000)
    return tmp_path


def test_transcription_example_runs_as_printed(desk: Path) -> None:
    out = run(sys.executable, "-c", "import w2vc\n" + EXAMPLES[1], cwd=desk)
    text, start = re.match(r"(.*) (\d+\.\d+) 1\n00:00:0", out, re.S).groups()
    assert text
    assert 0 <= float(start) < 5


def test_command_line_examples_run_as_printed(desk: Path) -> None:
    lines = [line.partition("#")[0].split() for line in re.findall(r"^w2vc .*", README, re.M)]
    commands = {line[1]: line[2:] for line in lines}
    assert set(commands) == {
        "transcribe",
        "info",
        "convert",
        "evaluate",
        "pretrain",
        "finetune",
        "demo",
        "explore",
        "export",
        "bench",
    } & set(commands)
    assert len(commands) >= 5
    program = [sys.executable, "-m", "w2vc.cli"]
    for name in commands:
        run(*program, name, "--help", cwd=desk)
    assert run(*program, "transcribe", "talk.flac", cwd=desk)  # by the demo checkpoint
    said = run(*program, "transcribe", *commands["transcribe"], cwd=desk)
    assert [line.split("\t")[0] for line in said.splitlines()] == ["talk.flac", "recordings/a.wav"]
    assert "Wav2Vec2ConformerForCTC" in run(*program, "info", *commands["info"], cwd=desk)
    for name in ("pretrain", "finetune"):
        run(*program, name, *commands[name], "--dry-run", cwd=desk)


def test_tables_list_every_chapter_with_its_kind_its_minutes_and_a_measured_time() -> None:
    found: list[str] = []
    for kind in book.KINDS:
        (rows,) = re.findall(rf"^\| {kind} \|.*\n\|[-| ]+\n((?:\|.*\n)+)", README, re.M)
        times = re.findall(r"^\| \[[^]]+\]\(nbs/(\S+)\.ipynb\).*\| (\d+) min \| (\d+) s \|", rows, re.M)
        assert [name for name, *_ in times] == [name for part in book.parts(kind).values() for name in part]
        for name, minutes, seconds in times:
            assert abs(int(minutes) - book.minutes(name)) <= 10, f"{name}: run make readme"
            assert 0 < int(seconds) <= 60, name
            found.append(name)
        assert re.findall(r"^\| \*\*(.+?)\*\* \|", rows, re.M) == list(book.parts(kind))
    assert found == book.chapters()


def test_speed_has_five_rows_at_most() -> None:
    (rows,) = re.findall(r"<!-- speed: make readme -->\n\|.*\n\|.*\n((?:\|.*\n)+)", README)
    assert 1 <= len(rows.splitlines()) <= 5


def test_readme_and_start_send_a_reader_the_same_way() -> None:
    first, second = book.chapters()[:2]
    assert f"Start with [{first}](nbs/{first}.ipynb) and follow *Next*" in README
    assert "Read the spine; open the library when you need it." in README
    last = book.texts(first)[-1]
    assert re.findall(r"\]\(([^)]+)\.ipynb\)", last.partition("Next:")[2])[:1] == [second]


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for alt in re.findall(r"!\[([^\]]*)\]", README):
        assert alt


def test_commands_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", README, re.M)
    assert {"book", "test", "lab", "chapter"} <= {a or b for a, b in named} <= targets
