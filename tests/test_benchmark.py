"""The benchmark: figures are worked out rightly, sides that differ get no ratio, and children report what they cannot hold."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from w2vc import benchmark
from w2vc.benchmark import (
    ROWS,
    BenchmarkReport,
    Goal,
    Measured,
    Setting,
    Side,
    Switchable,
    count_flops,
    difference_of_outputs,
    extrapolate,
    find_rows,
    fit_exponents,
    judge,
    list_rows,
    matmul_peak,
    measure_row,
    middle,
    plot_growth,
    plot_ratios,
    readme_table,
    run_benchmarks,
)


def made_up(goal: Goal, *, difference: float | None = 0.0, **about: float) -> Measured:
    ours = Side(seconds=2.0, spread=0.5, memory=10**9, share=0.9, samples=[2.0])
    plain = Side(seconds=4.0, memory=2 * 10**9)
    peer = Side(seconds=5.0, spread=0.1, memory=4 * 10**9, share=0.5, samples=[5.0], mode="eager")
    return Measured(
        "row", "a row", goal, plain, ours, peer, difference=difference, tolerance=1e-5, about=about
    )


def test_kernels_that_are_tried() -> None:
    for side in ("plain", "ours"):
        assert Switchable(None, side, compiled=False).modes == ["sdpa"]
        assert Switchable(None, side, compiled=True).modes == ["sdpa"]
    assert Switchable(None, "peer", compiled=True).modes == ["eager", "sdpa", "sdpa, compiled"]


def test_median_and_spread() -> None:
    assert middle([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, 2.0)
    assert middle([1.0, 1.0, 1.0, 1.0, 99.0]) == (1.0, 0.0)
    assert middle([7]) == (7.0, 0.0)
    with pytest.raises(ValueError, match="values is empty"):
        middle([])


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal("", ratio=2.5), True),
        (Goal("", ratio=2.6), False),
        (Goal("", memory=0.25), True),
        (Goal("", memory=0.24), False),
        (Goal("", plain_ratio=1.25), True),
        (Goal("", plain_ratio=1.26), False),
        (Goal("", plain_memory=0.5), True),
        (Goal("", ratio=2.5, plain_memory=0.49), False),
        (Goal("", share=0.95), False),
        (Goal("", ratio=1, share=0.9), True),
        (Goal("", gigabytes=1.0), True),
        (Goal("", gigabytes=0.9), False),
        (Goal("measured"), None),
    ],
)
def test_verdict(goal: Goal, met: bool | None) -> None:
    row = judge(made_up(goal))
    assert row.ratios == {"plain": 1.25, "ours": 2.5}
    assert row.memories == {"plain": 0.5, "ours": 0.25}
    assert row.met is met


@pytest.mark.parametrize("difference", [1.1e-5, math.inf, math.nan])
def test_outputs_that_differ_get_no_ratio(difference: float) -> None:
    row = judge(made_up(Goal("", ratio=1), difference=difference))
    assert row.ratios == row.memories == {}
    assert row.met is False
    assert "outputs differ" in row.note
    assert "2.5" not in readme_table(BenchmarkReport({}, [row])).splitlines()[-1]


def test_without_a_peer_a_ratio_is_open_and_a_missed_bound_is_missed() -> None:
    row = made_up(Goal("", ratio=2, gigabytes=4))
    row.peer = None
    assert judge(row).met is None
    row.goal = Goal("", ratio=2, gigabytes=0.5)
    assert judge(row).met is False


def test_a_peer_that_does_not_fit_leaves_our_own_goals() -> None:
    row = made_up(Goal("", gigabytes=4))
    row.peer = Side(failed="does not fit (58 GB predicted, 12 GB allowed)")
    judge(row)
    assert (row.ratios, row.met) == ({}, True)
    assert "does not fit (58 GB" in readme_table(BenchmarkReport({}, [row]))


def test_difference_of_outputs() -> None:
    ours = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([10.0])}
    theirs = {"a": torch.tensor([1.0, 2.5]), "b": torch.tensor([10.0])}
    assert difference_of_outputs(ours, theirs) == pytest.approx(0.2)
    assert difference_of_outputs({"a": torch.tensor([math.nan])}, {"a": torch.tensor([1.0])}) == math.inf
    with pytest.raises(ValueError, match="shapes differ"):
        difference_of_outputs({"a": torch.zeros(2)}, {"a": torch.zeros(3)})
    with pytest.raises(ValueError, match="differ in name"):
        difference_of_outputs({"a": torch.zeros(2)}, {"b": torch.zeros(2)})


def test_flops_are_those_of_the_formulas() -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 7, requires_grad=True)
    assert count_flops(lambda: a @ b)[1] == 2 * 3 * 5 * 7
    assert count_flops(lambda: (a @ b).sum().backward())[1] == 2 * (2 * 3 * 5 * 7)
    q = torch.randn(1, 2, 16, 8, requires_grad=True)

    def attend() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    products = 2 * 2 * 16 * 16 * 8
    assert count_flops(attend)[1] == 2 * products
    assert count_flops(lambda: attend().sum().backward())[1] == 7 * products


def test_a_parabola_is_found_again() -> None:
    held = [3 + 2 * x + 5 * x**2 for x in (1, 2, 4)]
    assert extrapolate([1, 2, 4], held, 100) == pytest.approx(3 + 200 + 50_000)
    assert extrapolate([1, 2, 4], [1.0, 1.9, 3.0], 40) == pytest.approx(
        30
    )  # bent downwards: the line through 0


def test_exponents_of_each_region() -> None:
    x = [1, 2, 4, 8, 16, 32]
    y = [v if v <= 8 else v**2 / 8 for v in x]
    (_, _, low), (_, _, high) = fit_exponents(x, y, (1, 8, 32))
    assert (low, high) == pytest.approx((1, 2))
    assert fit_exponents([1, 2], [1, 0], (1, 2)) == []


def test_the_product_rate_is_counted_in_operations_per_second() -> None:
    assert 1e7 < matmul_peak([(64, 64, 64)], seconds=0.01) < 1e15


def test_an_unknown_row_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no row 'uterance'; the nearest is 'utterance'"):
        run_benchmarks(["uterance"], progress=False)
    assert [row.name for row in find_rows(["step", "beam"])] == ["step", "beam"]
    assert [row.name for row in find_rows(None)] == list_rows()


@pytest.mark.parametrize("wrong", [{"against": "fairseq"}, {"device": "tpu"}, {"size": "huge"}])
def test_wrong_arguments_are_named(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        run_benchmarks(["beam"], progress=False, **wrong)


BOTH = [name for name, row in ROWS.items() if row.peer == "transformers"]


@pytest.mark.parametrize("name", BOTH)
def test_all_sides_of_a_row_compute_the_same(name: str, tmp_path: Path) -> None:
    row, outputs = ROWS[name], {}
    for side in ("plain", "ours", "peer") if row.forms else ("ours", "peer"):
        work = row.make(side, Setting(size="tiny", folder=str(tmp_path)))
        checked = (work.check or work.call)()
        assert checked, "a row compares something"
        outputs[side] = {key: value.detach().float() for key, value in checked.items()}
        work.call()
    assert difference_of_outputs(outputs["ours"], outputs["peer"]) <= row.tolerance
    if row.forms:
        bound = row.tolerance if math.isfinite(row.tolerance) else 5e-5
        assert difference_of_outputs(outputs["ours"], outputs["plain"]) <= bound


@pytest.mark.parametrize("name", ["utterance", "step"])
def test_a_row_notices_other_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ROWS[name].make("ours", Setting(size="tiny"))
    monkeypatch.setattr(benchmark, "_disturb", lambda model: None)
    other = ROWS[name].make("peer", Setting(size="tiny"))
    found = [{k: v.detach() for k, v in (work.check or work.call)().items()} for work in (ours, other)]
    assert difference_of_outputs(*found) > ROWS[name].tolerance


@pytest.mark.parametrize("name", ["beam", "loading", "import"])
def test_rows_with_a_peer_of_their_own_run(name: str, tmp_path: Path) -> None:
    for side in ("ours", "peer") if ROWS[name].peer else ("ours",):
        assert ROWS[name].make(side, Setting(size="tiny", folder=str(tmp_path))).call()


def test_two_children_take_turns_and_the_file_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "figures" / "cpu.json"
    report = run_benchmarks(
        ["loss-4x5"], against="transformers", size="tiny", threads=1, out=path, progress=False
    )
    (row,) = report.rows
    assert row.ours is not None
    assert row.peer is not None
    for side in (row.ours, row.peer):
        assert side.failed == ""
        assert len(side.samples) == 2
        assert min(side.seconds, side.wall, side.flops, side.share) > 0
    assert row.ratios == {"ours": pytest.approx(row.peer.seconds / row.ours.seconds, rel=1e-3)}
    assert row.difference is not None
    assert row.difference <= row.tolerance
    assert report.machine["threads"] == 1
    assert readme_table(BenchmarkReport.load(path)) == readme_table(report) == str(report)
    again = run_benchmarks(["gpu-step"], size="tiny", out=path, progress=False)  # what the file had, stays
    if not torch.cuda.is_available():
        assert [r.name for r in again.rows] == ["loss-4x5", "gpu-step"]
        assert "needs a CUDA device" in readme_table(BenchmarkReport.load(path))


def test_an_older_version_is_measured_beside(tmp_path: Path) -> None:
    """It is found by its folder and runs its own program; here it is this version again."""
    root = Path(benchmark.__file__).parent.parent
    setting = Setting(size="tiny", parent=str(root))
    row = measure_row(ROWS["loss-4x5"], setting, against=True, repeats=1)
    assert row.parent is not None
    assert row.parent.failed == ""
    assert set(row.ratios) == {"ours", "parent"}
    table = readme_table(BenchmarkReport({}, [row])).splitlines()
    assert "parent" in table[0]
    assert row.difference is not None
    assert row.difference <= row.tolerance


def test_what_does_not_fit_is_said_with_its_size() -> None:
    row = measure_row(ROWS["minutes-10"], Setting(size="tiny", limit=0.004), repeats=1)
    assert row.ours is not None
    assert row.ours.seconds > 0
    assert row.peer is not None
    assert row.peer.failed.startswith("does not fit (")
    assert row.ratios == {}
    assert row.met is True  # the goal is our own memory


def test_the_limit_ends_an_allocation_and_not_the_process() -> None:
    code = (
        "import torch; from w2vc.benchmark import limit_memory, is_out_of_memory; limit_memory(0.1)\n"
        "torch.ones(1_000_000)\n"
        "try: torch.ones(100_000_000)\n"
        "except RuntimeError as error: print(is_out_of_memory(error))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr
    assert not benchmark.is_out_of_memory(ValueError("shape"))


def test_a_child_that_breaks_is_reported_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    row = measure_row(ROWS["greedy"], Setting(size="nonsense"), against=False, repeats=1)
    assert row.ours is not None
    assert "failed: KeyError" in row.ours.failed
    assert row.met is False


def test_pictures_of_a_report() -> None:
    points = [{"x": x, "seconds": 0.1 * x, "cpu": 0.1 * x, "memory": 1e6 * x**2} for x in (1, 10, 60, 600)]
    lost = {"peer": {"x": 600, "why": "does not fit (58 GB predicted)", "memory": 58e9}}
    growth = {"length": {"ours": points, "peer": points[:3], "not fitting": lost}, "batch": {"ours": points}}
    axes = plot_growth(growth).axes
    assert [ax.get_xscale() for ax in axes] == ["log", "log"]
    assert any("predicted" in text.get_text() for text in axes[1].get_legend().get_texts())
    assert plot_growth(growth, "batch", (1, 10, 600)).axes
    (ax,) = plot_ratios(BenchmarkReport({}, [judge(made_up(Goal("", ratio=2)))])).axes
    assert [text.get_text() for text in ax.texts] == ["2.5x"]


def test_nothing_of_the_model_needs_the_benchmark() -> None:
    package = Path(benchmark.__file__).parent
    users = [
        p.stem
        for p in package.glob("*.py")
        if ".benchmark import" in p.read_text() or "import benchmark" in p.read_text()
    ]
    assert set(users) <= {"cli"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpu-inference", "gpu-step", "gpu-minutes"])
def test_gpu_rows_run(name: str) -> None:  # their CPU siblings: test_both_sides_of_a_row_compute_the_same
    row = measure_row(ROWS[name], Setting(device="cuda", size="tiny"), repeats=1)
    assert row.ours is not None
    assert row.ours.failed == ""
    assert row.ours.memory > 0
