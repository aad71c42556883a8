"""What codes and layers know of phones, against slow plain code."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import tiny_config
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.data.corpus import KEYWORDS, Speech, Utterance, load_speech
from w2vc.evaluation import probes as P
from w2vc.evaluation.measures import bootstrap
from w2vc.model.features import conv_output_lengths
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining

pytest.importorskip("scipy")
quick = settings(max_examples=50, deadline=None)


def test_cross_table() -> None:
    assert P.cross_table([0, 1, 1], [1, 0, 0], (2, 3)).tolist() == [[0, 1, 0], [2, 0, 0]]
    assert P.cross_table([0, 1, 1, 2], [0, 1, 0, 2]).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert P.cross_table([], [], (2, 2)).sum() == 0
    for bad in (([0], [1, 2]), ([-1], [0])):
        with pytest.raises(ValueError, match="rows and columns"):
            P.cross_table(*bad)
    with pytest.raises(IndexError, match="out of bounds"):
        P.cross_table([3], [0], (2, 2))


def test_log_mel_frames_lie_where_the_models_frames_lie() -> None:
    config = Wav2Vec2ConformerConfig()
    for size in (400, 719, 720, 16_000):
        audio = np.sin(2 * np.pi * 1000 / 16_000 * np.arange(size)).astype(np.float32)
        mel = P.log_mel_frames(audio)
        assert mel.shape == (int(conv_output_lengths(size, config.conv_kernel, config.conv_stride)), 40)
    top = 2595 * math.log10(1 + 8000 / 700)
    centre = 2595 * math.log10(1 + 1000 / 700) / top * 41 - 1
    assert abs(mel.mean(0).argmax() - centre) <= 1


def test_softmax_regression_is_at_its_optimum() -> None:
    g = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 3, (300,), generator=g)
    features = torch.randn(300, 4, generator=g) + 1.5 * torch.eye(3, 4)[classes]
    weights = P.fit_softmax(features, classes, 3, steps=300)
    again = weights.clone().requires_grad_()
    inputs = torch.cat([features, torch.ones(300, 1)], 1)
    loss = (
        torch.nn.functional.cross_entropy(inputs @ again.T, classes, reduction="sum")
        + again[:, :-1].square().sum() / 2
    )
    (gradient,) = torch.autograd.grad(loss, again)
    assert gradient.abs().max() < 0.2  # of a sum over 300 frames
    assert torch.equal(weights, P.fit_softmax(features, classes, 3, steps=300))
    with torch.inference_mode():
        assert torch.equal(weights, P.fit_softmax(features, classes, 3, steps=300))


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
    assert P.mutual_information(table) == pytest.approx(max(slow, 0), abs=1e-9)
    assert P.mutual_information(table.T) == pytest.approx(P.mutual_information(table), abs=1e-9)


def test_measures_of_codes() -> None:
    rng = np.random.default_rng(0)
    phones = rng.integers(0, 10, 4000)
    names = np.array([f"p{i}" for i in phones])
    exact = P.measure_codes(phones * 7, phones)
    assert (exact.used, exact.known, exact.phone_purity, exact.code_purity) == (10, pytest.approx(1), 1, 1)
    assert exact.chance < 0.02
    codes = np.stack([phones // 2, rng.integers(0, 8, 4000)], 1)  # half of what there is to know, and noise
    report = P.code_phone_report(codes, names, np.eye(10)[phones], n_codes=10)
    assert list(report) == ["group 0", "group 1", "joint", "k-means 10", "k-means 40"]
    assert report["group 0"].phone_purity == pytest.approx(0.5, abs=0.02)
    assert report["group 1"].known < 0.01
    assert abs(report["group 1"].known - report["group 1"].chance) < 0.01
    assert report["joint"].known >= report["group 0"].known
    assert report["k-means 40"].known > 0.9
    more = [P.measure_codes(rng.integers(0, n, 4000), phones) for n in (10, 100, 1000)]  # knows nothing
    assert more[0].known < more[1].known < more[2].known  # the trap: more codes seem to know more
    assert all(abs(m.known - m.chance) < 0.02 for m in more)
    assert more[0].phone_purity < more[2].phone_purity
    with pytest.raises(ValueError, match="frames, groups"):
        P.code_phone_report(phones, names)


def test_the_phone_of_a_frame_is_that_of_its_middle() -> None:
    u = load_speech("builtin", "test")[3]
    config = Wav2Vec2ConformerConfig()
    rows = P.phone_rows(u, 50, config)
    for t in range(50):
        middle = (320 * t + 199.5) / 16_000  # of the samples 320 t … 320 t + 399
        assert rows[t] == next((s.label for s in u.phones if s.start <= middle < s.end), "")


def test_an_interval_of_an_entropy_is_centred() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 50, 200)
    entropy = lambda rows: P._bits(np.bincount(rows))  # noqa: E731
    plain, centred = (bootstrap(codes, entropy, n=300, centred=c) for c in (False, True))
    assert (
        plain.high < plain.value
    )  # repeated rows hold fewer codes: the interval does not even hold the figure
    assert centred.low < centred.value < centred.high
    assert centred.high - centred.low == pytest.approx(plain.high - plain.low)


# ---- the probe


@pytest.fixture(scope="module")
def some() -> Speech:
    """A few utterances of four speakers."""
    speech = load_speech("builtin", "test").filter(speaker=["f11", "f12", "m11", "m12"])
    return speech.filter(lambda u: u.kind == "keyword" and u.text in KEYWORDS[:4])


def pretraining_model(**knobs: Any) -> Wav2Vec2ConformerForPreTraining:
    torch.manual_seed(0)
    return Wav2Vec2ConformerForPreTraining(tiny_config(num_negatives=5, **knobs)).eval()


def test_probe_learns_on_other_speakers(some: Speech) -> None:
    model = pretraining_model().train()
    probe = P.phone_probe(model, some)
    assert model.training
    assert probe.layers == ("latent frames", "encoder input", "block 1", "block 2")
    assert set(probe.ids) == {u.id for u in some}
    counted = {
        u.id: sum(
            p != ""
            for p in P.phone_rows(u, int(model._get_feat_extract_output_lengths(u.n_samples)), model.config)
        )
        for u in some
    }
    assert dict(zip(probe.ids, probe.frames.tolist(), strict=True)) == counted
    assert probe.accuracy[probe.best] == max(probe.accuracy.values())
    other = P.phone_probe(model, some, batch_seconds=3)
    assert probe.accuracy == pytest.approx(other.accuracy, abs=0.01)  # other batches: a few frames at most
    halves = [some.filter(speaker=names) for names in (["f11", "m12"], ["f12", "m11"])]
    one, other = (P.phone_probe(model, a, b) for a, b in (halves, halves[::-1]))
    assert (probe.right.sum(1) == one.right.sum(1) + other.right.sum(1)).all()
    with pytest.raises(ValueError, match="speak in both sets"):
        P.phone_probe(model, some, some[:3])
    with pytest.raises(ValueError, match="1 speaker"):
        P.phone_probe(model, halves[0].filter(speaker="f11"))
    thin = P.phone_probe(model, some, max_frames=300)
    assert 0 < thin.frames.sum() <= 0.5 * probe.frames.sum() + len(some)


def test_probe_reads_what_is_there(some: Speech, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that holds the phone is read perfectly, one that holds noise no better than by guessing."""
    real = P._known_frames

    def planted(*arguments: Any, **options: Any) -> Any:
        _, phones, ids = real(*arguments, **options)
        alphabet = sorted({p for u in some for p, _, _ in u.phones})
        told = torch.eye(len(alphabet))[[alphabet.index(p) for p in phones.tolist()]]
        return [told, torch.randn(told.shape)], phones, ids

    monkeypatch.setattr(P, "_known_frames", planted)
    probe = P.phone_probe(pretraining_model(), some)
    right, guessed = probe.right.sum(1) / probe.frames.sum()
    count = pretraining_model()._get_feat_extract_output_lengths
    phones = {u.id: P.phone_rows(u, int(count(u.n_samples)), Wav2Vec2ConformerConfig.tiny()) for u in some}
    halves = (["f11", "m12"], ["f12", "m11"])
    sides = [{p for u in some if u.speaker in names for p in phones[u.id]} for names in halves]
    known = sum(p in sides[u.speaker in {"f11", "m12"}] for u in some for p in phones[u.id] if p)
    assert right * probe.frames.sum() >= 0.99 * known  # a phone that only the asked half says cannot be named
    assert guessed < probe.majority + 0.05


def test_padding_that_would_be_heard_is_avoided(some: Speech) -> None:
    sizes = {}
    for invariant in (True, False):
        model = pretraining_model(padding_invariant=invariant)
        sizes[invariant] = [len(batch["ids"]) for batch in P.utterance_batches(model, some)]
    assert sizes == {True: [16], False: [1] * 16}


def test_phone_frames(some: Speech) -> None:
    model = pretraining_model()
    frames = P.phone_frames(model, some, batch_seconds=5)
    alone = [P.phone_frames(model, Speech([u])) for u in some[:3]]
    for u, own in zip(some[:3], alone, strict=True):
        mine = frames.ids == u.id
        assert (frames.codes[mine] == own.codes).all()
        assert (frames.phones[mine] == own.phones).all()
        assert np.allclose(frames.mel[mine], own.mel, atol=1e-4)
    with pytest.raises(ValueError, match="no phones are known"):
        P.phone_frames(model, Speech([Utterance("x", some[0].audio)]))
