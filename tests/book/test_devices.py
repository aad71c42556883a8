"""Every chapter that trains or runs a trained model chooses the device once, and computes there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import book

CHAPTERS = [
    "00_start",
    "01_skeleton",
    "model/conformer",
    "model/pretraining",
    "model/ctc",
    "model/classification",
    "model/speaker",
    "training/trainer",
    "training/distributed",
    "training/demo",
    "text/decoding",
    "text/alignment",
    "text/transcription",
    "evaluation/reports",
    "evaluation/probes",
    "explore/attention",
    "explore/codevectors",
    "explore/tracing",
    "explore/views",
    "explore/faults",
]
TESTS = book.ROOT / "tests"
on_every = pytest.mark.parametrize("name", CHAPTERS)


def code(name: str) -> str:
    """All cells of a chapter that do not go into the package."""
    cells = nbformat.read(book.path_of(name), as_version=4).cells
    return "\n".join(
        c.source for c in cells if c.cell_type == "code" and not c.source.startswith("#| export")
    )


@on_every
def test_the_device_is_chosen_once(name: str) -> None:
    assert len(re.findall(r"^device = best_device\(\)$", code(name), re.MULTILINE)) == 1
    assert code(name).count("best_device()") == 1
    assert not re.search(r"""["']cuda|\.cuda\(""", code(name)), "the switch names the device, not the chapter"


@on_every
def test_every_demo_model_goes_to_the_device(name: str) -> None:
    """A model that only lends its weights may stay."""
    calls = re.findall(r"load_demo\([^()]*\)\S{0,24}", code(name))
    assert [c for c in calls if "device=device" not in c and ".base_model.state_dict" not in c] == []


def environment(folder: Path | None = None) -> dict[str, str]:
    """Of a process that starts with the stand-in device; with `folder`, each IPython kernel does."""
    if folder is not None:
        startup = folder / "profile_default" / "startup"
        startup.mkdir(parents=True)
        lines = (
            "import sys",
            f"sys.path.insert(0, {str(TESTS)!r})",
            "import fake_device",
            "fake_device.start()",
        )
        (startup / "00-device.py").write_text("\n".join(lines), encoding="utf-8")
    return {**os.environ, "W2VC_DEVICE": "lazy", **({"IPYTHONDIR": str(folder)} if folder else {})}


def python(program: str) -> subprocess.CompletedProcess[str]:
    start = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import fake_device; fake_device.start()\n"
    command = [sys.executable, "-c", start + program]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )


def test_the_stand_in_raises_where_a_gpu_would() -> None:
    done = python("""
import torch
away, here = torch.ones(3).to("lazy"), torch.ones(3)
assert (away + 1).cpu().tolist() == [2, 2, 2] and away.sum().item() == 3
assert (torch.tensor(2.0) * away).device.type == "lazy"  # a number of the CPU may meet it
for wrong in (lambda: away + here, lambda: here * away.sum(), lambda: here[away.bool()], lambda: away.numpy()):
    try:
        wrong()
    except (RuntimeError, TypeError):
        continue
    raise AssertionError("passed")
""")
    assert done.returncode == 0, done.stderr


def test_the_skeleton_trains_and_listens_on_another_device() -> None:
    done = python("""
from w2vc.data.corpus import load_speech
from w2vc.files.pretrained import best_device
from w2vc.skeleton import listen, long_clips, make_skeleton, train
clips, here = long_clips(load_speech("builtin")), make_skeleton(long_clips(load_speech("builtin")))
there = make_skeleton(clips).to(best_device())
assert there.hidden.device.type == "lazy"
for game in train(there, clips, steps=2):
    assert {value.device.type for value in game} == {"cpu"}
vectors, codes, phones = listen(there, load_speech("builtin", "test")[:2])
assert vectors.device.type == codes.device.type == "cpu" and len(vectors) == len(codes) == len(phones)
""")
    assert done.returncode == 0, done.stderr


def execute(name: str, folder: Path, env: dict[str, str]) -> None:
    command = [sys.executable, "docs/execute.py", f"nbs/{name}.ipynb", "--out", str(folder / "out.ipynb")]
    done = subprocess.run(command, cwd=book.ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@on_every
def test_the_chapter_runs_on_the_stand_in_device(name: str, tmp_path: Path) -> None:
    execute(name, tmp_path, environment(tmp_path / "ipython"))


@pytest.mark.gpu
@on_every
def test_the_chapter_runs_on_a_gpu(name: str, tmp_path: Path) -> None:
    execute(name, tmp_path, {key: value for key, value in os.environ.items() if key != "W2VC_DEVICE"})
