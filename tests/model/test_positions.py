"""Positions: the sinusoid table, the shift, the rotation, and what survives casts, moves, saving and loading."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers import assert_close, peer_config, tiny_config
from w2vc.model.positions import (
    ConvolutionalPositions,
    RelativePositions,
    RotaryPositions,
    apply_rotary,
    make_positions,
    relative_shift,
    rotary_frequencies,
    rotate_half,
)


def peer_module() -> Any:
    from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer

    return modeling_wav2vec2_conformer


def table(n_frames: int, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    config = tiny_config(position_embeddings_type="relative", **options)
    return RelativePositions(config)(n_frames, "cpu", dtype)


def rotary(**options: Any) -> RotaryPositions:
    return RotaryPositions(tiny_config(position_embeddings_type="rotary", **options))


# ---------------------------------------------------------------------------------------------- relative


@pytest.mark.parametrize("n_frames", [1, 2, 7, 60, 700])
def test_relative_table_equals_the_peers(n_frames: int) -> None:
    config = tiny_config(
        position_embeddings_type="relative", max_source_positions=50
    )  # the peer regrows its own
    peer = peer_module().Wav2Vec2ConformerRelPositionalEmbedding(peer_config(config))
    theirs = peer(torch.zeros(1, n_frames, config.hidden_size))[0]
    assert_close("positions.relative", RelativePositions(config)(n_frames, "cpu", torch.float32), theirs)


def test_relative_rows_are_distances_largest_positive_first() -> None:
    n_frames, width = 5, 8
    got = table(n_frames, hidden_size=width, num_attention_heads=2)
    for row in range(2 * n_frames - 1):
        distance = n_frames - 1 - row
        for channel in range(width):
            angle = distance / 10000 ** ((channel - channel % 2) / width)
            want = math.cos(angle) if channel % 2 else math.sin(angle)
            assert abs(got[row, channel] - want) < 1e-6, (row, channel)


def test_relative_saves_nothing_and_has_no_longest_utterance() -> None:
    positions = RelativePositions(tiny_config(position_embeddings_type="relative", max_source_positions=3))
    assert positions(100, "cpu", torch.float32).shape == (199, 32)
    assert positions(4, "cpu", torch.float32).shape == (7, 32)
    assert positions(100, "cpu", torch.bfloat16).dtype == torch.bfloat16
    assert positions.state_dict() == {}
    assert list(positions.buffers()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_relative_is_computed_in_fp32_and_cast_last(dtype: torch.dtype) -> None:
    assert torch.equal(table(900, dtype), table(900).to(dtype))
    assert table(900, dtype).dtype == dtype


def test_relative_ignores_the_default_dtype() -> None:
    want = table(300)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(table(300), want)
    finally:
        torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------------------- shift


def shift_by_index(scores: Tensor) -> Tensor:
    n_frames = scores.shape[-2]
    i, j = torch.arange(n_frames)[:, None], torch.arange(n_frames)
    columns = (n_frames - 1) - (i - j)
    return scores.gather(-1, columns.expand(*scores.shape[:-1], n_frames))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 3), heads=st.integers(1, 3), n_frames=st.integers(1, 20), contiguous=st.booleans())
def test_shift_equals_the_index_gather_in_value_and_gradient(
    rows: int, heads: int, n_frames: int, contiguous: bool
) -> None:
    g = torch.Generator().manual_seed(n_frames)
    scores = torch.randn(rows, heads, n_frames, 2 * n_frames - 1, generator=g)
    if not contiguous:
        scores = scores.transpose(0, 1).contiguous().transpose(0, 1)
    scores.requires_grad_()
    weight = torch.randn(rows, heads, n_frames, n_frames, generator=g)
    ours, want = relative_shift(scores), shift_by_index(scores)
    assert torch.equal(ours, want)
    (ours_grad,) = torch.autograd.grad((ours * weight).sum(), scores)
    (want_grad,) = torch.autograd.grad((want * weight).sum(), scores)
    assert torch.equal(ours_grad, want_grad)


@settings(max_examples=25, deadline=None)
@given(n_keys=st.integers(1, 15), data=st.data())
def test_shift_of_a_block_equals_its_rows_of_the_whole(n_keys: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, n_keys - 1))
    after = data.draw(st.integers(first + 1, n_keys))
    whole = torch.randn(2, 3, n_keys, 2 * n_keys - 1)
    block = whole[:, :, first:after, n_keys - after : 2 * n_keys - 1 - first].clone()
    assert torch.equal(relative_shift(block), shift_by_index(whole)[:, :, first:after])


def test_shift_copies_nothing() -> None:
    for scores in (torch.randn(2, 3, 6, 11), torch.randn(2, 3, 2, 7)):  # six of six queries, two of six
        got = relative_shift(scores)
        assert got.shape == (2, 3, scores.shape[2], 6)
        assert got.untyped_storage().data_ptr() == scores.untyped_storage().data_ptr()


class Shift(nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        return relative_shift(scores)


def test_an_exported_shift_takes_any_length() -> None:
    time = torch.export.Dim("time", min=3, max=4000)
    example = torch.randn(2, 3, 7, 13)
    program = torch.export.export(Shift(), (example,), dynamic_shapes=({2: time, 3: 2 * time - 1},))
    for n_frames in (3, 7, 40, 333):
        scores = torch.randn(2, 3, n_frames, 2 * n_frames - 1)
        assert torch.equal(program.module()(scores), shift_by_index(scores))


def test_a_compiled_shift_takes_any_length() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Shift(), fullgraph=True, dynamic=True, backend="aot_eager")
    for n_frames in (3, 7, 40):
        scores = torch.randn(2, 3, n_frames, 2 * n_frames - 1, requires_grad=True)
        weight = torch.randn(2, 3, n_frames, n_frames)
        assert torch.equal(compiled(scores), shift_by_index(scores))
        (got,) = torch.autograd.grad((compiled(scores) * weight).sum(), scores)
        (want,) = torch.autograd.grad((shift_by_index(scores) * weight).sum(), scores)
        assert torch.equal(got, want)


# ------------------------------------------------------------------------------------------------ rotary


@pytest.mark.parametrize("base", [10000, 50])
@pytest.mark.parametrize("n_frames", [1, 5, 333])
def test_rotary_equals_the_peers(base: int, n_frames: int) -> None:
    config = tiny_config(position_embeddings_type="rotary", rotary_embedding_base=base)
    peer = peer_module().Wav2Vec2ConformerRotaryPositionalEmbedding(peer_config(config))
    theirs = peer(torch.zeros(1, n_frames, config.hidden_size))[:, :, 0, 0]  # [2, T, K]
    ours = RotaryPositions(config)(n_frames, "cpu", torch.float32)
    for name, a, b in zip(("cos", "sin"), ours, theirs, strict=True):
        assert_close(f"positions.{name}", a, b)


def test_rotary_frequencies_fall_from_one_by_the_base() -> None:
    frequencies = rotary_frequencies(8, 10000)
    assert torch.allclose(frequencies, torch.tensor([1.0, 0.1, 0.01, 0.001]))
    assert frequencies.dtype == torch.float32


def test_rotary_ignores_the_default_dtype() -> None:
    want = rotary()(300, "cpu", torch.float32)
    torch.set_default_dtype(torch.float64)
    try:
        got = rotary()(300, "cpu", torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_rotation_turns_pairs_k_and_k_plus_half() -> None:
    x = torch.randn(1, 6, 2, 8)
    cos, sin = rotary(hidden_size=32, num_attention_heads=4)(6, "cpu", torch.float32)
    got = apply_rotary(x, cos, sin)
    for t in range(6):
        for k in range(4):
            angle = t * 10000 ** (-2 * k / 8)
            a, b = x[0, t, :, k], x[0, t, :, k + 4]
            assert torch.allclose(got[0, t, :, k], a * math.cos(angle) - b * math.sin(angle), atol=1e-5)
            assert torch.allclose(got[0, t, :, k + 4], a * math.sin(angle) + b * math.cos(angle), atol=1e-5)
    assert torch.allclose(got.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert torch.equal(rotate_half(rotate_half(x)), -x)


def test_rotated_dot_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(8), torch.randn(8)
    cos, sin = rotary(hidden_size=32, num_attention_heads=4)(40, "cpu", torch.float32)
    turned = [apply_rotary(x.expand(1, 40, 1, 8), cos, sin)[0, :, 0] for x in (q, k)]
    scores = turned[0] @ turned[1].T
    for distance in range(-39, 40):
        diagonal = scores.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-4


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to_bf16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "half_then_float": lambda m: m.half().float(),
    "copy": lambda m: copy.deepcopy(m.bfloat16()),
    "meta_to_empty": lambda m: m.to("meta").to_empty(device="cpu"),
    "meta_half_to_empty": lambda m: m.half().to("meta").bfloat16().to_empty(device="cpu"),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "share": lambda m: m.share_memory(),
}


def exact_angles(n_frames: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of heads of 8 channels, computed in float32 and cast last."""
    angle = torch.arange(n_frames, dtype=torch.float32)[:, None] * rotary_frequencies(8, 10000).repeat(2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def assert_exact(positions: nn.Module) -> None:
    """However the module was made, its angles are those of float32, at frames that 16 bits cannot count."""
    for dtype in (torch.float32, torch.bfloat16):
        got = positions(1500, "cpu", dtype)
        assert all(torch.equal(a, b) for a, b in zip(got, exact_angles(1500, dtype), strict=True))


@pytest.mark.parametrize("cast", CASTS)
def test_angles_are_those_of_float32_after_a_cast(cast: str) -> None:
    holder = CASTS[cast](nn.Sequential(nn.Linear(2, 2), rotary()))
    assert_exact(holder[1])
    assert list(holder[1].state_dict()) == ["inv_freq"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotary_error_in_half_precision_stays_at_rounding(dtype: torch.dtype) -> None:
    exact = rotary(hidden_size=64, num_attention_heads=1)(1500, "cpu", torch.float32)
    positions = rotary(hidden_size=64, num_attention_heads=1).to(dtype)
    for a, b in zip(positions(1500, "cpu", dtype), exact, strict=True):
        assert a.dtype == dtype
        assert (a.float() - b).abs().max() <= torch.finfo(
            dtype
        ).eps  # one rounding; a cast of the frequencies gives 2.0


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([*CASTS, "T=7", "T=40"]), min_size=1, max_size=6))
def test_rotary_is_right_after_any_sequence_of_casts_and_lengths(steps: list[str]) -> None:
    holder: nn.Module = nn.Sequential(rotary())
    for step in [*steps, "T=40", "T=7"]:
        if step.startswith("T="):
            n_frames = int(step[2:])
            for dtype in (torch.float32, torch.bfloat16):
                got = holder[0](n_frames, "cpu", dtype)
                assert all(torch.equal(a, b) for a, b in zip(got, exact_angles(n_frames, dtype), strict=True))
        else:
            holder = CASTS[step](holder)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_angles_are_those_of_float32_after_loading_a_16_bit_file(
    assign: bool, meta: bool, dtype: torch.dtype
) -> None:
    holder = nn.Sequential(rotary())
    if meta:
        holder = holder.to("meta")
        if not assign:
            holder = holder.to_empty(device="cpu")
    rounded = rotary_frequencies(8, 10000).to(dtype)
    holder.load_state_dict({"0.inv_freq": rounded}, assign=assign)
    assert torch.equal(
        holder[0].inv_freq, rounded if assign else rounded.float()
    )  # the file's: nobody reads it
    assert_exact(holder[0])


def test_rotary_built_on_the_meta_device_has_its_angles() -> None:
    with torch.device("meta"):
        positions = rotary()
    assert positions.inv_freq.is_meta
    assert_exact(positions.to_empty(device="cpu"))


def test_rotary_is_saved_and_missing_frequencies_are_reported() -> None:
    assert torch.equal(rotary().state_dict()["inv_freq"], rotary_frequencies(8, 10000))
    with pytest.raises(RuntimeError, match="inv_freq"):
        rotary().load_state_dict({}, strict=True)


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16])
def test_rotation_keeps_the_dtype_of_what_it_turns(x_dtype: torch.dtype) -> None:
    x = torch.randn(1, 5, 4, 8).to(x_dtype)
    cos, sin = rotary()(5, "cpu", torch.float32)
    got = apply_rotary(x, cos, sin)
    assert got.dtype == x_dtype
    assert (got.float() - apply_rotary(x.float(), cos, sin)).abs().max() < 4 * torch.finfo(x_dtype).eps * 3


# --------------------------------------------------------------------------------- convolutional and choice


@pytest.mark.parametrize("kernel", [128, 5])
def test_dead_convolution_has_the_peers_keys_and_output_but_no_gradient(kernel: int) -> None:
    config = tiny_config(num_conv_pos_embeddings=kernel, num_conv_pos_embedding_groups=4)
    ours = ConvolutionalPositions(config)
    theirs = peer_module().Wav2Vec2ConformerPositionalConvEmbedding(peer_config(config))
    assert sorted(ours.state_dict()) == [
        "conv.bias", "conv.parametrizations.weight.original0", "conv.parametrizations.weight.original1"
    ]  # fmt: skip
    theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs.conv.parametrizations.weight.original0.data.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.conv.parametrizations.weight.original0.shape == (1, 1, kernel)
    assert not any(p.requires_grad for p in ours.parameters())
    x = torch.randn(2, 30, 32)
    assert_close("positions.convolutional", ours(x), theirs(x))


def test_dead_convolution_can_be_pickled_and_copied() -> None:
    ours, x = ConvolutionalPositions(tiny_config()), torch.randn(2, 30, 32)
    for again in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert list(again.state_dict()) == list(ours.state_dict())
        assert torch.equal(again(x), ours(x))
        assert not any(p.requires_grad for p in again.parameters())


def test_a_whole_model_can_be_pickled_and_has_the_peers_keys() -> None:
    from transformers import Wav2Vec2ConformerModel as Peer

    from w2vc.model.wav2vec2 import Wav2Vec2ConformerModel

    for kind in ("relative", "rotary"):
        model = Wav2Vec2ConformerModel(tiny_config(position_embeddings_type=kind)).eval()
        again, audio = pickle.loads(pickle.dumps(model)), torch.randn(1, 2000)
        assert torch.equal(again(audio).last_hidden_state, model(audio).last_hidden_state)
        assert model.state_dict().keys() == Peer(peer_config(model.config)).state_dict().keys()


def test_make_positions_follows_the_config() -> None:
    assert isinstance(make_positions(tiny_config(position_embeddings_type="relative")), RelativePositions)
    assert isinstance(make_positions(tiny_config(position_embeddings_type="rotary")), RotaryPositions)
    assert make_positions(tiny_config(position_embeddings_type=None)) is None


@pytest.mark.gpu
def test_tables_on_the_gpu_equal_those_on_the_cpu() -> None:
    relative = RelativePositions(tiny_config())
    assert (
        relative(700, "cuda", torch.float32).cpu() - relative(700, "cpu", torch.float32)
    ).abs().max() < 1e-3
    positions = rotary().cuda().bfloat16()
    for a, b in zip(positions(700, "cuda", torch.float32), rotary()(700, "cpu", torch.float32), strict=True):
        assert (a.cpu() - b).abs().max() < 1e-3
