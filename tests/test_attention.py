"""Self-attention: parity with the peer, eager against SDPA, masks, half precision, errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import w2vc.attention as module
from helpers import (
    assert_close,
    difference,
    grad_difference,
    peer_config,
    randomise_,
    tiny_config,
    torch_noise,
)
from w2vc.attention import Packing, SelfAttention, attend, block_length, hide_padding
from w2vc.positions import Positions, Remembered, make_positions

KINDS = ["relative", "rotary", None]


def build(kind: str | None, seed: int = 0, **knobs: Any) -> SelfAttention:
    """A layer in eval whose every parameter matters (biases and the two position biases are not 0)."""
    torch.manual_seed(seed)
    layer = SelfAttention(tiny_config(position_embeddings_type=kind, **knobs)).eval()
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
    with torch_noise():
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


# ------------------------------------------------------------------------------------- blocks of queries


def small_blocks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let every block have `size` queries (the last one perhaps fewer), however long the utterance."""
    monkeypatch.setattr(module, "block_length", lambda query: min(size, query.shape[2]))


def attention_pair(seed: int = 0, **knobs: Any) -> tuple[SelfAttention, SelfAttention]:
    eager = build("relative", seed, attn_implementation="eager", **knobs)
    blocks = copy.deepcopy(eager)
    blocks.config.attn_implementation = "sdpa"
    return eager, blocks


@settings(max_examples=40, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 4]),
    head_width=st.sampled_from([2, 8]),
    n_frames=st.integers(1, 23),
    size=st.integers(1, 23),
    rows=st.integers(1, 3),
    masked=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_blocks_equal_the_plain_path_in_value_and_gradient(
    *,
    heads: int,
    head_width: int,
    n_frames: int,
    size: int,
    rows: int,
    masked: bool,
    training: bool,
    seed: int,
) -> None:
    eager, blocks = attention_pair(
        seed,
        hidden_size=heads * head_width,
        num_attention_heads=heads,
        attention_dropout=0.0,
        num_conv_pos_embedding_groups=1,
    )
    eager.train(training), blocks.train(training)
    mask = mask_of(torch.randint(0, n_frames + 1, (rows,)).tolist(), n_frames) if masked else None
    ours_in = torch.randn(rows, n_frames, heads * head_width, requires_grad=True)
    theirs_in = ours_in.detach().clone().requires_grad_()
    positions = positions_for(eager, n_frames)
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_blocks(monkeypatch, size)
        out, _ = blocks(ours_in, mask, positions)
        with torch.no_grad():
            assert_close("attention.blocks.no_grad", blocks(ours_in, mask, positions)[0], out)
        _, maps = blocks(ours_in, mask, positions, output_attentions=True)
        want, want_maps = eager(theirs_in, mask, positions, output_attentions=True)
        weight = torch.randn(out.shape)
        (out * weight).sum().backward()
        (want * weight).sum().backward()
    assert_close("attention.blocks.out", out, want)
    assert maps is not None
    assert torch.equal(maps, want_maps)
    assert grad_difference(blocks, eager) <= 1e-5
    assert ours_in.grad is not None
    assert theirs_in.grad is not None
    assert_close("attention.blocks.input_gradient", ours_in.grad, theirs_in.grad)


@pytest.mark.parametrize("outer", [False, True])
def test_the_second_run_of_a_block_draws_the_same_dropout(
    monkeypatch: pytest.MonkeyPatch, outer: bool
) -> None:
    layer = build("relative", attention_dropout=0.4, attn_implementation="sdpa").train()
    hidden, mask, positions = torch.randn(2, 19, 32), mask_of([19, 8], 19), positions_for(layer, 19)
    weight = torch.randn(2, 19, 32)
    small_blocks(monkeypatch, 5)

    def step(layer: SelfAttention, outer: bool) -> tuple[Tensor, SelfAttention]:
        layer = copy.deepcopy(layer)
        torch.manual_seed(7)
        if outer:  # as gradient checkpointing of whole layers does
            out = checkpoint(
                lambda x: layer(x, mask, positions)[0], hidden.clone().requires_grad_(), use_reentrant=False
            )
        else:
            out, _ = layer(hidden, mask, positions)
        torch.rand(100)  # other noise is drawn before the backward pass
        (out * weight).sum().backward()
        return out, layer

    out, once_more = step(layer, outer)
    monkeypatch.setattr(module, "checkpoint", lambda f, *inputs, p, **_: f(*inputs, p=p))  # keep all
    want, kept = step(layer, False)
    assert torch.equal(out, want)
    assert grad_difference(once_more, kept) <= 1e-6
    assert difference(out, layer.eval()(hidden, mask, positions)[0]) > 0.01  # there was noise


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_blocks_in_half_precision(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    layer = build("relative", attn_implementation="sdpa")
    hidden, mask = torch.randn(2, 40, 32), mask_of([40, 25], 40)
    want, _ = layer(hidden, mask, positions_for(layer, 40))
    small_blocks(monkeypatch, 7)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = layer(hidden, mask, positions_for(layer, 40))
    assert difference(cast, want) < 12 * torch.finfo(torch.bfloat16).eps
    layer.to(dtype)
    out, _ = layer(hidden.to(dtype), mask, positions_for(layer, 40, dtype))
    assert out.dtype == dtype
    assert difference(out, want) < 12 * torch.finfo(dtype).eps
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
        self.numbers = max(
            [self.numbers, *(t.untyped_storage().nbytes() // t.element_size() for t in tensors)]
        )
        return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_as_large_as_a_map_exists_in_forward_or_backward(
    monkeypatch: pytest.MonkeyPatch, training: bool, masked: bool
) -> None:
    n_frames, heads = 400, 4
    monkeypatch.setattr(module, "BLOCK_BYTES", 2**16 if training else 2**18)
    layer = build("relative", attention_dropout=0.1, attn_implementation="sdpa").train(training)
    hidden, positions = torch.randn(1, n_frames, 32, requires_grad=training), positions_for(layer, n_frames)
    mask = mask_of([300], n_frames) if masked else None
    with Largest() as largest, torch.set_grad_enabled(training):
        out, _ = layer(hidden, mask, positions)
        if training:
            out.sum().backward()
    size = 32  # queries in a block
    assert largest.numbers <= heads * size * (n_frames + size - 1)
    assert largest.numbers < heads * n_frames * n_frames / 4
    layer.config.attn_implementation = "eager"
    with Largest() as largest, torch.no_grad():
        layer(hidden, mask, positions)
    assert largest.numbers >= heads * n_frames * (
        2 * n_frames - 1
    )  # the plain path does make it: we would have seen it


def test_training_keeps_nothing_as_large_as_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build("relative", attention_dropout=0.1, attn_implementation="sdpa").train()
    hidden, positions, seen = torch.randn(1, 300, 32), positions_for(layer, 300), {}

    def kept() -> int:
        seen.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t,
            lambda t: t,
        ):
            layer(hidden, None, positions)
        return sum(seen.values())

    whole = kept()
    small_blocks(monkeypatch, 50)
    assert whole > 4 * 4 * 300 * 300
    assert kept() < 4 * 300 * 32 * 16


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("n_frames", [1, 31, 33, 499, 2999, 29_999])
def test_block_length_keeps_to_the_budget(n_frames: int, rows: int) -> None:
    query = torch.empty(1).expand(rows, 16, n_frames, 64)
    sizes = {}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            size = sizes[grad] = block_length(query)
        assert 1 <= size <= n_frames
        taken = rows * 16 * 4 * size * (size + n_frames - 1)
        assert taken <= module.BLOCK_BYTES * (4 if grad else 1) or size == module.FEWEST_QUERIES
    assert sizes[True] >= sizes[False]


def test_a_short_utterance_is_one_block_and_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = module.attend_block
    monkeypatch.setattr(
        module, "attend_block", lambda *a, **k: (calls.append(a[0].shape[2]), real(*a, **k))[1]
    )
    layer = build("relative", attn_implementation="sdpa").train()
    hidden, positions = torch.randn(12, 250, 32), positions_for(layer, 250)
    out, _ = layer(hidden, None, positions)
    out.sum().backward()
    assert calls == [250]
    with torch.no_grad():  # where nothing is computed twice, blocks may be smaller
        layer(hidden, None, positions)
    assert calls == [250, 125, 125]


# --------------------------------------------------------------------------------------- flex attention


@pytest.fixture
def flexed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backend of each call of flex attention; empty, if SDPA or the readable path ran instead."""
    calls: list[str] = []
    real = module.compiled_flex
    monkeypatch.setattr(module, "compiled_flex", lambda backend: (calls.append(backend), real(backend))[1])
    return calls


def with_kernels(layer: SelfAttention, *kernels: str) -> list[SelfAttention]:
    """The same layer under several kernels; `attn_implementation` is read at each call."""
    copies = [copy.deepcopy(layer) for _ in kernels]
    for each, kernel in zip(copies, kernels, strict=True):
        each.config.attn_implementation = kernel
    return copies


@pytest.mark.parametrize("size", [99, 6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_flex_equals_eager(
    kind: str | None, masked: bool, size: int, flexed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At several lengths, alone and in a batch, with one row that has no real frame, in one block and in many."""
    small_blocks(monkeypatch, size)
    shapes = ((3, 17), (3, 13), (1, 24), (2, 1))
    for dtype, tol in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        eager, flex = with_kernels(build(kind).to(dtype), "eager", "flex")
        for n_rows, n_frames in shapes if dtype == torch.float32 else shapes[:1]:
            hidden = torch.randn(n_rows, n_frames, 32, dtype=dtype)
            mask = mask_of([n_frames, max(1, n_frames - 5), 0][:n_rows], n_frames) if masked else None
            positions = positions_for(eager, n_frames, dtype)
            flexed.clear()
            with torch.no_grad():
                got, want = flex(hidden, mask, positions)[0], eager(hidden, mask, positions)[0]
            assert flexed == ["eager"] * (1 + (n_frames - 1) // size)
            assert got.dtype == dtype
            assert_close(f"attention.flex.{dtype}", got, want, tol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_flex_in_half_precision(
    kind: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes, real = [], module.compiled_flex

    def watch(backend: str) -> Callable[..., Tensor]:
        return lambda *x: (dtypes.append({x[0].dtype, x[1].dtype}), real(backend)(*x))[1]

    monkeypatch.setattr(module, "compiled_flex", watch)
    eager, flex = with_kernels(build(kind), "eager", "flex")
    hidden, mask, positions = torch.randn(3, 40, 32), mask_of([40, 25, 0], 40), positions_for(eager, 40)
    with torch.no_grad():
        want = eager(hidden, mask, positions)[0]
        with torch.autocast("cpu", torch.bfloat16):
            cast = flex(hidden, mask, positions)[0]
        out = flex.to(dtype)(hidden.to(dtype), mask, positions_for(eager, 40, dtype))[0]
    assert dtypes == [{torch.bfloat16}, {dtype}]
    assert (cast.dtype, out.dtype) == (torch.bfloat16, dtype)
    assert difference(cast, want) < 12 * torch.finfo(torch.bfloat16).eps
    assert difference(out, want) < 12 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
def test_flex_hides_padding_and_mixes_packed_batches(kind: str | None, flexed: list[str]) -> None:
    eager, flex = with_kernels(build(kind), "eager", "flex")
    mask, positions = mask_of([15, 6], 15), positions_for(eager, 15)
    hidden = torch.randn(2, 15, 32)
    loud = torch.where(mask[..., None], hidden, 1e4 * torch.randn(2, 15, 32))
    packing = Packing.of(mask, "cpu")
    assert packing is not None
    inside = positions
    if isinstance(positions, tuple):
        inside = tuple(packing.pack(x.expand(2, -1, -1))[0] for x in positions)
    with torch.no_grad():
        want = eager(hidden, mask, positions)[0][mask]
        assert_close("attention.flex.padding", flex(loud, mask, positions)[0][mask], want)
        assert_close("attention.flex.packed", flex(packing.pack(hidden), packing, inside)[0][0], want)
        hole = torch.arange(15) != 4  # frames that are missing in the middle are hidden as well
        other = flex(hidden[:1], hole[None], positions)[0][:, hole]
        assert_close("attention.flex.hole", other, eager(hidden[:1], hole[None], positions)[0][:, hole])
    assert len(flexed) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_flex_gives_maps_and_gradients_as_the_other_kernels_do(
    kind: str | None, flexed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch, 6)
    eager, flex = with_kernels(build(kind), "eager", "flex")
    hidden, mask, positions = torch.randn(2, 17, 32), mask_of([17, 5], 17), positions_for(eager, 17)
    with torch.no_grad():
        out, maps = flex(hidden, mask, positions, output_attentions=True)
        want, want_maps = eager(hidden, mask, positions, output_attentions=True)
        assert torch.equal(out, want)
        assert torch.equal(maps, want_maps)
        assert flex(hidden, mask, positions)[1] is None
    flexed.clear()
    weight, inputs = torch.randn(2, 17, 32), [hidden.clone().requires_grad_() for _ in range(2)]
    for layer, x in zip((flex, eager), inputs, strict=True):
        (layer(x, mask, positions)[0] * weight).sum().backward()
    assert flexed == []  # no gradients on a CPU: SDPA
    assert grad_difference(flex, eager) <= 1e-5
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert_close("attention.flex.input_gradient", inputs[0].grad, inputs[1].grad)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sdpa_takes_over_from_flex_under_dropout(kind: str | None, grad: bool, flexed: list[str]) -> None:
    sdpa, flex = with_kernels(build(kind, attention_dropout=0.3).train(), "sdpa", "flex")
    hidden, mask, positions = torch.randn(2, 11, 32), mask_of([11, 7], 11), positions_for(sdpa, 11)
    results = []
    with torch.set_grad_enabled(grad):
        for layer in (sdpa, flex):
            torch.manual_seed(3)
            results.append(layer(hidden, mask, positions)[0])
        assert flexed == []
        assert torch.equal(*results)
        with torch.no_grad():
            flex.eval()(hidden, mask, positions)
    assert flexed == ["eager"]


def test_what_flex_attention_fits() -> None:
    """The rule for all devices, read off shapes: fake CUDA tensors have no values."""
    some = (torch.zeros(1), torch.zeros(1), torch.zeros(1))
    with FakeTensorMode():
        wide, narrow = (torch.empty(1, 2, 5, width, device="cuda") for width in (16, 8))
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert module.flex_fits(wide, None, p=0.0)
                assert module.flex_fits(wide, some, p=0.0) == (not grad)
                assert not module.flex_fits(wide, None, p=0.1)
                assert not module.flex_fits(narrow, None, p=0.0)
                assert module.flex_fits(torch.empty(1, 2, 5, 8), some, p=0.0) == (not grad)
    assert not module.flex_fits(torch.empty(1, 2, 5, 16, device="meta"), None, p=0.0)


def test_flex_takes_tensors_that_could_have_gradients() -> None:
    query, key, value = torch.randn(3, 1, 2, 7, 8).requires_grad_()
    with torch.no_grad():
        got = module.flex_block(query, key, value, None, None, p=0.0)
        want = module.attend_block(query, key, value, None, None, p=0.0)
    assert difference(got, want) <= 1e-5


def test_flex_compiles_for_kinds_of_input_and_not_for_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = module.compiled_flex(counter)
    monkeypatch.setattr(module, "compiled_flex", lambda _: compiled)
    layer = build("relative", attn_implementation="flex")

    def hear(n_rows: int, n_frames: int) -> int:
        hidden = torch.randn(n_rows, n_frames, 32)
        layer(hidden, mask_of([n_frames, n_frames - 2, 5][:n_rows], n_frames), positions_for(layer, n_frames))
        return counter.frame_count

    with torch.no_grad():
        first = hear(3, 17)
        assert [hear(n_rows, n_frames) for n_rows, n_frames in ((3, 30), (2, 11), (3, 24))] == [first] * 3
        small_blocks(monkeypatch, 7)
        later = hear(3, 20)
        assert [hear(n_rows, n_frames) for n_rows, n_frames in ((3, 30), (2, 11), (3, 24))] == [later] * 3
    assert later <= first + 1
    for heads in range(1, 9):  # with these, more kinds than torch compiles by itself: 8
        layer = build(None, attn_implementation="flex", hidden_size=24 * heads, num_attention_heads=heads)
        with torch.no_grad():
            layer(torch.randn(2, 9, 24 * heads))
    assert counter.frame_count == later + 8


@pytest.mark.parametrize("kind", KINDS)
def test_flex_on_a_cpu_makes_nothing_larger_than_a_block(kind: str | None, flexed: list[str]) -> None:
    layer, n_frames = build(kind, attn_implementation="flex"), 3000
    hidden, positions = torch.randn(1, n_frames, 32), positions_for(layer, n_frames)
    with torch.no_grad():
        size = block_length(torch.empty(1).expand(1, 4, n_frames, 8))
        assert size < n_frames / 10
        seen: list[int] = []
        real = module.compiled_flex

        def watch(backend: str) -> Callable[..., Tensor]:
            return lambda query, *rest: (seen.append(query.shape[2]), real(backend)(query, *rest))[1]

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(module, "compiled_flex", watch)
            layer(hidden, None, positions)
    assert max(seen) == size
    assert sum(seen) == n_frames


# ------------------------------------------------------------------------- projected positions, remembered


def load_another(layer: SelfAttention) -> None:
    layer.load_state_dict({k: v + 0.1 for k, v in layer.state_dict().items()})


def train_a_step(layer: SelfAttention) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(torch.randn(1, 9, 32), None, positions_for(layer, 9))[0].square().sum().backward()
    optimizer.step()


def replace(layer: SelfAttention) -> None:
    layer.linear_pos = nn.Linear(32, 32, bias=False)


def write_through_data(layer: SelfAttention) -> None:
    layer.linear_pos.weight.data.mul_(3.0)
    layer.eval()  # torch does not count such writes: this clears what was remembered


CHANGES: dict[str, Callable[[SelfAttention], Any]] = {
    "load_state_dict": load_another,
    "optimizer_step_in_eval": train_a_step,
    "write_in_no_grad": lambda layer: torch.no_grad()(layer.linear_pos.weight.mul_)(2.0),
    "data_assigned": lambda layer: setattr(layer.linear_pos.weight, "data", torch.randn(32, 32)),
    "another_parameter": lambda layer: setattr(layer.linear_pos, "weight", nn.Parameter(torch.randn(32, 32))),
    "another_module": replace,
    "data_written_then_eval": write_through_data,
    "bfloat16_and_back": lambda layer: layer.bfloat16().float(),
    "double": lambda layer: layer.double(),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_remembered_projection_follows_the_weights(change: str, mode: Any) -> None:
    layer = build("relative")
    make = make_positions(layer.config)
    hidden = torch.randn(2, 9, 32)
    with mode():
        before, _ = layer(hidden, None, make(9, "cpu", torch.float32))
        assert torch.equal(layer(hidden, None, make(9, "cpu", torch.float32))[0], before)
    assert layer.remembered.last is not None
    CHANGES[change](layer)
    dtype = layer.linear_q.weight.dtype
    fresh = copy.deepcopy(layer)  # a copy remembers nothing
    assert fresh.remembered.last is None
    with mode():
        positions = make(9, "cpu", dtype)
        got, _ = layer(hidden.to(dtype), None, positions)
        assert torch.equal(got, fresh(hidden.to(dtype), None, positions)[0])
    if change != "bfloat16_and_back":
        assert difference(got.float(), before) > 1e-3 or change == "double"


def test_projection_is_remembered_in_eval_without_gradients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build("relative")
    hidden, calls, real = torch.randn(1, 9, 32), [], layer.linear_pos.forward
    monkeypatch.setattr(layer.linear_pos, "forward", lambda x: (calls.append(len(x)), real(x))[1])

    def count(times: int = 2, n_frames: int = 9) -> int:
        calls.clear()
        for _ in range(times):
            layer(hidden[:, :n_frames], None, positions[n_frames])
        return len(calls)

    positions = {n: positions_for(layer, n) for n in (4, 9)}
    assert count() == 2  # gradients are wanted
    with torch.no_grad():
        assert count(3) == 1
        assert count(3) == 0
        assert count(3, n_frames=4) == 1
        with torch.autocast("cpu", torch.bfloat16):
            assert count() == 1  # another dtype
        assert count() == 1
        assert count(1) == 0
        positions[9] = positions[9].clone()
        assert count() == 1  # another table
        positions[9].mul_(2.0)
        assert count() == 1  # the table was written to
        hook = layer.linear_pos.register_forward_hook(lambda *_: None)
        assert count() == 2  # somebody wants to see each call
        hook.remove()
        layer.train()
        assert count() == 2
        layer.eval()
        assert count() == 1  # train() forgot it
        monkeypatch.setattr(Remembered, "largest", 10)
        layer.eval()
        assert count() == 2  # too large to keep
    assert list(layer.state_dict()) == list(build("relative").state_dict())
    assert len(pickle.dumps(layer.remembered)) < 200


# ------------------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize(
    ("kind", "training", "size"),
    [
        ("relative", True, 6),  # two blocks, computed again in the backward pass
        ("relative", True, 99),
        ("relative", False, 99),
        ("rotary", True, 99),
        (None, False, 99),
    ],
)
def test_compiles_whole_with_equal_value_and_gradient(
    monkeypatch: pytest.MonkeyPatch, kind: str | None, training: bool, size: int
) -> None:
    """aot_eager traces forward and backward as inductor does. (The debug backend "eager" draws new noise in recomputed blocks.)"""
    torch._dynamo.reset()
    monkeypatch.setattr(module, "BLOCK_BYTES", 2**24 if size == 99 else 2**9)
    monkeypatch.setattr(module, "FEWEST_QUERIES", size)
    monkeypatch.setattr(  # what a compiled layer calls, for equal noise
        module,
        "_attend_dropping",
        lambda q, k, v, bias, drop: scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop.p),
    )
    layer = build(kind, attention_dropout=0.2, attn_implementation="sdpa").train(training)
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


def test_an_exported_layer_takes_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 2**9)
    monkeypatch.setattr(module, "FEWEST_QUERIES", 4)

    class WithPositions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = build("relative")
            self.positions = make_positions(self.layer.config)

        def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
            return self.layer(hidden, mask, self.positions(hidden.shape[1], hidden.device, hidden.dtype))[0]

    model, time = WithPositions().eval(), torch.export.Dim("time", min=3, max=1000)
    inputs = (torch.randn(2, 11, 32), mask_of([11, 7], 11))
    with torch.no_grad():
        program = torch.export.export(model, inputs, dynamic_shapes=({1: time}, {1: time}))
        for n_frames in (5, 60):
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


def test_wrong_inputs_are_refused_by_name() -> None:
    layer, hidden = build("relative"), torch.randn(2, 6, 32)
    good = positions_for(layer, 6)
    layer(hidden, None, good)
    with pytest.raises(ValueError, match=r"positions has shape \[None\].*\[\[11, 32\]\]"):
        layer(hidden)
    with pytest.raises(ValueError, match="positions has shape"):
        layer(hidden, None, positions_for(layer, 7))
    with pytest.raises(ValueError, match="positions has shape"):
        build("rotary")(hidden, None, positions_for(build("rotary"), 7))
    with pytest.raises(ValueError, match="positions has shape"):
        build(None)(hidden, None, good)
    with pytest.raises(
        ValueError, match=r"frame_mask is torch.int64 \[2, 6\]; it must be torch.bool \[2, 6\]"
    ):
        layer(hidden, torch.ones(2, 6, dtype=torch.long), good)
    with pytest.raises(ValueError, match=r"frame_mask is torch.bool \[2, 5\]"):
        layer(hidden, torch.ones(2, 5, dtype=torch.bool), good)


def test_unknown_kernels_are_refused_at_the_call() -> None:
    layer, hidden = build(None), torch.randn(1, 3, 32)
    layer.config = SimpleNamespace(attn_implementation="flash")  # a real config refuses it earlier
    with pytest.raises(ValueError, match=r"attn_implementation='flash'.*'sdpa', 'eager', 'flex'"):
        layer(hidden)
    layer.config = SimpleNamespace(attn_implementation=None)
    with pytest.raises(ValueError, match="allowed are"):
        layer(hidden)


def test_attend_by_hand() -> None:
    q, k, v = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
    mixed, weights = attend(q, k, v, None, nn.Identity())
    for i in range(3):
        e = [torch.exp(q[i] @ k[j] / 2) for j in range(3)]
        assert torch.allclose(mixed[i], sum(e[j] * v[j] for j in range(3)) / sum(e), atol=1e-6)
        assert torch.allclose(weights[i], torch.stack(e) / sum(e), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_looks_at_values(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device a tensor has no values, so any `.all()` or `.item()` in a branch would raise."""
    layer = build(kind).to("meta")
    make = make_positions(layer.config)
    positions = None if make is None else make(7, "meta", torch.float32)
    for kernel in module.KERNELS:
        layer.config.attn_implementation = kernel
        mask = torch.ones(2, 7, dtype=torch.bool, device="meta")
        for size in (99, 3):
            small_blocks(monkeypatch, size)
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_flex_equals_eager(
    kind: str | None, dtype: torch.dtype, flexed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled to one kernel: values against the CPU's in fp32; gradients, its own or those of SDPA, against eager's."""
    eager, flex = with_kernels(build(kind, hidden_size=64), "eager", "flex")  # heads of 16 channels
    reference, make = copy.deepcopy(eager), make_positions(eager.config)
    eager.to("cuda", dtype), flex.to("cuda", dtype)
    tol = 1e-3 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    for size in (999, 40):
        small_blocks(monkeypatch, size)
        for n_rows, n_frames in ((3, 150), (1, 130), (2, 33)):
            hidden = torch.randn(n_rows, n_frames, 64)
            mask = mask_of([n_frames, n_frames - 5, 0][:n_rows], n_frames)
            positions = None if make is None else make.cuda()(n_frames, "cuda", dtype)
            inputs = (hidden.to("cuda", dtype), mask.cuda(), positions)
            flexed.clear()
            with torch.no_grad():
                want, _ = reference(hidden, mask, positions_for(reference, n_frames))
                got, _ = flex(*inputs)
            assert set(flexed) == {"inductor"}
            assert difference(got.cpu(), want) < tol
            assert (
                difference(
                    flex(*inputs, output_attentions=True)[1], eager(*inputs, output_attentions=True)[1]
                )
                < tol
            )
            flexed.clear()
            for layer in (eager, flex):
                layer.zero_grad()
                layer(*inputs)[0].float().square().sum().backward()
            assert bool(flexed) == (kind != "relative")
            assert grad_difference(flex, eager) < tol
