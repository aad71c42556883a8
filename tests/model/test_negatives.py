"""The negatives chapter: negatives in distribution and in every edge case."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.wav2vec2.modeling_wav2vec2 import _sample_negative_indices as peer

from w2vc.model.masking import compute_mask_indices
from w2vc.model.negatives import negatives_from_noise, sample_negative_indices

quick = settings(max_examples=80, deadline=None)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def negatives_loop(noise: Tensor, mask: Tensor) -> Tensor:
    """The plain reference: one utterance, one masked frame, one negative at a time."""
    n_rows, n_frames = mask.shape
    out = torch.empty(n_rows, n_frames, noise.shape[1], dtype=torch.int32)
    rows = iter(noise)
    for b in range(n_rows):
        out[b] = b * n_frames
        masked = [t for t in range(n_frames) if mask[b, t]]
        for i, t in enumerate(masked):
            others = masked[:i] + masked[i + 1 :] or [t]
            for k, x in enumerate(next(rows)):
                out[b, t, k] = b * n_frames + others[int(x * torch.tensor(len(others), dtype=torch.float32))]
    return out


masks = st.integers(1, 12).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=5)
)


@quick
@given(masks, st.integers(1, 7), st.integers(0, 2**31))
def test_vectorised_equals_the_loop(rows: list[list[bool]], n: int, seed: int) -> None:
    mask = torch.tensor(rows)
    noise = torch.rand(int(mask.sum()), n, generator=seeded(seed))
    kept = noise.clone()
    got = negatives_from_noise(noise, mask)
    assert got.dtype == torch.int32
    assert got.is_contiguous()
    assert torch.equal(got, negatives_loop(noise, mask))
    assert torch.equal(noise, kept), "the noise was changed"


@quick
@given(masks, st.integers(1, 7), st.integers(0, 2**31))
def test_negatives_are_other_masked_frames_of_the_same_utterance(
    rows: list[list[bool]], n: int, seed: int
) -> None:
    mask = torch.tensor(rows)
    n_rows, n_frames = mask.shape
    got = sample_negative_indices((n_rows, n_frames), n, mask, generator=seeded(seed))
    assert got.shape == (n_rows, n_frames, n)
    assert torch.equal(
        got // n_frames, torch.arange(n_rows, dtype=torch.int32)[:, None, None].expand_as(got)
    ), "another utterance"
    lonely = mask.sum(1) == 1
    scored = mask & ~lonely[:, None]
    own = torch.arange(n_rows * n_frames).view(n_rows, n_frames, 1)
    assert (got != own)[scored].all(), "the positive itself"
    assert mask.flatten()[got[mask]].all(), "a visible frame"
    assert (got == own)[mask & lonely[:, None]].all(), "a lone masked frame gets itself"
    first = (torch.arange(n_rows, dtype=torch.int32) * n_frames)[:, None, None].expand_as(got)
    assert torch.equal(got[~mask], first[~mask]), "a visible frame gets the first of its row"


@pytest.mark.parametrize("n_masked", [2, 3, 7, 30])
def test_distribution_equals_transformers_and_is_uniform(n_masked: int) -> None:
    """20,000 draws for each masked frame: every share within 4 standard errors, on both sides and of each other."""
    draws, n_frames = 20_000, 40
    mask = torch.zeros(2, n_frames, dtype=torch.bool)
    for row in range(2):
        mask[row, torch.randperm(n_frames, generator=seeded(row))[:n_masked]] = True
    np.random.seed(0)  # noqa: NPY002 the peer draws from numpy's global state
    theirs = torch.from_numpy(peer((2, n_frames), draws, mask.numpy()))
    ours = sample_negative_indices((2, n_frames), draws, mask, generator=seeded())
    assert torch.equal(ours[~mask], theirs[~mask])  # the filling of visible frames

    def shares(x: Tensor) -> Tensor:
        return torch.stack([row.bincount(minlength=2 * n_frames) for row in x[mask]]) / draws

    assert ours.dtype == theirs.dtype == torch.int32
    a, b = shares(ours), shares(theirs)
    allowed = torch.block_diag(*[torch.ones(n_masked, n_masked) - torch.eye(n_masked)] * 2).bool()
    columns = mask.flatten()
    assert torch.equal(a[:, columns] > 0, allowed)
    assert not a[:, ~columns].any()
    p = 1 / (n_masked - 1)
    error = math.sqrt(p * (1 - p) / draws)
    assert ((a - b).abs() <= 4 * math.sqrt(2) * error).all()
    exact = a[:, columns][allowed] - p
    assert (exact.abs() <= 4.5 * error + 1e-7).all()
    if n_masked > 2:  # all cells together: chi squared, mean df, variance 2 df
        chi = float((exact**2 * draws / p).sum())
        df = 2 * n_masked * (n_masked - 2)
        assert abs(chi - df) <= 4 * math.sqrt(2 * df)


def test_draws_of_one_frame_and_of_neighbours_are_independent() -> None:
    """Two draws agree as often as chance says: with 11 others, in 1 of 11 cases."""
    x = sample_negative_indices((1, 12), 20_000, generator=seeded())[0]
    within = (x[:, ::2] == x[:, 1::2]).float().mean()
    # frames 0 and 1 share 10 of their 11 choices: equal with probability 10 / 121
    between = (x[0] == x[1]).float().mean()
    assert abs(within - 1 / 11) < 4 * math.sqrt(1 / 11 / 120_000)
    assert abs(between - 10 / 121) < 4 * math.sqrt(10 / 121 / 20_000)


def test_zero_one_and_two_masked_frames() -> None:
    mask = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1]])
    got = sample_negative_indices((3, 4), 3, mask)
    assert got.tolist() == [
        [[0] * 3] * 4,
        [[4] * 3, [4] * 3, [6] * 3, [4] * 3],
        [[8] * 3, [11] * 3, [8] * 3, [9] * 3],
    ]


def test_transformers_rejects_one_masked_frame() -> None:
    with pytest.raises(ValueError, match="high <= 0"):
        peer((1, 4), 3, np.array([[0, 0, 1, 0]]))


def test_nothing_masked_at_all_and_no_rows() -> None:
    assert not sample_negative_indices((1, 5), 2, torch.zeros(1, 5, dtype=torch.bool)).any()
    assert sample_negative_indices((0, 5), 2, torch.zeros(0, 5, dtype=torch.bool)).shape == (0, 5, 2)
    assert sample_negative_indices((2, 0), 2).shape == (2, 0, 2)


def test_without_a_mask_every_frame_takes_part() -> None:
    full = torch.ones(3, 6, dtype=torch.bool)
    got = sample_negative_indices((3, 6), 50, generator=seeded())
    assert torch.equal(got, sample_negative_indices((3, 6), 50, full, generator=seeded()))
    for b in range(3):
        for t in range(6):
            assert set(got[b, t].tolist()) == {6 * b + i for i in range(6) if i != t}


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64])
def test_masks_of_any_type(dtype: torch.dtype) -> None:
    mask = compute_mask_indices((3, 30), 0.5, 4, generator=seeded())
    expected = sample_negative_indices((3, 30), 4, mask, generator=seeded(1))
    assert torch.equal(sample_negative_indices((3, 30), 4, mask.to(dtype), generator=seeded(1)), expected)
    if dtype != torch.bool:
        assert torch.equal(
            sample_negative_indices((3, 30), 4, 3 * mask.to(dtype), generator=seeded(1)), expected
        )
    as_array: Any = mask.to(dtype).numpy()
    assert torch.equal(sample_negative_indices((3, 30), 4, as_array, generator=seeded(1)), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2, 4), 0), "num_negatives=0 must be at least 1"),
        (((2, 4), 3, torch.ones(2, 5, dtype=torch.bool)), r"shape \(2, 5\).*\(2, 4\) \(rows, frames\)"),
        (((2, 4), 3, torch.ones(8, dtype=torch.bool)), r"shape \(8,\)"),
        (((2, 4), 3, torch.ones(2, 4)), r"mask_time_indices is torch\.float32"),
    ],
)
def test_wrong_arguments_are_errors(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_negative_indices(*arguments)


def test_a_generator_repeats_the_draw_and_leaves_the_global_state() -> None:
    before = torch.get_rng_state()
    a = sample_negative_indices((2, 30), 5, generator=seeded(5))
    assert torch.equal(a, sample_negative_indices((2, 30), 5, generator=seeded(5)))
    assert not torch.equal(a, sample_negative_indices((2, 30), 5, generator=seeded(6)))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_the_global_state_decides() -> None:
    torch.manual_seed(1)
    a, b = sample_negative_indices((2, 30), 5), sample_negative_indices((2, 30), 5)
    torch.manual_seed(1)
    assert torch.equal(sample_negative_indices((2, 30), 5), a)
    assert not torch.equal(a, b)


def test_default_dtype_does_not_matter() -> None:
    expected = sample_negative_indices((2, 300), 5, generator=seeded())
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = sample_negative_indices((2, 300), 5, generator=seeded())
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)


def test_the_largest_number_below_one_stays_inside() -> None:
    """float32 rounds products: the last place must not become the next utterance's first."""
    for n in (2, 3, 98, 735, 1499, 4097):
        mask = torch.ones(2, n, dtype=torch.bool)
        noise = torch.full((2 * n, 1), 1 - 2**-24)
        got = negatives_from_noise(noise, mask)[..., 0]
        expected = torch.full((2, n), n - 1, dtype=torch.int32)
        expected[:, -1] = n - 2
        assert torch.equal(got, expected + torch.tensor([[0], [n]], dtype=torch.int32)), n


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    noise, mask = torch.rand(6, 4, generator=seeded()), torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1]]).bool()
    alone = negatives_from_noise(noise, mask)
    mates = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 0]]).bool()
    batch = negatives_from_noise(torch.cat([torch.rand(3, 4), noise]), torch.cat([mates, mask]))
    assert torch.equal(batch[1] - 8, alone[0])


def test_the_documentation_example_runs() -> None:
    mask = compute_mask_indices(shape=(1, 48), mask_prob=0.2, mask_length=2)
    sampled = sample_negative_indices(features_shape=(1, 48), num_negatives=10, mask_time_indices=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises clone() over torch.tensor()
        again = torch.tensor(data=sampled, device="cpu", dtype=torch.long)
    assert torch.equal(again, sampled.long())


class CountOperations(TorchDispatchMode):
    """Count the tensor operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += 1
        return func(*args, **(kwargs or {}))


def test_a_larger_batch_takes_no_more_operations() -> None:
    """No Python loop over rows, frames, spans or negatives: each operation works on the whole batch."""

    def operations(rows: int, frames: int, n: int) -> tuple[int, int]:
        real = torch.ones(rows, frames)
        with CountOperations() as masking:
            mask = compute_mask_indices((rows, frames), 0.65, 5, real, 2)
        with CountOperations() as sampling:
            sample_negative_indices((rows, frames), n, mask)
        return masking.total, sampling.total

    assert operations(2, 20, 3) == operations(17, 150, 40)


def test_the_noise_comes_from_the_generator_a_row_for_each_masked_frame() -> None:
    """A row of `N` uniform numbers for each masked frame: this is what makes a draw the same for every device."""
    mask = compute_mask_indices((4, 30), 0.5, 4, generator=seeded())
    noise = torch.rand(int(mask.sum()), 6, generator=seeded(1))
    got = sample_negative_indices((4, 30), 6, mask, generator=seeded(1))
    assert torch.equal(got, negatives_from_noise(noise, mask))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    mask = compute_mask_indices((3, 60), 0.5, 5, generator=seeded())
    expected = sample_negative_indices((3, 60), 7, mask, generator=seeded(2))
    on_gpu = sample_negative_indices((3, 60), 7, mask.cuda(), generator=seeded(2))
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), expected)  # a CPU generator draws the same for every device
    a, b = (
        sample_negative_indices((3, 60), 7, mask.cuda(), generator=torch.Generator("cuda").manual_seed(4))
        for _ in range(2)
    )
    assert a.is_cuda
    assert torch.equal(a, b)
    noise = torch.rand(int(mask.sum()), 9)
    assert torch.equal(
        negatives_from_noise(noise.cuda(), mask.cuda()).cpu(), negatives_from_noise(noise, mask)
    )
