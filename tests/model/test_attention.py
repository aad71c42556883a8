"""Self-attention: parity with the peer, eager against SDPA, masks, half precision, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import w2vc.model.attention as module
from helpers import (
    assert_close,
    difference,
    grad_difference,
    peer_config,
    randomise_,
    tiny_config,
)
from w2vc.model.attention import SelfAttention, attend, attend_fused, hide_padding, split_heads, turn_frames
from w2vc.model.positions import Positions, apply_rotary, make_positions

KINDS = ["relative", "rotary", None]


def build(kind: str | None, seed: int = 0, **options: Any) -> SelfAttention:
    """A layer in eval whose every parameter matters (biases and the two position biases are not 0)."""
    torch.manual_seed(seed)
    layer = SelfAttention(tiny_config(position_embeddings_type=kind, **options)).eval()
    randomise_(layer, seed)
    for name, p in layer.named_parameters():
        if name.startswith("pos_bias"):
            nn.init.normal_(p, std=0.5)
    return layer


def positions_for(layer: SelfAttention, n_frames: int, dtype: torch.dtype = torch.float32) -> Positions:
    make = make_positions(layer.config)
    return None if make is None else make(n_frames, "cpu", dtype)


def mask_of(lengths: list[int], n_frames: int) -> Tensor:
    return torch.arange(n_frames) < torch.tensor(lengths)[:, None]


def peer_of(layer: SelfAttention) -> nn.Module:
    from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import (
        Wav2Vec2ConformerSelfAttention,
    )

    peer = Wav2Vec2ConformerSelfAttention(peer_config(layer.config)).eval()
    peer.load_state_dict(layer.state_dict(), strict=True)
    return peer


def run_peer(peer: Any, hidden: Tensor, mask: Tensor | None, positions: Positions) -> tuple[Tensor, Tensor]:
    bias = None if mask is None else (~mask[:, None, None, :]).float() * torch.finfo(torch.float32).min
    if isinstance(positions, tuple):
        positions = torch.stack([p[:, None, None] for p in positions])  # [2, T, 1, 1, K]
    elif positions is not None:
        positions = positions[None]
    return peer(hidden, attention_mask=bias, relative_position_embeddings=positions)


# ------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_maps_and_gradients_equal_the_peers(kind: str | None, masked: bool, kernel: str) -> None:
    layer = build(kind, attn_implementation=kernel)
    peer = peer_of(layer)
    ours_in = torch.randn(3, 17, 32, requires_grad=True)
    theirs_in = ours_in.detach().clone().requires_grad_()
    mask = mask_of([17, 9, 4], 17) if masked else None
    positions = positions_for(layer, 17)
    out, none = layer(ours_in, mask, positions)
    want, want_maps = run_peer(peer, theirs_in, mask, positions)
    assert none is None
    assert_close(f"attention.{kind}.out", out, want)
    _, maps = layer(ours_in, mask, positions, output_attentions=True)
    assert maps is not None
    assert_close(f"attention.{kind}.maps", maps, want_maps)
    weight = torch.randn(out.shape)
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    assert grad_difference(layer, peer) <= 1e-5
    assert ours_in.grad is not None
    assert theirs_in.grad is not None
    assert_close(f"attention.{kind}.input_gradient", ours_in.grad, theirs_in.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_the_parameters(kind: str | None) -> None:
    linear = [f"linear_{x}.{p}" for x in ("q", "k", "v", "out") for p in ("weight", "bias")]
    relative = ["linear_pos.weight", "pos_bias_u", "pos_bias_v"] if kind == "relative" else []
    assert sorted(build(kind).state_dict()) == sorted(linear + relative)


@pytest.mark.parametrize("kind", KINDS)
def test_training_with_dropout_equals_the_peers_given_equal_noise(kind: str | None) -> None:
    layer = build(kind, attention_dropout=0.3, attn_implementation="eager").train()
    peer = peer_of(layer).train()
    hidden, positions = torch.randn(2, 11, 32), positions_for(layer, 11)
    torch.manual_seed(5)
    out, maps = layer(hidden, None, positions, output_attentions=True)
    torch.manual_seed(5)
    want, want_maps = run_peer(peer, hidden, None, positions)
    assert maps is not None
    assert 0.1 < (maps == 0).float().mean() < 0.5  # the noise is there
    assert_close(f"attention.{kind}.train", out, want)
    assert_close(f"attention.{kind}.train_maps", maps, want_maps)


# -------------------------------------------------------------------------------------- kernels agree


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_kernels_agree_in_training_with_dropout(kind: str | None, padded: bool) -> None:
    layer = build(kind, attention_dropout=0.4).train()
    hidden, positions = torch.randn(2, 13, 32, requires_grad=True), positions_for(layer, 13)
    mask = mask_of([13, 8], 13) if padded else None
    found = []
    for kernel in ("eager", "sdpa"):
        layer.config.attn_implementation = kernel
        torch.manual_seed(6)  # the same noise
        out, _ = layer(hidden, mask, positions)
        found.append([out, *torch.autograd.grad(out.square().sum(), [hidden, *layer.parameters()])])
    for readable, lean in zip(*found, strict=True):
        torch.testing.assert_close(readable, lean, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    heads=st.sampled_from([1, 2, 4]),
    head_width=st.sampled_from([2, 6, 8]),
    n_frames=st.integers(1, 23),
    rows=st.integers(1, 3),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_eager_and_sdpa_agree_in_value_and_gradient(
    *, kind: str | None, heads: int, head_width: int, n_frames: int, rows: int, masked: bool, seed: int
) -> None:
    eager = build(
        kind,
        seed,
        hidden_size=heads * head_width,
        num_attention_heads=heads,
        attn_implementation="eager",
        num_conv_pos_embedding_groups=1,
    )
    sdpa = copy.deepcopy(eager)
    sdpa.config.attn_implementation = "sdpa"
    lengths = torch.randint(1, n_frames + 1, (rows,)).tolist()
    mask = mask_of(lengths, n_frames) if masked else None
    hidden = torch.randn(rows, n_frames, heads * head_width)
    positions = positions_for(eager, n_frames)
    a, _ = eager(hidden, mask, positions)
    b, _ = sdpa(hidden, mask, positions)
    assert difference(b, a) <= 1e-5
    weight = torch.randn(a.shape)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    assert grad_difference(sdpa, eager) <= 1e-5


# ------------------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize(
    ("kind", "training"), [("relative", True), ("relative", False), ("rotary", True), (None, False)]
)
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_compiles_whole_with_equal_value_and_gradient(kind: str | None, training: bool, kernel: str) -> None:
    torch._dynamo.reset()
    layer = build(kind, attention_dropout=0.2, attn_implementation=kernel).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    hidden, mask, positions = torch.randn(2, 11, 32), mask_of([11, 7], 11), positions_for(layer, 11)
    weight, results = torch.randn(2, 11, 32), []
    for run in (compiled, layer):
        layer.zero_grad()
        torch.manual_seed(3)
        out, _ = run(hidden, mask, positions)
        (out * weight).sum().backward()
        results.append([out, *(p.grad for p in layer.parameters())])
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want, atol=1e-5, rtol=1e-5)


class WithPositions(nn.Module):
    """A layer and its positions: what the encoder does with them."""

    def __init__(self, layer: SelfAttention) -> None:
        super().__init__()
        self.layer, self.positions = layer, make_positions(layer.config)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        made = (
            None if self.positions is None else self.positions(hidden.shape[1], hidden.device, hidden.dtype)
        )
        out: Tensor = self.layer(hidden, mask, made)[0]
        return out


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_layer_takes_any_length(kind: str | None, kernel: str) -> None:
    model, time = (
        WithPositions(build(kind, attn_implementation=kernel)),
        torch.export.Dim("time", min=3, max=1000),
    )
    inputs = (torch.randn(2, 11, 32), mask_of([11, 7], 11))
    with torch.no_grad():
        program = torch.export.export(model, inputs, dynamic_shapes=({1: time}, {1: time}))
        for n_frames in (3, 5, 60):
            hidden, mask = torch.randn(2, n_frames, 32), mask_of([n_frames, 3], n_frames)
            assert_close("attention.exported", program.module()(hidden, mask), model(hidden, mask))


@pytest.mark.parametrize("kind", KINDS)
def test_asking_for_maps_changes_nothing_else(kind: str | None) -> None:
    layer = build(kind, attn_implementation="sdpa")
    hidden, mask, positions = torch.randn(2, 13, 32), mask_of([13, 6], 13), positions_for(layer, 13)
    plain, none = layer(hidden, mask, positions)
    out, maps = layer(hidden, mask, positions, output_attentions=True)
    assert none is None
    assert maps.shape == (2, 4, 13, 13)
    assert difference(plain, out) <= 1e-5
    assert torch.allclose(maps.sum(-1), torch.ones(2, 4, 13), atol=1e-5)
    layer.config.attn_implementation = "eager"
    assert layer(hidden, mask, positions)[1] is None
    assert torch.equal(layer(hidden, mask, positions, output_attentions=True)[1], maps)


def test_the_switch_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = build(None, attn_implementation="sdpa"), []
    real = module.scaled_dot_product_attention
    monkeypatch.setattr(
        module, "scaled_dot_product_attention", lambda *a, **k: (calls.append("sdpa"), real(*a, **k))[1]
    )
    hidden = torch.randn(1, 5, 32)
    layer(hidden)
    assert calls == ["sdpa"]
    layer.config.attn_implementation = "eager"
    layer(hidden)
    assert calls == ["sdpa"]


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_dropout_acts_in_training_alone(kernel: str) -> None:
    layer = build(None, attention_dropout=0.5, attn_implementation=kernel)
    hidden = torch.randn(1, 9, 32)
    quiet = layer(hidden)[0]
    assert torch.equal(quiet, layer(hidden)[0])
    layer.train()
    draws = torch.stack([layer(hidden)[0] for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    assert (draws.mean(0) - quiet).abs().max() < 5 * (draws.std(0) / 20).max()  # right on average


# ------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_never_attended_to(kind: str | None, kernel: str) -> None:
    layer = build(kind, attn_implementation=kernel)
    hidden, mask, positions = torch.randn(2, 12, 32), mask_of([12, 5], 12), positions_for(layer, 12)
    other = hidden.clone()
    other[1, 5:] = 1000.0 * torch.randn(7, 32)
    a, maps = layer(hidden, mask, positions, output_attentions=True)
    b, _ = layer(other, mask, positions)
    assert maps is not None
    assert maps[1, :, :, 5:].eq(0).all()
    assert (a[1, :5] - b[1, :5]).abs().max() < 1e-5
    alone, _ = layer(hidden[1:, :5], None, positions_for(layer, 5))
    assert_close(f"attention.{kind}.alone", b[1, :5], alone[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_without_real_frames_gives_numbers_and_the_same_from_both_kernels(
    kind: str | None, dtype: torch.dtype
) -> None:
    layer = build(kind).to(dtype)
    hidden, positions = torch.randn(2, 6, 32, dtype=dtype), positions_for(layer, 6, dtype)
    mask = mask_of([6, 0], 6)
    outs = []
    for kernel in ("eager", "sdpa"):
        layer.config.attn_implementation = kernel
        outs.append(layer(hidden, mask, positions)[0])
    assert all(out.isfinite().all() for out in outs)
    assert difference(outs[0], outs[1]) < (1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps)


def test_hidden_scores_are_finite_and_the_rest_untouched() -> None:
    bias = torch.randn(1, 2, 3, 3)
    got = hide_padding(bias, torch.tensor([[True, True, False]]), torch.float32)
    assert torch.equal(got[..., :2], bias[..., :2])
    assert (got[..., 2] == torch.finfo(torch.float32).min).all()
    small = hide_padding(None, torch.tensor([[True, False]]), torch.float16)
    assert small.shape == (1, 1, 1, 2)
    assert small.dtype == torch.float16
    assert small.isfinite().all()


# ------------------------------------------------------------------------------------------ half precision


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_close_to_fp32(kind: str | None, dtype: torch.dtype, kernel: str) -> None:
    layer = build(kind, attn_implementation=kernel)
    hidden, mask = torch.randn(2, 40, 32), mask_of([40, 25], 40)
    want, _ = layer(hidden, mask, positions_for(layer, 40))
    layer.to(dtype)
    out, _ = layer(hidden.to(dtype), mask, positions_for(layer, 40, dtype))
    assert out.dtype == dtype
    assert difference(out, want) < 12 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
def test_large_queries_do_not_overflow_float16(kind: str | None) -> None:
    layer = build(kind, hidden_size=256, num_attention_heads=1, attn_implementation="eager").half()
    hidden = torch.full((1, 4, 256), 3.0, dtype=torch.float16)
    with torch.no_grad():
        for linear in (layer.linear_q, layer.linear_k):
            linear.weight.copy_(torch.eye(256) * 10)  # q.k = 256 * 900 = 230 400; scaled it is 14 400
            linear.bias.zero_()
    out, maps = layer(hidden, None, positions_for(layer, 4, torch.float16), output_attentions=True)
    assert maps is not None
    assert maps.isfinite().all()
    assert out.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_with_padding_is_finite_and_close(kind: str | None) -> None:
    layer = build(kind)
    hidden, mask, positions = torch.randn(2, 10, 32), mask_of([10, 4], 10), positions_for(layer, 10)
    want, _ = layer(hidden, mask, positions)
    for kernel in ("eager", "sdpa"):
        layer.config.attn_implementation = kernel
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = layer(hidden, mask, positions)
        assert difference(out, want) < 0.05


# ------------------------------------------------------------------------------------------------- errors


def test_positions_that_do_not_fit_stop_the_call() -> None:
    """Never other numbers without an error."""
    hidden, layers = torch.randn(2, 6, 32), {kind: build(kind) for kind in KINDS}
    good = {kind: positions_for(layer, 6) for kind, layer in layers.items()}
    long = {kind: positions_for(layer, 7) for kind, layer in layers.items()}
    for kind, layer in layers.items():
        for kernel in ("eager", "sdpa"):
            layer.config.attn_implementation = kernel
            layer(hidden, None, good[kind])
            if kind is None:
                continue
            other = good["rotary" if kind == "relative" else "relative"]
            for wrong in (None, other, long[kind]):
                with pytest.raises((TypeError, ValueError, RuntimeError)):
                    layer(hidden, None, wrong)
    want, _ = layers[None](hidden)
    assert torch.equal(layers[None](hidden, None, good["relative"])[0], want)  # the config says: no positions


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_that_do_not_fit_stop_the_call(kind: str | None, kernel: str) -> None:
    layer, hidden = build(kind, attn_implementation=kernel), torch.randn(2, 6, 32)
    for mask in (
        torch.ones(2, 6),
        torch.ones(2, 6, dtype=torch.long),
        torch.ones(2, 5, dtype=torch.bool),
        torch.ones(3, 6, dtype=torch.bool),
    ):
        with pytest.raises((TypeError, RuntimeError)):
            layer(hidden, mask, positions_for(layer, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_grows_with_the_square_is_in_mix(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seam of faster forms: another `mix` gets queries, keys, values, mask and distance keys, and what it gives is used."""
    layer, seen = build(kind), []

    def mix(  # noqa: PLR0917
        query: Tensor, key: Tensor, value: Tensor, mask: Any, distance_keys: Tensor | None, maps: bool
    ) -> tuple[Tensor, None]:
        seen.append((query.shape, key.shape, value.shape, distance_keys, mask, maps))
        return value, None

    monkeypatch.setattr(layer, "mix", mix)
    hidden, positions = torch.randn(2, 5, 32), positions_for(layer, 5)
    out, none = layer(hidden, "anything", positions)  # handed on without a look
    assert none is None
    assert torch.allclose(out, layer.linear_out(layer.linear_v(hidden)), atol=1e-6)
    ((*shapes, distance_keys, mask, maps),) = seen
    assert shapes == [(2, 4, 5, 8)] * 3
    assert (mask, maps) == ("anything", False)
    if kind == "relative":
        assert torch.equal(distance_keys, split_heads(layer.linear_pos(positions), 4))
    else:
        assert distance_keys is None


def test_attend_by_hand() -> None:
    q, k, v = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
    mixed, weights = attend(q, k, v, None, nn.Identity())
    for i in range(3):
        e = [torch.exp(q[i] @ k[j] / 2) for j in range(3)]
        assert torch.allclose(mixed[i], sum(e[j] * v[j] for j in range(3)) / sum(e), atol=1e-6)
        assert torch.allclose(weights[i], torch.stack(e) / sum(e), atol=1e-6)


def test_the_fused_kernel_gives_the_same_values_and_drops_out_in_training_alone() -> None:
    q, k, v, bias = (
        torch.randn(2, 3, 5, 4),
        torch.randn(2, 3, 5, 4),
        torch.randn(2, 3, 5, 4),
        torch.randn(5, 5),
    )
    dropout = nn.Dropout(0.5).eval()
    fused, none = attend_fused(q, k, v, bias, dropout)
    assert none is None
    assert torch.allclose(fused, attend(q, k, v, bias, dropout)[0], atol=1e-6)
    assert not torch.allclose(fused, attend_fused(q, k, v, bias, dropout.train())[0])


def test_frames_are_turned_head_by_head() -> None:
    hidden = torch.randn(2, 7, 32)
    positions = positions_for(build("rotary"), 7)
    assert isinstance(positions, tuple)
    got = turn_frames(hidden, positions, 4)
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        want = apply_rotary(hidden[..., part][:, :, None], *positions)[:, :, 0]
        assert torch.allclose(got[..., part], want, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_looks_at_values(kind: str | None) -> None:
    """On the meta device a tensor has no values, so any `.all()` or `.item()` in a branch would raise."""
    layer = build(kind).to("meta")
    make = make_positions(layer.config)
    positions = None if make is None else make(7, "meta", torch.float32)
    mask = torch.ones(2, 7, dtype=torch.bool, device="meta")
    for kernel in ("eager", "sdpa"):
        layer.config.attn_implementation = kernel
        for mode in (torch.no_grad, torch.enable_grad):
            with mode():
                out, _ = layer(torch.zeros(2, 7, 32, device="meta"), mask, positions)
            assert out.shape == (2, 7, 32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_kernels_agree_with_the_cpu(kind: str | None, dtype: torch.dtype) -> None:
    layer = build(kind)
    hidden, mask = torch.randn(2, 50, 32), mask_of([50, 31], 50)
    want, _ = layer(hidden, mask, positions_for(layer, 50))
    layer.to("cuda", dtype)
    make = make_positions(layer.config)
    positions = None if make is None else make.cuda()(50, "cuda", dtype)
    for kernel in ("eager", "sdpa"):
        layer.config.attn_implementation = kernel
        out, _ = layer(hidden.to("cuda", dtype), mask.cuda(), positions)
        tol = 1e-3 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
        assert difference(out.cpu(), want) < tol
