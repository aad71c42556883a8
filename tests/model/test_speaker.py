"""The speaker head: its parts against plain loops, the whole head against the peer where the peer is right."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import helpers
from w2vc.checks import check_speakers
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.model.ctc import Wav2Vec2ConformerForCTC
from w2vc.model.features import conv_output_lengths
from w2vc.model.speaker import (
    AMSoftmaxLoss,
    TDNNLayer,
    Wav2Vec2ConformerForXVector,
    XVectorOutput,
    cosine_score,
    effective_kernel_sizes,
    min_samples,
    statistics_pooling,
    tdnn_output_lengths,
)
from w2vc.model.wav2vec2 import adapter_output_lengths

SAMPLES = 8_000  # half a second, 24 frames
N = 5  # speakers


def still(**knobs: Any) -> Wav2Vec2ConformerConfig:
    """A tiny config without any randomness; its TDNN reaches over 9 frames and has a gap."""
    quiet = dict.fromkeys(
        (
            "hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout",
            "conformer_conv_dropout", "final_dropout", "layerdrop", "mask_time_prob", "mask_feature_prob",
        ),
        0.0,
    )  # fmt: skip
    sizes = {"tdnn_dim": (12, 10, 14), "tdnn_kernel": (3, 3, 1), "tdnn_dilation": (1, 3, 1)}
    return helpers.tiny_config(**{**quiet, **sizes, "num_labels": N, "xvector_output_dim": 9, **knobs})


DENSE: dict[str, Any] = {"tdnn_dilation": (1, 1, 1)}  # without gaps the peer counts frames correctly


def build(config: Wav2Vec2ConformerConfig, training: bool = False) -> Wav2Vec2ConformerForXVector:
    torch.manual_seed(0)
    model = Wav2Vec2ConformerForXVector(config)
    helpers.randomise_(model)
    with (
        torch.no_grad()
    ):  # with the small first weights frames hardly differ, and the gradients below the pooling vanish
        for layer in (
            model.projector,
            *(tdnn.kernel for tdnn in model.tdnn),
            model.feature_extractor,
            model.classifier,
        ):
            layer.weight.normal_(0, 1.5 / math.sqrt(layer.in_features))
    return model.train(training)


def batch(padded: bool = False) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    lengths = torch.tensor([SAMPLES, 6_400 if padded else SAMPLES, 4_800 if padded else SAMPLES])
    attention_mask = (torch.arange(SAMPLES) < lengths[:, None]).long()
    values = torch.randn(3, SAMPLES, generator=g) * attention_mask
    inputs = {"input_values": values, "labels": torch.tensor([4, 0, 2])}
    return {**inputs, "attention_mask": attention_mask} if padded else inputs


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

    config = still(
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
    config = still(tdnn_dim=(3,) * len(layers), tdnn_kernel=kernels, tdnn_dilation=dilations)
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
    theirs = helpers.twin(build(still()))
    assert theirs._get_tdnn_output_lengths(24) == 20
    assert build(still())._get_tdnn_output_lengths(24) == 16


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


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_parity_of_the_whole_head(positions: str, mixed: bool, padded: bool, training: bool) -> None:
    config = still(
        position_embeddings_type=positions,
        feat_extract_norm="group" if mixed else "layer",
        use_weighted_layer_sum=mixed,
        padding_invariant=False,
        hidden_states_pre_norm=True,
        **(DENSE if padded else {}),
    )
    ours = build(config, training)
    theirs = helpers.twin(ours)
    inputs = batch(padded)
    flags = {"output_hidden_states": True, "output_attentions": True}
    a, b = ours(**inputs, **flags), theirs(**inputs, **flags)
    assert a.keys() == list(b.keys()) == ["loss", "logits", "embeddings", "hidden_states", "attentions"]
    for name in ("loss", "logits", "embeddings"):
        helpers.assert_close(f"x-vector {name}", a[name], b[name])
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        helpers.assert_close("x-vector hidden_states", x, y)
    assert [x.shape for x in a.attentions] == [y.shape for y in b.attentions]
    a.loss.backward()
    b.loss.backward()
    gap = helpers.grad_difference(ours, theirs)
    helpers.worst["x-vector gradients"] = max(helpers.worst.get("x-vector gradients", 0.0), gap)
    assert gap <= helpers.PARITY
    assert (ours.layer_weights is not None) == mixed
    if mixed:
        assert ours.layer_weights.grad.abs().max() > 0


def test_parity_with_an_adapter() -> None:
    """The peer can read an adapter of the model's own width; with mixed layers it looks past the adapter."""
    adapter = {"add_adapter": True, "num_adapter_layers": 1}
    for mixed, padded in ((False, False), (False, True), (True, False)):
        config = still(
            **adapter,
            **DENSE,
            use_weighted_layer_sum=mixed,
            padding_invariant=False,
            hidden_states_pre_norm=True,
        )
        ours = build(config)
        theirs = helpers.twin(ours)
        inputs = batch(padded)
        a, b = ours(**inputs), theirs(**inputs)
        helpers.assert_close("x-vector with an adapter", a.embeddings, b.embeddings)
        a.loss.backward()
        b.loss.backward()
        assert helpers.grad_difference(ours, theirs) <= helpers.PARITY


def test_an_adapter_of_another_width() -> None:
    """The peer builds this model and cannot run it."""
    config = still(add_adapter=True, num_adapter_layers=1, output_hidden_size=20)
    model = build(config)
    assert model.projector.in_features == 20
    assert model(**batch()).embeddings.shape == (3, 9)
    mixed = build(still(add_adapter=True, output_hidden_size=20, use_weighted_layer_sum=True))
    assert mixed.projector.in_features == 32
    assert mixed(**batch(padded=True)).loss.isfinite()


def test_gaps_where_the_peer_counts_wrong() -> None:
    """With dilation the peer pools padding into the short rows; full rows agree, short ones are as if alone here."""
    ours = build(still(padding_invariant=False))
    theirs = helpers.twin(ours)
    inputs = batch(padded=True)
    a, b = ours(**inputs).embeddings, theirs(**inputs).embeddings
    helpers.assert_close("x-vector with gaps, full rows", a[:1], b[:1])
    assert all(helpers.difference(a[row], b[row]) > 1e-3 for row in (1, 2))
    ours.config.padding_invariant = True
    a = ours(**inputs).embeddings
    alone = theirs(inputs["input_values"][1:2, :6400]).embeddings  # the peer is right without padding
    helpers.assert_close("x-vector with gaps, a short row", a[1:2], alone)


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("knobs", [{}, {"use_weighted_layer_sum": True}, {"add_adapter": True, "num_adapter_layers": 1, "tdnn_kernel": (2, 2, 1)}, {"add_adapter": True, "use_weighted_layer_sum": True}], ids=str)  # fmt: skip
def test_padding_does_not_reach_the_vector(norm: str, knobs: dict[str, Any]) -> None:
    """The padding theorem for the head: an utterance's vector does not depend on its batch mates."""
    model = build(still(feat_extract_norm=norm, **knobs))
    inputs = batch(padded=True)
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


def test_padding_theorem_for_gradients() -> None:
    """The gradient of a padded batch is the mean of the gradients of its utterances."""
    inputs = batch(padded=True)
    model, other = build(still(use_weighted_layer_sum=True)), build(still(use_weighted_layer_sum=True))
    model(**inputs).loss.backward()
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        one = {
            "input_values": inputs["input_values"][row : row + 1, :length],
            "labels": inputs["labels"][row : row + 1],
        }
        (other(**one).loss / 3).backward()
    assert helpers.grad_difference(model, other) <= helpers.PARITY


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
    config = still(
        tdnn_dim=(4,) * n, tdnn_kernel=tuple(kernels), tdnn_dilation=(dilation,) * n, use_weighted_layer_sum=mixed,
        add_adapter=adapters > 0, num_adapter_layers=max(adapters, 1), adapter_kernel_size=adapter_kernel, adapter_stride=stride,
    )  # fmt: skip
    least = min_samples(config)

    def pooled(samples: int) -> int:
        frames = conv_output_lengths(torch.tensor(samples), config.conv_kernel, config.conv_stride)
        for _ in range(adapters if not mixed else 0):
            frames = adapter_output_lengths(frames, config)
        return int(tdnn_output_lengths(frames, config))

    assert pooled(least) >= 1
    assert pooled(least - 1) == 0


def test_an_utterance_too_short_is_named() -> None:
    model = build(still())
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
    model = build(still())
    least = min_samples(model.config)
    with pytest.raises(ValueError, match="row 0 has"):
        model(torch.randn(2, least - 1))
    mask = (torch.arange(SAMPLES) < torch.tensor([[SAMPLES], [least - 1]])).long()
    out = model(torch.randn(2, SAMPLES) * mask, mask)
    torch.testing.assert_close(out.embeddings[1], model.feature_extractor.bias)
    assert out.embeddings[0].isfinite().all()


def test_one_pooled_frame_is_nan_in_the_peer_and_not_here() -> None:
    ours = build(still(), training=True)
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
        build(still())(torch.randn(3, SAMPLES), labels=labels)


def test_labels_of_every_form_mean_the_same() -> None:
    model, values = build(still()), torch.randn(3, SAMPLES)
    plain = model(values, labels=torch.tensor([1, 4, 0])).loss
    for form in (torch.tensor([[1], [4], [0]]), torch.tensor([1, 4, 0], dtype=torch.int16)):
        assert torch.equal(model(values, labels=form).loss, plain)
        check_speakers(form, 3, N)


def test_one_speaker_cannot_be_trained() -> None:
    """Documented is a regression, which no vector fits; the peer's loss is 0, and so are its gradients."""
    ours = build(still(num_labels=1))
    values, labels = torch.randn(2, SAMPLES), torch.zeros(2, dtype=torch.long)
    assert helpers.twin(ours)(values, labels=labels).loss == 0
    assert ours(values).embeddings.shape == (2, 9)
    with pytest.raises(ValueError, match=r"num_labels=1 .*at least 2"):
        ours(values, labels=labels)


# ---- outputs, training, precision


def test_strict_state_dict_both_ways_and_tuple_outputs() -> None:
    for mixed in (False, True):
        ours = build(still(use_weighted_layer_sum=mixed))
        theirs = helpers.twin(ours)  # loads strictly in both directions
        assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
        heads = {name for name in ours.state_dict() if not name.startswith("wav2vec2_conformer.")}
        assert heads == {
            *(f"{part}.{leaf}" for part in ("projector", "feature_extractor", "classifier", "tdnn.0.kernel", "tdnn.1.kernel", "tdnn.2.kernel") for leaf in ("weight", "bias")),
            "objective.weight", *(["layer_weights"] if mixed else []),
        }  # fmt: skip
        inputs = batch()
        for flags in ({}, {"output_hidden_states": True, "output_attentions": True}):
            for names in (("input_values", "labels"), ("input_values",)):
                some = {name: inputs[name] for name in names}
                a, b = ours(**some, **flags, return_dict=False), theirs(**some, **flags, return_dict=False)
                assert isinstance(a, tuple)
                assert [type(x) for x in a] == [type(y) for y in b]
                named = ours(**some, **flags)
                assert isinstance(named, XVectorOutput)
                assert len(named) == len(a) == 1 + len(names) + len(flags)
                assert torch.equal(a[len(names) - 1], named.logits)
                assert torch.equal(a[len(names)], named.embeddings)
                assert (named.loss is None) == (len(names) == 1)
        ours.config.return_dict = False
        assert len(ours(**inputs)) == 3
        ours.config.output_hidden_states = True
        assert len(ours(**inputs)) == 4
        assert len(ours(**inputs, output_hidden_states=False)) == 3


def test_positional_order_is_the_documented_one() -> None:
    model, inputs = build(still()), batch(padded=True)
    out = model(inputs["input_values"], inputs["attention_mask"], True, True, False, inputs["labels"])
    assert isinstance(out, tuple)
    assert len(out) == 5


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = Wav2Vec2ConformerForXVector(
        still(use_weighted_layer_sum=True, xvector_output_dim=64, num_labels=300, tdnn_dim=(64, 64, 64))
    )
    assert model.objective.weight.std().item() == pytest.approx(1, rel=0.05)
    assert model.layer_weights.tolist() == pytest.approx([1 / 3] * 3)
    for layer in (model.projector, model.feature_extractor, model.classifier, model.tdnn[1].kernel):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert (layer.bias == 0).all()


def test_freezing() -> None:
    inputs = batch()
    model = build(still(), training=True)
    model.freeze_feature_encoder()
    model(**inputs).loss.backward()
    base = model.wav2vec2_conformer
    assert all(p.grad is None for p in base.feature_extractor.parameters())
    assert base.feature_projection.projection.weight.grad is not None
    assert model.feature_extractor.weight.grad is not None  # the head's own layer of that name
    model = build(still(use_weighted_layer_sum=True), training=True)
    model.freeze_base_model()
    model(**inputs).loss.backward()
    learned = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert learned == {"layer_weights", "projector", "tdnn", "feature_extractor", "classifier", "objective"}


def test_every_trainable_parameter_gets_a_gradient_in_training() -> None:
    for knobs in (
        {},
        {"use_weighted_layer_sum": True},
        {"add_adapter": True, "num_adapter_layers": 1, **DENSE},
    ):
        model = build(still(mask_time_prob=0.05, mask_time_length=2, **knobs), training=True)
        model(**batch(padded="add_adapter" not in knobs)).loss.backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("pre_norm", [False, True])
def test_layerdrop_with_mixed_layers_never_fails(pre_norm: bool) -> None:
    """In the peer skipped layers are missing from the mixture, and training crashes; here the stream repeats."""
    config = still(
        use_weighted_layer_sum=True, num_hidden_layers=4, layerdrop=0.5, hidden_states_pre_norm=pre_norm
    )
    model = build(config, training=True)
    inputs = batch(padded=True)
    torch.manual_seed(1)
    losses = set()
    for _ in range(12):
        model.zero_grad()
        out = model(**inputs)
        out.loss.backward()
        losses.add(round(out.loss.item(), 4))
        assert model.layer_weights.grad.isfinite().all()
    assert len(losses) > 3  # layers were skipped
    config.layerdrop = 1.0
    assert model(**inputs).loss.isfinite()


def test_gradient_checkpointing_changes_nothing() -> None:
    results = []
    for on in (False, True):
        config = still(hidden_dropout=0.1, attention_dropout=0.1, layerdrop=0.3, use_weighted_layer_sum=True)
        model = build(config, training=True)
        if on:
            model.gradient_checkpointing_enable()
            assert model.wav2vec2_conformer.encoder.gradient_checkpointing
        torch.manual_seed(4)
        loss = model(**batch(padded=True)).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    (a, ga), (b, gb) = results
    assert torch.equal(a, b)
    assert all((g is None) == (gb[n] is None) and (g is None or torch.equal(g, gb[n])) for n, g in ga.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loss_is_fp32(dtype: torch.dtype) -> None:
    model = build(still(use_weighted_layer_sum=True), training=True)
    inputs = batch(padded=True)
    exact = model(**inputs)
    half = model.to(dtype)(**{**inputs, "input_values": inputs["input_values"].to(dtype)})
    assert half.logits.dtype == half.embeddings.dtype == dtype
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, exact.loss, rtol=0.1, atol=0)
    with torch.no_grad():  # nothing but the logits and directions is rounded
        again = functional.normalize(half.logits.float(), dim=1) @ functional.normalize(
            model.objective.weight.float(), dim=0
        )
        taken = 0.4 * functional.one_hot(inputs["labels"], N)
        torch.testing.assert_close(
            half.loss, functional.cross_entropy(30 * (again - taken), inputs["labels"])
        )
    half.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_loss_is_fp32_inside_autocast() -> None:
    model = build(still())
    inputs = batch(padded=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**inputs)
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.loss, model.objective(out.logits, inputs["labels"]))


def test_compiles_into_one_graph() -> None:
    model = build(still(use_weighted_layer_sum=True, num_hidden_layers=1))
    inputs = batch(padded=True)
    want = model(**inputs)
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    got = torch.compile(model, backend=count, fullgraph=True)(**inputs)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.embeddings, want.embeddings)
    assert len(graphs) == 1  # loss and all
    torch._dynamo.reset()


# ---- in and out of files


def test_save_and_load_both_ways(tmp_path: Path) -> None:
    from transformers import Wav2Vec2ConformerForXVector as Peer

    ours = build(
        still(padding_invariant=False, use_weighted_layer_sum=True, hidden_states_pre_norm=True, **DENSE)
    )
    inputs = batch(padded=True)
    want = ours(**inputs)
    ours.save_pretrained(tmp_path / "ours")
    theirs = Peer.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    helpers.assert_close("x-vector, loaded by the peer", theirs(**inputs).embeddings, want.embeddings)
    theirs.save_pretrained(tmp_path / "theirs")
    again = Wav2Vec2ConformerForXVector.from_pretrained(
        tmp_path / "theirs", padding_invariant=False, hidden_states_pre_norm=True
    )
    assert again.load_report.fits
    assert not again.load_report.fresh
    assert torch.equal(again(**inputs).embeddings, want.embeddings)


def test_a_ctc_folder_becomes_a_speaker_model(tmp_path: Path) -> None:
    """As in the documentation's example: a CTC checkpoint, and a new head."""
    torch.manual_seed(0)
    Wav2Vec2ConformerForCTC(still(vocab_size=32)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"objective.*projector.*tdnn.*newly initialised"):
        model = Wav2Vec2ConformerForXVector.from_pretrained(
            tmp_path, num_labels=7, use_weighted_layer_sum=True
        )
    assert model.objective.weight.shape == (9, 7)
    assert model.layer_weights.tolist() == pytest.approx([1 / 3] * 3)
    assert model.objective.weight.std() > 0.5
    vectors = functional.normalize(model(**batch(padded=True)).embeddings, dim=-1)
    score = torch.nn.CosineSimilarity(dim=-1)(vectors[0], vectors[1])
    torch.testing.assert_close(score, cosine_score(vectors[0], vectors[1]))


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
@pytest.mark.parametrize("training", [False, True])
def test_gpu_equals_cpu(training: bool) -> None:
    config = still(use_weighted_layer_sum=True)
    cpu, gpu = build(config, training), build(config, training).cuda()
    inputs = batch(padded=True)
    a, b = gpu(**{k: v.cuda() for k, v in inputs.items()}), cpu(**inputs)
    helpers.assert_close("x-vector on the GPU", a.embeddings.cpu(), b.embeddings, tol=1e-4)
    a.loss.backward()
    b.loss.backward()
    assert helpers.grad_difference(gpu.cpu(), cpu) <= 1e-3


@pytest.mark.gpu
def test_gpu_errors() -> None:
    model = build(still()).cuda()
    least = min_samples(model.config)
    with pytest.raises(ValueError, match=r"labels\[1\] = 99"):
        model(torch.randn(2, SAMPLES).cuda(), labels=torch.tensor([0, 99]).cuda())
    with pytest.raises(ValueError, match="row 0 has"):  # seen by the shape
        model(torch.randn(2, least - 1).cuda())
    mask = (torch.arange(SAMPLES) < torch.tensor([[SAMPLES], [least - 1]])).long()  # values are not looked at
    out = model((torch.randn(2, SAMPLES) * mask).cuda(), mask.cuda())
    assert out.embeddings.isfinite().all()
