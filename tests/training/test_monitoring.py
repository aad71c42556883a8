"""Monitoring: sums against plain counting, and alarms that ring for what they are for, and for nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from helpers import tiny_config
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining
from w2vc.training.demo import demo_curves
from w2vc.training.monitoring import (
    ALARMS,
    choice_sums,
    code_sums,
    compare_with_bands,
    describe_codes,
    diversity_share,
    find_alarms,
    gradient_norms,
    healthy_bands,
    perplexity,
    stored_bands,
)


def test_code_sums_count_hidden_frames_alone() -> None:
    scores, mask = torch.randn(2, 7, 3, 5), torch.rand(2, 7) < 0.5
    sums = code_sums(scores, mask)
    hard, soft = torch.zeros(3, 5), torch.zeros(3, 5)
    for b, t in mask.nonzero().tolist():
        for g in range(3):
            hard[g, scores[b, t, g].argmax()] += 1
            soft[g] += scores[b, t, g].softmax(-1)
    assert torch.equal(sums["hard"], hard)
    torch.testing.assert_close(sums["soft"], soft)
    assert float(sums["frames"]) == int(mask.sum())


def test_perplexity_of_known_counts() -> None:
    counts = torch.tensor(
        [[5.0, 5.0, 5.0, 5.0], [9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [3.0, 3.0, 0.0, 0.0]]
    )
    torch.testing.assert_close(perplexity(counts), torch.tensor([4.0, 1.0, 1.0, 2.0]))


def test_choice_sums_equal_a_loop() -> None:
    B, T, N = 2, 9, 6
    states, targets = torch.randn(B, T, 4), torch.randn(B, T, 4)
    states = states + targets  # some targets are found
    codes = torch.randint(0, 2, (B, T, 2))
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, :6] = mask[1, 3:7] = True
    home = [mask[b].nonzero()[:, 0] for b in range(B)]
    negatives = torch.stack([b * T + home[b][torch.randint(0, len(home[b]), (T, N))] for b in range(B)])
    sums = choice_sums(states, targets, negatives, mask, codes, 0.1)
    hits = duplicates = 0
    for b, t in mask.nonzero().tolist():
        wrong = [int(i) % T for i in negatives[b, t]]
        duplicates += sum(bool((codes[b, i] == codes[b, t]).all()) for i in wrong)
        cosine = torch.nn.functional.cosine_similarity
        rivals = [
            cosine(states[b, t], targets[b, i], 0) for i in wrong if not (codes[b, i] == codes[b, t]).all()
        ]
        hits += all(cosine(states[b, t], targets[b, t], 0) > rival for rival in rivals)
    assert {k: float(v) for k, v in sums.items()} == {
        "questions": 10,
        "hits": hits,
        "answers": 60,
        "twins": duplicates,
    }
    assert 0 < hits < 10
    assert duplicates


def test_a_tie_is_no_hit() -> None:
    """A collapsed model whose states are all alike has learned nothing, and scores nothing."""
    alike, codes = torch.ones(1, 4, 3), torch.arange(4).view(1, 4, 1)
    negatives = torch.tensor([[[1, 2], [2, 3], [3, 0], [0, 1]]])
    sums = choice_sums(alike, alike, negatives, torch.ones(1, 4, dtype=torch.bool), codes, 0.1)
    assert (sums["hits"], sums["questions"], sums["twins"]) == (0, 4, 0)


def test_figures_of_a_dead_codebook() -> None:
    one = torch.zeros(2, 8)
    one[:, 3] = 50.0
    sums = {"soft": one, "hard": one, "frames": torch.tensor(50.0), "questions": torch.tensor(50.0)}
    sums |= {"hits": torch.tensor(50.0), "answers": torch.tensor(500.0), "twins": torch.tensor(500.0)}
    figures = describe_codes(sums)
    assert figures["accuracy"] == 1.0  # the collapse looks perfect …
    assert figures["twins"] == 1.0
    assert figures["dead_codes"] == 14
    assert figures["score"] == pytest.approx((2 / 16) ** 2)  # … but not to the score


def test_gradient_norms_per_block_add_up() -> None:
    model = Wav2Vec2ConformerForPreTraining(tiny_config(layerdrop=0.0))
    output = model.train()(torch.randn(1, 16_000), mask_time_indices=torch.ones(1, 49, dtype=torch.bool))
    (output.projected_states.square().sum() + output.projected_quantized_states.sum()).backward()
    norms = gradient_norms(model)
    assert {
        "features",
        "projection",
        "mask",
        "layer 0",
        "layer 1",
        "quantizer",
        "project_hid",
        "project_q",
    } <= set(norms)
    total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert math.sqrt(sum(n**2 for n in norms.values())) == pytest.approx(float(total), rel=1e-5)
    assert gradient_norms(torch.nn.Linear(2, 2)) == {}


def test_diversity_share() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    one, other = (weight * 3).sum(), weight.sum()
    assert diversity_share(one, other, weight) == pytest.approx(0.25)
    assert diversity_share(one, other * 0, weight) == 0.0


def a_run(n: int = 60, **curves: Any) -> list[dict[str, Any]]:
    """Records of a run; a figure is a number or a function of progress."""
    healthy = {
        "loss": lambda x: 4 - 1.6 * x, "accuracy": lambda x: 0.02 + 0.4 * x, "used": lambda x: 0.9 - 0.3 * x * (1 - x),
        "twins": lambda x: 0.01 + 0.02 * x, "gradient": lambda x: 1 - 0.5 * x, "feature_energy": lambda x: 0.3 + x,
    }  # fmt: skip
    figures = {**healthy, **curves}
    return [
        {
            "kind": "train",
            "step": 10 * (i + 1),
            **{k: f(i / n) if callable(f) else f for k, f in figures.items()},
        }
        for i in range(n)
    ]


def test_a_healthy_run_is_left_in_peace_at_every_moment() -> None:
    records = a_run()
    assert not [alarm for i in range(1, 61) for alarm in find_alarms(records[:i], 600, 1 / 51)]


@pytest.mark.parametrize(
    ("name", "curves"),
    [
        ("collapse", {"used": lambda x: 0.9 - 0.75 * x, "accuracy": lambda x: 0.02 + 0.6 * x}),
        ("collapse", {"twins": lambda x: 0.2 * x}),
        ("divergence", {"loss": lambda x: 4 - 2 * x if x < 0.5 else 3 + 6 * (x - 0.5)}),
        ("divergence", {"gradient": lambda x: 1 if x < 0.9 else 50}),
        ("not learning", {"accuracy": 0.021}),
        ("not learning", {"accuracy": None, "blanks": 0.999}),
        ("features grow", {"feature_energy": lambda x: 0.4 * 300**x}),
    ],
)
def test_alarms_ring(name: str, curves: dict[str, Any]) -> None:
    alarms = find_alarms(a_run(**curves), 600, 1 / 51)
    assert [alarm.name for alarm in alarms] == [name]
    text = str(alarms[0])
    assert ALARMS[name][0] in text
    assert ALARMS[name][1] in text
    assert "at step 600" in text


def test_overfitting_needs_three_bad_evaluations() -> None:
    def valid(step: int, loss: float) -> dict[str, Any]:
        return {"kind": "valid", "step": step, "loss": loss}

    records = a_run()
    good = [*records, *(valid(10 * i, 3 - 0.1 * i) for i in range(6))]
    assert not find_alarms(good, 600)
    bad = [*records, *(valid(10 * i, loss) for i, loss in enumerate((3.0, 2.5, 2.9, 3.0, 3.1)))]
    assert [alarm.name for alarm in find_alarms(bad, 600)] == ["overfitting"]


def test_bands_hold_their_own_runs_and_no_collapse() -> None:
    runs = [a_run(), a_run(accuracy=lambda x: 0.02 + 0.5 * x)]
    bands = healthy_bands(runs, points=20, name="demo")
    assert bands["steps"][-1] == 600
    for run in runs:
        assert set(compare_with_bands(run, bands).values()) == {0.0}
    outside = compare_with_bands(a_run(used=lambda x: 0.9 - 0.75 * x), bands)
    assert outside["used"] > 0.4
    assert outside["accuracy"] == 0.0
    early = compare_with_bands(a_run()[:15], bands)  # a run that has only begun is compared as far as it came
    assert early["used"] == 0.0


def test_bands_are_as_dense_as_the_log() -> None:
    early, late = a_run(), a_run(n=10, loss=2.0)
    run = [
        *early[:10],
        *({**r, "step": 100 + 50 * r["step"] // 10} for r in late),
    ]  # 10, 20, … 100, 150, … 600
    bands = healthy_bands([run], points=100)
    assert bands["steps"] == [r["step"] for r in run]
    assert (
        healthy_bands([run], points=10)["steps"] == bands["steps"][1::2]
    )  # at most so many, and the last one
    odd = [{**r, "loss": r["loss"] + 9 * (r["step"] == 150)} for r in run]
    assert compare_with_bands(odd, bands)["loss"] == pytest.approx(
        2 / 20
    )  # it touches its own point and the next


def test_the_demo_run_is_inside_its_bands_and_the_collapse_is_not() -> None:
    bands = stored_bands("demo_pretrain")
    assert bands == healthy_bands([demo_curves("pretraining")], margin=0.2, name="demo_pretrain")
    inside = compare_with_bands(demo_curves("pretraining"), bands)
    assert set(inside) == {"loss", "accuracy", "used", "twins", "gradient", "feature_energy", "temperature"}
    assert set(inside.values()) == {0.0}
    outside = compare_with_bands(demo_curves("collapse"), bands)
    assert outside["used"] == outside["twins"] == 1.0
    assert outside["accuracy"] > 0.5
    assert outside["temperature"] == 0.0  # the schedule is the same
