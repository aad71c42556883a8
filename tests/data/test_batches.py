"""The batches chapter: keyed randomness, buckets, collators, and loaders that do not care who loads."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from helpers import tiny_config
from w2vc.data.audio import Wav2Vec2FeatureExtractor
from w2vc.data.batches import (
    BucketSampler,
    Collator,
    CTCCollator,
    Example,
    LabelCollator,
    PretrainingCollator,
    SampleRequest,
    SpeechDataset,
    add_noise,
    bucket_batches,
    crop_start,
    data_loader,
    draw_mask,
    draw_negatives,
    find_problems,
    label_names,
    model_inputs,
    sample_rng,
    turn_order,
)
from w2vc.data.corpus import KEYWORDS, SAMPLING_RATE, Segment, Speech, Utterance, frame_labels, load_speech
from w2vc.data.sound import normalise
from w2vc.model.ctc import Wav2Vec2ConformerForCTC
from w2vc.model.features import conv_output_lengths
from w2vc.model.masking import compute_mask_indices
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining
from w2vc.text.tokenizer import Wav2Vec2CTCTokenizer, Wav2Vec2Processor

quick = settings(max_examples=40, deadline=None)
EXTRACTOR = Wav2Vec2FeatureExtractor()
BASE = [0.4897758798192007, 0.48066014524207823]


def rngs(n: int, seed: int = 0, epoch: int = 0, purpose: str = "mask") -> list[np.random.Generator]:
    return [sample_rng(seed, epoch, f"utterance {i}", purpose) for i in range(n)]


def draw_masks(keyed: list[np.random.Generator], n_frames: list[int], **spans: Any) -> Tensor:
    return pad_sequence(
        [draw_mask(rng, n, **spans) for rng, n in zip(keyed, n_frames, strict=True)], batch_first=True
    )


def within(got: float, expected: float, error: float, times: float = 4.5) -> None:
    assert abs(got - expected) <= times * error, (
        f"{got} is {abs(got - expected) / error:.1f} errors from {expected}"
    )


# ---------------------------------------------------------------------------------------------------- randomness


def test_numbers_follow_from_seed_epoch_name_and_purpose_alone() -> None:
    """The four facts are kept apart, on every machine alike, and a longer draw begins as a shorter one."""
    base = sample_rng(3, 1, "anna", "mask").random(100)
    assert base[:2] == pytest.approx(BASE, abs=1e-12)
    assert np.array_equal(sample_rng(3, 1, "anna", "mask").random(17), base[:17])
    facts = [(3, 1, "anna", "mask"), (1, 3, "anna", "mask"), (2, 2, "anna", "mask"), (-3, 1, "anna", "mask")]
    facts += [
        (3, 1, "ann", "amask"),
        (3, 1, "mask", "anna"),
        (31, 1, "anna", "mask"),
        (2**70, 1, "anna", "mask"),
    ]
    assert len({sample_rng(*fact).random() for fact in facts}) == len(facts)


@pytest.mark.parametrize("change", ["seed", "epoch", "name", "purpose"])
def test_neighbouring_keys_are_independent(change: str) -> None:
    """Pairs of numbers, one from each key, fill a 16 x 16 grid evenly."""

    def table(seed: int = 0, epoch: int = 0, shift: int = 0, purpose: str = "a") -> Any:
        return np.stack(
            [sample_rng(seed, epoch, f"clip {i + shift}", purpose).random(50) for i in range(1000)]
        )

    other: dict[str, Any] = {
        "seed": {"seed": 1},
        "epoch": {"epoch": 1},
        "name": {"shift": 1},
        "purpose": {"purpose": "b"},
    }
    a, b = table(), table(**other[change])
    pairs = np.bincount(((a * 16).astype(int) * 16 + (b * 16).astype(int)).ravel(), minlength=256)
    expected = a.size / 256
    within(float(((pairs - expected) ** 2 / expected).sum()), 255, math.sqrt(2 * 255))


# ----------------------------------------------------------------------------------------- crops, masks, negatives


def test_crops_are_uniform_over_all_places() -> None:
    n = 20_000
    cells = np.bincount([crop_start(rng, 20, 11) for rng in rngs(n, purpose="crop")])
    assert len(cells) == 10
    within(float(((cells - n / 10.0) ** 2 / (n / 10)).sum()), 9, math.sqrt(18))
    assert {crop_start(rng, length, 11) for rng in rngs(9) for length in (5, 11, 3)} == {0}


CASES: dict[str, dict[str, Any]] = {
    "pretraining": {"mask_prob": 0.65, "mask_length": 8},
    "fine-tuning": {"mask_prob": 0.05, "mask_length": 8, "min_masks": 2},
    "rare": {"mask_prob": 0.02, "mask_length": 8},
    "single frames": {"mask_prob": 0.3, "mask_length": 1},
    "everything": {"mask_prob": 1.0, "mask_length": 5},
}
LENGTHS = [40, 33, 17, 8]
CALLS = 1500


@pytest.mark.parametrize("case", CASES, ids=str)
def test_masks_have_the_distribution_of_the_plain_sampler(case: str) -> None:
    """Each row, in a padded batch, is drawn as the plain sampler draws it alone: profile, share and spread."""
    knobs = CASES[case]
    keyed = draw_masks(rngs(4 * CALLS + 1), [*LENGTHS * CALLS, 47], **knobs)[:-1].view(CALLS, 4, 47)
    g = torch.Generator().manual_seed(0)
    for row, length in enumerate(LENGTHS):
        plain = torch.cat(
            [compute_mask_indices((1, length), generator=g, **knobs) for _ in range(CALLS)]
        ).double()
        mine = keyed[:, row].double()
        assert not mine[:, length:].any()
        mine = mine[:, :length]
        pairs = [(mine, plain)] + [
            (mine.sum(1, keepdim=True) ** k, plain.sum(1, keepdim=True) ** k) for k in (1, 2)
        ]
        pairs.append((mine[:, 1:] * mine[:, :-1], plain[:, 1:] * plain[:, :-1]))  # neighbours hidden together
        for a, b in pairs:
            error = ((a.var(0) + b.var(0)) / CALLS).sqrt()
            gap = (a.mean(0) - b.mean(0)).abs()
            assert (gap <= 4.5 * error + 1e-3 * (error == 0)).all(), (
                length,
                float((gap / (error + 1e-9)).max()),
            )


def test_each_row_rounds_on_its_own() -> None:
    """Single frames cannot overlap, so they count the spans: 1.5 on average, not equal in all rows."""
    counts = draw_masks(rngs(2000), [10] * 2000, mask_prob=0.15, mask_length=1).sum(1)
    assert set(counts.tolist()) == {1, 2}
    within(float(counts.double().mean()), 1.5, 0.5 / math.sqrt(2000))


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "lengths": draw(st.lists(st.integers(0, 60), min_size=1, max_size=7)),
        "extra": draw(st.integers(0, 30)),
        "mask_prob": draw(st.sampled_from([0.0, 0.05, 0.3, 0.65, 1.0])),
        "mask_length": draw(st.integers(1, 12)),
        "min_masks": draw(st.sampled_from([0, 1, 2, 9])),
        "seed": draw(st.integers(0, 2**40)),
        "epoch": draw(st.integers(0, 9)),
    }


@quick
@given(rows())
def test_masks_and_negatives_ignore_batch_mates_and_padding(r: dict[str, Any]) -> None:
    knobs = {k: r[k] for k in ("mask_prob", "mask_length", "min_masks")}
    key, n, lengths = (r["seed"], r["epoch"]), len(r["lengths"]), r["lengths"]
    n_frames = max(lengths) + r["extra"]
    together = draw_masks(rngs(n + 1, *key), [*lengths, n_frames], **knobs)[:n]
    negatives = draw_negatives(rngs(n, *key, "negatives"), together, 6)
    assert together.shape == (n, n_frames)
    for i, length in enumerate(lengths):
        alone = draw_masks(rngs(n, *key)[i : i + 1], [length], **knobs)
        assert torch.equal(together[i, :length], alone[0])
        assert not together[i, length:].any()
        if length >= r["mask_length"] and (r["mask_prob"] == 1 or r["min_masks"]):
            assert alone.any()
        mine = draw_negatives(rngs(n, *key, "negatives")[i : i + 1], alone, 6)[0]
        assert torch.equal(negatives[i, :length] - i * n_frames, mine)
        own = torch.arange(length)[:, None]
        if alone.sum() > 1:
            assert alone[0][mine[alone[0]]].all(), "a visible frame"
            assert (mine != own)[alone[0]].all(), "the frame itself"


@pytest.mark.parametrize("hidden", [2, 3, 12])
def test_negatives_are_uniform_over_the_other_hidden_frames(hidden: int) -> None:
    mask = torch.zeros(1, 20, dtype=torch.bool)
    mask[0, torch.randperm(20, generator=torch.Generator().manual_seed(0))[:hidden]] = True
    n_rows, n_draws = 500, 60
    got = draw_negatives(rngs(n_rows, 1), mask.expand(n_rows, -1), n_draws)
    got = (got - 20 * torch.arange(n_rows)[:, None, None])[:, mask[0]]  # [rows, hidden, draws]
    share = torch.stack([got[:, i].flatten().bincount(minlength=20) for i in range(hidden)]).double()
    share = share[:, mask[0]]
    assert (share.diagonal() == 0).all()
    expected = n_rows * n_draws / (hidden - 1)
    others = share[~torch.eye(hidden, dtype=torch.bool)]
    df = hidden * (hidden - 2)
    chi = float(((others - expected) ** 2 / expected).sum())
    within(chi, df, math.sqrt(2 * df) if df else 1e-9)
    if hidden == 12:  # draws of one frame, of two frames and of two utterances agree as often as chance says
        total = n_rows * 12 * n_draws
        for a, b, chance in (
            (got[..., ::2], got[..., 1::2], 1 / 11),
            (got[:, 0], got[:, 1], 10 / 121),
            (got[:-1], got[1:], 1 / 11),
        ):
            within(float((a == b).double().mean()), chance, math.sqrt(chance / min(a.numel(), total)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_masks(rngs(1), [9], mask_prob=1.2, mask_length=2), "mask_prob=1.2"),
        (lambda: draw_masks(rngs(1), [9], mask_prob=0.2, mask_length=0), "mask_length=0"),
        (lambda: draw_negatives(rngs(1), torch.ones(1, 4).bool(), 0), "num_negatives=0"),
    ],
)
def test_draws_that_make_no_sense(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_noise_has_the_power_asked_for_and_its_own_level_each_epoch() -> None:
    audio = np.sin(np.arange(40_000) / 5).astype(np.float32)

    def noisy(epoch: int, decibels: tuple[float, float]) -> Any:
        return add_noise(sample_rng(0, epoch, "anna", "noise"), audio, decibels)

    def snr(epoch: int, decibels: tuple[float, float]) -> float:
        return 10 * math.log10(np.mean(audio**2) / np.mean((noisy(epoch, decibels) - audio) ** 2))

    assert noisy(0, (20, 20)).dtype == np.float32
    assert snr(0, (20, 20)) == pytest.approx(20, abs=0.15)
    levels = [snr(epoch, (10, 30)) for epoch in range(60)]
    assert 9.8 < min(levels) < 14
    assert 26 < max(levels) < 30.2
    assert np.array_equal(noisy(0, (20, 20)), noisy(0, (20, 20)))
    assert not np.array_equal(noisy(0, (20, 20)), noisy(1, (20, 20)))
    silence = np.zeros(50_000, np.float32)
    assert np.isfinite(add_noise(sample_rng(0, 0, "anna", "noise"), silence, (0, 0))).all()


# ---------------------------------------------------------------------------------------------------------- buckets


def padding_share(lengths: Any, batches: Any) -> float:
    real = sum(lengths[i] for batch in batches for i in batch)
    return 1 - real / sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    lengths = draw(st.lists(st.integers(1, 100), min_size=0, max_size=60))
    most = draw(st.integers(100, 600))
    return {
        "lengths": lengths,
        "max_samples": most,
        "max_rows": draw(st.sampled_from([None, 2, 3])),
        "seed": draw(st.sampled_from([None, 0, 7])),
        "epoch": draw(st.integers(0, 3)),
        "multiple_of": 1 if len(lengths) < 8 or most < 200 else draw(st.integers(1, 4)),  # enough to cut
    }


@quick
@given(plans())
def test_every_utterance_is_in_one_batch_that_fits(p: dict[str, Any]) -> None:
    lengths = p["lengths"]
    batches = bucket_batches(**p)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) % p["multiple_of"] == 0
    for batch in batches:
        assert 0 < len(batch) <= (p["max_rows"] or math.inf)
        assert len(batch) * max(lengths[i] for i in batch) <= p["max_samples"]
    assert bucket_batches(**p) == batches
    assert bucket_batches(**{**p, "lengths": torch.tensor(lengths, dtype=torch.long)}) == batches


def spread_lengths(n: int = 2000) -> list[int]:
    """Two to twenty seconds."""
    g = torch.Generator().manual_seed(0)
    return (16_000 * (2 + 18 * torch.rand(n, generator=g))).long().tolist()


def test_buckets_hold_little_padding_and_change_with_the_epoch() -> None:
    lengths, most = spread_lengths(), 16_000 * 120
    plain = bucket_batches(lengths, most)
    assert padding_share(lengths, plain) < 0.01
    longest = [max(lengths[i] for i in batch) for batch in plain]
    assert longest == sorted(longest, reverse=True)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [order[i : i + 6] for i in range(0, len(order), 6)]
    assert padding_share(lengths, shuffled) > 0.3
    first, second = (bucket_batches(lengths, most, seed=0, epoch=epoch) for epoch in (0, 1))
    assert first != second != bucket_batches(lengths, most, seed=1, epoch=1)
    for batches in (first, second):
        assert padding_share(lengths, batches) < 0.08
        halves = [
            np.mean([max(lengths[i] for i in batch) for batch in half])
            for half in (batches[::2], batches[1::2])
        ]
        assert abs(halves[0] - halves[1]) < 0.1 * halves[0]  # order is shuffled: no half is longer
        middle = len(batches) // 2
        halves = [np.mean([len(batch) for batch in part]) for part in (batches[:middle], batches[middle:])]
        assert abs(halves[0] - halves[1]) < 0.3 * halves[0]
    together = {frozenset((a, b)) for batch in first for a in batch for b in batch if a < b}
    again = {frozenset((a, b)) for batch in second for a in batch for b in batch if a < b}
    assert len(together & again) < 0.3 * len(together), "the same groups every epoch"


def test_equal_lengths_are_shuffled_whole() -> None:
    """Crops all have one length; then every grouping must be possible."""
    batches = bucket_batches([10] * 400, 100, seed=0)
    assert len(batches) == 40
    spans = [max(batch) - min(batch) for batch in batches]
    assert np.mean(spans) > 200


def test_processes_get_batches_of_similar_length_in_each_step() -> None:
    lengths = spread_lengths()
    batches = bucket_batches(lengths, 16_000 * 120, seed=0, multiple_of=4)
    assert len(batches) % 4 == 0
    longest = np.array([max(lengths[i] for i in batch) for batch in batches]).reshape(-1, 4)
    assert np.mean(longest.min(1) / longest.max(1)) > 0.9


def test_batches_of_one_that_cannot_be_cut_take_turns_in_staying_out() -> None:
    out = set()
    for epoch in range(40):
        batches = bucket_batches(
            [10, 20, 30, 40, 50, 60, 70], 80, max_rows=1, seed=0, epoch=epoch, multiple_of=2
        )
        assert len(batches) == 6
        out |= {*range(7)} - {i for batch in batches for i in batch}
    assert out == {*range(7)}


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"lengths": [5, 101, 7]},
            "utterance 1 has 101 samples, not 1..max_samples=100",
        ),
        ({"lengths": [5, 0]}, "utterance 1 has 0 samples"),
        ({"max_samples": 0}, "max_samples=0"),
        ({"max_rows": 0}, "max_rows=0 must be at least 1"),
        (
            {"lengths": [5, 6, 7], "multiple_of": 4},
            "3 single utterances cannot be shared by 4 processes",
        ),
        ({"lengths": [5, 6, 7], "multiple_of": 4, "seed": 0}, "cannot be shared by 4 processes"),
        ({"max_rows": 1, "multiple_of": 2}, "cannot be shared by 2 processes"),
    ],
)
def test_bucket_refusals(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bucket_batches(**{"lengths": [5, 6, 7], "max_samples": 100, **knobs})


# ---------------------------------------------------------------------------------------------------------- sampler


def seen(batches: Any) -> list[int]:
    return sorted(draw.number for batch in batches for draw in batch)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_processes_share_an_epoch_evenly(processes: int) -> None:
    lengths = spread_lengths(101)
    parts = []
    for rank in range(processes):
        sampler = BucketSampler(lengths, 16_000 * 60, seed=3, processes=processes, rank=rank)
        sampler.set_epoch(2)
        part = list(sampler)
        assert len(part) == len(sampler)
        assert all(draw.epoch == 2 for batch in part for draw in batch)
        parts.append(part)
    assert len({len(part) for part in parts}) == 1
    assert seen(batch for part in parts for batch in part) == list(range(101))


@pytest.mark.parametrize("processes", [2, 3])
def test_accelerate_deals_out_the_same_batches(processes: int) -> None:
    lengths = spread_lengths(101)
    whole = BucketSampler(lengths, 16_000 * 60, seed=3, processes=processes)
    whole.set_epoch(1, 2)
    for rank in range(processes):
        mine = BucketSampler(lengths, 16_000 * 60, seed=3, processes=processes, rank=rank)
        mine.set_epoch(1, 2)
        shard = BatchSamplerShard(whole, processes, rank, even_batches=False)
        assert list(shard) == list(mine)
        assert len(shard) == len(mine)


def test_a_loader_prepared_by_accelerate() -> None:
    speech = Speech([tone(f"clip {i}", 4000 + 800 * i) for i in range(12)])
    ids = []
    for rank in range(2):
        loader = data_loader(speech, Collator(tiny_config(), EXTRACTOR), max_seconds=2, seed=0, processes=2)
        mine = prepare_data_loader(
            loader, num_processes=2, process_index=rank, put_on_device=False, even_batches=False
        )
        ids.append([batch["ids"] for batch in mine])
    assert len(ids[0]) == len(ids[1])
    assert sorted(name for part in ids for batch in part for name in batch) == sorted(u.id for u in speech)


def test_resume_anywhere_goes_on_with_the_same_batches() -> None:
    lengths = spread_lengths(60)

    def sampler(**knobs: Any) -> BucketSampler:
        return BucketSampler(lengths, 16_000 * 60, **{"seed": 1, "processes": 2, "rank": 1, **knobs})

    first = sampler()
    first.set_epoch(4)
    batches = list(first)
    for position in range(len(batches) + 1):
        state = pickle.loads(pickle.dumps(first.state_dict(position)))
        again = sampler()
        again.load_state_dict(state)
        assert len(again) == len(batches) - position
        assert list(again) == batches[position:]
        again.set_epoch(5)
        assert again.position == 0
    again.set_epoch(5)
    fresh = sampler()
    fresh.set_epoch(5)
    assert list(again) == list(fresh)
    again.set_epoch(4)
    assert list(again) == batches
    changed = BucketSampler([*lengths[:-1], 32_000], 16_000 * 60, seed=1, processes=2, rank=1)
    for other in (changed, sampler(seed=2), sampler(processes=3), sampler(max_rows=2)):
        with pytest.raises(ValueError, match="saved at batch 3 of an epoch with other utterances"):
            other.load_state_dict(first.state_dict(3))
        other.load_state_dict(first.state_dict(0))
        assert (other.epoch, other.position) == (4, 0)


def test_sampler_refusals() -> None:
    with pytest.raises(ValueError, match="rank=2"):
        BucketSampler([5], 10, processes=2, rank=2)
    with pytest.raises(ValueError, match="epoch=-1"):
        BucketSampler([5], 10).set_epoch(-1)


# -------------------------------------------------------------------------------------------------------- collators


def tone(id: str, n_samples: int, **facts: Any) -> Utterance:
    g = sample_rng(0, 0, id, "tone")
    return Utterance(id, g.normal(0, 0.1, n_samples).astype(np.float32), **facts)


def clips(*utterances: Utterance, epoch: int = 0) -> list[Example]:
    dataset = SpeechDataset(Speech(utterances))
    return [dataset[SampleRequest(epoch, i)] for i in range(len(utterances))]


def pretraining(**knobs: Any) -> PretrainingCollator:
    return PretrainingCollator(tiny_config(), EXTRACTOR, **{"crop_seconds": 1.0, "num_negatives": 7, **knobs})


FOUR = [tone("a", 30_000), tone("b", 12_000), tone("c", 20_000), tone("d", 16_000)]


def test_a_pretraining_batch_is_complete_and_trains() -> None:
    config = tiny_config()
    batch = pretraining()(clips(*FOUR))
    assert batch["ids"] == ["a", "b", "c", "d"]
    assert batch["lengths"] == [16_000, 12_000, 16_000, 16_000]
    assert batch["input_values"].shape == batch["attention_mask"].shape == (4, 16_000)
    assert batch["attention_mask"].dtype == torch.bool
    assert batch["attention_mask"].sum(1).tolist() == batch["lengths"]
    T = max(batch["n_frames"])
    assert batch["mask_time_indices"].shape == (4, T)
    assert batch["sampled_negative_indices"].shape == (4, T, 7)
    assert batch["n_masked"] == int(batch["mask_time_indices"].sum()) > 0
    assert all(
        isinstance(n, int) for n in (*batch["lengths"], *batch["n_frames"], batch["n_masked"], batch["epoch"])
    )
    model = Wav2Vec2ConformerForPreTraining(config).train()
    frames = model._get_feat_extract_output_lengths(torch.tensor(batch["lengths"]))
    assert frames.tolist() == batch["n_frames"]
    inputs = model_inputs(batch)
    assert set(inputs) == {"input_values", "attention_mask", "mask_time_indices", "sampled_negative_indices"}
    loss = model(**inputs).loss
    assert torch.isfinite(loss)
    loss.backward()


def test_rows_are_crops_of_their_utterance_normalised() -> None:
    for crop in ("max", "shortest"):
        batch = pretraining(crop=crop)(clips(*FOUR, epoch=3))
        for row, length, u in zip(batch["input_values"], batch["lengths"], FOUR, strict=True):
            start = crop_start(sample_rng(0, 3, u.id, "crop"), u.n_samples, length)
            assert np.allclose(row[:length].numpy(), normalise(u.audio[start : start + length]), atol=1e-5)
            assert not row[length:].any()
    assert batch["lengths"] == [12_000] * 4  # the last one: cut to the shortest, nothing is padded
    assert batch["attention_mask"].all()


def test_a_sample_is_the_same_in_any_batch_any_order_any_time() -> None:
    collator = pretraining(noise_db=(10, 30))
    whole = collator(clips(*FOUR, epoch=2))
    T = whole["mask_time_indices"].shape[1]
    for order in ([3, 1, 0], [0], [1, 2], [2, 2]):
        part = collator(clips(*(FOUR[i] for i in order), epoch=2))
        width = part["mask_time_indices"].shape[1]
        for row, i in enumerate(order):
            n, t = part["lengths"][row], part["n_frames"][row]
            assert torch.equal(part["input_values"][row, :n], whole["input_values"][i, :n])
            assert torch.equal(part["mask_time_indices"][row, :t], whole["mask_time_indices"][i, :t])
            mine, theirs = part["sampled_negative_indices"][row, :t], whole["sampled_negative_indices"][i, :t]
            assert torch.equal(mine - row * width, theirs - i * T)
    for other in (
        collator(clips(*FOUR, epoch=3)),
        pretraining(noise_db=(10, 30), seed=1)(clips(*FOUR, epoch=2)),
    ):
        assert not torch.equal(other["mask_time_indices"], whole["mask_time_indices"])
        assert not torch.equal(other["input_values"], whole["input_values"])


def broken(kind: str) -> Utterance:
    if kind == "nan":
        audio = np.zeros(9000, np.float32)
        audio[5] = np.nan
        return Utterance("nan", audio)
    if kind == "short":
        return tone("short", 200)
    if kind == "rate":
        return tone("rate", 9000, sampling_rate=8000)
    if kind == "stereo":
        return Utterance("stereo", np.zeros((2, 9000), np.float32))

    class Missing:
        n_samples = 9000

        def read(self) -> Any:
            raise ValueError("the file is cut short")

    return Utterance("file", Missing())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "'nan': 1 of its samples are NaN or Inf"),
        ("short", "'short': its 200 samples are fewer than the 400 of a frame"),
        ("rate", "'rate': it has 8000 samples a second"),
        ("stereo", r"'stereo': it is float32 of shape \(2, 9000\)"),
        ("file", "'file': it cannot be decoded: the file is cut short"),
    ],
)
def test_broken_samples_are_named_or_counted(kind: str, message: str) -> None:
    config = tiny_config(
        conv_dim=(16,) * 7, conv_kernel=(10, 3, 3, 3, 3, 2, 2), conv_stride=(5, 2, 2, 2, 2, 2, 2)
    )
    bad = broken(kind)
    with pytest.raises(ValueError, match=f"1 of 3 utterances cannot be used .{message}.*bad='drop'"):
        Collator(config, EXTRACTOR)(clips(FOUR[0], bad, FOUR[1]))
    collator = Collator(config, EXTRACTOR, bad="drop")
    batch = collator(clips(FOUR[0], bad, FOUR[1]))
    assert batch["ids"] == ["a", "b"]
    assert len(batch["dropped"]) == 1
    assert batch["dropped"][0].startswith(f"'{kind}'")
    assert torch.equal(batch["input_values"], collator(clips(FOUR[0], FOUR[1]))["input_values"])
    with pytest.raises(ValueError, match="1 of 1 utterances cannot be used"):
        collator(clips(bad))  # nothing is left


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Collator(tiny_config(), Wav2Vec2FeatureExtractor(padding_side="left")),
            "padding_side='left'",
        ),
        (lambda: Collator(tiny_config(), EXTRACTOR, crop="first"), "crop='first' must be one of"),
        (lambda: Collator(tiny_config(), EXTRACTOR, bad="ignore"), "bad='ignore' must be one of"),
        (lambda: Collator(tiny_config(), EXTRACTOR, crop_seconds=0.001), "shorter than one frame"),
        (lambda: LabelCollator(tiny_config(), EXTRACTOR, "speaker", per="word"), "per='word'"),
        (lambda: CTCCollator(tiny_config(), processor(), crop_seconds=1.0), "not for CTC"),
    ],
)
def test_collator_refusals(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------------------- labels


def processor(letters: str = "abcdefghijklmnopqrstuvwxyz'") -> Wav2Vec2Processor:
    vocabulary = {
        "<pad>": 0,
        "<s>": 1,
        "</s>": 2,
        "<unk>": 3,
        "|": 4,
        **{c: i + 5 for i, c in enumerate(letters)},
    }
    return Wav2Vec2Processor(EXTRACTOR, Wav2Vec2CTCTokenizer(vocabulary))


def test_a_ctc_batch_equals_the_processors_and_trains() -> None:
    speech = load_speech("builtin").filter(kind="sentence")[:3]
    both = processor()
    batch = CTCCollator(tiny_config(), both)(clips(*speech))
    expected = both(
        audio=[u.audio for u in speech], text=[u.text for u in speech], sampling_rate=SAMPLING_RATE,
        padding=True, return_tensors="pt", audio_kwargs={"return_attention_mask": True},
    )  # fmt: skip
    assert torch.equal(batch["input_values"], expected["input_values"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"].bool())
    assert torch.equal(batch["labels"], expected["labels"])
    assert batch["texts"] == [u.text for u in speech]
    assert batch["label_lengths"] == (batch["labels"] != -100).sum(1).tolist()
    assert batch["n_labels"] == sum(batch["label_lengths"])
    assert set(model_inputs(batch)) == {"input_values", "attention_mask", "labels"}
    assert torch.isfinite(Wav2Vec2ConformerForCTC(tiny_config()).train()(**model_inputs(batch)).loss)


def test_spec_augment_masks_are_keyed_and_optional() -> None:
    config = tiny_config(mask_time_prob=0.4, mask_time_length=4, mask_time_min_masks=1)
    speech = load_speech("builtin")[:3]
    batch = CTCCollator(config, processor(), spec_augment=True, seed=2)(clips(*speech, epoch=5))
    keyed = [sample_rng(2, 5, u.id, "mask") for u in speech]
    mask = draw_masks(keyed, batch["n_frames"], mask_prob=0.4, mask_length=4, min_masks=1)
    assert mask.any(1).all()
    assert torch.equal(batch["mask_time_indices"], mask)
    off = tiny_config(mask_time_prob=0.4, apply_spec_augment=False)
    for quiet in (CTCCollator(config, processor()), CTCCollator(off, processor(), spec_augment=True)):
        assert "mask_time_indices" not in quiet(clips(*speech))


def test_find_problems_names_what_a_collator_would_refuse() -> None:
    speech = Speech([tone("good", 9000, text="a"), tone("click", 100, text="a"), tone("mute", 9000)])
    assert list(find_problems(speech, Collator(tiny_config(), EXTRACTOR))) == ["click"]
    found = find_problems(speech, CTCCollator(tiny_config(), processor()))
    assert found["mute"] == "it has no text"
    assert found.keys() == {"click", "mute"}


@pytest.mark.parametrize(
    ("utterance", "message"),
    [
        (tone("mute", 9000), "'mute': it has no text"),
        (
            tone("letters", 9000, text="naïve"),
            "'letters': its text 'naïve' has letters that the vocabulary has not",
        ),
        (tone("fast", 3200, text="aabbccdd"), "'fast': its text needs 12 frames, and it has"),
    ],
)
def test_texts_that_cannot_be_learned_are_named(utterance: Utterance, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CTCCollator(tiny_config(), processor())(clips(utterance))


def test_a_text_may_need_all_frames_and_no_more() -> None:
    config = tiny_config()
    n_frames = int(conv_output_lengths(3200, config.conv_kernel, config.conv_stride))
    letters = "abcdefghijklmnopqrstuvwxyz"
    collator = CTCCollator(config, processor())
    assert collator(clips(tone("full", 3200, text=letters[:n_frames])))["n_labels"] == n_frames
    with pytest.raises(ValueError, match=f"needs {n_frames + 1} frames, and it has {n_frames}"):
        collator(clips(tone("fuller", 3200, text=letters[: n_frames + 1])))


def test_one_label_for_each_utterance() -> None:
    speech = load_speech("builtin").filter(kind="keyword")
    names = label_names(speech, "text")
    assert sorted(names.values()) == sorted(KEYWORDS)
    assert list(names) == list(range(10))
    config = tiny_config(num_labels=10, id2label=names)
    batch = LabelCollator(config, EXTRACTOR, "text")(clips(*speech[:6]))
    assert batch["labels"].dtype == torch.int64
    assert [names[i] for i in batch["labels"].tolist()] == [u.text for u in speech[:6]]
    assert batch["n_labels"] == 6
    config = tiny_config(num_labels=10, id2label=names, problem_type="multi_label_classification")
    batch = LabelCollator(config, EXTRACTOR, lambda u: {u.text, "yes"})(clips(*speech[:6]))
    assert batch["labels"].dtype == torch.float32
    assert [{names[i] for i in row.nonzero()[:, 0].tolist()} for row in batch["labels"]] == [
        {u.text, "yes"} for u in speech[:6]
    ]
    config = tiny_config(num_labels=1, problem_type="regression")
    batch = LabelCollator(config, EXTRACTOR, lambda u: u.seconds)(clips(*speech[:6]))
    torch.testing.assert_close(batch["labels"], torch.tensor([u.seconds for u in speech[:6]]))
    speakers = tiny_config(num_labels=16, id2label=label_names(speech, "speaker"))
    batch = LabelCollator(speakers, EXTRACTOR, "speaker", crop_seconds=0.4)(clips(*speech[:3]))
    assert [speakers.id2label[i] for i in batch["labels"].tolist()] == [u.speaker for u in speech[:3]]
    assert max(batch["lengths"]) <= 6400


def test_unknown_labels_are_named() -> None:
    config = tiny_config(num_labels=2, id2label={0: "yes", 1: "no"})
    with pytest.raises(ValueError, match="'x': its label cannot be used: 'maybe' is not among the 2 labels"):
        LabelCollator(config, EXTRACTOR, "text")(clips(tone("x", 9000, text="maybe")))
    with pytest.raises(ValueError, match="7 is not among the 2 labels"):
        LabelCollator(config, EXTRACTOR, lambda u: 7)(clips(tone("x", 9000)))
    with pytest.raises(ValueError, match="'sil' is not among"):
        LabelCollator(config, EXTRACTOR, "phones", per="frame")(clips(load_speech("builtin")[0]))


REAL = {"conv_dim": (16,) * 7, "conv_kernel": (10, 3, 3, 3, 3, 2, 2), "conv_stride": (5, 2, 2, 2, 2, 2, 2)}


def test_frame_labels_equal_those_of_the_speech_chapter_and_follow_the_crop() -> None:
    speech = load_speech("builtin").filter(kind="sentence")[:4]
    names = label_names(speech, "phones")
    config = tiny_config(num_labels=len(names), id2label=names, **REAL)
    batch = LabelCollator(config, EXTRACTOR, "phones", per="frame")(clips(*speech))
    assert batch["labels"].shape == (4, max(batch["n_frames"]))
    for row, n, u in zip(batch["labels"], batch["n_frames"], speech, strict=True):
        expected = [config.label2id.get(label, -100) for label in frame_labels(u.phones, n)]
        assert row[:n].tolist() == expected
        assert (row[n:] == -100).all()
    assert batch["n_labels"] == int((batch["labels"] != -100).sum())

    collator = LabelCollator(config, EXTRACTOR, "phones", per="frame", crop_seconds=1.0, seed=4)
    cropped = collator(clips(*speech))
    starts = [crop_start(sample_rng(4, 0, u.id, "crop"), u.n_samples, 16_000) for u in speech]
    for row, start, u in zip(cropped["labels"], starts, speech, strict=True):
        middles = start + 200 + 320 * np.arange(49)
        for label, middle in zip(row.tolist(), (middles / 16_000).tolist(), strict=True):
            covering = [s.label for s in u.phones if s.start <= middle < s.end]
            assert (config.id2label[label] in covering) if covering else label == -100


def test_several_speakers_in_a_frame() -> None:
    mixes = load_speech("builtin-mixes", "dev")[:3]
    names = {0: "speaker 1", 1: "speaker 2"}
    config = tiny_config(num_labels=2, id2label=names, problem_type="multi_label_classification", **REAL)
    batch = LabelCollator(config, EXTRACTOR, turn_order, per="frame")(clips(*mixes))
    T = max(batch["n_frames"])
    assert batch["labels"].shape == (3, T, 2)
    assert set(batch["labels"].unique().tolist()) <= {-100.0, 0.0, 1.0}
    assert batch["n_labels"] == sum(batch["n_frames"])
    for row, n, u in zip(batch["labels"], batch["n_frames"], mixes, strict=True):
        order = list(dict.fromkeys(t.label for t in sorted(u.turns, key=lambda t: t.start)))
        times = (200 + 320 * np.arange(n)) / 16_000
        for i, name in enumerate(order):
            speaking = [any(t.label == name and t.start <= s < t.end for t in u.turns) for s in times]
            assert row[:n, i].tolist() == speaking
        assert (row[n:] == -100).all()
    single = tiny_config(num_labels=2, id2label=names, **REAL)
    overlapping = [u for u in load_speech("builtin-mixes", "dev") if overlaps(turn_order(u))][:1]
    with pytest.raises(ValueError, match="segments overlap"):
        LabelCollator(single, EXTRACTOR, turn_order, per="frame")(clips(*overlapping))


def overlaps(segments: list[Segment]) -> bool:
    return any(b.start < a.end - 0.05 for a, b in pairwise(segments))


# ---------------------------------------------------------------------------------------------------------- loader


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k] for k in a
    )


def test_batches_do_not_depend_on_the_workers() -> None:
    speech = load_speech("builtin", "dev")[:40]
    collator = pretraining(noise_db=(20, 30))
    knobs: dict[str, Any] = {"max_seconds": 6, "seed": 1}
    here, there = (data_loader(speech, collator, workers=n, **knobs) for n in (0, 2))
    kept = data_loader(speech, collator, preload=True, **knobs)
    state = torch.get_rng_state()
    for epoch, position in ((0, 0), (1, 0), (1, 3)):
        for loader in (here, there, kept):
            loader.batch_sampler.set_epoch(epoch, position)
        count = 0
        for a, b, c in zip(here, there, kept, strict=True):
            assert a["epoch"] == epoch
            assert same(a, b)
            assert same(a, c)
            count += 1
        assert count == len(here) == len(there)
    assert torch.equal(torch.get_rng_state(), state), "drawing batches moved torch's global state"


def test_what_goes_to_a_worker_can_be_pickled() -> None:
    """Where processes are spawned, the data set and the collator are sent."""
    speech = load_speech("builtin", "dev")[:5] + load_speech("builtin-mixes", "dev")[:1]
    loader = data_loader(speech, pretraining(), max_seconds=16)
    dataset, collator = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    keys = [SampleRequest(1, i) for i in range(6)]
    assert same(collator([dataset[k] for k in keys]), loader.collate_fn([loader.dataset[k] for k in keys]))
    batch = collator([dataset[k] for k in keys])
    assert same(batch, pickle.loads(pickle.dumps(batch)))


def test_lengths_that_rule_an_utterance_out() -> None:
    speech = Speech([*FOUR, tone("long", 90_000), tone("tiny", 100)])
    with pytest.raises(
        ValueError, match=r"2 of 6 utterances are shorter.*'long' \(5\.62 s\), 'tiny' \(0\.01 s\)"
    ):
        data_loader(speech, Collator(tiny_config(), EXTRACTOR), max_seconds=4)
    loader = data_loader(speech, Collator(tiny_config(), EXTRACTOR, bad="drop"), max_seconds=4)
    assert loader.dataset.left_out == ["'long' (5.62 s)", "'tiny' (0.01 s)"]
    assert sorted(name for batch in loader for name in batch["ids"]) == ["a", "b", "c", "d"]
    cropped = data_loader(speech[:5], pretraining(), max_seconds=2)
    for batch in cropped:
        assert batch["input_values"].numel() <= 32_000


def test_a_batch_moves_and_keeps_its_facts() -> None:
    batch = pretraining()(clips(*FOUR))
    moved = batch.to("cpu", torch.float64)
    assert moved["input_values"].dtype == torch.float64
    assert moved["mask_time_indices"].dtype == torch.bool
    assert moved.ids == ["a", "b", "c", "d"]
