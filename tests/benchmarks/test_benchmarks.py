"""The benchmark: figures are worked out rightly, sides that differ get no ratio, and children say what they cannot hold."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import rows, run
from benchmarks.rows import ROWS, Goal, Setting

ROOT = Path(__file__).parents[2]
TINY = Setting(size="tiny")


def made_up(difference: float | None = 0.0, **goal: float) -> dict[str, Any]:
    """A row whose fast forms take 2 s and 1 GB, the plain ones 4 s and 2 GB, and the peer 5 s and 4 GB."""
    sides = {"plain": (4.0, 2), "fast": (2.0, 1), "peer": (5.0, 4)}
    row: dict[str, Any] = {
        name: {"seconds": seconds, "spread": 0.5, "memory": memory * 10**9, "share": 0.9, "failed": ""}
        for name, (seconds, memory) in sides.items()
    }
    texts = {"name": "row", "title": "a row", "parent": None}
    return row | texts | {"goal": vars(Goal(**goal)), "difference": difference, "tolerance": 1e-5}


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        ({"ratio": 2.5}, True), ({"ratio": 2.6}, False), ({"memory": 0.25}, True), ({"memory": 0.24}, False),
        ({"plain_ratio": 1.25}, True), ({"plain_ratio": 1.26}, False), ({"plain_memory": 0.5}, True),
        ({"ratio": 2.5, "plain_memory": 0.49}, False), ({"share": 0.95}, False), ({"ratio": 1, "share": 0.9}, True),
        ({"gigabytes": 1.0}, True), ({"gigabytes": 0.9}, False), ({}, None),
    ],
)  # fmt: skip
def test_verdict(goal: dict[str, float], met: bool | None) -> None:
    row = run.judge(made_up(**goal))
    assert row["ratios"] == {"plain": 1.25, "fast": 2.5}
    assert row["memories"] == {"plain": 0.5, "fast": 0.25}
    assert row["met"] is met


@pytest.mark.parametrize("difference", [1.1e-5, math.inf, math.nan])
def test_outputs_that_differ_get_no_ratio(difference: float) -> None:
    row = run.judge(made_up(difference, ratio=1))
    assert row["ratios"] == row["memories"] == {}
    assert row["met"] is False
    assert "outputs differ" in row["note"]
    assert "2.5" not in run.write_table({"rows": [row]}).splitlines()[-1]


def test_without_a_peer_a_ratio_is_open_and_a_missed_bound_is_missed() -> None:
    assert run.judge(made_up(ratio=2, gigabytes=4) | {"peer": None})["met"] is None
    assert run.judge(made_up(ratio=2, gigabytes=0.5) | {"peer": None})["met"] is False


def test_a_peer_that_does_not_fit_leaves_our_own_goals() -> None:
    row = run.judge(made_up(gigabytes=4) | {"peer": {"failed": "does not fit (more than 12 GB)"}})
    assert (row["ratios"], row["met"]) == ({}, True)
    assert "does not fit (more than 12 GB)" in run.write_table({"rows": [row]})


def test_median_and_spread() -> None:
    answers = [{"cpu": x, "seconds": 2 * x, "memory": 5 * x} for x in (5.0, 1.0, 2.0, 3.0, 99.0)]
    side: dict[str, Any] = {"flops": 6}
    run.sum_up(side, answers, 2.0, "cpu")
    assert (side["seconds"], side["spread"], side["wall"], side["memory"], side["share"]) == (
        3.0,
        3.0,
        6.0,
        495,
        1.0,
    )


def test_difference_of_outputs() -> None:
    ours = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([10.0])}
    theirs = {"a": torch.tensor([1.0, 2.5]), "b": torch.tensor([10.0])}
    assert run.difference(ours, theirs) == pytest.approx(0.2)
    assert run.difference({"a": torch.tensor([math.nan])}, {"a": torch.tensor([1.0])}) == math.inf
    for other in ({"a": torch.zeros(2)}, {"c": torch.zeros(2), "b": torch.zeros(1)}):
        with pytest.raises(ValueError, match="names or shapes"):
            run.difference(ours, other)


def test_operations_are_those_of_the_formulas() -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 7, requires_grad=True)
    assert run.count_flops(lambda: (a @ b).sum().backward())[1] == 2 * (2 * 3 * 5 * 7)
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert run.count_flops(lambda: attention(q, q, q).sum().backward())[1] == 7 * (2 * 2 * 16 * 16 * 8)
    assert 1e7 < run.product_rate(torch.float32, "cpu") < 1e15


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.peer == "transformers"])
def test_all_sides_of_a_row_compute_the_same(name: str) -> None:
    outputs = {}
    for side in (*ROWS[name].sides, "peer"):
        work = ROWS[name].make(side, TINY)
        outputs[side] = {key: value.detach().float() for key, value in (work.check or work.call)().items()}
    assert run.difference(outputs["fast"], outputs["peer"]) <= ROWS[name].tolerance
    if "plain" in outputs:
        bound = ROWS[name].tolerance if math.isfinite(ROWS[name].tolerance) else 5e-5
        assert run.difference(outputs["fast"], outputs["plain"]) <= bound


def test_a_row_notices_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ROWS["utterance"].make("fast", TINY).call()
    monkeypatch.setattr(rows.nn.Module, "named_buffers", lambda self: [])
    assert run.difference(ours, ROWS["utterance"].make("peer", TINY).call()) > ROWS["utterance"].tolerance


def test_children_take_turns_and_an_older_version_is_measured_beside(tmp_path: Path) -> None:
    """The older version is found by its folder; here it is this one again."""
    (tmp_path / "w2vc").symlink_to(ROOT / "w2vc", target_is_directory=True)
    row = run.measure(ROWS["loss-8x10"], TINY, parent=str(tmp_path), repeats=2)
    for side in ("fast", "peer", "parent"):
        assert row[side]["failed"] == ""
        assert len(row[side]["samples"]) == 2
        assert min(row[side][key] for key in ("seconds", "wall", "flops", "share")) > 0
    assert set(row["ratios"]) == {"fast", "parent"}
    assert row["ratios"]["fast"] == pytest.approx(row["peer"]["seconds"] / row["fast"]["seconds"], rel=1e-2)
    assert row["difference"] <= row["tolerance"]
    assert "parent" in run.write_table({"rows": [row]}).splitlines()[0]


def test_the_command_writes_a_file_and_keeps_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cpu.json"
    path.write_text((ROOT / "docs" / "benchmarks" / "cpu.json").read_text())
    before = json.loads(path.read_text())
    run.main(["loss-8x10", "--tiny", "--json", str(path)])
    after = json.loads(path.read_text())
    assert [row["name"] for row in after["rows"]] == [row["name"] for row in before["rows"]]
    assert after["rows"][1:] == before["rows"][1:]
    assert after["growth"] == before["growth"]
    assert after["rows"][0]["fast"]["seconds"] < before["rows"][0]["fast"]["seconds"]
    assert "quantizer + contrastive loss" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main(["uterance"])
    assert "the nearest is 'utterance'" in capsys.readouterr().err


def test_what_does_not_fit_is_said() -> None:
    row = run.measure(
        replace(ROWS["minutes-10"], sides=("fast",)), Setting(size="tiny", limit=0.001), repeats=1
    )
    assert row["fast"]["seconds"] > 0
    assert row["peer"]["failed"] == "does not fit (more than 0.001 GB)"
    assert row["ratios"] == {}
    assert row["met"] is True  # the goal is our own memory


def test_the_limit_ends_an_allocation_and_not_the_process() -> None:
    code = (
        "import torch; from benchmarks.run import limit_memory, is_out_of_memory; limit_memory(0.1, 'cpu')\n"
        "torch.ones(1_000_000)\n"
        "try: torch.ones(100_000_000)\n"
        "except RuntimeError as error: print(is_out_of_memory(error))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "True", done.stderr
    assert not run.is_out_of_memory(ValueError("shape"))


def test_the_readme_shows_the_committed_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    report = json.loads((ROOT / "docs" / "benchmarks" / "cpu.json").read_text())
    shown = runpy.run_path(str(ROOT / "docs" / "readme.py"))["SHOWN"]
    for line in run.write_table(report, shown).splitlines():
        assert line in (ROOT / "README.md").read_text(), "run `make readme`"


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.device == "cuda"])
def test_gpu_rows_run(name: str) -> None:
    row = run.measure(ROWS[name], Setting(device="cuda", size="tiny"), repeats=1)
    assert row["fast"]["failed"] == ""
