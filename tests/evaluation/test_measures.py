"""The measures chapter: every measure against a slow plain one, and intervals that cover."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from w2vc.data.corpus import Segment
from w2vc.evaluation import measures as M

pytest.importorskip("jiwer")
pytest.importorskip("scipy")
quick = settings(max_examples=50, deadline=None)
words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6).map(" ".join)


def distance(a: list[str], b: list[str]) -> int:
    """Fewest edits, cell by cell."""
    cost = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i, j in itertools.product(range(1, len(a) + 1), range(1, len(b) + 1)):
        other = cost[i - 1, j - 1] + (a[i - 1] != b[j - 1])
        cost[i, j] = min(other, cost[i - 1, j] + 1, cost[i, j - 1] + 1)
    return cost[len(a), len(b)]


# ------------------------------------------------------------------------------------------ word error rate


@quick
@given(st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_edits_are_the_fewest_and_add_up(pairs: list[tuple[str, str]]) -> None:
    references, hypotheses = ([pair[side] for pair in pairs] for side in (0, 1))
    for unit, part in (("word", str.split), ("char", list)):
        counts = M.count_edits(references, hypotheses, unit)
        assert [c.errors for c in counts] == [distance(part(a), part(b)) for a, b in pairs]
        assert [c.length for c in counts] == [len(part(a)) for a, _ in pairs]
        assert [c.hits + c.substitutions + c.insertions for c in counts] == [len(part(b)) for _, b in pairs]
    assert M.word_error_rate(references, hypotheses) == sum(
        M.count_edits(references, hypotheses), M.EditCounts()
    )


def test_the_rate_of_a_set_is_not_the_mean_of_rates() -> None:
    references, hypotheses = ["a b c d e f g h", "x"], ["a b c d e f g h", "y z"]
    total = M.word_error_rate(references, hypotheses)
    assert (total.errors, total.length, float(total)) == (2, 9, 2 / 9)
    assert np.mean([c.rate for c in M.count_edits(references, hypotheses)]) == 1.0
    assert M.word_error_rate("a b", "a c").substitutions == 1


def test_empty_references() -> None:
    assert M.word_error_rate(["", "a"], ["b c", "a"]) == M.EditCounts(1, 0, 0, 2)
    assert float(M.word_error_rate("", "b")) == math.inf
    assert float(M.word_error_rate([], [])) == float(M.word_error_rate("", "")) == 0.0
    assert M.character_error_rate("a b", "a  b").errors == 0  # the number of spaces is no error


def test_what_is_normalised() -> None:
    assert M.plain_text("“Don’t”, said Zoë — twenty-one times…") == "don't said zoë twenty one times"
    assert M.plain_text("'tis 7 o'clock") == "tis 7 o'clock"
    assert M.word_error_rate("It’s HERE.", "it's here").errors == 2
    assert M.word_error_rate("It’s HERE.", "it's here", normalise=M.plain_text).errors == 0


def test_texts_must_be_pairs() -> None:
    with pytest.raises(ValueError, match="2 references and 1 hypotheses"):
        M.word_error_rate(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="unit='phone'"):
        M.count_edits(["a"], ["a"], "phone")


@pytest.mark.parametrize("name", ["jiwer", "scipy.optimize"])
def test_a_missing_library_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    needs = {
        "jiwer": lambda: M.word_error_rate("a", "a"),
        "scipy.optimize": lambda: M.diarization_error_rate([Segment("a", 0, 1)], []),
    }
    with pytest.raises(ImportError, match=rf"needs {name.partition('.')[0]}.*w2vc\[eval\]"):
        needs[name]()


# ------------------------------------------------------------------------------------------ verification


scored = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0]), st.booleans()), min_size=2, max_size=12
).filter(lambda pairs: len({same for _, same in pairs}) == 2)


@quick
@given(scored)
def test_error_curve_counts(pairs: list[tuple[float, bool]]) -> None:
    scores, same = map(np.array, zip(*pairs, strict=True))
    thresholds, miss, alarm = M.error_curve(scores, same)
    for t, m, a in zip(thresholds, miss, alarm, strict=True):
        assert m == pytest.approx(np.mean([s < t for s, friend in pairs if friend]))
        assert a == pytest.approx(np.mean([s >= t for s, friend in pairs if not friend]))
    assert (alarm[0], miss[-1], len(thresholds)) == (1, 1, len(set(scores.tolist())) + 1)
    for p in (0.01, 0.05, 0.5, 0.9):
        cost, best = M.min_dcf(scores, same, p)
        every = (p * miss + (1 - p) * alarm) / min(p, 1 - p)
        assert cost == pytest.approx(every.min())
        assert every[list(thresholds).index(best)] == pytest.approx(cost)
        assert cost <= 1


@quick
@given(scored)
def test_equal_error_rate_is_where_the_curve_meets_the_diagonal(pairs: list[tuple[float, bool]]) -> None:
    from scipy.optimize import brentq

    scores, same = map(np.array, zip(*pairs, strict=True))
    _, miss, alarm = M.error_curve(scores, same)
    place = np.linspace(0, 1, len(miss))
    meet = brentq(lambda x: np.interp(x, place, miss) - np.interp(x, place, alarm), 0, 1, xtol=1e-12)
    value, threshold = M.equal_error_rate(scores, same)
    assert value == pytest.approx(np.interp(meet, place, miss), abs=1e-8)
    assert scores.min() <= threshold <= scores.max()
    assert M.equal_error_rate(scores**3 + 2, same).value == pytest.approx(value)  # only the order counts
    assert M.equal_error_rate(-scores, ~same).value == pytest.approx(value)


def test_equal_error_rate_of_clear_cases() -> None:
    same = np.array([1, 1, 0, 0])
    assert M.equal_error_rate([0.9, 0.8, 0.2, 0.1], same) == (0, 0.8)
    assert M.equal_error_rate([0.1, 0.2, 0.8, 0.9], same).value == 1
    assert M.equal_error_rate([0.5] * 4, same).value == 0.5
    assert M.min_dcf([0.9, 0.8, 0.2, 0.1], same).value == 0
    assert M.min_dcf([0.1, 0.2, 0.8, 0.9], same) == (1, math.inf)  # it pays to say no to everybody
    for scores, answers in (([0.1, math.nan], [0, 1]), ([0.1, 0.2], [1, 1]), ([0.1], [0, 1])):
        with pytest.raises(ValueError, match=r"scores|same"):
            M.equal_error_rate(scores, answers)
    with pytest.raises(ValueError, match="p_target=1"):
        M.min_dcf([0.1, 0.2], [0, 1], 1.0)


def test_score_pairs() -> None:
    vectors = torch.randn(5, 7)
    scores, same = M.score_pairs(vectors, list("aabbc"))
    assert scores[1, 3] == pytest.approx(torch.cosine_similarity(vectors[1], vectors[3], 0).item(), abs=1e-6)
    assert same.tolist()[0] == [True, True, False, False, False]


# ------------------------------------------------------------------------------------------ diarization


def plain_der(
    reference: list[Segment], hypothesis: list[Segment], collar: float, overlap: bool, step: float = 0.01
) -> tuple:
    """Walk through time in small steps and try every pairing of names."""
    ours, theirs = (sorted({t.label for t in turns}) for turns in (reference, hypothesis))
    best = None
    size = max(len(ours), len(theirs))
    for order in itertools.permutations(range(size), len(theirs)):
        pairing = {name: ours[k] if k < len(ours) else None for name, k in zip(theirs, order, strict=True)}
        miss = alarm = confused = total = 0.0
        for i in range(400):
            t = (i + 0.5) * step
            true = {s.label for s in reference if s.start <= t < s.end}
            said = {s.label for s in hypothesis if s.start <= t < s.end}
            edge = collar and any(abs(t - e) < collar for s in reference for e in (s.start, s.end))
            if edge or (not overlap and len(true) > 1):
                continue
            right = len(true & {pairing[name] for name in said})
            miss += step * max(len(true) - len(said), 0)
            alarm += step * max(len(said) - len(true), 0)
            confused += step * (min(len(true), len(said)) - right)
            total += step * len(true)
        if best is None or confused < best[2]:
            best = (miss, alarm, confused, total)
    return best


tick = st.integers(0, 20).map(lambda n: n / 5)
turns = st.lists(
    st.tuples(st.sampled_from("abc"), tick, tick).map(lambda t: Segment(t[0], min(t[1:]), max(t[1:]))),
    max_size=5,
)


@quick
@given(turns, turns, st.sampled_from([0.0, 0.1, 0.25]), st.booleans())
def test_diarization_errors_are_those_of_a_walk_through_time(
    reference: list, hypothesis: list, collar: float, overlap: bool
) -> None:
    found = M.diarization_error_rate(reference, hypothesis, collar=collar, overlap=overlap)
    slow = plain_der(reference, hypothesis, collar, overlap)
    assert [found.missed, found.false_alarm, found.confusion, found.total] == pytest.approx(slow, abs=1e-6)


def test_diarization_by_hand() -> None:
    true = [Segment("ann", 0, 4), Segment("bob", 3, 6)]
    assert float(M.diarization_error_rate(true, true)) == 0
    renamed = [Segment("1", 3, 6), Segment("0", 0, 4)]
    same = M.diarization_error_rate(true, renamed)
    assert (same.rate, dict(same.mapping)) == (0, {"0": "ann", "1": "bob"})
    found = M.diarization_error_rate(true, [Segment("0", 0, 3), Segment("1", 3, 8)])
    assert (found.missed, found.false_alarm, found.confusion, found.total) == (1, 2, 0, 7)
    assert M.diarization_error_rate(
        true, [Segment("0", 0, 3), Segment("1", 3, 8)], overlap=False
    ).rate == pytest.approx(2 / 5)
    assert (M.diarization_error_rate(true, []).rate, M.diarization_error_rate([], true).rate) == (1, math.inf)
    assert M.diarization_error_rate([], []).rate == 0
    assert (found + same).total == 14
    with pytest.raises(ValueError, match="ends before it starts"):
        M.diarization_error_rate([Segment("a", 2, 1)], [])


def test_frames_become_turns() -> None:
    on = np.array([[1, 0], [1, 0], [0, 1], [1, 1]])
    found = M.activity_turns(on, ["a", "b"], hop=0.5, middle=0.25)
    assert found == [Segment("a", 0, 1), Segment("b", 1, 2), Segment("a", 1.5, 2)]
    assert M.activity_turns(torch.ones(1, 1))[0][1:] == pytest.approx((0.0025, 0.0225))
    with pytest.raises(ValueError, match="shape"):
        M.activity_turns([1, 0])


# ------------------------------------------------------------------------------------------ intervals


def test_bootstrap_by_hand_and_by_groups() -> None:
    rng = np.random.default_rng(1)
    speaker = np.repeat(np.arange(10), 10)
    values = rng.normal(size=10)[speaker] + 0.1 * rng.normal(size=100)  # a speaker's utterances are alike
    found = M.bootstrap(values, n=500)
    again = np.random.default_rng(0)
    draws = [values[again.integers(0, 100, 100)].mean() for _ in range(2000)]
    assert found.value == pytest.approx(values.mean())
    assert found[1:] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.03)
    assert found == M.bootstrap(values, n=500)
    assert found != M.bootstrap(values, n=500, seed=1)
    grouped = M.bootstrap(values, groups=[f"s{i}" for i in speaker], n=500)
    assert grouped.value == found.value
    assert grouped.high - grouped.low > 2 * (found.high - found.low)  # ten voices say less than a hundred
    assert math.isnan(M.bootstrap(values, groups=["one"] * 100).low)
    narrow = M.bootstrap(values, n=500, level=0.5)
    assert found.low < narrow.low < narrow.high < found.high
    for bad in (
        {"values": []},
        {"values": [1, 2], "groups": ["a"]},
        {"values": [1, 2], "level": 1.0},
        {"values": [1, 2], "n": 0},
    ):
        with pytest.raises(ValueError, match="make no interval"):
            M.bootstrap(**bad)


def test_intervals_cover_as_often_as_they_promise() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        found = M.bootstrap(rng.exponential(size=60), n=200, seed=trial, level=0.9)
        hits += found.low <= 1 <= found.high
    assert 80 <= hits <= 98  # 90, give or take three deviations
