"""The quantizer: straight-through choice, Gumbel noise, perplexity, and parity with the peer."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import gumbel_softmax

import helpers
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.model.quantizer import (
    GumbelVectorQuantizer,
    choose_codes,
    codebook_perplexity,
    gumbel_relaxed,
    read_codebooks,
    straight_through,
)


def sizes(groups: int = 2, codes: int = 8, width: int = 12, channels: int = 10) -> Wav2Vec2ConformerConfig:
    return helpers.tiny_config(
        conv_dim=(channels,),
        conv_kernel=(10,),
        conv_stride=(5,),
        num_codevector_groups=groups,
        num_codevectors_per_group=codes,
        codevector_dim=width,
    )


def build(config: Wav2Vec2ConformerConfig, seed: int = 0) -> GumbelVectorQuantizer:
    torch.manual_seed(seed)
    quantizer = GumbelVectorQuantizer(config)
    helpers.randomise_(quantizer, seed)
    return quantizer


def peer(config: Wav2Vec2ConformerConfig, ours: nn.Module) -> nn.Module:
    from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as theirs

    module = theirs.Wav2Vec2ConformerGumbelVectorQuantizer(helpers.peer_config(config))
    module.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(module.state_dict(), strict=True)
    return module.train(ours.training)


def one_hot_product(quantizer: GumbelVectorQuantizer, x: Tensor) -> Tensor:
    """The training version by PyTorch's own straight-through choice: every choice times the whole codebook."""
    B, T, _ = x.shape
    G, V = quantizer.num_groups, quantizer.num_vars
    logits = quantizer.weight_proj(x).float().view(B * T * G, V)
    choice = gumbel_softmax(logits, tau=quantizer.temperature, hard=True).view(B * T, G, V, 1)
    return (choice * quantizer.codevectors.view(1, G, V, -1)).sum(2).view(B, T, -1)


def backward(module: nn.Module, x: Tensor, out: Tensor, perplexity: Tensor) -> Tensor:
    """Gradients of a fixed random functional of both outputs; returns the one of the input."""
    g = torch.Generator().manual_seed(9)
    loss = (out * torch.randn(out.shape, generator=g)).sum() + 3.0 * perplexity
    module.zero_grad()
    x.grad = None
    loss.backward()
    return torch.zeros_like(x) if x.grad is None else x.grad.clone()


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask_kind", ["none", "bool", "int64"])
def test_parity_with_the_peer(groups: int, training: bool, mask_kind: str) -> None:
    config = sizes(groups=groups)
    ours = build(config).train(training)
    theirs = peer(config, ours)
    ours.set_temperature(1.3)
    theirs.temperature = 1.3
    x = torch.randn(3, 17, 10, requires_grad=True)
    bool_mask = torch.rand(3, 17) < 0.5
    mine = {"none": None, "bool": bool_mask, "int64": bool_mask.long()}[mask_kind]
    torch.manual_seed(4)
    a, a_ppl = ours(x, mine)
    a_grad = backward(ours, x, a, a_ppl)
    torch.manual_seed(4)
    b, b_ppl = theirs(x, None if mine is None else bool_mask)
    b_grad = backward(theirs, x, b, b_ppl)
    helpers.assert_close("quantizer codevectors", a, b)
    assert torch.equal(a, b)  # the peer's straight-through value is an exact one-hot product
    helpers.assert_close("quantizer perplexity", a_ppl, b_ppl)
    helpers.assert_close("quantizer input gradient", a_grad, b_grad)
    assert helpers.grad_difference(ours, theirs) <= helpers.PARITY
    if not training:
        assert ours.weight_proj.weight.grad is None
        assert a_grad.abs().max() == 0


@settings(max_examples=15, deadline=None)
@given(
    B=st.integers(1, 3), T=st.integers(1, 9), G=st.integers(1, 4), V=st.integers(1, 9), d=st.integers(1, 5),
    tau=st.floats(0.3, 4.0),
)  # fmt: skip
def test_equals_the_one_hot_product(  # noqa: PLR0917
    B: int, T: int, G: int, V: int, d: int, tau: float
) -> None:
    ours = build(sizes(groups=G, codes=V, width=G * d)).train()
    ours.set_temperature(tau)
    x = torch.randn(B, T, 10, requires_grad=True)
    torch.manual_seed(1)
    plain = one_hot_product(ours, x)
    plain_grad = backward(ours, x, plain, x.new_zeros(()))
    plain_grads = {n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None}
    torch.manual_seed(1)
    fast = ours(x)[0]
    fast_grad = backward(ours, x, fast, x.new_zeros(()))
    assert torch.equal(fast, plain)
    scale = max(g.abs().max().item() for g in plain_grads.values())
    assert (fast_grad - plain_grad).abs().max() <= 1e-5 * max(scale, plain_grad.abs().max().item())
    for name, p in ours.named_parameters():
        assert p.grad is not None, name
        assert (p.grad - plain_grads[name]).abs().max() <= 1e-5 * scale, name


@settings(max_examples=15, deadline=None)
@given(frames=st.integers(1, 9), G=st.integers(1, 3), V=st.integers(1, 400), tau=st.floats(0.3, 4.0))
def test_one_seed_gives_the_noise_of_gumbel_softmax(frames: int, G: int, V: int, tau: float) -> None:
    """Soft and hard, to the last bit; the hard one is exactly one-hot."""
    logits = 3 * torch.randn(frames, G, V, generator=torch.Generator().manual_seed(frames + 10 * G + 100 * V))
    answers = {}
    for name, draw in (("ours", gumbel_relaxed), ("torch", gumbel_softmax)):
        torch.manual_seed(2)
        answers[name] = draw(logits, tau)
    assert torch.equal(answers["ours"], answers["torch"])
    torch.manual_seed(2)
    hard = straight_through(answers["ours"])
    assert torch.equal(hard, gumbel_softmax(logits, tau, hard=True))
    assert torch.equal(hard.sort(-1).values[..., -1], torch.ones(frames, G))
    assert torch.equal(hard.sum(-1), torch.ones(frames, G))


def test_gradients_against_finite_differences() -> None:
    """The gradient to `soft` is that of the soft average; the one to the codebook is that of the chosen rows."""
    book = torch.randn(2, 3, 2, dtype=torch.double, requires_grad=True)
    soft = torch.rand(4, 2, 3, dtype=torch.double).softmax(-1).requires_grad_()
    codes = soft.argmax(-1)
    weights = torch.randn(4, 2, 2, dtype=torch.double)
    (torch.einsum("fgv,gvd->fgd", straight_through(soft), book) * weights).sum().backward()
    eps = 1e-6
    for f, g, v in [(0, 0, 0), (1, 1, 2), (3, 0, 1)]:
        up, down = soft.detach().clone(), soft.detach().clone()
        up[f, g, v] += eps
        down[f, g, v] -= eps
        mean = [(torch.einsum("fgv,gvd->fgd", s, book.detach()) * weights).sum() for s in (up, down)]
        assert soft.grad is not None
        torch.testing.assert_close(soft.grad[f, g, v], (mean[0] - mean[1]) / (2 * eps), rtol=1e-6, atol=1e-6)
    expected = torch.zeros(2, 3, 2, dtype=torch.double)
    for f in range(4):
        for g in range(2):
            expected[g, codes[f, g]] += weights[f, g]
    torch.testing.assert_close(book.grad, expected)


def test_no_large_tensor_is_made() -> None:
    """Nothing of the size frames x codes x width: the largest tensor is frames x codes."""
    ours = build(sizes(groups=2, codes=32, width=64)).train()
    x = torch.randn(2, 50, 10, requires_grad=True)
    seen: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(
                t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)
            )
            return out

    with Sizes():
        out, perplexity = ours(x)
        (out.sum() + perplexity).backward()
    assert max(seen) == 2 * 50 * 2 * 32


def test_samples_follow_the_softmax() -> None:
    """Gumbel-max: whatever the temperature, a code is drawn with the probability that the softmax gives it."""
    ours = build(sizes(groups=1, codes=5, width=4)).train()
    ours.set_temperature(0.7)
    x = torch.randn(1, 1, 10).expand(1, 20_000, 10) * 0.3
    codes = ours(x, return_codes=True)[2].flatten()
    share = torch.bincount(codes, minlength=5) / codes.numel()
    p = ours.logits(x[:, :1]).softmax(-1).flatten()
    assert ((share - p).abs() <= 4 * (p * (1 - p) / codes.numel()).sqrt() + 1e-4).all(), (share, p)


def test_codes_are_the_best_ones_and_what_eval_uses() -> None:
    ours = build(sizes()).eval()
    x = torch.randn(2, 7, 10)
    out, _, codes = ours(x, return_codes=True)
    assert codes.shape == (2, 7, 2)
    assert codes.dtype == torch.long
    assert torch.equal(codes, ours.codes(x))
    book = ours.codevectors.view(2, 8, 6)
    assert torch.equal(out, torch.cat([book[0, codes[..., 0]], book[1, codes[..., 1]]], -1))
    assert torch.equal(ours.codes(x), ours.train().codes(x))  # never noisy


def test_training_codes_name_the_returned_vectors() -> None:
    ours = build(sizes()).train()
    x = torch.randn(2, 7, 10)
    out, _, codes = ours(x, return_codes=True)
    book = ours.codevectors.view(2, 8, 6)
    assert torch.equal(out, torch.cat([book[0, codes[..., 0]], book[1, codes[..., 1]]], -1))
    assert not torch.equal(codes, ours.codes(x))  # the noise moved some choices


def test_perplexity_from_collapsed_to_uniform() -> None:
    uniform = torch.full((6, 2, 8), 1 / 8)
    assert math.isclose(codebook_perplexity(uniform).item(), 16, rel_tol=1e-6)
    collapsed = torch.zeros(6, 2, 8)
    collapsed[..., 3] = 1
    assert codebook_perplexity(collapsed).item() == 2
    half = torch.zeros(4, 1, 8)
    half[:2, :, 0] = half[2:, :, 5] = 1
    assert math.isclose(codebook_perplexity(half).item(), 2, rel_tol=1e-6)
    assert codebook_perplexity(half, torch.tensor([1, 1, 0, 0])).item() == 1


def test_a_batch_counts_as_its_frames_in_a_row_and_a_mask_must_fit() -> None:
    probs, keep = torch.rand(3, 5, 2, 6).softmax(-1), torch.rand(3, 5) < 0.5
    assert torch.equal(
        codebook_perplexity(probs, keep), codebook_perplexity(probs.flatten(0, 1), keep.flatten())
    )
    with pytest.raises(ValueError, match=r"shape \(5, 3\), expected \(3, 5\)"):
        codebook_perplexity(probs, keep.T)


def test_choices_with_and_without_noise() -> None:
    """With a temperature a draw that learns, counted by the softmax; without one the best score, counted as it is."""
    logits = torch.randn(7, 2, 5, requires_grad=True)
    torch.manual_seed(3)
    choice, counted = choose_codes(logits, 0.7)
    torch.manual_seed(3)
    assert torch.equal(choice, gumbel_softmax(logits, tau=0.7, hard=True))
    assert torch.equal(counted, logits.softmax(-1))
    assert choice.requires_grad
    best, same = choose_codes(logits, None)
    assert torch.equal(best.argmax(-1), logits.argmax(-1))
    assert best is same
    assert not best.requires_grad


def test_codebooks_are_read_row_by_row() -> None:
    codes, book = torch.randint(5, (7, 2)), torch.randn(1, 10, 3)
    choice = nn.functional.one_hot(codes, 5).float()
    wanted = torch.cat([book[0, codes[:, 0]], book[0, 5 + codes[:, 1]]], dim=1)
    assert torch.equal(read_codebooks(choice, book), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(read_codebooks(choice, book), wanted)  # not rounded
    assert read_codebooks(choice, book.half()).dtype == torch.float16


def test_no_masked_frame_is_defined() -> None:
    ours = build(sizes()).train()
    x = torch.randn(2, 5, 10, requires_grad=True)
    out, perplexity = ours(x, torch.zeros(2, 5, dtype=torch.long))
    assert perplexity.item() == 2  # one code per group
    (out.sum() + perplexity).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
    logits = torch.randn(6, 3, 5, requires_grad=True)
    nothing = codebook_perplexity(logits.softmax(-1), torch.zeros(6, dtype=torch.bool))
    nothing.backward()
    assert nothing.item() == 3
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_mask_counts_the_frames_it_keeps() -> None:
    """As if the others were not there: value and gradient."""
    logits, keep = torch.randn(40, 2, 6, requires_grad=True), torch.rand(40) < 0.5
    results = []
    for perplexity in (
        codebook_perplexity(logits.softmax(-1), keep),
        codebook_perplexity(logits.softmax(-1), keep * torch.arange(1, 41)),
        codebook_perplexity(logits[keep].softmax(-1)),
    ):
        (slope,) = torch.autograd.grad(perplexity, logits)
        results.append((perplexity, slope))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)


def test_the_default_dtype_does_not_matter() -> None:
    """Frames are counted in fp32: bfloat16 cannot count to 499."""
    probs = torch.rand(499, 2, 8).softmax(-1)
    expected = codebook_perplexity(probs)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = codebook_perplexity(probs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)


def test_codes_that_underflow_keep_gradients_finite() -> None:
    """A code whose average probability is exactly 0 in fp32 gives NaN gradients in the plain x log x."""
    logits = torch.tensor([[[0.0, 1.0, -300.0]]]).expand(4, 1, 3).clone().requires_grad_()
    codebook_perplexity(logits.softmax(-1)).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_noise_and_softmax_in_fp32(dtype: torch.dtype) -> None:
    ours = build(sizes(codes=32)).train().to(dtype)
    x = torch.randn(4, 50, 10).to(dtype)
    assert ours.logits(x).dtype == torch.float32
    out, perplexity = ours(x)
    assert out.dtype == dtype
    assert perplexity.dtype == torch.float32
    (out.float().sum() + perplexity).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
    _, hard = ours.eval()(x, torch.ones(4, 50))
    assert 2 <= hard.item() <= 64


@pytest.mark.parametrize("training", [True, False])
def test_autocast_changes_only_the_projection(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the scores everything is computed in fp32: the same values and gradients as without autocast."""
    ours = build(sizes()).train(training)
    x, mask = torch.randn(2, 90, 10), torch.rand(2, 90) < 0.5
    scores = torch.randn(180, 2, 8)

    def outcome(autocast: bool) -> list[Tensor]:
        logits = scores.clone().requires_grad_()
        monkeypatch.setattr(ours, "logits", lambda features: logits)
        ours.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out, perplexity = ours(x, mask)
            total = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + 3 * perplexity
        total.backward()
        grads = [g for g in (ours.codevectors.grad, logits.grad) if g is not None]
        return [out, perplexity, *grads]

    inside, outside = outcome(True), outcome(False)
    assert len(inside) == (4 if training else 3)
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    monkeypatch.undo()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours.weight_proj(x).dtype == torch.bfloat16  # autocast was on
        assert ours.logits(x).dtype == torch.float32


def test_initialisation() -> None:
    torch.manual_seed(0)
    ours = GumbelVectorQuantizer(sizes(codes=320, width=256, channels=64))
    assert abs(ours.weight_proj.weight.std().item() - 1) < 0.02
    assert ours.weight_proj.bias.abs().max() == 0
    assert 0 <= ours.codevectors.min() < 0.01
    assert 0.99 < ours.codevectors.max() <= 1
    assert isinstance(ours.temperature, float)
    assert ours.temperature == 2.0


def test_errors_name_what_came() -> None:
    with pytest.raises(ValueError, match="codevector_dim"):
        GumbelVectorQuantizer(sizes(groups=2, width=13))
    ours = build(sizes())
    for bad in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature"):
            ours.set_temperature(bad)
    with pytest.raises(ValueError, match=r"mask_time_indices.*\(2, 4\)"):
        ours(torch.randn(2, 5, 10), torch.ones(2, 4))
    ours.set_temperature(1)
    assert isinstance(ours.temperature, float)


@pytest.mark.gpu
def test_gpu_equals_cpu_in_eval() -> None:
    ours = build(sizes()).eval()
    x = torch.randn(2, 9, 10)
    mask = torch.rand(2, 9) < 0.5
    cpu = ours(x, mask)
    gpu = ours.cuda()(x.cuda(), mask.cuda())
    assert torch.equal(gpu[0].cpu(), cpu[0])
    helpers.assert_close("quantizer perplexity on the GPU", gpu[1].cpu(), cpu[1])
