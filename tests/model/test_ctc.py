"""The CTC head: the loss against brute force and torch, the whole head against the peer, and every edge case."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import helpers
from heads import CTC, SAMPLES, V
from w2vc.checks import check_labels
from w2vc.model import ctc
from w2vc.model.ctc import (
    Wav2Vec2ConformerForCTC,
    collapse,
    ctc_loss,
    extend_labels,
    min_input_length,
    pack_labels,
    runs,
)
from w2vc.model.wav2vec2 import Wav2Vec2ConformerModel


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


@pytest.mark.parametrize("knobs", [{}, {"output_hidden_size": 16, "num_adapter_layers": 1}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_parity_with_an_adapter(padded: bool, knobs: dict[str, Any]) -> None:
    ours = CTC.build(add_adapter=True, padding_invariant=False, **{"num_adapter_layers": 2, **knobs})
    theirs = helpers.twin(ours)
    inputs = CTC.batch(padded)
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
    ours = CTC.build(padding_invariant=False)
    theirs = helpers.twin(ours)
    inputs = CTC.batch(padded=True)
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
    model = CTC.build(training=True, ctc_zero_infinity=True)
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
    ours = CTC.build()
    values, labels = torch.randn(1, SAMPLES), torch.full((1, 60), 5)
    assert ours(values, labels=labels).loss.isinf()
    assert helpers.twin(ours)(values, labels=labels).loss.isinf()
    ours.config.ctc_zero_infinity = True
    assert ours(values, labels=labels).loss.item() == 0


def test_infeasible_rows_are_named_and_a_tight_fit_is_not() -> None:
    model = CTC.build()
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
    model, values = CTC.build(), torch.randn(3, SAMPLES)
    with pytest.raises(ValueError, match=r"labels\[1, 1\] = 99 .*vocab_size=32"):
        model(values, labels=torch.tensor([[1, 2], [3, 99], [1, 1]]))
    with pytest.raises(ValueError, match=r"shape \(2, 2\).*batch = 3"):
        model(values, labels=torch.ones(2, 2, dtype=torch.long))


def test_labels_of_every_form_mean_the_same() -> None:
    model = CTC.build()
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
    ours = CTC.build(pad_token_id=5, padding_invariant=False)
    theirs = helpers.twin(ours)
    inputs = CTC.batch(padded=True)
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
    model = CTC.build(training=True)
    values = torch.randn(2, SAMPLES)
    out = model(values, labels=torch.full((2, width), -100))
    want = -out.logits.log_softmax(-1)[..., 0].sum()
    torch.testing.assert_close(out.loss, want)
    out.loss.backward()
    assert model.lm_head.weight.grad.isfinite().all()


def test_construction_refuses() -> None:
    with pytest.raises(ValueError, match=r"vocab_size=None .*from_pretrained"):
        Wav2Vec2ConformerForCTC(CTC.config(vocab_size=None))
    with pytest.raises(ValueError, match=r"target_lang='eng'.*no language adapters"):
        Wav2Vec2ConformerForCTC(CTC.config(), target_lang="eng")
    assert Wav2Vec2ConformerForCTC(CTC.config(), target_lang=None).lm_head.out_features == V


def test_initialisation() -> None:
    model = Wav2Vec2ConformerForCTC(CTC.config(hidden_size=64, vocab_size=400))
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (model.lm_head.bias == 0).all()


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_padding_does_not_reach_what_leaves_an_adapter(norm: str) -> None:
    model = CTC.build(
        feat_extract_norm=norm, add_adapter=True, num_adapter_layers=1, ctc_loss_reduction="none"
    )
    inputs = CTC.batch(padded=True)
    together = model(**inputs)
    for row in range(3):
        alone = model(**CTC.row(inputs, row)[0])
        n = alone.logits.shape[1]
        helpers.assert_close("ctc alone, logits", together.logits[row : row + 1, :n], alone.logits)
        helpers.assert_close("ctc alone, loss", together.loss[row : row + 1], alone.loss)


def test_final_dropout_is_in_front_of_the_head() -> None:
    model = CTC.build(final_dropout=1.0)
    values = torch.randn(1, SAMPLES)
    assert not torch.equal(model(values).logits[0, 0], model.lm_head.bias)
    torch.testing.assert_close(
        model.train()(values).logits[0], model.lm_head.bias.expand_as(model(values).logits[0])
    )


def test_compiled_with_labels() -> None:
    """torch's loss reads lengths, which breaks the graph there; the model before it is one graph."""
    model, inputs = CTC.build(), CTC.batch(padded=True)
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


def test_a_folder_without_a_vocabulary_asks_for_one(tmp_path: Path) -> None:
    model = Wav2Vec2ConformerModel(CTC.config(vocab_size=None))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocab_size"):
        Wav2Vec2ConformerForCTC.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="target_lang"):
        Wav2Vec2ConformerForCTC.from_pretrained(tmp_path, target_lang="eng", vocab_size=V)


@pytest.mark.gpu
def test_gpu_label_errors_and_by_hand() -> None:
    model, inputs = CTC.build().cuda(), {k: v.cuda() for k, v in CTC.batch(padded=True).items()}
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
