"""The CTC head: the loss against brute force and torch, the whole head against the peer, and every edge case."""

from __future__ import annotations

import itertools
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
from w2vc.checks import check_labels
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.model import ctc
from w2vc.model.ctc import (
    CausalLMOutput,
    Wav2Vec2ConformerForCTC,
    collapse,
    ctc_loss,
    extend_labels,
    min_input_length,
    pack_labels,
    runs,
)
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining
from w2vc.model.wav2vec2 import Wav2Vec2ConformerModel

SAMPLES = 8_000  # half a second: rounding in the forward-backward sums grows with the loss, on both sides
V = 32


def brute_force(logits: Tensor, labels: list[int], blank: int) -> float:
    """Minus the log of the summed probability of every path that collapses to the labels, in plain Python."""
    T, n = logits.shape
    probs = logits.double().softmax(-1).tolist()
    total = 0.0
    for path in itertools.product(range(n), repeat=T):
        joined = [s for i, s in enumerate(path) if i == 0 or path[i - 1] != s]
        if [s for s in joined if s != blank] == labels:
            total += math.prod(probs[t][s] for t, s in enumerate(path))
    return -math.log(total) if total else math.inf


# ---- the loss alone


@pytest.mark.parametrize("blank", [0, 1, 3])
@pytest.mark.parametrize("text", [[], [2], [2, 2], [2, 4], [4, 2, 4], [2, 2, 4], [2, 2, 2]])
@pytest.mark.parametrize("T", [1, 3, 5])
def test_equals_brute_force(T: int, text: list[int], blank: int) -> None:
    logits = torch.randn(1, T, 5, dtype=torch.float64) * 2
    ours = ctc_loss(logits, torch.tensor([text], dtype=torch.long).view(1, -1), blank=blank).item()
    assert math.isclose(ours, brute_force(logits[0], text, blank), rel_tol=1e-12)


def test_the_paths_of_one_length_share_all_probability() -> None:
    """Every path spells exactly one text: over all texts of at most T labels, the probabilities sum to 1."""
    logits = torch.randn(1, 4, 3, dtype=torch.float64)
    texts = [list(t) for n in range(5) for t in itertools.product((1, 2), repeat=n)]
    total = sum(math.exp(-ctc_loss(logits, torch.tensor(t).long().view(1, -1)).item()) for t in texts)
    assert total == pytest.approx(1, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 4), T=st.integers(1, 12), U=st.integers(0, 6), vocab=st.integers(2, 5),
    blank=st.integers(0, 1), seed=st.integers(0, 999),
)  # fmt: skip
def test_equals_torch_in_value_and_gradient(  # noqa: PLR0917
    B: int, T: int, U: int, vocab: int, blank: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(B, T, vocab, generator=g, dtype=torch.float64) * 3).requires_grad_()
    labels = torch.randint(vocab, (B, U), generator=g)
    labels = torch.where(torch.rand(B, U, generator=g) < 0.3, -100, labels)  # holes anywhere
    n_frames = torch.randint(0, T + 1, (B,), generator=g)
    ours = ctc_loss(logits, labels, n_frames, blank=blank)
    texts = [[s for s in row if s not in (-100, blank)] for row in labels.tolist()]
    theirs = functional.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1),
        torch.tensor([s for text in texts for s in text], dtype=torch.long),
        n_frames,
        torch.tensor([len(text) for text in texts]),
        blank=blank,
        reduction="none",
    )
    torch.testing.assert_close(ours, theirs)
    needed = min_input_length(*pack_labels(labels, blank))
    assert torch.equal(ours.isinf(), needed > n_frames)  # feasible exactly where min_input_length says so
    finite = ours.isfinite()
    weights = torch.rand(B, generator=g, dtype=torch.float64)[finite]
    (mine,) = torch.autograd.grad((ours[finite] * weights).sum(), logits)
    (other,) = torch.autograd.grad((theirs[finite] * weights).sum(), logits)
    torch.testing.assert_close(mine[finite], other[finite])
    assert (mine[~finite] == 0).all()


def test_gradient_is_predicted_minus_expected() -> None:
    """Occupancies by enumeration: how often each symbol stands at each frame, over the paths that spell the text."""
    T, n, text = 5, 3, [1, 2, 1]
    logits = torch.randn(1, T, n, dtype=torch.float64, requires_grad=True)
    probs = logits[0].softmax(-1)
    share = torch.zeros(T, n, dtype=torch.float64)
    for path in itertools.product(range(n), repeat=T):
        if collapse(path) == text:
            p = math.prod(probs[t, s].item() for t, s in enumerate(path))
            for t, s in enumerate(path):
                share[t, s] += p
    share /= share.sum(1, keepdim=True)
    (grad,) = torch.autograd.grad(ctc_loss(logits, torch.tensor([text])).sum(), logits)
    torch.testing.assert_close(grad[0], probs.detach() - share)


def test_gradcheck_and_long_inputs() -> None:
    logits = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 1, 2], [3, -100, -100]])
    assert torch.autograd.gradcheck(lambda x: ctc_loss(x, labels, torch.tensor([6, 4])), logits)
    long = torch.randn(1, 1500, 4) * 20  # probabilities far below what a float can hold
    text = torch.randint(1, 4, (1, 300))
    theirs = functional.ctc_loss(
        long.log_softmax(-1).transpose(0, 1),
        text,
        torch.tensor([1500]),
        torch.tensor([300]),
        reduction="none",
    )
    torch.testing.assert_close(ctc_loss(long, text), theirs, rtol=1e-5, atol=0)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(3, 20, 6)
    labels = torch.tensor([[1, 2, 3, 3], [4, -100, -100, -100], [5, 5, -100, -100]])
    n_frames = torch.tensor([20, 7, 11])
    together = ctc_loss(logits, labels, n_frames)
    for row, (T, U) in enumerate(zip(n_frames.tolist(), (4, 1, 2), strict=True)):
        alone = ctc_loss(logits[row : row + 1, :T], labels[row : row + 1, :U])
        assert torch.equal(alone[0], together[row])


def test_half_precision_is_read_in_fp32() -> None:
    logits = torch.randn(2, 9, 5).half()
    labels = torch.tensor([[1, 2], [3, 3]])
    assert ctc_loss(logits, labels).dtype == torch.float32
    assert torch.equal(ctc_loss(logits, labels), ctc_loss(logits.float(), labels))


def test_collapse_extend_and_pack() -> None:
    assert collapse([0, 3, 3, 0, 3, 1, 1, 0]) == [3, 3, 1]
    assert collapse([3, 3, 0, 1], blank=3) == [0, 1]
    assert collapse([]) == collapse([0, 0]) == []
    assert extend_labels(torch.tensor([[4, 5]]), 9).tolist() == [[9, 4, 9, 5, 9]]
    assert extend_labels(torch.zeros(2, 0, dtype=torch.long)).tolist() == [[0], [0]]
    packed, n = pack_labels(torch.tensor([[-100, 3, 0, 2], [1, 1, -100, 1]], dtype=torch.int32))
    assert packed.tolist() == [[3, 2, 0, 0], [1, 1, 1, 0]]
    assert n.tolist() == [2, 3]
    assert packed.dtype == torch.long
    assert min_input_length(packed, n).tolist() == [2, 5]
    assert min_input_length(
        torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    ).tolist() == [
        0,
        0,
    ]


@settings(max_examples=30, deadline=None)
@given(text=st.lists(st.integers(1, 3), max_size=6))
def test_min_input_length_is_the_length_of_the_shortest_path(text: list[int]) -> None:
    path: list[int] = []
    for label in text:
        path += [0, label] if path and path[-1] == label else [label]
    assert collapse(path) == text
    labels = torch.tensor([text], dtype=torch.long).view(1, -1)
    assert min_input_length(labels, torch.tensor([len(text)])).item() == len(path)
    if path:
        assert ctc_loss(torch.randn(1, len(path), 4), labels).isfinite().all()
        assert ctc_loss(torch.randn(1, len(path), 4), labels, torch.tensor([len(path) - 1])).isinf().all()


# ---- the whole head


def still(**knobs: Any) -> Wav2Vec2ConformerConfig:
    """A tiny config without any randomness."""
    quiet = dict.fromkeys(
        (
            "hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout",
            "conformer_conv_dropout", "final_dropout", "layerdrop", "mask_time_prob", "mask_feature_prob",
        ),
        0.0,
    )  # fmt: skip
    return helpers.tiny_config(**{**quiet, "vocab_size": V, **knobs})


def build(config: Wav2Vec2ConformerConfig, training: bool = False) -> Wav2Vec2ConformerForCTC:
    torch.manual_seed(0)
    model = Wav2Vec2ConformerForCTC(config)
    helpers.randomise_(model)
    return model.train(training)


def batch(padded: bool = False) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    lengths = torch.tensor([SAMPLES, 6_400 if padded else SAMPLES, 4_800 if padded else SAMPLES])
    attention_mask = (torch.arange(SAMPLES) < lengths[:, None]).long()
    values = torch.randn(3, SAMPLES, generator=g) * attention_mask
    labels = torch.randint(1, V, (3, 6), generator=g)
    labels[0, 2] = labels[0, 1]  # a repeated letter
    labels[1, 4:] = -100
    labels[2, 3:] = 0  # padded with the blank, as a tokenizer without labels in mind does
    inputs = {"input_values": values, "labels": labels}
    return {**inputs, "attention_mask": attention_mask} if padded else inputs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("positions", ["relative", "rotary", None])
def test_parity_of_the_whole_head(positions: str | None, norm: str, padded: bool, training: bool) -> None:
    config = still(
        position_embeddings_type=positions,
        feat_extract_norm=norm,
        conv_bias=norm == "layer",
        padding_invariant=False,
        hidden_states_pre_norm=True,
    )
    ours = build(config, training)
    theirs = helpers.twin(ours)
    inputs = batch(padded)
    flags = {"output_hidden_states": True, "output_attentions": True}
    a, b = ours(**inputs, **flags), theirs(**inputs, **flags)
    assert a.keys() == list(b.keys()) == ["loss", "logits", "hidden_states", "attentions"]
    helpers.assert_close("ctc logits", a.logits, b.logits)
    helpers.assert_close("ctc loss", a.loss, b.loss)
    for name in ("hidden_states", "attentions"):
        for x, y in zip(a[name], b[name], strict=True):
            if name == "attentions" and padded:  # rows of padding look at nothing that counts
                n = ours._get_feature_vector_attention_mask(x.shape[2], inputs["attention_mask"])
                x, y = x * n[:, None, :, None], y * n[:, None, :, None]  # noqa: PLW2901
            helpers.assert_close(f"ctc {name}", x, y)
    a.loss.backward()
    b.loss.backward()
    gap = helpers.grad_difference(ours, theirs)
    helpers.worst["ctc gradients"] = max(helpers.worst.get("ctc gradients", 0.0), gap)
    assert gap <= helpers.PARITY
    before = build(config).state_dict()
    peers = theirs.state_dict()
    for name, value in ours.state_dict().items():
        if "running" in name:  # the statistics moved in training, and only then
            helpers.assert_close("ctc running statistics", value, peers[name])
            assert torch.equal(value, before[name]) != training


@pytest.mark.parametrize("knobs", [{}, {"output_hidden_size": 16, "num_adapter_layers": 1}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_parity_with_an_adapter(padded: bool, knobs: dict[str, Any]) -> None:
    ours = build(still(add_adapter=True, padding_invariant=False, **{"num_adapter_layers": 2, **knobs}))
    theirs = helpers.twin(ours)
    inputs = batch(padded)
    inputs["labels"][:, 2:] = -100  # an adapter leaves few frames
    a, b = ours(**inputs), theirs(**inputs)
    helpers.assert_close("ctc with an adapter, logits", a.logits, b.logits)
    helpers.assert_close("ctc with an adapter, loss", a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    assert helpers.grad_difference(ours, theirs) <= helpers.PARITY
    assert a.logits.shape[1] == int(ours._get_feat_extract_output_lengths(SAMPLES))


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("zero_infinity", [False, True])
def test_reductions(reduction: str, zero_infinity: bool) -> None:
    ours = build(still(padding_invariant=False))
    theirs = helpers.twin(ours)
    inputs = batch(padded=True)
    if zero_infinity:
        inputs["labels"] = torch.cat([inputs["labels"], torch.full((3, 40), -100)], 1)
        inputs["labels"][1, :45] = 7  # 45 equal letters do not fit into the frames of row 1
    for model in (ours, theirs):
        model.config.ctc_loss_reduction = reduction  # read at each call
        model.config.ctc_zero_infinity = zero_infinity
    a, b = ours(**inputs), theirs(**inputs)
    helpers.assert_close(f"ctc loss, {reduction}", a.loss, b.loss)
    assert a.loss.shape == ((3,) if reduction == "none" else ())
    frames = ours._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1))
    rows = ctc_loss(a.logits, inputs["labels"], frames)
    rows = rows.where(rows.isfinite(), 0)
    assert (rows[1] == 0) == zero_infinity
    n_labels = pack_labels(inputs["labels"])[1]
    want = {"sum": rows.sum(), "mean": (rows / n_labels).mean(), "none": rows}[reduction]
    torch.testing.assert_close(a.loss, want, rtol=1e-5, atol=1e-5)
    a.loss.sum().backward()
    b.loss.sum().backward()
    assert helpers.grad_difference(ours, theirs) <= helpers.PARITY


def test_reductions_are_read_at_each_call_and_zero_infinity_gives_no_gradient() -> None:
    model = build(still(ctc_zero_infinity=True), training=True)
    values = torch.randn(1, SAMPLES)
    out = model(values, labels=torch.full((1, 60), 5))
    assert out.loss.item() == 0
    out.loss.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())
    model.config.ctc_zero_infinity = False
    with pytest.raises(ValueError, match=r"row 0 has \d+ frames and needs 119 \(60 labels, 59"):
        model(values, labels=torch.full((1, 60), 5))


def test_without_a_look_an_infeasible_row_is_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens on a device, where the lengths are not read: the loss says it, as the peer's does."""
    monkeypatch.setattr(ctc, "check_feasible", lambda *_: None)
    ours = build(still())
    values, labels = torch.randn(1, SAMPLES), torch.full((1, 60), 5)
    assert ours(values, labels=labels).loss.isinf()
    assert helpers.twin(ours)(values, labels=labels).loss.isinf()
    ours.config.ctc_zero_infinity = True
    assert ours(values, labels=labels).loss.item() == 0


def test_infeasible_rows_are_named_and_a_tight_fit_is_not() -> None:
    model = build(still())
    T = int(model._get_feat_extract_output_lengths(SAMPLES))
    values = torch.randn(3, SAMPLES)
    labels = (torch.arange(T) % 2 + 1).repeat(3, 1)  # no repeats: exactly as many labels as frames
    assert model(values, labels=labels).loss.isfinite()
    labels[1, 5] = labels[1, 4]  # equal to both neighbours: two blanks too many
    with pytest.raises(
        ValueError, match=rf"1 of 3 rows.*row 1 has {T} frames and needs {T + 2} \({T} labels, 2 of"
    ):
        model(values, labels=labels)
    short = (torch.arange(SAMPLES) < torch.tensor([[SAMPLES], [4000], [SAMPLES]])).long()
    with pytest.raises(ValueError, match="row 1 has"):
        model(values * short, attention_mask=short, labels=labels[:1].repeat(3, 1))


def test_the_head_refuses_wrong_labels() -> None:
    model, values = build(still()), torch.randn(3, SAMPLES)
    with pytest.raises(ValueError, match=r"labels\[1, 1\] = 99 .*vocab_size=32"):
        model(values, labels=torch.tensor([[1, 2], [3, 99], [1, 1]]))
    with pytest.raises(ValueError, match=r"shape \(2, 2\).*batch = 3"):
        model(values, labels=torch.ones(2, 2, dtype=torch.long))


def test_labels_of_every_form_mean_the_same() -> None:
    model = build(still())
    values = torch.randn(2, SAMPLES)
    plain = model(values, labels=torch.tensor([[3, 4, 4], [5, -100, -100]])).loss
    forms = [
        torch.tensor([[3, 4, 4], [5, 0, 0]]),  # padded with the blank, as transformers 5 allows
        torch.tensor([[-100, 3, 0, 4, 4], [0, -100, 5, -100, -100]]),  # holes
        torch.tensor([[3, 4, 4], [5, -100, -100]], dtype=torch.int32),
        torch.tensor([[3, 4, 4], [5, -100, -100]], dtype=torch.int16),
    ]
    for form in forms:
        assert torch.equal(model(values, labels=form).loss, plain)
        check_labels(form, 2, V)


def test_another_blank_and_none() -> None:
    ours = build(still(pad_token_id=5, padding_invariant=False))
    theirs = helpers.twin(ours)
    inputs = batch(padded=True)
    inputs["labels"][0, 0] = 0  # an ordinary letter now
    a, b = ours(**inputs), theirs(**inputs)
    helpers.assert_close("ctc loss, blank 5", a.loss, b.loss)
    ours.config.pad_token_id = 0
    assert ours(**inputs).loss != a.loss
    ours.config.pad_token_id = None
    assert ours(inputs["input_values"]).loss is None
    with pytest.raises(ValueError, match="pad_token_id"):
        ours(**inputs)


@pytest.mark.parametrize("width", [0, 3])
def test_empty_texts(width: int) -> None:
    """Nothing was said: the only path is all blanks."""
    model = build(still(), training=True)
    values = torch.randn(2, SAMPLES)
    out = model(values, labels=torch.full((2, width), -100))
    want = -out.logits.log_softmax(-1)[..., 0].sum()
    torch.testing.assert_close(out.loss, want)
    out.loss.backward()
    assert model.lm_head.weight.grad.isfinite().all()


def test_construction_refuses() -> None:
    with pytest.raises(ValueError, match=r"vocab_size=None .*from_pretrained"):
        Wav2Vec2ConformerForCTC(still(vocab_size=None))
    with pytest.raises(ValueError, match=r"target_lang='eng'.*no language adapters"):
        Wav2Vec2ConformerForCTC(still(), target_lang="eng")
    assert Wav2Vec2ConformerForCTC(still(), target_lang=None).lm_head.out_features == V


def test_initialisation() -> None:
    model = Wav2Vec2ConformerForCTC(still(hidden_size=64, vocab_size=400))
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (model.lm_head.bias == 0).all()


def test_strict_state_dict_both_ways_and_tuple_outputs() -> None:
    ours = build(still())
    theirs = helpers.twin(ours)  # loads strictly in both directions
    assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
    inputs = batch()
    for with_labels in (True, False):
        some = inputs if with_labels else {"input_values": inputs["input_values"]}
        flags = {"output_hidden_states": True, "output_attentions": True, "return_dict": False}
        a, b = ours(**some, **flags), theirs(**some, **flags)
        assert isinstance(a, tuple)
        assert len(a) == len(b) == 3 + with_labels
        named = ours(**some, output_hidden_states=True, output_attentions=True)
        assert isinstance(named, CausalLMOutput)
        assert [type(x) for x in named.to_tuple()] == [type(x) for x in a] == [type(y) for y in b]
        assert (named.loss is None) != with_labels
        assert torch.equal(a[int(with_labels)], named.logits)
        ours.config.return_dict = False
        assert len(ours(**some)) == 1 + with_labels
        ours.config.return_dict = True


def test_positional_order_is_the_documented_one() -> None:
    model, inputs = build(still()), batch(padded=True)
    out = model(inputs["input_values"], inputs["attention_mask"], True, True, False, inputs["labels"])
    assert isinstance(out, tuple)
    assert len(out) == 4


def test_padding_does_not_reach_logits_or_loss() -> None:
    """The padding theorem for the head: logits and loss of an utterance are the same, alone or beside longer ones."""
    for norm, adapter in itertools.product(("group", "layer"), (False, True)):
        model = build(
            still(
                feat_extract_norm=norm, add_adapter=adapter, num_adapter_layers=1, ctc_loss_reduction="none"
            )
        )
        inputs = batch(padded=True)
        together = model(**inputs)
        for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
            alone = model(
                inputs["input_values"][row : row + 1, :length], labels=inputs["labels"][row : row + 1]
            )
            T = alone.logits.shape[1]
            helpers.assert_close("ctc alone, logits", together.logits[row : row + 1, :T], alone.logits)
            helpers.assert_close("ctc alone, loss", together.loss[row : row + 1], alone.loss)
        model.config.padding_invariant = False
        assert helpers.difference(model(**inputs).loss, together.loss) > 1e-4  # the switch does something


def test_padding_theorem_for_gradients() -> None:
    """The gradient of a padded batch is the sum of the gradients of its utterances."""
    inputs = batch(padded=True)
    model, other = build(still()), build(still())
    model(**inputs).loss.backward()
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        other(
            inputs["input_values"][row : row + 1, :length], labels=inputs["labels"][row : row + 1]
        ).loss.backward()
    gap = helpers.grad_difference(model, other)
    assert gap <= helpers.PARITY


def test_freezing() -> None:
    inputs = batch()
    model = build(still(), training=True)
    model.freeze_feature_encoder()
    model(**inputs).loss.backward()
    base = model.wav2vec2_conformer
    assert all(p.grad is None for p in base.feature_extractor.parameters())
    assert base.feature_projection.projection.weight.grad is not None
    model = build(still(), training=True)
    model.freeze_base_model()
    model(**inputs).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        "lm_head.weight",
        "lm_head.bias",
    ]


def test_every_trainable_parameter_gets_a_gradient_in_training() -> None:
    model = build(still(mask_time_prob=0.05), training=True)
    model(**batch(padded=True)).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_final_dropout_is_in_front_of_the_head() -> None:
    model = build(still(final_dropout=1.0))
    values = torch.randn(1, SAMPLES)
    assert not torch.equal(model(values).logits[0, 0], model.lm_head.bias)
    torch.testing.assert_close(
        model.train()(values).logits[0], model.lm_head.bias.expand_as(model(values).logits[0])
    )


def test_gradient_checkpointing_changes_nothing() -> None:
    results = []
    for on in (False, True):
        model = build(still(hidden_dropout=0.1, attention_dropout=0.1, final_dropout=0.1), training=True)
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
    model = build(still(), training=True)
    inputs = batch(padded=True)
    exact = model(**inputs)
    half = model.to(dtype)(**{**inputs, "input_values": inputs["input_values"].to(dtype)})
    assert half.logits.dtype == dtype
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, exact.loss, rtol=0.05, atol=0)
    frames = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1))
    torch.testing.assert_close(  # nothing but the logits is rounded
        half.loss, ctc_loss(half.logits, inputs["labels"], frames).sum(), rtol=1e-5, atol=1e-4
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
    frames = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1))
    torch.testing.assert_close(
        out.loss, ctc_loss(out.logits, inputs["labels"], frames).sum(), rtol=1e-5, atol=1e-4
    )


def test_a_mask_given_to_the_head_is_given_to_the_base_model() -> None:
    model, inputs = build(still(mask_time_prob=0.05)), batch(padded=True)
    audio, padding, labels = inputs["input_values"], inputs["attention_mask"], inputs["labels"]
    T = int(model._get_feat_extract_output_lengths(SAMPLES))
    mask = torch.rand(3, T, generator=torch.Generator().manual_seed(1)) < 0.4
    with torch.no_grad():
        out = model(audio, padding, labels=labels, mask_time_indices=mask)
        states = model.wav2vec2_conformer(audio, padding, mask_time_indices=mask).last_hidden_state
        assert torch.equal(out.logits, model.lm_head(states))
        frames = model._get_feat_extract_output_lengths(padding.sum(1))
        torch.testing.assert_close(out.loss, ctc_loss(out.logits, labels, frames).sum())
        assert not torch.equal(out.logits, model(audio, padding).logits)
        last = model(audio, padding, None, None, None, labels, mask)  # the last argument
        assert torch.equal(last.loss, out.loss)


def test_compiled_with_labels() -> None:
    """torch's loss reads lengths, which breaks the graph there; the model before it is one graph."""
    model, inputs = build(still()), batch(padded=True)
    inputs["input_values"] = inputs["input_values"][:, :5000]
    inputs["attention_mask"] = (torch.arange(5000) < torch.tensor([[5000], [4500], [4000]])).long()
    inputs["labels"] = inputs["labels"][:, :3]
    model(**inputs).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss = model(**inputs).loss
    model.zero_grad()
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(sum(node.target is torch.conv1d for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count)
    got = compiled(**inputs).loss
    torch.testing.assert_close(got, loss)
    got.backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in want), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, want[name])
    assert graphs[0] > 0
    assert not any(graphs[1:])  # all layers are in the first graph
    with pytest.raises(ValueError, match=r"labels\[0, 0\]"):  # else torch would read foreign memory
        compiled(**{**inputs, "labels": inputs["labels"] + V})
    with pytest.raises(ValueError, match="3 of 3 rows are too long"):
        compiled(**{**inputs, "labels": torch.full((3, 3), 5).repeat(1, 20)})
    torch._dynamo.reset()


# ---- in and out of files


def test_save_and_load_both_ways(tmp_path: Path) -> None:
    from transformers import Wav2Vec2ConformerForCTC as Peer

    ours = build(still(padding_invariant=False))
    inputs = batch(padded=True)
    want = ours(**inputs)
    ours.save_pretrained(tmp_path / "ours")
    theirs = Peer.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    helpers.assert_close("ctc, loaded by the peer", theirs(**inputs).loss, want.loss)
    theirs.save_pretrained(tmp_path / "theirs")
    again = Wav2Vec2ConformerForCTC.from_pretrained(tmp_path / "theirs", padding_invariant=False)
    assert again.load_report.fits
    assert not again.load_report.fresh
    assert torch.equal(again(**inputs).logits, want.logits)
    assert again.config.vocab_size == V


def test_a_ctc_folder_loads_into_base_and_pretraining_and_back(tmp_path: Path) -> None:
    ours = build(still(mask_time_prob=0.05))
    ours.save_pretrained(tmp_path / "ctc")
    inputs = batch(padded=True)
    audio = {k: inputs[k] for k in ("input_values", "attention_mask")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a head that the base model does not have is no news
        base = Wav2Vec2ConformerModel.from_pretrained(tmp_path / "ctc")
    want = ours.wav2vec2_conformer(**audio).last_hidden_state
    assert torch.equal(base(**audio).last_hidden_state, want)
    with pytest.warns(UserWarning, match=r"quantizer.*newly initialised"):
        pre = Wav2Vec2ConformerForPreTraining.from_pretrained(tmp_path / "ctc")
    assert torch.equal(pre.wav2vec2_conformer(**audio).last_hidden_state, want)
    pre.save_pretrained(tmp_path / "pre")
    with pytest.warns(UserWarning, match=r"lm_head.*newly initialised"):
        tuned = Wav2Vec2ConformerForCTC.from_pretrained(tmp_path / "pre", vocab_size=11)
    assert tuned.lm_head.out_features == 11
    assert tuned.lm_head.weight.std() > 0
    assert torch.equal(tuned.wav2vec2_conformer(**audio).last_hidden_state, want)
    with pytest.raises(ValueError, match=r"mis-shaped.*lm_head"):
        Wav2Vec2ConformerForCTC.from_pretrained(tmp_path / "ctc", vocab_size=11)
    with pytest.raises(ValueError, match="target_lang"):
        Wav2Vec2ConformerForCTC.from_pretrained(tmp_path / "ctc", target_lang="eng")


def test_a_folder_without_a_vocabulary_asks_for_one(tmp_path: Path) -> None:
    model = Wav2Vec2ConformerModel(still(vocab_size=None))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocab_size"):
        Wav2Vec2ConformerForCTC.from_pretrained(tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_gpu_equals_cpu(training: bool) -> None:
    cpu, gpu = build(still(), training), build(still(), training).cuda()
    inputs = batch(padded=True)
    a, b = gpu(**{k: v.cuda() for k, v in inputs.items()}), cpu(**inputs)
    helpers.assert_close("ctc loss on the GPU", a.loss.cpu(), b.loss, tol=1e-4)
    a.loss.backward()
    b.loss.backward()
    assert helpers.grad_difference(gpu.cpu(), cpu) <= 1e-3


@pytest.mark.gpu
def test_gpu_label_errors_and_by_hand() -> None:
    model, inputs = build(still()).cuda(), {k: v.cuda() for k, v in batch(padded=True).items()}
    out = model(**inputs)
    frames = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1))
    torch.testing.assert_close(
        ctc_loss(out.logits, inputs["labels"], frames).sum(), out.loss, rtol=1e-5, atol=1e-4
    )
    with pytest.raises(ValueError, match=r"labels\[0, 0\]"):
        model(inputs["input_values"], labels=inputs["labels"] + 500)
    long = torch.full((3, 60), 5).cuda()
    assert model(inputs["input_values"], labels=long).loss.isinf()  # values are not looked at on a device


def test_runs_of_a_path() -> None:
    assert runs([0, 1, 1, 0, 1, 2]) == [(1, 1, 3), (1, 4, 5), (2, 5, 6)]
    assert runs(torch.tensor([2, 2, 0]), blank=2) == [(0, 2, 3)]
    assert runs("aab", None) == [("a", 0, 2), ("b", 2, 3)]
    assert runs([]) == []
