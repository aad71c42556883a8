"""The classification heads: pooling and losses against plain versions, the heads against the peer, every edge case."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch.nn import functional

import helpers
from heads import FRAMES, SAMPLES, SEQUENCE, N, T
from w2vc.model.classification import (
    classification_loss,
    counted_labels,
    masked_mean,
    resolve_problem_type,
    weighted_layer_sum,
)

ONE, MANY, NUMBERS = "single_label_classification", "multi_label_classification", "regression"
each_head = pytest.mark.parametrize("head", [SEQUENCE, FRAMES], ids=["sequence", "frames"])


# ---- the parts


def test_weighted_layer_sum() -> None:
    states = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    scores = torch.randn(3, dtype=torch.float64, requires_grad=True)
    shares = scores.exp() / scores.exp().sum()
    want = shares[0] * states[0] + shares[1] * states[1] + shares[2] * states[2]
    torch.testing.assert_close(weighted_layer_sum(states, scores), want)
    torch.testing.assert_close(weighted_layer_sum(states, torch.full((3,), 7.0)), sum(states) / 3)
    torch.testing.assert_close(
        weighted_layer_sum(tuple(states), torch.tensor([0.0, 99.0, 0.0])), states[1] + 0.0
    )
    assert torch.autograd.gradcheck(lambda s, *h: weighted_layer_sum(h, s), (scores, *states))
    for number in (2, 4):
        with pytest.raises(ValueError, match=rf"hidden_states: got 3 for {number} layer_weights"):
            weighted_layer_sum(states, torch.zeros(number))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weighted_layer_sum_adds_up_in_fp32(dtype: torch.dtype) -> None:
    states = [torch.full((1, 1, 1), 1.0 + k / 64).to(dtype) for k in range(64)]
    scores = torch.zeros(64).to(dtype)
    mixed = weighted_layer_sum(states, scores)
    assert mixed.dtype == dtype
    exact = sum(s.double() for s in states) / 64
    assert (mixed.double() - exact).abs() <= torch.finfo(dtype).eps  # one rounding at the end, not 64


@pytest.mark.parametrize("seed", range(5))
def test_masked_mean_equals_a_loop(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(4, 9, 3, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, 10, (4,), generator=g)
    mask = torch.arange(9) < lengths[:, None]
    want = torch.stack([hidden[b, : int(n)].mean(0) for b, n in enumerate(lengths)])
    torch.testing.assert_close(masked_mean(hidden, mask), want)
    torch.testing.assert_close(masked_mean(hidden), hidden.mean(1))
    torch.testing.assert_close(masked_mean(hidden, torch.ones(4, 9, dtype=torch.bool)), hidden.mean(1))


def test_masked_mean_at_the_edges() -> None:
    hidden = torch.ones(2, 3, 2)
    hidden[0, 2] = torch.nan  # padding may hold anything
    hidden.requires_grad_()
    mask = torch.tensor([[True, True, False], [False, False, False]])
    mean = masked_mean(hidden, mask)
    assert mean.tolist() == [[1, 1], [0, 0]]
    mean.sum().backward()
    assert hidden.grad.tolist() == [[[0.5] * 2, [0.5] * 2, [0, 0]], [[0, 0]] * 3]
    long = torch.full((1, 3000, 1), 40.0).half()  # the sum, 120,000, is no fp16 number
    for m in (None, torch.ones(1, 3000, dtype=torch.bool)):
        assert masked_mean(long, m).item() == 40
        assert masked_mean(long, m).dtype == torch.float16


def test_resolve_problem_type_follows_problem_type() -> None:
    assert resolve_problem_type(helpers.tiny_config(num_labels=1)) == NUMBERS
    assert resolve_problem_type(helpers.tiny_config(num_labels=2)) == ONE
    for n, kind in itertools.product((1, 2, 3), (NUMBERS, MANY)):
        assert resolve_problem_type(helpers.tiny_config(num_labels=n, problem_type=kind)) == kind
    assert resolve_problem_type(helpers.tiny_config(num_labels=3, problem_type=ONE)) == ONE


@pytest.mark.parametrize("places", [(4,), (4, 7)], ids=["sequence", "frames"])
def test_losses_equal_torch(places: tuple[int, ...]) -> None:
    """Without masks and holes, each loss is the one that torch has."""
    logits = torch.randn(*places, 3, dtype=torch.float64)
    numbers = torch.randint(3, places)
    flat = functional.cross_entropy(logits.reshape(-1, 3), numbers.reshape(-1))
    torch.testing.assert_close(classification_loss(logits, numbers, ONE), flat)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        torch.testing.assert_close(classification_loss(logits, numbers.to(dtype), ONE), flat)
    torch.testing.assert_close(classification_loss(logits, numbers[..., None], ONE), flat)
    several = (torch.rand(*places, 3) < 0.5).double()
    want = functional.binary_cross_entropy_with_logits(logits, several)
    for form in (several, several.long(), several.bool(), several.float(), several.half()):
        torch.testing.assert_close(classification_loss(logits, form, MANY), want)
    soft = torch.rand(*places, 3, dtype=torch.float64)
    want = functional.binary_cross_entropy_with_logits(logits, soft)
    torch.testing.assert_close(classification_loss(logits, soft, MANY), want)
    wanted = torch.randn(*places, 3, dtype=torch.float64)
    torch.testing.assert_close(
        classification_loss(logits, wanted, NUMBERS), functional.mse_loss(logits, wanted)
    )
    one, target = logits[..., :1], torch.randint(-5, 5, places)
    want = (one[..., 0] - target).square().mean()  # never [B, 1] against [B], which torch would broadcast
    for form in (target, target.double(), target[..., None], target[..., None].float()):
        torch.testing.assert_close(classification_loss(one, form, NUMBERS), want)
    yes = target > 0
    want = functional.binary_cross_entropy_with_logits(one[..., 0], yes.double())
    torch.testing.assert_close(classification_loss(one, yes, MANY), want)
    torch.testing.assert_close(classification_loss(one, yes[..., None].long(), MANY), want)


def test_one_hot_frames_mean_class_numbers() -> None:
    logits = torch.randn(2, 5, 3)
    numbers = torch.randint(3, (2, 5))
    one_hot = functional.one_hot(numbers, 3)
    want = classification_loss(logits, numbers, ONE)
    for form in (one_hot, one_hot.bool(), one_hot.float(), one_hot.int()):
        assert torch.equal(classification_loss(logits, form, ONE), want)
    numbers[0, 2], one_hot[0, 2] = -100, -100  # a row of -100 is ignored too
    want = classification_loss(logits, numbers, ONE)
    assert torch.equal(classification_loss(logits, one_hot, ONE), want)
    assert torch.equal(classification_loss(logits, one_hot.float(), ONE), want)


@pytest.mark.parametrize("kind", [ONE, MANY, NUMBERS])
def test_what_is_ignored_has_no_weight_and_no_gradient(kind: str) -> None:
    """The mean is over what counts: -100 is ignored, and frames of padding may hold any label."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 6, 4, generator=g, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(6) < torch.tensor([[6], [4], [1]])
    labels = (
        torch.randint(4, (3, 6), generator=g) if kind == ONE else torch.randint(2, (3, 6, 4), generator=g)
    )
    labels[0, 1] = -100
    counts = mask.clone()
    counts[0, 1] = False
    want = classification_loss(logits[counts][:, None], labels[counts][:, None], kind)
    for junk in (0, 77, -3):
        labels[2, 3:] = junk  # padding
        loss = classification_loss(logits, labels, kind, mask)
        torch.testing.assert_close(loss, want)
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.equal((grad != 0).any(-1), counts)
    with pytest.raises(ValueError, match="labels") if kind != NUMBERS else warnings.catch_warnings():
        assert classification_loss(logits, labels, kind) != want
    nothing = classification_loss(logits, torch.full_like(labels, -100), kind, mask)
    assert nothing.item() == 0
    assert (torch.autograd.grad(nothing, logits)[0] == 0).all()


def test_floats_of_a_regression_are_all_numbers_and_nan_may_stand_in_padding() -> None:
    logits = torch.zeros(1, 2, 1, requires_grad=True)
    assert classification_loss(logits, torch.tensor([[-100.0, 0.0]]), NUMBERS).item() == 5000
    assert classification_loss(logits, torch.tensor([[-100, 2]]), NUMBERS).item() == 4
    mask = torch.tensor([[True, False]])
    loss = classification_loss(logits, torch.tensor([[3.0, torch.nan]]), NUMBERS, mask)
    loss.backward()
    assert loss.item() == 9
    assert logits.grad.flatten().tolist() == [-6, 0]
    many = classification_loss(logits, torch.tensor([[-100.0, 1.0]]), MANY)
    torch.testing.assert_close(many, torch.tensor(2.0).log())


def test_counted_labels() -> None:
    mask = torch.tensor([[True, True, False]])
    numbers, several = torch.tensor([[3, -100, 1]]), torch.tensor([[[1, -100], [-100, -100], [1, 0]]])
    assert counted_labels(numbers, ONE).tolist() == [[True, False, True]]
    assert counted_labels(numbers, ONE, mask).tolist() == [[True, False, False]]
    assert counted_labels(several, MANY, mask).tolist() == [[[True, False], [False, False], [False, False]]]
    assert counted_labels(several, ONE, mask).tolist() == [[True, False, False]]  # a one-hot row is one label
    assert counted_labels(numbers, NUMBERS).tolist() == [[True, False, True]]
    assert counted_labels(numbers.float(), NUMBERS, mask).tolist() == [[True, True, False]]
    assert counted_labels(torch.tensor([1, -100]), ONE).tolist() == [True, False]


# ---- wrong labels


LONG, FLOAT = torch.long, torch.float


@pytest.mark.parametrize(
    ("knobs", "labels", "message"),
    [
        ({}, [0, 1, 2], "got list, expected a tensor: class numbers"),
        ({}, torch.zeros(3), r"dtype torch\.float32, expected class numbers \(integers\) of shape \(3,\) for prob"),
        ({}, torch.zeros(3, dtype=torch.bool), r"dtype torch\.bool, expected class numbers"),
        ({}, torch.zeros(2, dtype=LONG), r"shape \(2,\), expected class numbers \(integers\) of shape \(3,\) for"),
        ({}, torch.zeros(3, N, dtype=LONG), rf"shape \(3, {N}\), expected class numbers .* for problem_type 'single_"),
        ({}, torch.tensor([0, N, 1]), rf"labels\[1\] = {N} is refused: allowed are 0\.\.{N - 1} \(num_labels={N}\)"),
        ({}, torch.tensor([0, 1, -1]), r"labels\[2\] = -1 is refused.*-100"),
        ({"problem_type": MANY}, torch.zeros(3, dtype=LONG), rf"shape \(3,\), expected 0 or 1 .* \(3, {N}\) for"),
        ({"problem_type": MANY}, torch.full((3, N), 2), r"labels\[0, 0\] = 2 is refused: allowed are 0 to 1"),
        ({"problem_type": MANY}, torch.full((3, N), -0.5), r"labels\[0, 0\] = -0\.5"),
        ({"problem_type": MANY}, torch.full((3, N), torch.nan), r"labels\[0, 0\] = nan"),
        ({"problem_type": NUMBERS}, torch.zeros(3), rf"shape \(3,\), expected numbers of shape \(3, {N}\)"),
        ({"problem_type": NUMBERS}, torch.full((3, N), torch.inf), r"labels\[0, 0\] = inf .*finite numbers"),
        ({"num_labels": 1}, torch.zeros(3, dtype=torch.bool), r"dtype torch\.bool, expected numbers of shape \(3,\)"),
        ({"num_labels": 1}, torch.zeros(3, dtype=torch.cfloat), r"complex64"),
        ({"num_labels": 1}, torch.zeros(4), r"shape \(4,\), expected numbers of shape \(3,\) for problem_type 'reg"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_labels_of_utterances_are_value_errors(
    knobs: dict[str, Any], labels: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SEQUENCE.build(**knobs)(torch.randn(3, SAMPLES), labels=labels)


@pytest.mark.parametrize(
    ("knobs", "labels", "message"),
    [
        ({}, torch.zeros(3, dtype=LONG), rf"shape \(3,\), expected .* \(3, {T}\) or one-hot labels of shape \(3, {T}, {N}"),
        ({}, torch.zeros(3, T + 1, dtype=LONG), rf"shape \(3, {T + 1}\).*counted after the adapter.*output_lengths"),
        ({"add_adapter": True, "num_adapter_layers": 1}, torch.zeros(3, T, dtype=LONG), rf"shape \(3, {T}\), .*\(3, {T // 2}\)"),
        ({}, torch.zeros(3, T), r"dtype torch\.float32, expected class numbers"),
        ({}, torch.full((3, T), N), rf"labels\[0, 0\] = {N}"),
        ({}, torch.zeros(3, T, N), r"labels\[0, 0\] = \[0\.0, .* one 1 among zeros.*'multi_label_classification'"),
        ({}, torch.ones(3, T, N, dtype=torch.bool), r"labels\[0, 0\] = \[1, 1.* one 1 among zeros"),
        ({}, torch.eye(N)[None, 0].expand(3, T, N) * 0.7, "one 1 among zeros"),
        ({"problem_type": MANY}, torch.zeros(3, T, dtype=LONG), rf"expected 0 or 1 for each class, of shape \(3, {T}, {N}\)"),
        ({"problem_type": MANY}, torch.full((3, T, N), 3), r"labels\[0, 0, 0\] = 3"),
        ({"num_labels": 1}, torch.zeros(3, T, 2), rf"expected numbers of shape \(3, {T}\)"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_labels_of_frames_are_value_errors(knobs: dict[str, Any], labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FRAMES.build(**knobs)(torch.randn(3, SAMPLES), labels=labels)


# ---- the whole heads


@each_head
def test_weighted_sum_without_the_switch_ends_in_the_normalised_output(head: Any) -> None:
    """As documented and in transformers 4: the last of the mixed states is the encoder's output."""
    model = head.build(use_weighted_layer_sum=True)
    with torch.no_grad():
        model.layer_weights.copy_(torch.tensor([0.0, 0.0, 200.0]))  # all on the last
    values = torch.randn(2, SAMPLES)
    last = model.wav2vec2_conformer(values).last_hidden_state
    assert torch.equal(model.read_frames(values)[1], last)
    model.config.hidden_states_pre_norm = True
    assert helpers.difference(model.read_frames(values)[1], last) > 0.01


def test_frame_head_reads_class_numbers_and_ignores_minus_100() -> None:
    """The peer has no class numbers for frames; they mean what their one-hot rows mean there."""
    ours = FRAMES.build(padding_invariant=False)
    theirs = helpers.twin(ours)
    inputs = FRAMES.batch(padded=True)
    numbers = inputs["labels"].argmax(-1)
    want = theirs(**inputs).loss
    helpers.assert_close("frames loss of class numbers", ours(**{**inputs, "labels": numbers}).loss, want)
    numbers[:, 4:] = -100
    got = ours(**{**inputs, "labels": numbers})
    four = functional.cross_entropy(got.logits[:, :4].flatten(0, 1), numbers[:, :4].flatten())
    torch.testing.assert_close(got.loss, four)


def test_frames_of_padding_do_not_count_in_the_loss() -> None:
    model, inputs = FRAMES.build(), FRAMES.batch(padded=True)
    lengths = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1)).tolist()
    out = model(**inputs)
    real = [(out.logits[b, :n], inputs["labels"][b, :n].argmax(-1)) for b, n in enumerate(lengths)]
    want = functional.cross_entropy(torch.cat([x for x, _ in real]), torch.cat([y for _, y in real]))
    torch.testing.assert_close(out.loss, want)
    for b, n in enumerate(lengths):
        inputs["labels"][b, n:] = 55  # whatever stands there
    assert torch.equal(model(**inputs).loss, out.loss)
    inputs["labels"] = FRAMES.batch()["labels"]
    model.config.padding_invariant = False  # read at each call: now they count, as in the peer
    other = model(**inputs)
    want = functional.cross_entropy(other.logits.flatten(0, 1), inputs["labels"].argmax(-1).flatten())
    torch.testing.assert_close(other.loss, want)


@pytest.mark.parametrize("kind", [NUMBERS, MANY, None])
@pytest.mark.parametrize("n", [1, 3])
@each_head
def test_problem_types(head: Any, n: int, kind: str | None) -> None:
    """The promises that the peer does not keep: each loss from the logits, by torch."""
    model = head.build(training=True, num_labels=n, problem_type=kind)
    inputs = head.batch()
    lead = (3,) if head is SEQUENCE else (3, T)
    if kind == MANY:
        labels = (torch.rand(*lead, n) < 0.5).float()
    elif kind is None and n > 1:
        labels = torch.randint(n, lead)
    else:
        labels = torch.randn(*lead, n)
    out = model(inputs["input_values"], labels=labels.squeeze(-1) if n == 1 else labels)
    if kind == MANY:
        want = functional.binary_cross_entropy_with_logits(out.logits, labels)
    elif kind is None and n > 1:
        want = functional.cross_entropy(out.logits.flatten(0, -2), labels.flatten())
    else:
        want = functional.mse_loss(out.logits, labels)
    torch.testing.assert_close(out.loss, want)
    out.loss.backward()
    assert model.classifier.weight.grad.abs().max() > 0
    model.config.problem_type = NUMBERS if kind == MANY else MANY  # read at each call
    binary = (torch.rand(*lead, n) < 0.5).float()
    assert not torch.allclose(model(inputs["input_values"], labels=binary).loss, out.loss)


def test_regression_of_one_number_takes_integers_as_documented() -> None:
    """The peer's loss of one label is 0 for integers, and a RuntimeError for floats."""
    model = SEQUENCE.build(num_labels=1)
    values, labels = torch.randn(3, SAMPLES), torch.tensor([4, -2, 0])
    out = model(values, labels=labels)
    torch.testing.assert_close(out.loss, (out.logits[:, 0] - labels).square().mean())
    assert helpers.twin(model)(values, labels=torch.zeros(3, dtype=torch.long)).loss.item() == 0


# ---- adapter, layer drop


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [None, 16])
@each_head
def test_an_adapter_works(head: Any, width: int | None, weighted: bool) -> None:
    """The peer refuses: here the adapter shortens what is classified, alone as in a batch."""
    knobs = {"output_hidden_size": width, "use_weighted_layer_sum": weighted}
    model = head.build(add_adapter=True, num_adapter_layers=1, **knobs)
    inputs = head.batch(padded=True)
    inputs["labels"] = inputs["labels"] if head is SEQUENCE else inputs["labels"][:, : T // 2]
    out = model(**inputs)
    assert out.logits.shape == ((3, N) if head is SEQUENCE else (3, T // 2, N))
    base = model.wav2vec2_conformer(
        inputs["input_values"], inputs["attention_mask"], output_hidden_states=True
    )
    _, frames, n_frames = model.read_frames(inputs["input_values"], inputs["attention_mask"])
    if weighted:
        shares = model.layer_weights.softmax(0)
        mixed = sum(s * h for s, h in zip(shares, base.hidden_states, strict=True))
        n = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1), add_adapter=False)
        torch.testing.assert_close(frames, model.wav2vec2_conformer.adapter(mixed, n))
    else:
        assert torch.equal(frames, base.last_hidden_state)
    lengths = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1))
    assert torch.equal(n_frames, lengths)
    for row, samples in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = model(inputs["input_values"][row : row + 1, :samples]).logits
        there = out.logits[row : row + 1] if head is SEQUENCE else out.logits[row : row + 1, : lengths[row]]
        helpers.assert_close("classifier with an adapter, alone", there, alone)
    out.loss.backward()
    assert all(p.grad is not None for p in model.wav2vec2_conformer.adapter.parameters())


# ---- padding


# ---- the form


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [MANY, NUMBERS])
@each_head
def test_half_precision_loss_is_fp32(head: Any, kind: str, dtype: torch.dtype) -> None:
    model = head.build(training=True, use_weighted_layer_sum=True, problem_type=kind)
    inputs = head.batch(padded=True)
    if head is SEQUENCE:
        inputs["labels"] = functional.one_hot(inputs["labels"], N)
    exact = model(**inputs)
    half = model.to(dtype)(**{**inputs, "input_values": inputs["input_values"].to(dtype)})
    assert half.logits.dtype == dtype
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, exact.loss, rtol=0.05, atol=0)
    mask = model._get_feature_vector_attention_mask(T, inputs["attention_mask"]) if head is FRAMES else None
    again = classification_loss(half.logits.float(), inputs["labels"], kind, mask)
    assert torch.equal(half.loss, again)  # nothing but the logits is rounded
    half.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@each_head
def test_first_values(head: Any) -> None:
    sizes = {"hidden_size": 64, "classifier_proj_size": 300, "num_labels": 300}
    model = head.cls(head.config(use_weighted_layer_sum=True, **sizes))
    assert model.classifier.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (model.classifier.bias == 0).all()
    assert torch.equal(model.layer_weights, torch.full((3,), 1 / 3))
    assert head.cls(head.config()).layer_weights is None


# ---- in and out of files


@pytest.mark.gpu
@each_head
def test_gpu_label_errors_come_before_the_device_fails(head: Any) -> None:
    model, inputs = head.build().cuda(), {k: v.cuda() for k, v in head.batch(padded=True).items()}
    with pytest.raises(ValueError, match=r"labels\["):
        model(**{**inputs, "labels": inputs["labels"] + 500})
    assert model(
        **{**inputs, "labels": inputs["labels"].cpu()}
    ).loss.isfinite()  # labels of the host are moved
