"""Chapter 52: every measure against a slow plain one, intervals that cover, reports that fit the model's class."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import tiny_config
from w2vc import evaluation as E
from w2vc.audio import Wav2Vec2FeatureExtractor
from w2vc.batches import data_loader, turn_order
from w2vc.classification import (
    SequenceClassifierOutput,
    TokenClassifierOutput,
    Wav2Vec2ConformerForAudioFrameClassification,
    Wav2Vec2ConformerForSequenceClassification,
)
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.ctc import Wav2Vec2ConformerForCTC
from w2vc.features import conv_output_lengths
from w2vc.model import Wav2Vec2ConformerModel
from w2vc.pretraining import Wav2Vec2ConformerForPreTraining
from w2vc.recipes import Recipe
from w2vc.speaker import Wav2Vec2ConformerForXVector, XVectorOutput
from w2vc.speech import KEYWORDS, Segment, Speech, Utterance, load_speech, save_speech
from w2vc.text import Wav2Vec2CTCTokenizer, Wav2Vec2Processor, build_vocabulary
from w2vc.training import PretrainingObjective
from w2vc.transcription import transcribe

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
        counts = E.count_edits(references, hypotheses, unit)
        assert [c.errors for c in counts] == [distance(part(a), part(b)) for a, b in pairs]
        assert [c.length for c in counts] == [len(part(a)) for a, _ in pairs]
        assert [c.hits + c.substitutions + c.insertions for c in counts] == [len(part(b)) for _, b in pairs]
    assert E.word_error_rate(references, hypotheses) == sum(
        E.count_edits(references, hypotheses), E.EditCounts()
    )


def test_the_rate_of_a_set_is_not_the_mean_of_rates() -> None:
    references, hypotheses = ["a b c d e f g h", "x"], ["a b c d e f g h", "y z"]
    total = E.word_error_rate(references, hypotheses)
    assert (total.errors, total.length, float(total)) == (2, 9, 2 / 9)
    assert np.mean([c.rate for c in E.count_edits(references, hypotheses)]) == 1.0
    assert E.word_error_rate("a b", "a c").substitutions == 1


def test_empty_references() -> None:
    assert E.word_error_rate(["", "a"], ["b c", "a"]) == E.EditCounts(1, 0, 0, 2)
    assert float(E.word_error_rate("", "b")) == math.inf
    assert float(E.word_error_rate([], [])) == float(E.word_error_rate("", "")) == 0.0
    assert E.character_error_rate("a b", "a  b").errors == 0  # the number of spaces is no error


def test_what_is_normalised() -> None:
    assert E.plain_text("“Don’t”, said Zoë — twenty-one times…") == "don't said zoë twenty one times"
    assert E.plain_text("'tis 7 o'clock") == "tis 7 o'clock"
    assert E.word_error_rate("It’s HERE.", "it's here").errors == 2
    assert E.word_error_rate("It’s HERE.", "it's here", normalise=E.plain_text).errors == 0


def test_texts_must_be_pairs() -> None:
    with pytest.raises(ValueError, match="2 references and 1 hypotheses"):
        E.word_error_rate(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="unit='phone'"):
        E.count_edits(["a"], ["a"], "phone")


@pytest.mark.parametrize("name", ["jiwer", "scipy.optimize"])
def test_a_missing_library_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    needs = {
        "jiwer": lambda: E.word_error_rate("a", "a"),
        "scipy.optimize": lambda: E.diarization_error_rate([Segment("a", 0, 1)], []),
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
    thresholds, miss, alarm = E.error_curve(scores, same)
    for t, m, a in zip(thresholds, miss, alarm, strict=True):
        assert m == pytest.approx(np.mean([s < t for s, friend in pairs if friend]))
        assert a == pytest.approx(np.mean([s >= t for s, friend in pairs if not friend]))
    assert (alarm[0], miss[-1], len(thresholds)) == (1, 1, len(set(scores.tolist())) + 1)
    for p in (0.01, 0.05, 0.5, 0.9):
        cost, best = E.min_dcf(scores, same, p)
        every = (p * miss + (1 - p) * alarm) / min(p, 1 - p)
        assert cost == pytest.approx(every.min())
        assert every[list(thresholds).index(best)] == pytest.approx(cost)
        assert cost <= 1
    dear = (0.05 * 10 * miss + 0.95 * alarm).min() / min(0.05 * 10, 0.95)
    assert E.min_dcf(scores, same, 0.05, cost_miss=10).value == pytest.approx(dear)


@quick
@given(scored)
def test_equal_error_rate_is_where_the_curve_meets_the_diagonal(pairs: list[tuple[float, bool]]) -> None:
    from scipy.optimize import brentq

    scores, same = map(np.array, zip(*pairs, strict=True))
    _, miss, alarm = E.error_curve(scores, same)
    place = np.linspace(0, 1, len(miss))
    meet = brentq(lambda x: np.interp(x, place, miss) - np.interp(x, place, alarm), 0, 1, xtol=1e-12)
    value, threshold = E.equal_error_rate(scores, same)
    assert value == pytest.approx(np.interp(meet, place, miss), abs=1e-8)
    assert scores.min() <= threshold <= scores.max()
    assert E.equal_error_rate(scores**3 + 2, same).value == pytest.approx(value)  # only the order counts
    assert E.equal_error_rate(-scores, ~same).value == pytest.approx(value)


def test_equal_error_rate_of_clear_cases() -> None:
    same = np.array([1, 1, 0, 0])
    assert E.equal_error_rate([0.9, 0.8, 0.2, 0.1], same) == (0, 0.8)
    assert E.equal_error_rate([0.1, 0.2, 0.8, 0.9], same).value == 1
    assert E.equal_error_rate([0.5] * 4, same).value == 0.5
    assert E.min_dcf([0.9, 0.8, 0.2, 0.1], same).value == 0
    assert E.min_dcf([0.1, 0.2, 0.8, 0.9], same) == (1, math.inf)  # it pays to say no to everybody
    for scores, answers in (([0.1, math.nan], [0, 1]), ([0.1, 0.2], [1, 1]), ([0.1], [0, 1])):
        with pytest.raises(ValueError, match=r"scores|same"):
            E.equal_error_rate(scores, answers)
    with pytest.raises(ValueError, match="p_target=1"):
        E.min_dcf([0.1, 0.2], [0, 1], 1.0)


def test_score_pairs() -> None:
    vectors = torch.randn(5, 7)
    scores, same = E.score_pairs(vectors, list("aabbc"))
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
    found = E.diarization_error_rate(reference, hypothesis, collar=collar, overlap=overlap)
    slow = plain_der(reference, hypothesis, collar, overlap)
    assert [found.missed, found.false_alarm, found.confusion, found.total] == pytest.approx(slow, abs=1e-6)


def test_diarization_by_hand() -> None:
    true = [Segment("ann", 0, 4), Segment("bob", 3, 6)]
    assert float(E.diarization_error_rate(true, true)) == 0
    renamed = [Segment("1", 3, 6), Segment("0", 0, 4)]
    same = E.diarization_error_rate(true, renamed)
    assert (same.rate, dict(same.mapping)) == (0, {"0": "ann", "1": "bob"})
    found = E.diarization_error_rate(true, [Segment("0", 0, 3), Segment("1", 3, 8)])
    assert (found.missed, found.false_alarm, found.confusion, found.total) == (1, 2, 0, 7)
    assert E.diarization_error_rate(
        true, [Segment("0", 0, 3), Segment("1", 3, 8)], overlap=False
    ).rate == pytest.approx(2 / 5)
    assert (E.diarization_error_rate(true, []).rate, E.diarization_error_rate([], true).rate) == (1, math.inf)
    assert E.diarization_error_rate([], []).rate == 0
    assert (found + same).total == 14
    with pytest.raises(ValueError, match="ends before it starts"):
        E.diarization_error_rate([Segment("a", 2, 1)], [])


def test_frames_become_turns() -> None:
    on = np.array([[1, 0], [1, 0], [0, 1], [1, 1]])
    found = E.activity_turns(on, ["a", "b"], hop=0.5, middle=0.25)
    assert found == [Segment("a", 0, 1), Segment("b", 1, 2), Segment("a", 1.5, 2)]
    assert E.activity_turns(torch.ones(1, 1))[0][1:] == pytest.approx((0.0025, 0.0225))
    with pytest.raises(ValueError, match="shape"):
        E.activity_turns([1, 0])


# ------------------------------------------------------------------------------------------ codes and phones


def test_cross_table() -> None:
    assert E.cross_table([0, 1, 1], [1, 0, 0], (2, 3)).tolist() == [[0, 1, 0], [2, 0, 0]]
    assert E.accuracy(E.cross_table([0, 1, 1, 2], [0, 1, 0, 2])) == 0.75
    assert math.isnan(E.accuracy(E.cross_table([], [], (2, 2))))
    for bad in (([0], [1, 2]), ([-1], [0])):
        with pytest.raises(ValueError, match="rows and columns"):
            E.cross_table(*bad)
    with pytest.raises(ValueError, match="too small"):
        E.cross_table([3], [0], (2, 2))


@quick
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=2, max_size=4).filter(
        lambda t: np.sum(t) > 0
    )
)
def test_mutual_information_is_the_distance_from_independence(rows: list[list[int]]) -> None:
    table = np.array(rows)
    p = table / table.sum()
    both = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    slow = sum(x * math.log2(x / y) for x, y in zip(p.ravel(), both.ravel(), strict=True) if x)
    assert E.mutual_information(table) == pytest.approx(max(slow, 0), abs=1e-9)
    assert E.mutual_information(table.T) == pytest.approx(E.mutual_information(table), abs=1e-9)


def test_measures_of_codes() -> None:
    rng = np.random.default_rng(0)
    phones = rng.integers(0, 10, 4000)
    names = np.array([f"p{i}" for i in phones])
    exact = E.measure_codes(phones * 7, phones)
    assert (exact.used, exact.known, exact.phone_purity, exact.code_purity) == (10, pytest.approx(1), 1, 1)
    assert exact.chance < 0.02
    codes = np.stack([phones // 2, rng.integers(0, 8, 4000)], 1)  # half of what there is to know, and noise
    report = E.code_phone_report(codes, names, np.eye(10)[phones], n_codes=10)
    assert list(report) == ["group 0", "group 1", "joint", "k-means 10", "k-means 40"]
    assert report["group 0"].phone_purity == pytest.approx(0.5, abs=0.02)
    assert report["group 1"].known < 0.01
    assert abs(report["group 1"].known - report["group 1"].chance) < 0.01
    assert report["joint"].known >= report["group 0"].known
    assert report["k-means 40"].known > 0.9
    more = [E.measure_codes(rng.integers(0, n, 4000), phones) for n in (10, 100, 1000)]  # knows nothing
    assert more[0].known < more[1].known < more[2].known  # the trap: more codes seem to know more
    assert all(abs(m.known - m.chance) < 0.02 for m in more)
    assert more[0].phone_purity < more[2].phone_purity
    with pytest.raises(ValueError, match="frames, groups"):
        E.code_phone_report(phones, names)


def test_log_mel_frames_lie_where_the_models_frames_lie() -> None:
    config = Wav2Vec2ConformerConfig()
    for size in (400, 719, 720, 16_000):
        audio = np.sin(2 * np.pi * 1000 / 16_000 * np.arange(size)).astype(np.float32)
        mel = E.log_mel_frames(audio)
        assert mel.shape == (int(conv_output_lengths(size, config.conv_kernel, config.conv_stride)), 40)
    top = 2595 * math.log10(1 + 8000 / 700)
    centre = 2595 * math.log10(1 + 1000 / 700) / top * 41 - 1
    assert abs(mel.mean(0).argmax() - centre) <= 1


def test_the_phone_of_a_frame_is_that_of_its_middle() -> None:
    u = load_speech("builtin", "test")[3]
    config = Wav2Vec2ConformerConfig()
    rows = E.phone_rows(u, 50, config)
    for t in range(50):
        middle = (320 * t + 199.5) / 16_000  # of the samples 320 t … 320 t + 399
        assert rows[t] == next((s.label for s in u.phones if s.start <= middle < s.end), "")


# ------------------------------------------------------------------------------------------ probe and contrast


@pytest.fixture(scope="module")
def some() -> Speech:
    """A few utterances of four speakers."""
    speech = load_speech("builtin", "test").filter(speaker=["f11", "f12", "m11", "m12"])
    return speech.filter(lambda u: u.kind == "keyword" and u.text in KEYWORDS[:4])


def pretraining_model(**knobs: Any) -> Wav2Vec2ConformerForPreTraining:
    torch.manual_seed(0)
    return Wav2Vec2ConformerForPreTraining(tiny_config(num_negatives=5, **knobs)).eval()


def test_softmax_regression_is_at_its_optimum() -> None:
    g = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 3, (300,), generator=g)
    features = torch.randn(300, 4, generator=g) + 1.5 * torch.eye(3, 4)[classes]
    weights = E.fit_softmax(features, classes, 3, steps=300)
    again = weights.clone().requires_grad_()
    inputs = torch.cat([features, torch.ones(300, 1)], 1)
    loss = (
        torch.nn.functional.cross_entropy(inputs @ again.T, classes, reduction="sum")
        + again[:, :-1].square().sum() / 2
    )
    (gradient,) = torch.autograd.grad(loss, again)
    assert gradient.abs().max() < 0.2  # of a sum over 300 frames
    assert torch.equal(weights, E.fit_softmax(features, classes, 3, steps=300))
    with torch.inference_mode():
        assert torch.equal(weights, E.fit_softmax(features, classes, 3, steps=300))


def test_probe_learns_on_other_speakers(some: Speech) -> None:
    model = pretraining_model().train()
    probe = E.phone_probe(model, some)
    assert model.training
    assert probe.layers == ("latent frames", "encoder input", "block 1", "block 2")
    assert set(probe.ids) == {u.id for u in some}
    counted = {
        u.id: sum(
            p != ""
            for p in E.phone_rows(u, int(model._get_feat_extract_output_lengths(u.n_samples)), model.config)
        )
        for u in some
    }
    assert dict(zip(probe.ids, probe.frames.tolist(), strict=True)) == counted
    assert probe.accuracy[probe.best] == max(probe.accuracy.values())
    other = E.phone_probe(model, some, batch_seconds=3)
    assert probe.accuracy == pytest.approx(other.accuracy, abs=0.01)  # other batches: a few frames at most
    halves = [some.filter(speaker=names) for names in (["f11", "m12"], ["f12", "m11"])]
    one, other = (E.phone_probe(model, a, b) for a, b in (halves, halves[::-1]))
    assert (probe.right.sum(1) == one.right.sum(1) + other.right.sum(1)).all()
    with pytest.raises(ValueError, match="speak in both sets"):
        E.phone_probe(model, some, some[:3])
    with pytest.raises(ValueError, match="1 speaker"):
        E.phone_probe(model, halves[0].filter(speaker="f11"))
    thin = E.phone_probe(model, some, max_frames=300)
    assert 0 < thin.frames.sum() <= 0.5 * probe.frames.sum() + len(some)


def test_probe_reads_what_is_there(some: Speech, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that holds the phone is read perfectly, one that holds noise no better than by guessing."""
    real = E._layer_states

    def planted(*arguments: Any) -> Any:
        states = real(*arguments)
        alphabet = sorted({p for u in some for p, _, _ in u.phones})
        told = torch.eye(len(alphabet))[[alphabet.index(p) for p in states.phones.tolist()]]
        return states._replace(layers=[told, torch.randn(told.shape)])

    monkeypatch.setattr(E, "_layer_states", planted)
    probe = E.phone_probe(pretraining_model(), some)
    right, guessed = probe.right.sum(1) / probe.frames.sum()
    count = pretraining_model()._get_feat_extract_output_lengths
    phones = {u.id: E.phone_rows(u, int(count(u.n_samples)), Wav2Vec2ConformerConfig.tiny()) for u in some}
    halves = (["f11", "m12"], ["f12", "m11"])
    sides = [{p for u in some if u.speaker in names for p in phones[u.id]} for names in halves]
    known = sum(p in sides[u.speaker in {"f11", "m12"}] for u in some for p in phones[u.id] if p)
    assert right * probe.frames.sum() >= 0.99 * known  # a phone that only the asked half says cannot be named
    assert guessed < probe.majority + 0.05


def test_padding_that_would_be_heard_is_avoided(some: Speech) -> None:
    sizes = {}
    for invariant in (True, False):
        model = pretraining_model(padding_invariant=invariant)
        sizes[invariant] = [len(batch["ids"]) for batch in E.utterance_batches(model, some)]
    assert sizes == {True: [16], False: [1] * 16}


def test_phone_frames(some: Speech) -> None:
    model = pretraining_model()
    frames = E.phone_frames(model, some, batch_seconds=5)
    alone = [E.phone_frames(model, Speech([u])) for u in some[:3]]
    for u, own in zip(some[:3], alone, strict=True):
        mine = frames.ids == u.id
        assert (frames.codes[mine] == own.codes).all()
        assert (frames.phones[mine] == own.phones).all()
        assert np.allclose(frames.mel[mine], own.mel, atol=1e-4)
    with pytest.raises(ValueError, match="no phones are known"):
        E.phone_frames(model, Speech([Utterance("x", some[0].audio)]))


@pytest.mark.parametrize("crop", [{}, {"crop_seconds": 0.5, "crop": "shortest"}])
def test_contrastive_report_is_the_training_log(some: Speech, crop: dict[str, Any]) -> None:
    """The same set in the same batches gives the figures that a run would log for it."""
    recipe = Recipe.from_dict({"data": {"batch_seconds": 6.0, **crop}, "pretraining": {"mask_length": 3}})
    model, extractor = pretraining_model(), Wav2Vec2FeatureExtractor(return_attention_mask=True)
    model.train()
    ours = E.contrastive_report(model, some, extractor, recipe)
    assert model.training
    objective = PretrainingObjective(recipe, model.eval(), extractor)
    sums: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for batch in data_loader(some, objective.collator(False), max_seconds=6.0, seed=0):
            _, output = objective.forward(model, batch, 1)
            for key, value in objective.measure(batch, output).items():
                sums[key] = sums.get(key, 0) + value
    theirs = objective.summarise(sums)
    assert sums["questions"] > 100
    for key, value in ours.items():
        assert value == pytest.approx(theirs[key], rel=1e-5), key


# ------------------------------------------------------------------------------------------ intervals


def test_bootstrap_by_hand_and_by_groups() -> None:
    rng = np.random.default_rng(1)
    speaker = np.repeat(np.arange(10), 10)
    values = rng.normal(size=10)[speaker] + 0.1 * rng.normal(size=100)  # a speaker's utterances are alike
    found = E.bootstrap(values, n=500)
    again = np.random.default_rng(0)
    draws = [values[again.integers(0, 100, 100)].mean() for _ in range(2000)]
    assert found.value == pytest.approx(values.mean())
    assert found[1:] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.03)
    assert found == E.bootstrap(values, n=500)
    assert found != E.bootstrap(values, n=500, seed=1)
    grouped = E.bootstrap(values, groups=[f"s{i}" for i in speaker], n=500)
    assert grouped.value == found.value
    assert grouped.high - grouped.low > 2 * (found.high - found.low)  # ten voices say less than a hundred
    assert math.isnan(E.bootstrap(values, groups=["one"] * 100).low)
    narrow = E.bootstrap(values, n=500, level=0.5)
    assert found.low < narrow.low < narrow.high < found.high
    for bad in (
        {"values": []},
        {"values": [1, 2], "groups": ["a"]},
        {"values": [1, 2], "level": 1.0},
        {"values": [1, 2], "n": 0},
    ):
        with pytest.raises(ValueError, match="groups, n="):
            E.bootstrap(**bad)


def test_intervals_cover_as_often_as_they_promise() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        found = E.bootstrap(rng.exponential(size=60), n=200, seed=trial, level=0.9)
        hits += found.low <= 1 <= found.high
    assert 80 <= hits <= 98  # 90, give or take three deviations


def test_an_interval_of_an_entropy_is_centred() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 50, 200)
    entropy = lambda rows: E._bits(np.bincount(rows))  # noqa: E731
    plain, centred = (E.bootstrap(codes, entropy, n=300, centred=c) for c in (False, True))
    assert (
        plain.high < plain.value
    )  # repeated rows hold fewer codes: the interval does not even hold the figure
    assert centred.low < centred.value < centred.high
    assert centred.high - centred.low == pytest.approx(plain.high - plain.low)


# ------------------------------------------------------------------------------------------ reports


def folder_of(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CTC checkpoint with its processor."""
    folder = tmp_path_factory.mktemp("ctc")
    vocabulary = build_vocabulary(["abcdefghijklmnopqrstuvwxyz '"])
    torch.manual_seed(0)
    Wav2Vec2ConformerForCTC(tiny_config(vocab_size=len(vocabulary))).save_pretrained(folder)
    Wav2Vec2Processor(
        Wav2Vec2FeatureExtractor(return_attention_mask=True), Wav2Vec2CTCTokenizer(vocabulary)
    ).save_pretrained(folder)
    return folder


def test_ctc_report(written: Path) -> None:
    speech = load_speech("builtin", "test")
    speech = Speech(
        [
            *speech.filter(kind="keyword")[:4],
            *speech.filter(kind="digits")[:2],
            Utterance("silent", np.zeros(8000, np.float32)),
        ],
        "mine",
    )
    report = E.evaluate(written, speech, draws=50)
    model, processor = (
        Wav2Vec2ConformerForCTC.from_pretrained(written),
        Wav2Vec2Processor.from_pretrained(written),
    )
    said = [t.text for t in transcribe(speech[:6], model, processor, chunk_seconds=None)]
    wer = E.word_error_rate([u.text for u in speech[:6]], said, normalise=E.plain_text)
    assert report["WER"].value == wer.rate
    assert list(report) == ["WER", "CER", "WER digits", "CER digits", "WER keyword", "CER keyword"]
    assert f"{wer.errors:,} errors in {wer.length:,}" in report["WER"].note
    assert report["CER"].low <= report["CER"].value <= report["CER"].high
    assert any("1 of 7 utterances left out" in note for note in report.notes)
    rows = report.details["transcripts"]
    assert [row["hypothesis"] for row in rows] == said
    assert sum(row["word_errors"] for row in rows) == wer.errors
    assert len(report.table().splitlines()) == 2 + len(report) + len(report.notes)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["measures"]["WER"]["value"] == wer.rate
    again = E.evaluate(model, speech, processor, draws=50)
    assert again.to_dict() == report.to_dict()
    with pytest.raises(ValueError, match="no text is known"):
        E.evaluate(model, speech[6:], processor)


def test_texts_are_compared_plainly_unless_asked(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    u = load_speech("builtin", "test")[0]
    loud = Speech([Utterance("loud", u.audio, text=u.text.upper() + "!")])
    monkeypatch.setattr(
        E, "transcribe", lambda sounds, *a, **k: [type("T", (), {"text": u.text})() for _ in sounds]
    )
    assert E.evaluate(written, loud)["WER"].value == 0
    assert E.evaluate(written, loud, normalise=None)["WER"].value == 1


class Oracle(Wav2Vec2ConformerForSequenceClassification):
    """Knows each utterance by its length, and lies about one of them."""

    answers: dict[int, int]

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        known = [self.answers[int(n)] for n in attention_mask.sum(1)]
        return SequenceClassifierOutput(logits=torch.eye(self.config.num_labels)[known])


def test_sequence_report() -> None:
    speech = load_speech("builtin", "test").filter(kind=["keyword", "sentence"], speaker=["f11", "m11"])
    model = Oracle(tiny_config(id2label=dict(enumerate(KEYWORDS)))).train()
    asked = [u for u in speech if u.text in KEYWORDS]
    assert len({u.n_samples for u in asked}) == len(asked)
    model.answers = {u.n_samples: KEYWORDS.index(u.text) for u in asked}
    report = E.evaluate(model, speech, draws=50)
    assert model.training
    assert report["accuracy"].value == 1
    assert report.details["target"] == "text"
    assert (np.diag(report.details["confusion"]) == report.details["confusion"].sum(1)).all()
    assert any(
        f"{len(speech) - len(asked)} of {len(speech)} utterances left out" in note for note in report.notes
    )
    model.answers[asked[0].n_samples] = (KEYWORDS.index(asked[0].text) + 1) % 10
    assert E.evaluate(model, speech, draws=50)["accuracy"].value == pytest.approx(1 - 1 / len(asked))
    with pytest.raises(ValueError, match="target is missing"):
        E.evaluate(Oracle(tiny_config(num_labels=3)), speech)
    with pytest.raises(ValueError, match="regression"):
        E.evaluate(Oracle(tiny_config(num_labels=1)), speech)


class FrameOracle(Wav2Vec2ConformerForAudioFrameClassification):
    """Knows the true turns of each utterance by its length, with the two names swapped."""

    truth: dict[int, np.ndarray]

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        n_frames = int(self._get_feat_extract_output_lengths(input_values.shape[1]))
        logits = torch.full((len(input_values), n_frames, self.config.num_labels), -1.0)
        for row, size in zip(logits, attention_mask.sum(1).tolist(), strict=True):
            on = torch.from_numpy(self.truth[size])
            row[: len(on)][on] = 1.0
        return TokenClassifierOutput(logits=logits)


def test_frame_reports() -> None:
    mixes = load_speech("builtin-mixes", "test")[:4]
    labels = {0: "speaker 1", 1: "speaker 2"}
    config = Wav2Vec2ConformerConfig.tiny(id2label=labels, problem_type="multi_label_classification")
    model = FrameOracle(config)
    grid = {"hop": 0.02, "middle": E.receptive_field(config.conv_kernel, config.conv_stride)[0] / 32_000}
    counts = {u.id: int(model._get_feat_extract_output_lengths(u.n_samples)) for u in mixes}
    truth = {
        u.n_samples: E._frame_activity(turn_order(u), list(labels.values()), counts[u.id], **grid)
        for u in mixes
    }
    model.truth = truth
    report = E.evaluate(model, mixes, draws=50)
    assert report["frame accuracy"].value == 1
    assert 0 < report["DER"].value < 0.02  # turns end between frames
    model.truth = {size: on[:, ::-1].copy() for size, on in truth.items()}
    report = E.evaluate(model, mixes, draws=50)
    assert report["frame accuracy"].value < 0.7
    assert report["DER"].value < 0.02  # names do not matter
    model.truth = {size: np.zeros_like(on) for size, on in truth.items()}
    assert E.evaluate(model, mixes, draws=50)["DER"].value == 1
    u = load_speech("builtin", "test")[0]
    phones = sorted({p.label for p in u.phones})[:-1]  # one label is missing: its frames do not count
    single = FrameOracle(Wav2Vec2ConformerConfig.tiny(id2label=dict(enumerate(phones))))
    n = int(single._get_feat_extract_output_lengths(u.n_samples))
    single.truth = {u.n_samples: E._frame_activity(u.phones, phones, n, **grid)}
    report = E.evaluate(single, Speech([u]))
    assert list(report) == ["frame accuracy"]
    assert report["frame accuracy"].value == 1
    with pytest.raises(ValueError, match="nothing is known of it"):
        E.evaluate(single, Speech([Utterance("x", u.audio)]))


class VoiceOracle(Wav2Vec2ConformerForXVector):
    """A vector for each speaker, found by the length of the utterance."""

    vectors: dict[int, torch.Tensor]

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        return XVectorOutput(embeddings=torch.stack([self.vectors[int(n)] for n in attention_mask.sum(1)]))


def test_speaker_report() -> None:
    speech = load_speech("builtin", "test").filter(kind="sentence")
    names = sorted(speech.speakers)
    model = VoiceOracle(tiny_config())
    model.vectors = {
        u.n_samples: torch.eye(8)[names.index(u.speaker)] + 0.01 * torch.randn(8) for u in speech
    }
    report = E.evaluate(model, speech, draws=30)
    assert list(report) == ["EER", "minDCF 0.01", "minDCF 0.05"]
    assert all(m.value == 0 for m in report.values())
    model.vectors = {u.n_samples: torch.randn(8) for u in speech}
    report = E.evaluate(model, speech, draws=30)
    assert 0.35 < report["EER"].value < 0.65
    assert report["EER"].low < report["EER"].value < report["EER"].high
    assert (
        f"{sum(a.speaker == b.speaker for a, b in itertools.combinations(speech, 2)):,} pairs of one speaker"
        in report["EER"].note
    )
    wide = E.evaluate(model, speech, draws=30, by="speaker")
    assert wide["EER"].value == report["EER"].value
    assert (wide["EER"].low, wide["EER"].high) != (report["EER"].low, report["EER"].high)
    vectors = torch.stack([model.vectors[u.n_samples] for u in speech])
    scores, same = (
        table[np.triu_indices(len(speech), 1)]
        for table in E.score_pairs(vectors, [u.speaker for u in speech])
    )
    assert report["EER"].value == pytest.approx(E.equal_error_rate(scores, same).value)
    for p in (0.01, 0.05):
        assert report[f"minDCF {p}"].value == pytest.approx(E.min_dcf(scores, same, p).value)
    assert "over speakers" in wide.table()
    with pytest.raises(ValueError, match="both kinds are needed"):
        E.evaluate(model, speech.filter(speaker="f11"))


def test_real_heads_do_not_depend_on_the_batch(some: Speech, tmp_path: Path) -> None:
    torch.manual_seed(0)
    knobs = {"tdnn_dim": (6, 6), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 6}
    for model in (
        Wav2Vec2ConformerForSequenceClassification(tiny_config(id2label=dict(enumerate(KEYWORDS)))),
        Wav2Vec2ConformerForXVector(tiny_config(**knobs)),
        Wav2Vec2ConformerModel(tiny_config()),
        pretraining_model(),
    ):
        folder = folder_of(model, tmp_path / type(model).__name__)
        assert E.model_class(folder) is type(model)
        reports = [E.evaluate(model.train(), some, draws=20, batch_seconds=s) for s in (2, 60)]
        assert all(module.training for module in model.modules())
        loaded = E.evaluate(folder, some, draws=20)
        for name, measure in reports[0].items():
            assert measure.value == pytest.approx(reports[1][name].value, abs=1e-6), name
            assert measure.value == pytest.approx(loaded[name].value, abs=1e-6), name
    assert {
        "contrastive accuracy",
        "codes in use",
        "twins",
        "I(code; phone) / H(phone)",
        "phone probe",
    } <= set(loaded)
    assert set(loaded.details) == {"contrastive", "codes", "probe"}
    for name in ("contrastive accuracy", "codes in use", "I(code; phone) / H(phone)", "phone probe"):
        assert loaded[name].low < loaded[name].value < loaded[name].high, name
    contrast = E.contrastive_report(pretraining_model(), some)
    for name, key in (("contrastive accuracy", "accuracy"), ("codes in use", "used"), ("twins", "twins")):
        assert loaded[name].value == pytest.approx(contrast[key], rel=1e-5)
    assert math.isnan(loaded["phone purity"].low)
    assert loaded.to_dict()["measures"]["phone purity"]["low"] is None


@pytest.mark.gpu
def test_figures_are_the_same_on_a_device(some: Speech) -> None:
    model = pretraining_model()
    here, there = (E.evaluate(model.to(device), some, draws=5) for device in ("cpu", "cuda"))
    for name, measure in here.items():
        assert measure.value == pytest.approx(there[name].value, abs=0.02), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_types_are_measured_too(some: Speech, dtype: torch.dtype) -> None:
    report = E.evaluate(pretraining_model().to(dtype), some[:6], draws=5)
    exact = E.evaluate(pretraining_model(), some[:6], draws=5)
    for name in ("contrastive accuracy", "codes in use", "twins"):
        assert report[name].value == pytest.approx(exact[name].value, abs=0.1), name


def test_pretraining_report_without_phones(some: Speech) -> None:
    nameless = Speech([Utterance(u.id, u.audio) for u in some[:4]])
    report = E.evaluate(pretraining_model(), nameless, draws=20)
    assert list(report) == ["contrastive accuracy", "codes in use", "twins"]
    assert any("no phones are known" in note for note in report.notes)
    with pytest.raises(ValueError, match="measured by its phones"):
        E.evaluate(Wav2Vec2ConformerModel(tiny_config()), nameless)


def test_what_evaluate_refuses(some: Speech) -> None:
    for model, speech, options in (
        (torch.nn.Linear(1, 1), some, {}),
        (pretraining_model(), some[:0], {}),
        (pretraining_model(), some, {"by": "word"}),
    ):
        with pytest.raises(ValueError, match="allowed are Wav2Vec2ConformerForCTC"):
            E.evaluate(model, speech, **options)
    with pytest.raises(FileNotFoundError):
        E.evaluate("no/such-checkpoint-here", some)
    with pytest.raises(ValueError, match=r"1 name\(s\) belong to several"):
        E.evaluate(pretraining_model(), Speech([*some[:3], some[0]]))


def test_an_utterance_without_a_hidden_frame_asks_nothing(some: Speech) -> None:
    short = Utterance("short", some[0].audio[:1600])  # 4 or 5 frames, and a span has 10
    model = pretraining_model()
    sums = E.contrastive_sums(model, Speech([*some[:2], short]))
    assert [float(sums[name]["questions"]) > 0 for name in (some[0].id, "short")] == [True, False]
    reports = [E.contrastive_report(model, Speech([*some[:2], *more])) for more in ([], [short])]
    for key in ("accuracy", "used", "twins"):
        assert reports[0][key] == pytest.approx(reports[1][key], abs=1e-6)


# ------------------------------------------------------------------------------------------ sets


def test_open_speech(tmp_path: Path) -> None:
    whole = load_speech("builtin", "test")
    assert [u.id for u in E.open_speech("builtin")] == [u.id for u in whole]
    few = E.open_speech("builtin", limit=17)
    assert len(few) == 17
    assert {u.kind for u in few} == {"keyword", "digits", "sentence"}  # from all over the set, not its start
    assert [u.id for u in few] == [u.id for u in E.open_speech("builtin", limit=17)]
    assert E.open_speech("builtin", "dev", 3).split == "dev"
    save_speech(tmp_path / "packed", {"dev": whole[:2], "test": whole[2:5]}, {})
    assert len(E.open_speech(tmp_path / "packed")) == 3
    sf = pytest.importorskip("soundfile")
    plain = tmp_path / "plain"
    plain.mkdir()
    sf.write(plain / "a.wav", whole[0].audio, 16_000)
    assert len(E.open_speech(plain)) == 1
    for bad, split, limit in (
        ("builtin", "tset", None),
        ("builtin", None, 0),
        (plain, "test", None),
        ("no such set", None, None),
    ):
        with pytest.raises(ValueError, match=r"split=|limit=|known sets"):
            E.open_speech(bad, split, limit)


def librispeech_like(root: Path) -> Path:
    """Two utterances as LibriSpeech is released: speaker/chapter/*.flac and a file of transcripts."""
    sf = pytest.importorskip("soundfile")
    chapter = root / "test-clean" / "1089" / "134686"
    chapter.mkdir(parents=True)
    lines = []
    for i, u in enumerate(load_speech("builtin", "test")[:2]):
        sf.write(chapter / f"1089-134686-{i:04}.flac", u.audio, 16_000)
        lines.append(f"1089-134686-{i:04} {u.text.upper()}\n")
    (chapter / "1089-134686.trans.txt").write_text("".join(lines))
    return root


def test_librispeech_from_disk(written: Path, tmp_path: Path) -> None:
    report = E.evaluate(written, librispeech_like(tmp_path), split="test-clean")
    assert report.about["utterances"] == 2
    assert report.about["speakers"] == 1
    assert report["WER"].note.endswith("too many")


def test_librispeech_from_the_hub(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The offline sibling: a folder in the layout of openslr/librispeech_asr."""
    datasets = pytest.importorskip("datasets")
    from test_speech import released

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = released(tmp_path / "librispeech_asr")
    train = load_speech("builtin", "train")
    speech = E.open_speech(f"hf:{root}:clean:validation", limit=2)
    assert [u.text for u in speech] == [u.text.upper() for u in train[:2]]
    assert [u.n_samples for u in speech] == [u.n_samples for u in train[:2]]
    assert np.abs(speech[1].audio - train[1].audio).max() < 1e-4
    assert len(E.open_speech(f"hf:{root}:clean", "validation")) == 3
    report = E.evaluate(written, f"hf:{root}:clean:validation")
    assert report["WER"].value > 0
    assert report.about["speech"] == f"{root}:clean validation"


@pytest.mark.network
def test_released_checkpoint_on_librispeech(tmp_path: Path) -> None:
    """A handful of test-clean through the relative-position checkpoint: 1.85 % on all of it."""
    report = E.evaluate(
        "facebook/wav2vec2-conformer-rel-pos-large-960h-ft", "hf:openslr/librispeech_asr:clean:test", limit=16
    )
    assert report["WER"].value < 0.08
