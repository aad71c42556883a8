"""The speaker head: its parts against plain loops, the whole head against the peer where the peer is right."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import helpers
from heads import DENSE, SAMPLES, SPEAKER, N
from w2vc.checks import check_speakers
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.model.features import conv_output_lengths
from w2vc.model.speaker import (
    AMSoftmaxLoss,
    TDNNLayer,
    Wav2Vec2ConformerForXVector,
    cosine_score,
    effective_kernel_sizes,
    min_samples,
    statistics_pooling,
    tdnn_output_lengths,
)
from w2vc.model.wav2vec2 import adapter_output_lengths

# ---- statistics pooling


def pool_loop(hidden: Tensor, n_frames: list[int]) -> Tensor:
    """One row, one channel, one frame at a time."""
    rows = []
    for row, n in zip(hidden.tolist(), n_frames, strict=True):
        means, deviations = [], []
        for channel in zip(*row[:n], strict=True):
            mean = sum(channel) / n
            means.append(mean)
            deviations.append(math.sqrt(sum((x - mean) ** 2 for x in channel) / (n - 1)) if n > 1 else 0.0)
        rows.append(means + deviations)
    return torch.tensor(rows, dtype=hidden.dtype)


@settings(max_examples=30, deadline=None)
@given(B=st.integers(1, 4), T=st.integers(1, 9), D=st.integers(1, 4), seed=st.integers(0, 999))
def test_pooling_equals_the_loop(B: int, T: int, D: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=g, dtype=torch.float64) * 3 + 5
    n = torch.randint(1, T + 1, (B,), generator=g)
    torch.testing.assert_close(statistics_pooling(hidden, n), pool_loop(hidden, n.tolist()))
    torch.testing.assert_close(statistics_pooling(hidden), pool_loop(hidden, [T] * B))


def test_pooling_has_gradients_and_none_from_padding() -> None:
    hidden = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    n = torch.tensor([6, 3, 2])
    assert torch.autograd.gradcheck(lambda x: statistics_pooling(x, n), hidden)
    (grad,) = torch.autograd.grad(statistics_pooling(hidden, n).square().sum(), hidden)
    assert (grad[1, 3:] == 0).all()
    assert (grad[1, :3] != 0).all()
    poisoned = hidden.detach().clone()
    poisoned[1, 3:] = torch.nan  # whatever padding holds
    torch.testing.assert_close(statistics_pooling(poisoned, n), statistics_pooling(hidden.detach(), n))


@pytest.mark.parametrize("hidden", [torch.randn(2, 1, 3), torch.zeros(2, 5, 3), torch.full((2, 5, 3), 0.1)], ids=["one frame", "all zero", "constant"])  # fmt: skip
def test_pooling_where_nothing_varies(hidden: Tensor) -> None:
    """One frame, or a channel that a ReLU has switched off: deviation 0 (to rounding), and a finite gradient."""
    leaf = hidden.clone().requires_grad_()
    pooled = statistics_pooling(leaf)
    torch.testing.assert_close(pooled[:, :3], hidden.mean(1))
    assert (pooled[:, 3:].abs() < 1e-6).all()
    (grad,) = torch.autograd.grad(pooled.sum(), leaf)
    assert grad.isfinite().all()
    if hidden.shape[1] == 1:
        assert (grad == 1).all()  # of the mean alone


def test_pooling_of_nothing_and_of_half_precision() -> None:
    hidden = torch.randn(2, 4, 3)
    assert (statistics_pooling(hidden, torch.tensor([4, 0]))[1] == 0).all()
    big = torch.full((1, 3000, 2), 60.0, dtype=torch.float16)  # its sum is no float16
    big[:, ::2] += 8
    pooled = statistics_pooling(big)
    assert pooled.dtype == torch.float16
    torch.testing.assert_close(pooled.float(), statistics_pooling(big.float()), rtol=1e-3, atol=0)


# ---- the TDNN


def tdnn_loop(layer: TDNNLayer, hidden: Tensor) -> Tensor:
    """Join the frames of every place, and apply the linear layer to them."""
    reach = (layer.kernel_size - 1) * layer.dilation
    places = [
        torch.cat([hidden[:, t + i * layer.dilation] for i in range(layer.kernel_size)], -1)
        for t in range(hidden.shape[1] - reach)
    ]
    return layer.kernel(torch.stack(places, 1)).relu()


@settings(max_examples=30, deadline=None)
@given(
    kernel_size=st.integers(1, 5), dilation=st.integers(1, 4), more=st.integers(0, 5), index=st.integers(0, 1)
)
def test_tdnn_equals_the_loop_and_the_peer(kernel_size: int, dilation: int, more: int, index: int) -> None:
    from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import TDNNLayer as Peer

    config = SPEAKER.config(
        tdnn_dim=(6, 8), tdnn_kernel=(kernel_size, kernel_size), tdnn_dilation=(dilation, dilation)
    )
    layer, peer = TDNNLayer(config, index), Peer(helpers.peer_config(config), index)
    peer.load_state_dict(layer.state_dict(), strict=True)
    hidden = torch.randn(2, (kernel_size - 1) * dilation + 1 + more, 6)
    out = layer(hidden)
    assert out.shape == (2, 1 + more, (6, 8)[index])
    torch.testing.assert_close(out, tdnn_loop(layer, hidden))
    torch.testing.assert_close(out, peer(hidden))


@settings(max_examples=30, deadline=None)
@given(
    layers=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4), T=st.integers(1, 40)
)  # fmt: skip
def test_lengths_are_those_of_the_layers(layers: list[tuple[int, int]], T: int) -> None:
    kernels, dilations = zip(*layers, strict=True)
    config = SPEAKER.config(tdnn_dim=(3,) * len(layers), tdnn_kernel=kernels, tdnn_dilation=dilations)
    told = tdnn_output_lengths(torch.tensor([T, 1]), config)
    assert told[1] == (sum(effective_kernel_sizes(config)) == len(layers))
    hidden = torch.randn(1, T, 3)
    if told[0] < 1:
        return
    for i in range(len(layers)):
        hidden = TDNNLayer(config, i)(hidden)
    assert hidden.shape[1] == told[0]


def test_default_lengths_and_the_peers() -> None:
    """The published sizes: 14 frames are lost; the peer counts 8 and 2 frames of padding get in."""
    config = Wav2Vec2ConformerConfig()
    assert tdnn_output_lengths(torch.tensor([99, 15, 14, 3]), config).tolist() == [85, 1, 0, 0]
    theirs = helpers.twin(SPEAKER.build())
    assert theirs._get_tdnn_output_lengths(24) == 20
    assert SPEAKER.build()._get_tdnn_output_lengths(24) == 16


# ---- the loss


def loss_loop(objective: AMSoftmaxLoss, vectors: Tensor, labels: list[int]) -> float:
    """Wang et al. (2018), equation 5, one utterance at a time."""
    total = 0.0
    for vector, label in zip(vectors.double(), labels, strict=True):
        weight = objective.weight.double()
        cos = [(vector @ w / (vector.norm() * w.norm())).item() for w in weight.T]
        terms = [objective.scale * (c - (objective.margin if i == label else 0)) for i, c in enumerate(cos)]
        total -= terms[label] - math.log(sum(math.exp(t) for t in terms))
    return total / len(labels)


@pytest.mark.parametrize(("scale", "margin"), [(30.0, 0.4), (10.0, 0.0), (30.0, 0.2)])
def test_loss_equals_the_equation_and_the_peer(scale: float, margin: float) -> None:
    from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import AMSoftmaxLoss as Peer

    ours, theirs = AMSoftmaxLoss(7, N, scale, margin), Peer(7, N, scale, margin)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    vectors, labels = torch.randn(4, 7, requires_grad=True), torch.tensor([1, 4, 4, 0])
    a, b = ours(vectors, labels), theirs(vectors, labels)
    assert a.item() == pytest.approx(loss_loop(ours, vectors, labels.tolist()), rel=1e-5)
    helpers.assert_close("am-softmax", a, b)
    (ga,), (gb,) = torch.autograd.grad(a, vectors), torch.autograd.grad(b, vectors)
    helpers.assert_close("am-softmax gradient", ga, gb)
    assert (
        (ga * vectors).sum(1).abs() < 1e-5 * ga.norm()
    ).all()  # lengths do not matter: no push along a vector


def test_loss_defaults_and_direction_only() -> None:
    objective = AMSoftmaxLoss(6, 3)
    assert (objective.scale, objective.margin) == (30.0, 0.4)
    vectors, labels = torch.randn(2, 6), torch.tensor([2, 0])
    torch.testing.assert_close(objective(vectors * 17, labels), objective(vectors, labels))
    assert objective(vectors, labels) > AMSoftmaxLoss.forward(_without_margin(objective), vectors, labels)
    with torch.no_grad():  # a vector on its speaker's direction has cosine 1
        assert objective.cosines(objective.weight.T).diagonal().sub(1).abs().max() < 1e-6


def _without_margin(objective: AMSoftmaxLoss) -> AMSoftmaxLoss:
    other = copy.deepcopy(objective)
    other.margin = 0.0
    return other


# ---- the whole head


def test_parity_with_an_adapter() -> None:
    """The peer can read an adapter of the model's own width; with mixed layers it looks past the adapter."""
    adapter = {"add_adapter": True, "num_adapter_layers": 1}
    for mixed, padded in ((False, False), (False, True), (True, False)):
        peer = {"padding_invariant": False, "hidden_states_pre_norm": True, "use_weighted_layer_sum": mixed}
        ours = SPEAKER.build(**adapter, **DENSE, **peer)
        theirs = helpers.twin(ours)
        inputs = SPEAKER.batch(padded)
        a, b = ours(**inputs), theirs(**inputs)
        helpers.assert_close("x-vector with an adapter", a.embeddings, b.embeddings)
        a.loss.backward()
        b.loss.backward()
        assert helpers.grad_difference(ours, theirs) <= helpers.PARITY


def test_an_adapter_of_another_width() -> None:
    """The peer builds this model and cannot run it."""
    model = SPEAKER.build(add_adapter=True, num_adapter_layers=1, output_hidden_size=20)
    assert model.projector.in_features == 20
    assert model(**SPEAKER.batch()).embeddings.shape == (3, 9)
    mixed = SPEAKER.build(add_adapter=True, output_hidden_size=20, use_weighted_layer_sum=True)
    assert mixed.projector.in_features == 32
    assert mixed(**SPEAKER.batch(padded=True)).loss.isfinite()


def test_gaps_where_the_peer_counts_wrong() -> None:
    """With dilation the peer pools padding into the short rows; full rows agree, short ones are as if alone here."""
    ours = SPEAKER.build(padding_invariant=False)
    theirs = helpers.twin(ours)
    inputs = SPEAKER.batch(padded=True)
    a, b = ours(**inputs).embeddings, theirs(**inputs).embeddings
    helpers.assert_close("x-vector with gaps, full rows", a[:1], b[:1])
    assert all(helpers.difference(a[row], b[row]) > 1e-3 for row in (1, 2))
    ours.config.padding_invariant = True
    a = ours(**inputs).embeddings
    alone = theirs(inputs["input_values"][1:2, :6400]).embeddings  # the peer is right without padding
    helpers.assert_close("x-vector with gaps, a short row", a[1:2], alone)


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("knobs", [{"add_adapter": True, "num_adapter_layers": 1, "tdnn_kernel": (2, 2, 1)}, {"add_adapter": True, "use_weighted_layer_sum": True}], ids=str)  # fmt: skip
def test_padding_does_not_reach_the_vector(norm: str, knobs: dict[str, Any]) -> None:
    """The padding theorem for the head: an utterance's vector does not depend on its batch mates."""
    model = SPEAKER.build(feat_extract_norm=norm, **knobs)
    inputs = SPEAKER.batch(padded=True)
    together = model(**inputs)
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = model(inputs["input_values"][row : row + 1, :length])
        helpers.assert_close(
            "x-vector alone, embeddings", together.embeddings[row : row + 1], alone.embeddings
        )
        helpers.assert_close("x-vector alone, logits", together.logits[row : row + 1], alone.logits)
    model.config.padding_invariant = False
    assert (
        helpers.difference(model(**inputs).embeddings, together.embeddings) > 1e-5
    )  # the switch does something


# ---- too short


@settings(max_examples=25, deadline=None)
@given(
    kernels=st.lists(st.integers(1, 4), min_size=1, max_size=3), dilation=st.integers(1, 3),
    adapters=st.integers(0, 2), adapter_kernel=st.integers(3, 5), stride=st.integers(1, 3), mixed=st.booleans(),
)  # fmt: skip
def test_min_samples_is_exact(  # noqa: PLR0917
    kernels: list[int], dilation: int, adapters: int, adapter_kernel: int, stride: int, mixed: bool
) -> None:
    n = len(kernels)
    config = SPEAKER.config(tdnn_dim=(4,) * n, tdnn_kernel=tuple(kernels), tdnn_dilation=(dilation,) * n, use_weighted_layer_sum=mixed, add_adapter=adapters > 0, num_adapter_layers=max(adapters, 1), adapter_kernel_size=adapter_kernel, adapter_stride=stride)  # fmt: skip
    least = min_samples(config)

    def pooled(samples: int) -> int:
        frames = conv_output_lengths(torch.tensor(samples), config.conv_kernel, config.conv_stride)
        for _ in range(adapters if not mixed else 0):
            frames = adapter_output_lengths(frames, config)
        return int(tdnn_output_lengths(frames, config))

    assert pooled(least) >= 1
    assert pooled(least - 1) == 0


def test_an_utterance_too_short_is_named() -> None:
    model = SPEAKER.build()
    least = min_samples(model.config)
    for padded in (False, True):  # exactly enough: one frame, whose deviation is 0
        mask = (torch.arange(SAMPLES) < torch.tensor([[SAMPLES], [least]])).long()
        inputs = {"input_values": torch.randn(2, SAMPLES) * mask, "attention_mask": mask}
        out = model(**inputs) if padded else model(torch.randn(1, least))
        assert out.embeddings.isfinite().all()
    mask[1, least - 1] = 0
    seconds = rf"{least} samples \({least / 16_000:.3f} s at 16 kHz\)"
    with pytest.raises(ValueError, match=rf"{seconds} a row; row 1 has {least - 1} \(0\.\d+ s\)\. Leave"):
        model(inputs["input_values"], mask)
    with pytest.raises(ValueError, match=rf"{seconds}.*row 0 has {least - 1} .*row 4 has .*, …\. Leave"):
        model(torch.randn(7, least - 1))
    torch.testing.assert_close(
        model(torch.randn(2, least)).embeddings.isnan(), torch.zeros(2, 9, dtype=torch.bool)
    )


def test_where_values_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device, or while a graph is compiled: the shape is checked, and a short row gives statistics of 0."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    model = SPEAKER.build()
    least = min_samples(model.config)
    with pytest.raises(ValueError, match="row 0 has"):
        model(torch.randn(2, least - 1))
    mask = (torch.arange(SAMPLES) < torch.tensor([[SAMPLES], [least - 1]])).long()
    out = model(torch.randn(2, SAMPLES) * mask, mask)
    torch.testing.assert_close(out.embeddings[1], model.feature_extractor.bias)
    assert out.embeddings[0].isfinite().all()


def test_one_pooled_frame_is_nan_in_the_peer_and_not_here() -> None:
    ours = SPEAKER.build(training=True)
    theirs = helpers.twin(ours)
    values = torch.randn(2, min_samples(ours.config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert theirs(values).embeddings.isnan().all()
    out = ours(values, labels=torch.tensor([0, 1]))
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


# ---- labels


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([1, N, 0]), rf"labels\[1\] = {N} .*0\.\.{N - 1} \(num_labels={N}\)"),
        (torch.tensor([1, 2, -100]), r"labels\[2\] = -100"),
        (torch.tensor([[1], [2], [-1]]), r"labels\[2\] = -1"),
        (torch.tensor([1, 2]), r"shape \(2,\), expected a tensor \(3,\)"),
        (torch.ones(3, 2, dtype=torch.long), r"shape \(3, 2\)"),
        (torch.tensor(1), r"shape \(\)"),
        (torch.ones(3), r"dtype torch\.float32"),
        (torch.ones(3, dtype=torch.bool), r"dtype torch\.bool"),
        ([1, 2, 3], "list"),
    ],
    ids=str,
)
def test_wrong_labels_are_value_errors(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPEAKER.build()(torch.randn(3, SAMPLES), labels=labels)


def test_labels_of_every_form_mean_the_same() -> None:
    model, values = SPEAKER.build(), torch.randn(3, SAMPLES)
    plain = model(values, labels=torch.tensor([1, 4, 0])).loss
    for form in (torch.tensor([[1], [4], [0]]), torch.tensor([1, 4, 0], dtype=torch.int16)):
        assert torch.equal(model(values, labels=form).loss, plain)
        check_speakers(form, 3, N)


def test_one_speaker_cannot_be_trained() -> None:
    """Documented is a regression, which no vector fits; the peer's loss is 0, and so are its gradients."""
    ours = SPEAKER.build(num_labels=1)
    values, labels = torch.randn(2, SAMPLES), torch.zeros(2, dtype=torch.long)
    assert helpers.twin(ours)(values, labels=labels).loss == 0
    assert ours(values).embeddings.shape == (2, 9)
    with pytest.raises(ValueError, match=r"num_labels=1 .*at least 2"):
        ours(values, labels=labels)


# ---- outputs, training, precision


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = Wav2Vec2ConformerForXVector(
        SPEAKER.config(
            use_weighted_layer_sum=True, xvector_output_dim=64, num_labels=300, tdnn_dim=(64, 64, 64)
        )
    )
    assert model.objective.weight.std().item() == pytest.approx(1, rel=0.05)
    assert model.layer_weights.tolist() == pytest.approx([1 / 3] * 3)
    for layer in (model.projector, model.feature_extractor, model.classifier, model.tdnn[1].kernel):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert (layer.bias == 0).all()


# ---- in and out of files


def test_cosine_score() -> None:
    a, b = torch.randn(3, 6), torch.randn(4, 6)
    scores = cosine_score(a[:, None], b)
    assert scores.shape == (3, 4)
    torch.testing.assert_close(scores, functional.normalize(a, dim=1) @ functional.normalize(b, dim=1).T)
    torch.testing.assert_close(cosine_score(a, 3 * a), torch.ones(3))
    for other in (torch.half, torch.bfloat16):
        assert cosine_score(a.half(), a.to(other)).dtype == torch.float32
    assert cosine_score(torch.zeros(6), b[0]) == 0


@pytest.mark.gpu
def test_gpu_errors() -> None:
    model = SPEAKER.build().cuda()
    least = min_samples(model.config)
    with pytest.raises(ValueError, match=r"labels\[1\] = 99"):
        model(torch.randn(2, SAMPLES).cuda(), labels=torch.tensor([0, 99]).cuda())
    with pytest.raises(ValueError, match="row 0 has"):  # seen by the shape
        model(torch.randn(2, least - 1).cuda())
    mask = (torch.arange(SAMPLES) < torch.tensor([[SAMPLES], [least - 1]])).long()  # values are not looked at
    out = model((torch.randn(2, SAMPLES) * mask).cuda(), mask.cuda())
    assert out.embeddings.isfinite().all()
