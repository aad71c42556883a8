"""The features chapter: frame arithmetic, the feature encoder with both norms, the projection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import helpers
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.model.features import (
    FeatureEncoder,
    FeatureProjection,
    FrameClock,
    MaskedGroupNorm,
    conv_output_lengths,
    frame_mask,
    receptive_field,
    valid_lengths,
)

KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def peer_modules():
    from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as peer

    return peer


# ---- frame arithmetic ----


def test_lengths_equal_those_of_real_convolutions():
    stack = nn.Sequential(*[nn.Conv1d(1, 1, k, s) for k, s in zip(KERNELS, STRIDES, strict=True)])
    for n in (400, 401, 719, 720, 721, 1039, 1040, 16000, 16001):
        assert conv_output_lengths(n, KERNELS, STRIDES) == stack(torch.zeros(1, 1, n)).shape[-1], n
    assert conv_output_lengths(16000, KERNELS, STRIDES) == 49
    for n in (0, 1, 9, 10, 399):
        assert conv_output_lengths(n, KERNELS, STRIDES) == 0, n


def test_lengths_of_tensors_and_numbers_agree():
    n = torch.arange(0, 3000, 7).reshape(3, -1)
    frames = conv_output_lengths(n, KERNELS, STRIDES)
    assert frames.dtype == torch.int64
    assert frames.shape == n.shape
    assert frames.flatten().tolist() == [conv_output_lengths(int(i), KERNELS, STRIDES) for i in n.flatten()]
    with pytest.raises(ValueError, match="zip"):
        conv_output_lengths(100, (3, 3), (1,))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 4)), min_size=1, max_size=5), st.integers(0, 20))
def test_receptive_field_is_what_gradients_see(layers, frame):
    kernels, strides = zip(*layers, strict=True)
    width, hop = receptive_field(kernels, strides)
    samples = width + hop * frame
    # the shortest audio with such a frame, and one sample less
    assert conv_output_lengths(samples, kernels, strides) == frame + 1
    assert conv_output_lengths(samples - 1, kernels, strides) == frame
    x = torch.zeros(1, 1, samples, dtype=torch.float64, requires_grad=True)
    y = x
    for k, s in layers:
        y = nn.functional.conv1d(y, torch.ones(1, 1, k, dtype=torch.float64), stride=s)
    y[0, 0, frame].backward()
    seen = x.grad[0, 0].nonzero()[:, 0]
    assert seen.min() == hop * frame
    assert seen.max() == hop * frame + width - 1


def test_default_receptive_field():
    assert receptive_field(KERNELS, STRIDES) == (400, 320)


def test_frame_mask_and_valid_lengths():
    mask = frame_mask(torch.tensor([0, 2, 5, 9]), 5)
    assert mask.dtype == torch.bool
    assert mask.sum(-1).tolist() == [0, 2, 5, 5]
    assert (mask[:, :-1] >= mask[:, 1:]).all()  # no real frame after padding
    for dtype in (torch.bool, torch.int8, torch.int64, torch.float16):
        ones = torch.ones(1, 70_000, dtype=dtype)  # too many for a sum in int8 or float16
        assert valid_lengths(ones).tolist() == [70_000]
        assert valid_lengths(ones).dtype == torch.int64


# ---- the encoder against the peer ----


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu", "swish"])
def test_encoder_and_projection_equal_transformers(norm, bias, activation):
    config = helpers.tiny_config(
        feat_extract_norm=norm, conv_bias=bias, feat_extract_activation=activation, layer_norm_eps=1e-3
    )
    peer, theirs_config = peer_modules(), helpers.peer_config(config)
    ours = nn.ModuleList([FeatureEncoder(config), FeatureProjection(config)])
    theirs = nn.ModuleList(
        [
            peer.Wav2Vec2ConformerFeatureEncoder(theirs_config),
            peer.Wav2Vec2ConformerFeatureProjection(theirs_config),
        ]
    )
    helpers.randomise_(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.eval()
    theirs.eval()
    x = torch.randn(2, 4000, generator=generator(1))
    a, b = ours[0](x), theirs[0](x.clone()).transpose(1, 2)
    helpers.assert_close(f"features {norm}", a, b)
    (pa, na), (pb, nb) = ours[1](a), theirs[1](b)
    helpers.assert_close("projected features", pa, pb)
    helpers.assert_close("normalised features", na, nb)
    weight = torch.randn(pb.shape, generator=generator(2))
    (pa * weight).sum().backward()
    (pb * weight).sum().backward()
    assert helpers.grad_difference(ours, theirs) <= helpers.PARITY


def test_default_config_has_the_checkpoint_keys():
    with torch.device("meta"):
        for norm, layers in (("group", [0]), ("layer", range(7))):
            config = Wav2Vec2ConformerConfig(feat_extract_norm=norm, conv_bias=True)
            keys = set(FeatureEncoder(config).state_dict())
            expected = {f"conv_layers.{i}.conv.{p}" for i in range(7) for p in ("weight", "bias")}
            expected |= {f"conv_layers.{i}.layer_norm.{p}" for i in layers for p in ("weight", "bias")}
            assert keys == expected
        projection = FeatureProjection(Wav2Vec2ConformerConfig()).state_dict()
    assert set(projection) == {f"{m}.{p}" for m in ("layer_norm", "projection") for p in ("weight", "bias")}


def test_one_seed_gives_the_dropout_of_transformers():
    config = helpers.tiny_config(feat_proj_dropout=0.4)
    ours = FeatureProjection(config).train()
    theirs = peer_modules().Wav2Vec2ConformerFeatureProjection(helpers.peer_config(config)).train()
    helpers.randomise_(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 50, config.conv_dim[-1], generator=generator())
    torch.manual_seed(3)
    a, _ = ours(x)
    torch.manual_seed(3)
    b, _ = theirs(x)
    assert torch.equal(a == 0, b == 0)
    helpers.assert_close("projected features, dropout", a, b)


def test_projection_drops_only_the_projected_frames():
    config = helpers.tiny_config(feat_proj_dropout=0.5)
    projection = FeatureProjection(config).train()
    projected, normalised = projection(torch.randn(1, 50, config.conv_dim[-1]))
    assert 0.3 < (projected == 0).float().mean() < 0.7
    assert (normalised != 0).all()


def test_input_is_cast_to_the_dtype_of_the_weights():
    encoder = FeatureEncoder(helpers.tiny_config()).bfloat16()
    assert encoder(torch.randn(1, 4000)).dtype == torch.bfloat16


def test_lengths_may_stay_on_the_host():
    config = helpers.tiny_config(feat_extract_norm="group")
    encoder = FeatureEncoder(config).to("meta")
    out = encoder(torch.empty(3, 1000, device="meta"), torch.tensor([1000, 500, 400]))
    assert out.device.type == "meta"
    assert out.shape == (
        3,
        conv_output_lengths(1000, config.conv_kernel, config.conv_stride),
        config.conv_dim[-1],
    )


def test_gradient_checkpointing_changes_nothing():
    for norm in ("group", "layer"):
        encoder = FeatureEncoder(helpers.tiny_config(feat_extract_norm=norm)).train()
        x, lengths = torch.randn(2, 4000, generator=generator()), torch.tensor([4000, 3000])
        grads = []
        for on in (False, True):
            encoder.gradient_checkpointing = on
            encoder.zero_grad()
            encoder(x, lengths).square().sum().backward()
            grads.append([p.grad.clone() for p in encoder.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- padding ----


def test_without_lengths_it_is_torch_s_group_norm():
    for groups in (6, 3, 1):
        ours, theirs = MaskedGroupNorm(groups, 6), nn.GroupNorm(groups, 6)
        helpers.randomise_(ours)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(3, 6, 50, generator=generator()) * 3 + 1
        assert torch.equal(ours(x), theirs(x))
        helpers.assert_close("group norm, all frames counted", ours(x, torch.tensor([50] * 3)), theirs(x))


def test_masked_group_norm_counts_valid_frames_only():
    for groups, affine in ((6, True), (2, True), (6, False)):
        norm = helpers.randomise_(MaskedGroupNorm(groups, 6, affine=affine))
        x = torch.randn(3, 6, 50, generator=generator())
        lengths = torch.tensor([50, 20, 7])
        y = norm(x, lengths)
        for row, n in enumerate(lengths.tolist()):
            helpers.assert_close("masked group norm", y[row, :, :n], norm(x[row : row + 1, :, :n])[0])
        x[1, :, 20:] = float("nan")  # whatever stands on padding, it does not reach the valid frames
        assert torch.isfinite(norm(x, lengths)[1, :, :20]).all()


def test_masked_group_norm_keeps_its_precision_off_centre():
    """With a mean a thousand times the deviation, E[x²] − E[x]² in fp32 would be 6 % off."""
    norm = MaskedGroupNorm(1, 1, affine=False)
    x = (torch.randn(1, 1, 4000, generator=generator(), dtype=torch.float64) + 1000).float()
    exact = nn.functional.group_norm(x.double(), 1)
    assert helpers.difference(norm(x, torch.tensor([4000])), exact) < 1e-4


def test_masked_group_norm_in_half_precision():
    norm = MaskedGroupNorm(4, 4).bfloat16()
    x = torch.randn(2, 4, 3000, generator=generator()).bfloat16()
    y = norm(x, torch.tensor([3000, 1000]))
    assert y.dtype == torch.bfloat16
    alone = norm(x[1:, :, :1000], torch.tensor([1000]))
    assert helpers.difference(y[1:, :, :1000], alone) < 2**-8
    assert torch.isfinite(norm(x, torch.tensor([3000, 0]))).all()  # a row without a frame stays finite


@st.composite
def batches(draw):
    layers = draw(st.integers(1, 4))
    config = helpers.tiny_config(
        conv_dim=tuple(draw(st.lists(st.integers(2, 12), min_size=layers, max_size=layers))),
        conv_kernel=tuple(draw(st.lists(st.integers(1, 10), min_size=layers, max_size=layers))),
        conv_stride=tuple(draw(st.lists(st.integers(1, 4), min_size=layers, max_size=layers))),
        conv_bias=draw(st.booleans()),
        feat_extract_norm=draw(st.sampled_from(["group", "layer"])),
        feat_extract_activation=draw(st.sampled_from(["gelu", "relu", "swish"])),
    )
    width, hop = receptive_field(config.conv_kernel, config.conv_stride)
    shortest = width + 20 * hop
    lengths = draw(st.lists(st.integers(shortest, 4 * shortest), min_size=1, max_size=4))
    return config, lengths, draw(st.integers(0, shortest)), draw(st.integers(0, 2**31))


@settings(max_examples=40, deadline=None)
@given(batches())
def test_a_padded_row_equals_itself_alone(case):
    """In double precision: a layer norm over two channels is a step function, which magnifies rounding at will."""
    padded_against_alone(*case, dtype=torch.float64, tol=1e-9)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_a_padded_row_equals_itself_alone_in_single_precision(norm):
    for seed in range(3):
        config = helpers.tiny_config(feat_extract_norm=norm, conv_bias=norm == "layer")
        padded_against_alone(config, [9000, 16000, 4321], 100, seed, dtype=torch.float32, tol=helpers.PARITY)


def padded_against_alone(config, lengths, extra, seed, *, dtype, tol):
    g = generator(seed)
    encoder = helpers.randomise_(FeatureEncoder(config), seed).to(dtype)
    rows = [torch.randn(n, generator=g, dtype=dtype) * (1 + i) for i, n in enumerate(lengths)]
    batch = torch.full((len(rows), max(lengths) + extra), 0.7, dtype=dtype)  # padding that is not 0 either
    for i, row in enumerate(rows):
        batch[i, : len(row)] = row
    counts = torch.tensor(lengths)
    frames = conv_output_lengths(counts, config.conv_kernel, config.conv_stride).tolist()

    together = encoder(batch, counts)
    assert (together[~frame_mask(torch.tensor(frames), together.shape[1])] == 0).all()
    sum((together[i, :n] ** 2).sum() for i, n in enumerate(frames)).backward()
    grads = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    alone = [encoder(row[None])[0] for row in rows]
    sum((a**2).sum() for a in alone).backward()

    for i, n in enumerate(frames):
        assert alone[i].shape[0] == n
        helpers.assert_close(f"features: padded row vs alone, {dtype}", together[i, :n], alone[i], tol)
    scale = max(p.grad.abs().max() for p in encoder.parameters())
    gap = max((a - p.grad).abs().max() for a, p in zip(grads, encoder.parameters(), strict=True))
    assert gap <= tol * scale


def test_with_the_switch_off_padding_leaks_exactly_as_in_transformers():
    config = helpers.tiny_config(feat_extract_norm="group")
    encoder = FeatureEncoder(config).eval()
    theirs = peer_modules().Wav2Vec2ConformerFeatureEncoder(helpers.peer_config(config)).eval()
    helpers.randomise_(theirs)
    encoder.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6000, generator=generator())
    x[1, 3000:] = 0
    lengths = torch.tensor([6000, 3000])
    expected = theirs(x.clone()).transpose(1, 2)
    strict = encoder(x, lengths)
    config.padding_invariant = False  # read at each call
    helpers.assert_close("features, switch off", encoder(x, lengths), expected)
    assert torch.equal(encoder(x, lengths), encoder(x))
    assert helpers.difference(strict, expected) > 1e-2


@pytest.mark.gpu
def test_padding_on_the_gpu():
    config = helpers.tiny_config(feat_extract_norm="group")
    encoder = FeatureEncoder(config).cuda()
    x = torch.randn(2, 8000, generator=generator()).cuda()
    lengths = torch.tensor([8000, 5000], device="cuda")
    torch.cuda.set_sync_debug_mode("error")  # a host synchronisation raises
    try:
        together = encoder(x, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    alone = encoder(x[1:, :5000])
    helpers.assert_close("features on GPU: padded row vs alone", together[1:, : alone.shape[1]], alone, 1e-4)


def test_the_clock_tells_the_time_of_frames() -> None:
    assert FrameClock.of(None) == FrameClock.of(Wav2Vec2ConformerConfig()) == FrameClock(320, 400, 16_000)
    clock = FrameClock.of(None)
    assert (clock.step, clock.middle()) == (0.02, 0.0125)
    assert all(clock.frame(clock.middle(t) + late) == t for t in (0, 1, 40) for late in (-0.009, 0.0, 0.009))
    assert clock.frame(-1.0) == 0
    assert clock.span(0, 49) == (0.0025, 0.9825)
    assert clock.span(48, 50, seconds=0.97)[1] == 0.97
    assert FrameClock(hop=2560, width=400).span(0, 1)[0] == 0.0  # behind an adapter: never before the sound
    slow = Wav2Vec2ConformerConfig(add_adapter=True)
    assert FrameClock.of(slow) == clock
    assert FrameClock.of(slow, adapter=True).hop == 320 * 2**3
