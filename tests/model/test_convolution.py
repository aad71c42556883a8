"""The convolution chapter: the convolution module and the batch norm that leaves padding out."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import helpers
from w2vc.model.convolution import ConvolutionModule, MaskedBatchNorm1d, real_statistics
from w2vc.model.features import frame_mask

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def module_and_peer(**options):
    from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as peer

    config = helpers.tiny_config(conformer_conv_dropout=0.0, **options)
    theirs = helpers.randomise_(peer.Wav2Vec2ConformerConvolutionModule(helpers.peer_config(config)), seed=3)
    ours = ConvolutionModule(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return config, ours, theirs


# ---- against the peer ----


@pytest.mark.parametrize("activation", ["gelu", "relu", "swish"])
@pytest.mark.parametrize("kernel", [1, 5, 31])
@pytest.mark.parametrize("training", [False, True])
def test_equals_transformers(activation, kernel, training):
    config, ours, theirs = module_and_peer(hidden_act=activation, conv_depthwise_kernel_size=kernel)
    ours.train(training)
    theirs.train(training)
    x = torch.randn(3, 20, config.hidden_size, generator=generator())
    for _ in range(2):  # two batches: the second sees the statistics of the first
        xa, xb = x.clone().requires_grad_(), x.clone().requires_grad_()
        a, b = ours(xa), theirs(xb)
        helpers.assert_close("convolution module", a, b)
    weight = torch.randn(b.shape, generator=generator(1))
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    helpers.assert_close("convolution module, input gradient", xa.grad, xb.grad)
    assert helpers.grad_difference(ours, theirs) <= helpers.PARITY
    for name in BUFFERS:
        mine, peers = getattr(ours.batch_norm, name), getattr(theirs.batch_norm, name)
        helpers.assert_close(f"batch norm {name}", mine, peers)
    assert int(ours.batch_norm.num_batches_tracked) == (2 if training else 0)


@pytest.mark.parametrize("training", [False, True])
def test_with_the_switch_off_a_mask_changes_nothing(training):
    config, ours, theirs = module_and_peer(padding_invariant=False)
    ours.train(training)
    theirs.train(training)
    x = torch.randn(3, 20, config.hidden_size, generator=generator())
    mask = frame_mask(torch.tensor([20, 12, 5]), 20)
    expected = theirs(x)
    helpers.assert_close("convolution module, switch off", ours(x, mask), expected)
    helpers.assert_close(
        "running_var, switch off", ours.batch_norm.running_var, theirs.batch_norm.running_var
    )
    config.padding_invariant = True  # read at each call
    assert helpers.difference(ours(x, mask), expected) > 1e-2


def test_keys_and_missing_biases():
    module = ConvolutionModule(helpers.tiny_config())
    expected = {f"{m}.weight" for m in ("pointwise_conv1", "depthwise_conv", "pointwise_conv2")}
    expected |= {f"{m}.{p}" for m in ("layer_norm", "batch_norm") for p in ("weight", "bias")}
    expected |= {f"batch_norm.{b}" for b in BUFFERS}
    assert set(module.state_dict()) == expected


def test_a_frame_sees_a_kernel_of_frames():
    config = helpers.tiny_config(conv_depthwise_kernel_size=7)
    module = ConvolutionModule(config).eval()
    x = torch.randn(1, 30, config.hidden_size, generator=generator(), requires_grad=True)
    for t in (0, 2, 15, 29):
        (grad,) = torch.autograd.grad(module(x)[0, t].sum(), x)
        seen = grad[0].abs().sum(-1).nonzero()[:, 0].tolist()
        assert seen == list(range(max(t - 3, 0), min(t + 3, 29) + 1))


# ---- padding ----


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    extra=st.integers(0, 10),
    kernel=st.sampled_from([1, 3, 5, 31]),
    activation=st.sampled_from(["gelu", "relu", "swish"]),
    seed=st.integers(0, 2**31),
)
def test_a_padded_row_equals_itself_alone(lengths, extra, kernel, activation, seed):
    config = helpers.tiny_config(
        conv_depthwise_kernel_size=kernel, hidden_act=activation, conformer_conv_dropout=0.0
    )
    module = helpers.randomise_(ConvolutionModule(config), seed).eval()
    x = torch.randn(len(lengths), max(lengths) + extra, config.hidden_size, generator=generator(seed))
    mask = frame_mask(torch.tensor(lengths), x.shape[1])
    together = module(x, mask)
    (together[mask] ** 2).sum().backward()
    grads = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    alone = [module(x[i : i + 1, :n])[0] for i, n in enumerate(lengths)]
    sum((a**2).sum() for a in alone).backward()
    for i, n in enumerate(lengths):
        helpers.assert_close("convolution module: padded row vs alone", together[i, :n], alone[i])
    scale = max(p.grad.abs().max() for p in module.parameters())
    gap = max((a - p.grad).abs().max() for a, p in zip(grads, module.parameters(), strict=True))
    assert gap <= 1e-5 * scale


def test_training_sees_valid_frames_only():
    """Whatever stands on padding: same output, same gradients, same running statistics."""
    config = helpers.tiny_config(conformer_conv_dropout=0.0)
    mask = frame_mask(torch.tensor([20, 12, 5]), 20)
    original = helpers.randomise_(ConvolutionModule(config)).train()
    results = []
    for padding in (0.0, 50.0):
        module = copy.deepcopy(original)
        x = torch.randn(3, 20, config.hidden_size, generator=generator())
        x[~mask] = padding + torch.randn(3, 20, config.hidden_size, generator=generator(1))[~mask]
        x.requires_grad_()
        y = module(x, mask)[mask]
        y.square().sum().backward()
        assert (x.grad[~mask] == 0).all()
        results.append([y, x.grad, *(getattr(module.batch_norm, b) for b in BUFFERS)])
        results[-1] += [p.grad for p in module.parameters()]
    for a, b in zip(*results, strict=True):
        helpers.assert_close("convolution module, training: other padding", a, b)


# ---- the batch norm ----


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 15), min_size=1, max_size=5).filter(lambda n: sum(n) > 1),
    momentum=st.sampled_from([0.1, 0.7]),
    seed=st.integers(0, 2**31),
)
def test_masked_batch_norm_equals_torch_on_the_valid_frames(lengths, momentum, seed):
    ours, theirs = helpers.randomise_(MaskedBatchNorm1d(6), seed), nn.BatchNorm1d(6)
    ours.momentum = theirs.momentum = momentum
    theirs.load_state_dict(ours.state_dict())
    for batch in range(3):  # the first batch and two later ones
        x = torch.randn(len(lengths), 6, 15, generator=generator(seed + batch)) * 2 + 3
        mask = frame_mask(torch.tensor(lengths), 15)
        a = ours(x, mask).transpose(1, 2)[mask]  # [N, D]: the valid frames in a row
        b = theirs(x.transpose(1, 2)[mask])
        # two frames can lie close together; their normalised difference then magnifies rounding
        helpers.assert_close("masked batch norm", a, b, 1e-5 if sum(lengths) > 4 else 1e-3)
        for name in BUFFERS:
            helpers.assert_close(f"masked batch norm {name}", getattr(ours, name), getattr(theirs, name))


def test_statistics_are_those_of_the_real_frames_picked_out():
    x, mask = torch.randn(3, 4, 8, generator=generator()), frame_mask(torch.tensor([8, 5, 0]), 8)
    x.transpose(1, 2)[~mask] = 1e6
    real = x.transpose(1, 2)[mask]
    centred, mean, variance, count = real_statistics(x, mask)
    assert torch.allclose(mean, real.mean(0), atol=1e-5)
    assert torch.allclose(variance, real.var(0, unbiased=False), atol=1e-5)
    assert int(count) == 13
    assert torch.equal(centred.transpose(1, 2)[~mask], torch.zeros(11, 4))
    none = real_statistics(x, torch.zeros_like(mask))
    assert all((value == 0).all() for value in none)


def test_the_module_trains_on_the_statistics_of_valid_frames():
    """The batch norm inside the module gets the mask too, and its buffers stay out of the graph."""
    config = helpers.tiny_config(conformer_conv_dropout=0.0)
    module = helpers.randomise_(ConvolutionModule(config)).train()
    x = torch.randn(3, 20, config.hidden_size, generator=generator(), requires_grad=True)
    mask = frame_mask(torch.tensor([20, 12, 5]), 20)
    seen = []
    module.batch_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    plain = nn.BatchNorm1d(config.hidden_size)
    plain.load_state_dict(module.batch_norm.state_dict())
    y = module(x, mask)
    plain(seen[0].transpose(1, 2)[mask])
    for name in BUFFERS:
        helpers.assert_close(f"{name} in the module", getattr(module.batch_norm, name), getattr(plain, name))
        assert not getattr(module.batch_norm, name).requires_grad
    alone = seen[0].transpose(1, 2)[mask]
    normal = (alone - alone.mean(0)) / (alone.var(0, unbiased=False) + plain.eps).sqrt()
    expected = module.activation(normal * plain.weight + plain.bias) @ module.pointwise_conv2.weight[..., 0].T
    helpers.assert_close("convolution module, training, masked", y[mask], expected)


def test_without_a_mask_it_is_torch_s_batch_norm():
    for training in (True, False):
        ours, theirs = MaskedBatchNorm1d(6).train(training), nn.BatchNorm1d(6).train(training)
        x = torch.randn(3, 6, 15, generator=generator())
        helpers.assert_close("batch norm, no mask", ours(x), theirs(x))
        helpers.assert_close("batch norm, no mask, running_var", ours.running_var, theirs.running_var)
        everything = torch.ones(3, 15, dtype=torch.bool)
        helpers.assert_close("batch norm, all frames valid", ours(x, everything), theirs(x))


def test_in_evaluation_a_mask_changes_nothing():
    norm = helpers.randomise_(MaskedBatchNorm1d(6)).eval()
    x = torch.randn(3, 6, 15, generator=generator())
    before = norm.running_mean.clone()
    assert torch.equal(norm(x, frame_mask(torch.tensor([15, 3, 0]), 15)), norm(x))
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("valid", [0, 1])
def test_less_than_two_frames_teach_nothing(valid):
    norm = helpers.randomise_(MaskedBatchNorm1d(4)).train()
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    x = torch.randn(2, 4, 5, generator=generator(), requires_grad=True)
    y = norm(x, frame_mask(torch.tensor([valid, 0]), 5))
    assert torch.isfinite(y).all()
    # the frame is its own mean, so only the bias is left
    assert torch.allclose(y[0, :, :valid], norm.bias[:, None].expand(4, valid))
    y[0, :, :valid].sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


def test_masked_batch_norm_keeps_its_precision_off_centre():
    norm = MaskedBatchNorm1d(1).train()
    x = (torch.randn(1, 1, 4000, generator=generator(), dtype=torch.float64) + 1000).float()
    exact = nn.functional.batch_norm(x.double(), None, None, training=True)
    assert helpers.difference(norm(x, torch.ones(1, 4000, dtype=torch.bool)), exact) < 1e-4


def test_half_precision_keeps_its_dtype():
    norm = MaskedBatchNorm1d(4).bfloat16().train()
    y = norm(torch.randn(2, 4, 3000).bfloat16(), frame_mask(torch.tensor([3000, 1000]), 3000))
    assert y.dtype == torch.bfloat16
    assert norm.running_var.dtype == torch.bfloat16
    assert torch.isfinite(y).all()


def test_compiles_in_one_graph_in_training():
    config = helpers.tiny_config(conformer_conv_dropout=0.0)
    module = ConvolutionModule(config).train()
    plain = ConvolutionModule(config).train()
    plain.load_state_dict(module.state_dict())
    x, mask = torch.randn(2, 12, config.hidden_size), frame_mask(torch.tensor([12, 7]), 12)
    compiled = torch.compile(module, backend="eager", fullgraph=True)  # fullgraph: a host read would break it
    assert torch.equal(compiled(x, mask), plain(x, mask))
    assert torch.equal(module.batch_norm.running_var, plain.batch_norm.running_var)


@pytest.mark.gpu
def test_training_on_the_gpu_never_waits():
    config = helpers.tiny_config(conformer_conv_dropout=0.0)
    module = helpers.randomise_(ConvolutionModule(config)).train()
    x = torch.randn(3, 20, config.hidden_size, generator=generator())
    mask = frame_mask(torch.tensor([20, 9, 4]), 20)
    expected, running = module(x, mask), module.batch_norm.running_var.clone()
    helpers.randomise_(module)
    module.cuda()
    x, mask = x.cuda(), mask.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = module(x, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    helpers.assert_close("convolution module on GPU", y.cpu()[mask.cpu()], expected[mask.cpu()], 1e-4)
    helpers.assert_close("running_var on GPU", module.batch_norm.running_var.cpu(), running, 1e-4)
