"""Chapter 10: frame arithmetic, the input contract, the feature encoder with both norms, the projection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import helpers
from w2vc import features
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.features import (
    Dropout,
    FeatureEncoder,
    FeatureProjection,
    MaskedGroupNorm,
    check_inputs,
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


# ---- the input contract ----

GOOD = torch.randn(3, 1000, generator=generator())


def mask_of(*lengths: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
    return frame_mask(torch.tensor(lengths), 1000).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32, torch.uint8])
def test_good_inputs_pass(dtype):
    config = Wav2Vec2ConformerConfig()
    check_inputs(GOOD, None, config)
    check_inputs(GOOD.bfloat16(), mask_of(1000, 400, 777, dtype=dtype), config)


def with_value(value: float, *rows: int) -> torch.Tensor:
    x = GOOD.clone()
    x[list(rows), 5] = value
    return x


@pytest.mark.parametrize(
    ("audio", "mask", "says"),
    [
        ([[0.0] * 1000], None, "list.*float tensor"),
        (GOOD[0], None, r"\(1000,\).*\[None\]"),
        (GOOD[:2][None], None, r"2 channels.*mean\(1\)"),
        (GOOD[:2].T[None], None, r"2 channels.*mean\(2\)"),
        (GOOD[:, None, None], None, r"must be \[B, S\]"),
        (torch.tensor(0.5), None, r"must be \[B, S\]"),
        ((GOOD * 9000).short(), None, "int16.*PCM.*32768"),
        ((GOOD * 9000).int(), None, "int32.*PCM.*2147483648"),
        ((GOOD * 9000).long(), None, "int64.*floating"),
        (GOOD.to(torch.complex64), None, "complex64.*floating"),
        (GOOD[:0], None, "empty"),
        (GOOD[:, :0], None, "empty"),
        (GOOD[:, :399], None, "399 samples.*400"),
        (with_value(float("nan"), 1), None, "NaN or Inf in row 1:"),
        (with_value(float("inf"), 0, 2), None, "NaN or Inf in rows 0, 2:"),
        (GOOD, [[1] * 1000] * 3, "attention_mask is a list"),
        (GOOD, mask_of(1000, 500), r"attention_mask.*\(2, 1000\).*\(3, 1000\)"),
        (GOOD, mask_of(1000, 500, 500)[:, :2], "per sample, not per frame"),
        (GOOD, mask_of(1000, 500, 500).to(torch.complex64), "complex64"),
        (GOOD, mask_of(1000, 500, 500) * 2, "other than 0 and 1 in rows 0, 1, 2"),
        (GOOD, mask_of(1000, 500, 500) * -1, "other than 0 and 1"),
        (GOOD, mask_of(1000, 500, 500).flip(-1), "1 after a 0 in rows 1, 2: pad on the right"),
        (GOOD, mask_of(1000, 399, 500), "fewer than 400 valid samples in row 1 "),
        (GOOD, mask_of(0, 500, 500), "fewer than 400 valid samples in row 0 "),
    ],
)
def test_wrong_inputs_are_named(audio, mask, says):
    with pytest.raises(ValueError, match=says):
        check_inputs(audio, mask, Wav2Vec2ConformerConfig())


def test_only_the_first_five_rows_are_listed():
    with pytest.raises(ValueError, match=r"rows 0, 1, 2, 3, 4, …:"):
        check_inputs(torch.full((9, 400), float("nan")), None, Wav2Vec2ConformerConfig())


def test_off_the_cpu_no_value_is_read():
    """A meta tensor has no values: reading one would raise something else."""
    config = Wav2Vec2ConformerConfig()
    check_inputs(GOOD.to("meta"), mask_of(1, 2, 3).to("meta"), config)
    with pytest.raises(ValueError, match="399"):
        check_inputs(GOOD[:, :399].to("meta"), None, config)
    with pytest.raises(ValueError, match=r"attention_mask is on meta.*leave it on the CPU"):
        check_inputs(GOOD, mask_of(500, 500, 500).to("meta"), config)


def test_the_mask_may_stay_on_the_host():
    """Then its values are read, and the encoder knows the lengths without asking the device."""
    config = helpers.tiny_config()
    check_inputs(GOOD.to("meta"), mask_of(1000, 500, 400), config)
    with pytest.raises(ValueError, match="1 after a 0 in row 1:"):
        check_inputs(GOOD.to("meta"), mask_of(1000, 500, 1000).flip(-1), config)
    width, _ = receptive_field(config.conv_kernel, config.conv_stride)
    with pytest.raises(ValueError, match=r"fewer than .* in row 2 "):
        check_inputs(GOOD.to("meta"), mask_of(1000, 500, width - 1), config)
    encoder = FeatureEncoder(config).to("meta")
    lengths = valid_lengths(mask_of(1000, 500, 400))
    assert encoder(GOOD.to("meta"), lengths).shape == encoder._together(GOOD.to("meta"), lengths).shape


def test_compiling_and_exporting_skip_the_values():
    config = helpers.tiny_config()

    class Checked(nn.Module):
        def forward(self, x, mask):
            check_inputs(x, mask, config)
            return x + mask

    mask = mask_of(1000, 900, 800)
    # fullgraph: reading a value would break the graph, and that raises
    compiled = torch.compile(Checked(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(GOOD, mask), GOOD + mask)
    samples = torch.export.Dim("samples", min=1000, max=5000)
    exported = torch.export.export(Checked(), (GOOD, mask), dynamic_shapes=[{1: samples}, {1: samples}])
    assert torch.equal(exported.module()(GOOD, mask), GOOD + mask)


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


def test_unknown_norm_is_refused():
    config = helpers.tiny_config()
    object.__setattr__(config, "feat_extract_norm", "batch")
    with pytest.raises(ValueError, match=r"feat_extract_norm='batch'.*group.*layer"):
        FeatureEncoder(config)


def test_projection_drops_only_the_projected_frames():
    config = helpers.tiny_config(feat_proj_dropout=0.5)
    projection = FeatureProjection(config).train()
    projected, normalised = projection(torch.randn(1, 50, config.conv_dim[-1]))
    assert 0.3 < (projected == 0).float().mean() < 0.7
    assert (normalised != 0).all()


def test_input_is_cast_to_the_dtype_of_the_weights():
    encoder = FeatureEncoder(helpers.tiny_config()).bfloat16()
    assert encoder(torch.randn(1, 4000)).dtype == torch.bfloat16


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


def outputs_and_gradients(encoder, call, weights):
    encoder.zero_grad()
    x = weights["x"].clone().requires_grad_()
    out = call(x)
    (out * weights["out"] * weights["real"]).sum().backward()
    return [out.detach() * weights["real"], x.grad, *(p.grad.clone() for p in encoder.parameters())]


@settings(max_examples=40, deadline=None)
@given(batches(), st.integers(1, 30), st.booleans(), st.booleans())
def test_alone_and_in_blocks_equals_the_padded_batch(case, block, known, checkpointing):
    """The fast form against the plain one: outputs, and gradients of samples and weights."""
    config, lengths, extra, seed = case
    g = generator(seed)
    encoder = helpers.randomise_(FeatureEncoder(config), seed).double().train()
    encoder.gradient_checkpointing = checkpointing
    x = torch.randn(len(lengths), max(lengths) + extra, generator=g, dtype=torch.float64) + 3
    counts = torch.tensor(lengths) if known else None
    valid = lengths if known else [x.shape[1]] * len(lengths)
    frames = conv_output_lengths(torch.tensor(valid), config.conv_kernel, config.conv_stride)
    T = conv_output_lengths(x.shape[1], config.conv_kernel, config.conv_stride)
    real = frame_mask(frames, T)[..., None].double()
    weights = {"x": x, "real": real}
    weights["out"] = torch.randn(len(lengths), T, config.conv_dim[-1], generator=g, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "BLOCK", block)
        fast = outputs_and_gradients(encoder, lambda x: encoder(x, counts), weights)
        plain = outputs_and_gradients(encoder, lambda x: encoder._together(x, counts), weights)
        with torch.no_grad():
            quiet = encoder(x, counts)
        patch.setattr(encoder, "_together", None)  # nothing may go the plain way by mistake
        assert (quiet == encoder(x, counts)).all()
    assert (quiet * (1 - real) == 0).all()
    largest = max(b.abs().max() for b in plain[1:])
    assert helpers.difference(quiet * real, plain[0]) < 1e-9
    assert helpers.difference(fast[0], plain[0]) < 1e-9
    assert max((a - b).abs().max() for a, b in zip(fast[1:], plain[1:], strict=True)) <= 1e-9 * largest


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
        check_inputs(x, frame_mask(lengths, 8000), config)
        together = encoder(x, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    alone = encoder(x[1:, :5000])
    helpers.assert_close("features on GPU: padded row vs alone", together[1:, : alone.shape[1]], alone, 1e-4)


# ---- dropout, and what is made anew for the backward pass


@given(p=st.floats(0.01, 0.95), seed=st.integers(0, 2**62))
def test_dropout_keeps_the_share_and_the_mean(p: float, seed: int) -> None:
    ones = torch.ones(40_000)
    out = Dropout(p)(ones, seed)
    zero = (out == 0).float().mean().item()
    assert abs(zero - p) < 5 * (p * (1 - p) / 40_000) ** 0.5 + 2e-5  # five standard deviations
    kept = out[out != 0]
    assert torch.equal(kept, kept[:1].expand_as(kept))
    assert abs(kept[0].item() * (1 - round(p * 2**16) / 2**16) - 1) < 1e-6


def test_dropout_is_uncorrelated_between_places_and_seeds() -> None:
    a, b = (Dropout(0.5)(torch.ones(64, 4096), seed) - 1 for seed in (1, 2))
    assert abs((a * b).mean()) < 0.01
    assert abs((a[:, 1:] * a[:, :-1]).mean()) < 0.01
    assert abs((a[1:] * a[:-1]).mean()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_dropout_sends_back_what_it_let_through(dtype: torch.dtype, turned: bool) -> None:
    x = torch.randn(3, 5, 7, dtype=dtype).requires_grad_()
    out = Dropout(0.4)(x.mT if turned else x, seed=11)
    out.sum().backward()
    assert x.grad is not None
    grad = x.grad.mT if turned else x.grad
    assert torch.equal(grad == 0, out == 0)
    torch.testing.assert_close(out, grad * (x.mT if turned else x))


def test_dropout_repeats_under_a_seed_of_torch_and_under_checkpointing() -> None:
    drop, x = Dropout(0.3), torch.randn(50, 50, requires_grad=True)
    torch.manual_seed(4)
    first = drop(x)
    torch.manual_seed(4)
    assert torch.equal(first, drop(x))
    assert not torch.equal(first, drop(x))
    out = checkpoint(lambda x: drop(x).sin(), x, use_reentrant=False)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad == 0, out == 0)


def test_dropout_that_drops_nothing_draws_nothing() -> None:
    x = torch.randn(4, 4)
    state = torch.get_rng_state()
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert (Dropout(1.0)(x) == 0).all()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_feed_forward_saves_one_wide_tensor_and_has_the_same_gradients(p: float) -> None:
    from w2vc.conformer import FeedForward

    layer = FeedForward(helpers.tiny_config(activation_dropout=p, hidden_dropout=0.0)).train()
    x = torch.randn(2, 30, layer.intermediate_dense.in_features, requires_grad=True)
    wide = 2 * 30 * layer.intermediate_dense.out_features

    def run(listened: bool) -> tuple[list[Tensor], int]:
        hook = layer.intermediate_dropout.register_forward_hook(lambda *_: None) if listened else None
        torch.manual_seed(2)
        out = layer(x)
        grads = [*torch.autograd.grad(out.square().sum(), [x, *layer.parameters()], retain_graph=True)]
        again = [*torch.autograd.grad(out.square().sum(), [x, *layer.parameters()], retain_graph=True)]
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
        if hook is not None:
            hook.remove()
        return [out, *grads], sum(t.numel() == wide for t in saved_tensors(out))

    lean, plain = run(False), run(True)
    for a, b in zip(lean[0], plain[0], strict=True):
        torch.testing.assert_close(a, b)
    assert lean[1] == 1  # what the activation was given
    assert plain[1] == 2


def saved_tensors(out: Tensor) -> list[Tensor]:
    """The tensors that the graph behind `out` holds for its backward pass, each once; notes are left out."""
    found: dict[int, Tensor] = {}
    nodes, seen = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                raw = getattr(node, name)
                for one in raw if isinstance(raw, tuple) else (raw,):
                    try:
                        data = one.data
                    except RuntimeError:  # packed by a hook
                        continue
                    if isinstance(data, Tensor):
                        found[data.untyped_storage().data_ptr()] = data
    return list(found.values())
