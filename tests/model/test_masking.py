"""The masking chapter: span masks in distribution and in every edge case, and SpecAugment."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as peer

from helpers import peer_config, tiny_config
from w2vc.model.masking import (
    apply_spec_augment,
    compute_mask_indices,
    span_counts,
    span_coverage,
    spans_from_noise,
)

quick = settings(max_examples=60, deadline=None)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def right_padded(lengths: list[int], n_frames: int) -> Tensor:
    return (torch.arange(n_frames) < torch.tensor(lengths)[:, None]).long()


def runs(row: Tensor) -> list[int]:
    """Lengths of the masked runs of one row."""
    return [len(list(group)) for masked, group in itertools.groupby(row.tolist()) if masked]


def mask_loop(noise: Tensor, counts: Tensor, lengths: Tensor, mask_length: int) -> Tensor:
    """The plain reference: one row, one span, one frame at a time."""
    mask = torch.zeros(len(noise), noise.shape[1] + mask_length - 1, dtype=torch.bool)
    for row in range(len(noise)):
        places = max(int(lengths[row]) - mask_length + 1, 0)
        for start in noise[row, :places].argsort(descending=True)[: int(counts[row])].tolist():
            mask[row, start : start + mask_length] = True
    return mask


# ------------------------------------------------------------------------------------------- against transformers

LENGTHS = [40, 40, 33, 25, 17, 11, 8, 8]
CALLS = 2500  # of 8 rows each: 20,000 rows
CASES: dict[str, dict[str, Any]] = {
    "pretraining": {"mask_prob": 0.65, "mask_length": 8},
    "fine-tuning": {"mask_prob": 0.05, "mask_length": 8, "min_masks": 2},
    "rare": {"mask_prob": 0.02, "mask_length": 8},
    "short spans": {"mask_prob": 0.5, "mask_length": 3, "min_masks": 1},
    "single frames": {"mask_prob": 0.3, "mask_length": 1},
    "everything": {"mask_prob": 1.0, "mask_length": 5},
    "many at least": {"mask_prob": 0.1, "mask_length": 4, "min_masks": 50},
}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_distribution_equals_transformers(case: str, padded: bool) -> None:
    """Means and profiles agree within 4 standard errors; calls are independent, rows of a call share one rounding."""
    knobs = CASES[case]
    real = right_padded(LENGTHS, 40) if padded else None
    np.random.seed(1)  # noqa: NPY002 the peer draws from numpy's global state
    theirs = np.stack(
        [peer._compute_mask_indices((8, 40), attention_mask=real, **knobs) for _ in range(CALLS)]
    )
    if real is not None:
        theirs &= real.bool().numpy()  # a row without spans hides its last padding frame there: tested below
    g = seeded(1)
    ours = torch.stack(
        [compute_mask_indices((8, 40), attention_mask=real, generator=g, **knobs) for _ in range(CALLS)]
    ).numpy()

    def agree(a: np.ndarray, b: np.ndarray, what: str) -> None:
        error = np.sqrt((a.var(0) + b.var(0)) / CALLS)
        gap = np.abs(a.mean(0) - b.mean(0))
        # a share of 0 or 1 on both sides has no error; 1e-3 allows for an event that one side saw twice
        assert (gap <= 4 * error + 1e-3 * (error == 0)).all(), (
            f"{what}: {(gap / (error + 1e-9)).max():.1f} errors"
        )

    agree(ours.astype(float), theirs.astype(float), "profile")
    agree(ours.mean((1, 2)), theirs.mean((1, 2)), "share")
    agree(ours.sum(2).astype(float), theirs.sum(2).astype(float), "masked frames per row")
    agree(ours.sum(2).astype(float) ** 2, theirs.sum(2).astype(float) ** 2, "their spread")
    agree(ours.sum((1, 2)) ** 2.0, theirs.sum((1, 2)) ** 2.0, "spread of the whole batch")


def test_a_row_too_short_for_a_span_masks_padding_in_transformers_only() -> None:
    real = right_padded([30, 4], 30)
    theirs = peer._compute_mask_indices((2, 30), 0.65, 10, real)
    assert theirs[1].tolist() == [False] * 29 + [True]
    assert not compute_mask_indices((2, 30), 0.65, 10, real)[1].any()


def test_one_rounding_for_all_rows_of_a_call() -> None:
    """Spans of one frame cannot overlap, so the masked frames count the spans: 1.5 on average, equal in all rows."""
    g = seeded()
    totals = []
    for _ in range(400):
        counts = compute_mask_indices((5, 10), 0.15, 1, generator=g).sum(1)
        assert (counts == counts[0]).all()
        totals.append(int(counts[0]))
    assert set(totals) == {1, 2}
    assert abs(np.mean(totals) - 1.5) < 0.1


@pytest.mark.parametrize(
    ("n_frames", "n_spans", "length"), [(200, 13, 10), (30, 3, 10), (10, 1, 10), (12, 4, 3)]
)
def test_measured_chance_is_the_exact_one(n_frames: int, n_spans: int, length: int) -> None:
    rows = 20_000
    noise = torch.rand(rows, n_frames - length + 1, generator=seeded())
    full = torch.full((rows,), n_frames)
    measured = spans_from_noise(noise, torch.full((rows,), n_spans), full, length).double().mean(0)
    exact = span_coverage(n_frames, n_spans, length)
    assert ((measured - exact).abs() <= 4.5 * (exact * (1 - exact) / rows).sqrt() + 1e-12).all()


@pytest.mark.parametrize(
    ("n_frames", "n_spans", "length"), [(7, 2, 3), (6, 3, 2), (5, 0, 2), (4, 1, 4), (5, 5, 1)]
)
def test_span_coverage_by_enumeration(n_frames: int, n_spans: int, length: int) -> None:
    every = []
    for starts in itertools.combinations(range(n_frames - length + 1), n_spans):
        every.append([any(s <= t < s + length for s in starts) for t in range(n_frames)])
    expected = torch.tensor(every, dtype=torch.float64).mean(0)
    torch.testing.assert_close(span_coverage(n_frames, n_spans, length), expected, rtol=1e-12, atol=1e-12)


def test_edge_frames_are_hidden_ten_times_less_often() -> None:
    chance = span_coverage(200, 1, 10)
    assert chance[100] / chance[0] == pytest.approx(10)


def test_span_coverage_refuses_more_spans_than_places() -> None:
    with pytest.raises(ValueError, match=r"n_spans=4 must lie in 0\.\.3"):
        span_coverage(5, 4, 3)


# ------------------------------------------------------------------------------------------------------ properties


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    n_frames = draw(st.integers(1, 40))
    return {
        "n_frames": n_frames,
        "mask_length": draw(st.integers(1, n_frames)),
        "mask_prob": draw(st.sampled_from([0.0, 0.0012, 0.05, 0.3, 0.65, 1.0])),
        "min_masks": draw(st.sampled_from([0, 1, 2, 7])),
        "lengths": draw(st.lists(st.integers(0, n_frames), min_size=0, max_size=6)),
        "seed": draw(st.integers(0, 2**31)),
    }


@quick
@given(requests())
def test_every_mask_is_made_of_whole_spans_of_real_frames(r: dict[str, Any]) -> None:
    lengths = r["lengths"]
    mask = compute_mask_indices(
        (len(lengths), r["n_frames"]),
        r["mask_prob"],
        r["mask_length"],
        right_padded(lengths, r["n_frames"]) if lengths else None,
        r["min_masks"],
        generator=seeded(r["seed"]),
    )
    assert mask.dtype == torch.bool
    assert mask.is_contiguous()
    assert mask.shape == (len(lengths), r["n_frames"])
    most = max(math.floor(r["mask_prob"] * r["n_frames"] / r["mask_length"] + 1), r["min_masks"])
    for row, length in zip(mask, lengths, strict=True):
        assert not row[length:].any(), "padding is masked"
        assert all(run >= r["mask_length"] for run in runs(row)), "a span is cut"
        assert row.sum() <= most * r["mask_length"]
        if r["min_masks"] and length >= r["mask_length"]:
            assert row.any(), "a row that could get a span got none"


@quick
@given(requests(), st.floats(0.001, 0.998))
def test_counts_equal_the_formula_of_transformers(r: dict[str, Any], epsilon: float) -> None:
    lengths, length, n_frames = r["lengths"], r["mask_length"], r["n_frames"]
    expected = []
    for n in lengths:
        exact = r["mask_prob"] * n / length + epsilon
        assume(abs(exact - round(exact)) > 1e-4)  # there rounding of float32 decides
        spans = max(int(exact), r["min_masks"])
        spans = n_frames // length if spans * length > n_frames else spans
        expected.append(max(min(spans, n - length + 1), 0))
    got = span_counts(
        torch.tensor(lengths, dtype=torch.long),
        n_frames,
        torch.tensor(epsilon),
        mask_prob=r["mask_prob"],
        mask_length=length,
        min_masks=r["min_masks"],
    )
    assert got.dtype == torch.int64
    assert got.tolist() == expected


@quick
@given(requests())
def test_vectorised_equals_the_loop(r: dict[str, Any]) -> None:
    lengths = torch.tensor(r["lengths"], dtype=torch.long)
    g = seeded(r["seed"])
    noise = torch.rand(len(lengths), r["n_frames"] - r["mask_length"] + 1, generator=g)
    places = (lengths - r["mask_length"] + 1).clamp(min=0)
    counts = torch.minimum((torch.rand(len(lengths), generator=g) * 5).long(), places)
    counts = counts.clamp(max=r["n_frames"] // r["mask_length"])
    expected = mask_loop(noise, counts, lengths, r["mask_length"])
    assert torch.equal(spans_from_noise(noise, counts, lengths, r["mask_length"]), expected)
    most = int(counts.max()) if len(counts) else 0
    assert torch.equal(spans_from_noise(noise, counts, lengths, r["mask_length"], most), expected)


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    """Noise keyed by the utterance gives the same mask alone and in a longer, padded batch."""
    noise, length = torch.rand(1, 91, generator=seeded()), 10
    alone = spans_from_noise(noise[:, :31], torch.tensor([3]), torch.tensor([40]), length)
    batch = spans_from_noise(
        torch.cat([torch.rand(1, 91), noise]), torch.tensor([6, 3]), torch.tensor([100, 40]), length
    )
    assert torch.equal(batch[1, :40], alone[0])
    assert not batch[1, 40:].any()


# ------------------------------------------------------------------------------------------------------ edge cases


def test_rows_shorter_than_equal_to_and_longer_than_a_span() -> None:
    mask = compute_mask_indices((4, 8), 0.9, 4, right_padded([8, 4, 3, 0], 8), 1, generator=seeded())
    assert mask[0].any()
    assert mask[1].tolist() == [True] * 4 + [False] * 4
    assert not mask[2:].any()


def test_span_as_long_as_the_row() -> None:
    assert compute_mask_indices((3, 10), 1.0, 10).all()
    share = torch.stack([compute_mask_indices((1, 10), 0.4, 10, generator=g) for g in [seeded()] * 500])
    assert share.flatten(1).float().mean(1).unique().tolist() == [0.0, 1.0]
    assert abs(share.float().mean() - 0.4) < 0.1


def test_zero_probability() -> None:
    assert not compute_mask_indices((3, 20), 0.0, 5).any()
    forced = compute_mask_indices((3, 20), 0.0, 5, min_masks=1, generator=seeded())
    assert [runs(row) for row in forced] == [[5]] * 3


def test_a_probability_so_low_that_mostly_nothing_is_drawn() -> None:
    """transformers once failed here (feature masks with p = 0.0012)."""
    drawn = torch.stack([compute_mask_indices((2, 32), 0.0012, 10, generator=g) for g in [seeded()] * 300])
    assert drawn.float().mean() < 0.02


def test_no_rows_and_one_row() -> None:
    assert compute_mask_indices((0, 20), 0.5, 5).shape == (0, 20)
    assert compute_mask_indices((1, 20), 1.0, 5).any()


def test_more_spans_asked_for_than_there_are_places() -> None:
    mask = compute_mask_indices((1, 50), 0.0, 10, right_padded([11], 50), 5)
    assert mask[0].tolist() == [True] * 11 + [False] * 39  # two places, so two spans, which overlap


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"mask_length": 0}, "mask_length=0 must be at least 1"),
        ({"mask_length": 21}, "mask_length=21 must not exceed the 20 frames"),
        ({"mask_prob": -0.1}, r"mask_prob=-0\.1 must lie in 0\.\.1"),
        ({"mask_prob": 65}, r"mask_prob=65 must lie in 0\.\.1"),
        ({"mask_prob": math.nan}, "mask_prob=nan"),
        ({"min_masks": -1}, "min_masks=-1 must not be negative"),
        ({"shape": (20,)}, r"shape=\(20,\) must be \(rows, frames\)"),
        ({"attention_mask": torch.ones(2, 320)}, r"shape \(2, 320\); \(2, 20\) \(rows, frames\) is needed"),
        ({"attention_mask": torch.tensor([[0, 1] * 10] * 2)}, "padding on the right"),
        (
            {"attention_mask": right_padded([20, 20], 20).flip(1) * torch.tensor([0] + [1] * 19)},
            "on the right",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_mask_indices(**{"shape": (2, 20), "mask_prob": 0.5, "mask_length": 5, **knobs})


@pytest.mark.parametrize("length", [0, 21])
def test_transformers_refuses_the_same_lengths(length: int) -> None:
    with pytest.raises(ValueError, match="mask_length"):
        peer._compute_mask_indices((2, 20), 0.5, length)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32]
)
def test_attention_mask_of_any_type(dtype: torch.dtype) -> None:
    real = right_padded([30, 12], 30)
    expected = compute_mask_indices((2, 30), 0.6, 4, real, 1, generator=seeded(3))
    assert torch.equal(
        compute_mask_indices((2, 30), 0.6, 4, real.to(dtype), 1, generator=seeded(3)), expected
    )


def test_long_half_precision_masks_are_counted_exactly() -> None:
    real = right_padded([3001], 4000).half()  # a sum in float16 would be off
    mask = compute_mask_indices((1, 4000), 1.0, 1, real)
    assert mask.sum() == 3001


def test_a_generator_repeats_the_draw_and_leaves_the_global_state() -> None:
    before = torch.get_rng_state()
    a = compute_mask_indices((4, 60), 0.5, 6, generator=seeded(5))
    b = compute_mask_indices((4, 60), 0.5, 6, generator=seeded(5))
    c = compute_mask_indices((4, 60), 0.5, 6, generator=seeded(6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_the_global_state_decides() -> None:
    torch.manual_seed(1)
    a = compute_mask_indices((4, 60), 0.5, 6)
    b = compute_mask_indices((4, 60), 0.5, 6)
    torch.manual_seed(1)
    assert torch.equal(compute_mask_indices((4, 60), 0.5, 6), a)
    assert not torch.equal(a, b)


def test_default_dtype_does_not_matter() -> None:
    expected = compute_mask_indices((4, 300), 0.65, 10, generator=seeded())
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = compute_mask_indices((4, 300), 0.65, 10, generator=seeded())
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    real = right_padded([60, 60, 25, 5], 60)
    expected = compute_mask_indices((4, 60), 0.6, 6, real, generator=seeded(2))
    on_gpu = compute_mask_indices((4, 60), 0.6, 6, real.cuda(), generator=seeded(2))
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), expected)  # a CPU generator draws the same for every device
    a, b = (
        compute_mask_indices((4, 60), 0.6, 6, generator=torch.Generator("cuda").manual_seed(4))
        for _ in range(2)
    )
    assert a.is_cuda
    assert torch.equal(a, b)
    config = tiny_config(mask_time_prob=0.5, mask_feature_prob=0.5, mask_feature_length=4)
    hidden, embedding, mask = torch.zeros(4, 60, 32).cuda(), torch.ones(32).cuda(), real.cuda()
    apply_spec_augment(hidden, embedding, config, None, mask, True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # from here on, any wait for the device is an error
    try:
        drawn = apply_spec_augment(hidden, embedding, config, None, mask, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert drawn.is_cuda


# ----------------------------------------------------------------------------------------------------- SpecAugment


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_masks_equal_transformers(training: bool, dtype: torch.dtype) -> None:
    config = tiny_config(mask_feature_prob=0.0)
    model = peer.Wav2Vec2ConformerModel(peer_config(config)).train(training)
    hidden = torch.randn(3, 25, config.hidden_size).to(dtype)
    mask = compute_mask_indices((3, 25), 0.5, 4, generator=seeded())
    expected = model._mask_hidden_states(hidden.clone(), mask_time_indices=mask)
    kept = hidden.clone()
    got = apply_spec_augment(hidden, model.masked_spec_embed, config, mask, training=training)
    assert got.dtype == dtype
    assert torch.equal(got, expected)
    assert torch.equal(hidden, kept), "the input was changed"


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_given_masks_of_any_type_are_masks(dtype: torch.dtype) -> None:
    config = tiny_config()
    hidden, embedding = torch.randn(2, 4, 3), torch.full((3,), 7.0)
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]])
    expected = torch.where(mask[:, :, None] == 1, 7.0, hidden)
    assert torch.equal(apply_spec_augment(hidden, embedding, config, mask.to(dtype)), expected)
    if dtype != torch.bool:
        assert torch.equal(apply_spec_augment(hidden, embedding, config, 3 * mask.to(dtype)), expected)


def test_given_masks_are_used_even_when_spec_augment_is_off_unlike_transformers() -> None:
    config = tiny_config(apply_spec_augment=False, mask_feature_prob=1.0, mask_feature_length=4)
    hidden, mask = torch.randn(1, 3, config.hidden_size), torch.tensor([[True, False, False]])
    model = peer.Wav2Vec2ConformerModel(peer_config(config)).train()
    assert torch.equal(model._mask_hidden_states(hidden.clone(), mask_time_indices=mask), hidden)
    got = apply_spec_augment(hidden, model.masked_spec_embed, config, mask, training=True)
    assert torch.equal(got[0, 0], model.masked_spec_embed)
    assert torch.equal(got[0, 1:], hidden[0, 1:])
    assert apply_spec_augment(hidden, None, config, training=True) is hidden


def test_integer_masks_index_rows_in_transformers() -> None:
    """The defect that ours does not share: an integer mask picks rows there."""
    config = tiny_config()
    model = peer.Wav2Vec2ConformerModel(peer_config(config)).eval()
    hidden, mask = torch.randn(2, 3, config.hidden_size), torch.tensor([[0, 0, 0], [0, 0, 0]])
    theirs = model._mask_hidden_states(hidden.clone(), mask_time_indices=mask)
    assert torch.equal(theirs[0], model.masked_spec_embed.expand(3, -1))  # nothing was to be hidden
    assert torch.equal(apply_spec_augment(hidden, model.masked_spec_embed, config, mask), hidden)


def test_nothing_is_drawn_in_evaluation() -> None:
    config = tiny_config(mask_time_prob=1.0, mask_feature_prob=1.0)
    hidden = torch.randn(2, 30, 32)
    assert apply_spec_augment(hidden, torch.zeros(32), config) is hidden


def test_drawn_masks_are_those_of_compute_mask_indices() -> None:
    config = tiny_config(
        mask_time_prob=0.5,
        mask_time_length=3,
        mask_time_min_masks=1,
        mask_feature_prob=0.1,
        mask_feature_length=5,
        mask_feature_min_masks=3,
    )
    hidden, embedding = torch.randn(4, 20, 32) + 5, torch.full((32,), -9.0)
    real = right_padded([20, 15, 9, 4], 20)
    got = apply_spec_augment(hidden, embedding, config, None, real, True, generator=seeded(8))
    g = seeded(8)
    frames = compute_mask_indices((4, 20), 0.5, 3, real, 1, generator=g)
    channels = compute_mask_indices((4, 32), 0.1, 5, None, 3, generator=g)
    expected = torch.where(frames[:, :, None], -9.0, hidden) * ~channels[:, None, :]
    assert torch.equal(got, expected)
    assert frames.any()
    assert channels.any()


@pytest.mark.parametrize("knob", ["mask_time", "mask_feature"])
def test_each_kind_alone(knob: str) -> None:
    off = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    config = tiny_config(**{**off, f"{knob}_prob": 1.0, f"{knob}_length": 2, f"{knob}_min_masks": 1})
    hidden = torch.ones(2, 6, 8)
    got = apply_spec_augment(hidden, torch.full((8,), 5.0), config, training=True, generator=seeded())
    if knob == "mask_time":
        assert set(got.unique().tolist()) <= {1.0, 5.0}
        assert ((got == 5.0).all(2) | (got == 1.0).all(2)).all()  # whole frames
        assert (got == 5.0).any()
    else:
        assert set(got.unique().tolist()) <= {0.0, 1.0}
        assert ((got == 0.0).all(1) | (got == 1.0).all(1)).all()  # whole channels
        assert (got == 0.0).any()


def test_distribution_of_drawn_masks_equals_transformers() -> None:
    config = tiny_config(mask_time_prob=0.4, mask_time_length=4, mask_feature_prob=0.3, mask_feature_length=6)
    model = peer.Wav2Vec2ConformerModel(peer_config(config)).train()
    torch.nn.init.constant_(model.masked_spec_embed, 2.0)
    hidden, real = torch.ones(16, 20, 32), right_padded([20, 14] * 8, 20)
    np.random.seed(0)  # noqa: NPY002 the peer draws from numpy's global state
    with torch.no_grad():
        theirs = torch.stack([model._mask_hidden_states(hidden.clone(), None, real) for _ in range(300)])
        ours = torch.stack(
            [
                apply_spec_augment(hidden, model.masked_spec_embed, config, None, real, True)
                for _ in range(300)
            ]
        )
    for value in (0.0, 2.0):
        a, b = ((x == value).float().mean((1, 2, 3)) for x in (ours, theirs))
        assert abs(a.mean() - b.mean()) <= 4 * ((a.var() + b.var()) / 300).sqrt()


def test_knobs_are_read_at_each_call() -> None:
    config = tiny_config(mask_time_prob=1.0, mask_feature_prob=0.0)
    hidden, embedding = torch.ones(1, 30, 8), torch.zeros(8)
    assert (apply_spec_augment(hidden, embedding, config, training=True) == 0).any()
    config.apply_spec_augment = False
    assert apply_spec_augment(hidden, embedding, config, training=True) is hidden


def test_gradients_go_to_visible_frames_and_to_the_embedding() -> None:
    config = tiny_config()
    hidden = torch.randn(2, 5, 3, requires_grad=True)
    embedding = torch.randn(3, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 1]])
    apply_spec_augment(hidden, embedding, config, mask).sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, (1.0 - mask)[:, :, None].expand(2, 5, 3))
    assert embedding.grad is not None
    assert embedding.grad.tolist() == [3.0, 3.0, 3.0]


def test_wrong_masks_and_a_missing_embedding_are_refused() -> None:
    config = tiny_config(mask_time_prob=0.5)
    hidden = torch.randn(2, 30, 8)
    with pytest.raises(ValueError, match="no mask embedding"):
        apply_spec_augment(hidden, None, config, torch.ones(2, 30, dtype=torch.bool))
    with pytest.raises(ValueError, match="no mask embedding"):
        apply_spec_augment(hidden, None, config, training=True)
    with pytest.raises(ValueError, match=r"shape \(2, 29\)"):
        apply_spec_augment(hidden, torch.zeros(8), config, torch.ones(2, 29, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        apply_spec_augment(hidden, torch.zeros(8), config, torch.ones(2, 30))


def test_the_documentation_example_runs() -> None:
    """A mask is passed through torch.tensor(..., dtype=torch.long) there."""
    mask = compute_mask_indices(shape=(1, 48), mask_prob=0.2, mask_length=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises clone() over torch.tensor()
        again = torch.tensor(data=mask, device=mask.device, dtype=torch.long)
    assert torch.equal(again != 0, mask)
