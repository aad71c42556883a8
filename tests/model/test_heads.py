"""The contract that all heads share: outputs, parity with the peer, padding, precision, freezing, files, refused inputs."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import helpers
from heads import CTC, DENSE, HEADS, PRETRAINING, SAMPLES, SHARED, SPEAKER, Head, N, T
from w2vc.model.wav2vec2 import Wav2Vec2ConformerModel

each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
MIXING = {name: head for name, head in HEADS.items() if head.mixes}
each_mixing_head = pytest.mark.parametrize("head", MIXING.values(), ids=MIXING)
PEER = {"padding_invariant": False, "hidden_states_pre_norm": True}  # as transformers has it
ALL = {"output_hidden_states": True, "output_attentions": True}


def tensors(output: Any) -> dict[str, Tensor]:
    """The fields that are tensors."""
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def same_noise(*models: Any) -> None:
    """Start every quantizer call of these models from one seed."""
    for model in models:
        if hasattr(model, "quantizer"):
            model.quantizer.register_forward_pre_hook(lambda *_: torch.manual_seed(11) and None)


def mixed(head: Head) -> dict[str, Any]:
    return {"use_weighted_layer_sum": True} if head.mixes else {}


# ---- parity with transformers


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("positions", ["relative", "rotary", None])
@each_head
def test_parity_of_the_whole_head(
    head: Head, positions: str | None, norm: str, padded: bool, training: bool
) -> None:
    """Outputs, gradients and running statistics; with the group norm, heads that can read a mixture of layers."""
    knobs = {
        **PEER,
        "position_embeddings_type": positions,
        "feat_extract_norm": norm,
        "conv_bias": norm == "layer",
    }
    knobs |= mixed(head) if norm == "group" else {}
    knobs |= DENSE if head is SPEAKER and padded else {}
    ours = head.build(training, **knobs)
    theirs = helpers.twin(ours)
    same_noise(ours, theirs)
    if head is PRETRAINING:
        ours.set_gumbel_temperature(1.5)
        theirs.quantizer.temperature = 1.5
    inputs = head.batch(padded)
    a, b = ours(**inputs, **ALL), theirs(**inputs, **ALL)
    assert a.keys() == list(b.keys()) == list(head.fields)
    for name, value in tensors(a).items():
        helpers.assert_close(f"{head.cls.__name__} {name}", value, b[name])
    for name in SHARED:
        for x, y in zip(a[name], b[name], strict=True):
            if name == "attentions" and padded:  # rows of padding look at nothing that counts
                n = ours._get_feature_vector_attention_mask(x.shape[2], inputs["attention_mask"])
                x, y = x * n[:, None, :, None], y * n[:, None, :, None]  # noqa: PLW2901
            helpers.assert_close(f"{head.cls.__name__} {name}", x, y)
    a.loss.backward()
    b.loss.backward()
    gap = helpers.grad_difference(ours, theirs)
    name = f"{head.cls.__name__} gradients"
    helpers.worst[name] = max(helpers.worst.get(name, 0.0), gap)
    assert gap <= helpers.PARITY
    if "use_weighted_layer_sum" in knobs:
        assert ours.layer_weights.grad.abs().max() > 0
    before, peers = head.build(training, **knobs).state_dict(), theirs.state_dict()
    for name, value in ours.state_dict().items():
        if "running" in name:  # the statistics moved in training, and only then
            helpers.assert_close(f"{head.cls.__name__} running statistics", value, peers[name])
            assert torch.equal(value, before[name]) != training


@each_head
def test_the_names_of_all_tensors_are_the_peers(head: Head) -> None:
    for knobs in [{}, mixed(head)]:
        ours = head.build(**knobs)
        theirs = helpers.twin(ours)  # loads strictly in both directions
        assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
        own = {n.partition(".")[0] for n in ours.state_dict()} - {"wav2vec2_conformer"}
        assert own == head.parts | ({"layer_weights"} if knobs else set())


# ---- outputs


@each_head
def test_outputs_by_attribute_key_index_and_tuple(head: Head) -> None:
    ours, inputs = head.build(), head.batch()
    theirs = helpers.twin(ours)
    masked = {name: x for name, x in inputs.items() if name != "sampled_negative_indices"}
    for some in (inputs, masked, head.audio(inputs)):
        scored = bool({"labels", "sampled_negative_indices"} & set(some))
        for flags in ({}, ALL):
            out = ours(**some, **flags)
            assert isinstance(out, head.output)
            loss = set() if scored else {name for name in head.fields if "loss" in name}
            want = [name for name in head.fields if name not in loss and (flags or name not in SHARED)]
            assert out.keys() == list(out) == want
            assert all(out[i] is out[name] is getattr(out, name) for i, name in enumerate(want))
            assert all(getattr(out, name) is None for name in loss)
            plain, peers = (
                ours(**some, **flags, return_dict=False),
                theirs(**some, **flags, return_dict=False),
            )
            assert isinstance(plain, tuple)
            assert [type(x) for x in out.to_tuple()] == [type(x) for x in plain] == [type(y) for y in peers]
            assert all(
                torch.equal(x, y) for x, y in zip(plain, out.to_tuple(), strict=True) if isinstance(x, Tensor)
            )


@each_head
def test_switches_are_read_from_the_config_at_each_call_and_arguments_win(head: Head) -> None:
    model, values = head.build(**mixed(head)), torch.randn(1, SAMPLES)
    assert not set(model(values).keys()) & set(SHARED)  # also where the layers are mixed
    assert len(model(values, output_hidden_states=True).hidden_states) == 3
    model.config.output_hidden_states = model.config.output_attentions = True
    assert len(model(values).hidden_states) == 3
    assert len(model(values).attentions) == 2
    assert not set(model(values, output_hidden_states=False, output_attentions=False).keys()) & set(SHARED)
    model.config.return_dict = False
    assert isinstance(model(values), tuple)
    assert isinstance(model(values, return_dict=True), head.output)


ORDER = ["output_attentions", "output_hidden_states", "return_dict"]


@each_head
def test_the_arguments_come_in_the_documented_order(head: Head) -> None:
    extra = {
        "pretraining": ["mask_time_indices", "sampled_negative_indices", *ORDER],
        "frames": ["labels", *ORDER, "mask_time_indices"],
    }
    name = next(name for name, other in HEADS.items() if other is head)
    names = ["input_values", "attention_mask", *extra.get(name, [*ORDER, "labels", "mask_time_indices"])]
    assert list(inspect.signature(head.cls.forward).parameters)[1:] == names
    model, inputs = head.build(), head.batch(padded=True)
    given = {**dict.fromkeys(names), **inputs, **ALL, "return_dict": False}
    out = model(*given.values())
    assert isinstance(out, tuple)
    assert len(out) == len(head.fields)
    torch.testing.assert_close(out[0], model(**inputs).loss)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@each_head
def test_mask_time_indices_are_those_of_the_base_model(head: Head, training: bool) -> None:
    model = head.build(training, mask_time_prob=0.05, **mixed(head))
    audio = head.audio(head.batch(padded=True))
    mask = torch.zeros(3, T, dtype=torch.bool)
    mask[:, 1:4] = True
    seen: list[Any] = []
    hook = model.wav2vec2_conformer.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    got = model(**audio, mask_time_indices=mask, output_hidden_states=True)
    hook.remove()
    assert seen[0] is mask
    base = model.wav2vec2_conformer(**audio, mask_time_indices=mask, output_hidden_states=True)
    assert all(torch.equal(x, y) for x, y in zip(got.hidden_states, base.hidden_states, strict=True))
    other = model(**audio, mask_time_indices=torch.zeros_like(mask))
    assert not torch.equal(next(iter(tensors(other).values())), next(iter(tensors(got).values())))


# ---- padding


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("mix", [False, True], ids=["last", "mixed"])
@each_head
def test_an_utterance_does_not_depend_on_its_batch(head: Head, norm: str, mix: bool) -> None:
    """The padding theorem for outputs, loss and gradient: a padded batch weighs its utterances, nothing else."""
    knobs = {"feat_extract_norm": norm, "diversity_loss_weight": 0.0, **(mixed(head) if mix else {})}
    model, other = head.build(**knobs), head.build(**knobs)
    inputs = head.batch(padded=True)
    together = model(**inputs)
    together.loss.backward()
    shares = head.weights(model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1)).float())
    total = 0.0
    for row, share in enumerate(shares.tolist()):
        one, n = head.row(inputs, row)
        alone = other(**one)
        for name, value in tensors(alone).items():
            if value.dim() > 1:  # a row for each utterance
                there = together[name][row : row + 1]
                there = there[:, :n] if there.dim() == 3 else there
                helpers.assert_close(f"{head.cls.__name__} alone, {name}", there, value)
        (alone.loss * share).backward()
        total += alone.loss.item() * share
    assert together.loss.item() == pytest.approx(total, rel=1e-5)
    assert helpers.grad_difference(model, other) <= helpers.PARITY
    model.config.padding_invariant = False  # the switch does something
    assert helpers.difference(model(**inputs)[1][1], together[1][1]) > 1e-4


@pytest.mark.parametrize("mix", [False, True], ids=["last", "mixed"])
@each_head
def test_the_mask_may_stay_on_the_host(head: Head, mix: bool) -> None:
    """The meta device stands for an accelerator: it holds no values, and refuses to be mixed with tensors of the host."""
    if head is PRETRAINING:
        pytest.skip("switches autocast off, which torch cannot do on the meta device")
    with torch.device("meta"):
        model = head.cls(head.config(**(mixed(head) if mix else {}))).eval()
    inputs = head.batch(padded=True)
    output = model(inputs["input_values"].to("meta"), attention_mask=inputs["attention_mask"])
    assert all(x.device.type == "meta" for x in tensors(output).values())


# ---- training


@each_head
def test_freezing(head: Head) -> None:
    inputs = head.batch()
    model = head.build(training=True, **mixed(head))
    model.freeze_feature_encoder()
    model(**inputs).loss.backward()
    base = model.wav2vec2_conformer
    assert all(p.grad is None for p in base.feature_extractor.parameters())
    assert base.feature_projection.projection.weight.grad is not None
    if head is SPEAKER:
        assert model.feature_extractor.weight.grad is not None  # the head's own layer of that name
    model = head.build(training=True, **mixed(head))
    model.freeze_base_model()
    model(**inputs).loss.backward()
    learned = {n.partition(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert learned == head.parts | ({"layer_weights"} if head.mixes else set())


@pytest.mark.parametrize(
    "knobs", [{}, {"add_adapter": True, "num_adapter_layers": 1}], ids=["plain", "adapter"]
)
@each_head
def test_every_trainable_parameter_gets_a_gradient_in_training(head: Head, knobs: dict[str, Any]) -> None:
    if head is PRETRAINING and knobs:
        pytest.skip("with an adapter there is no one target per state")
    for mix in ({}, *([mixed(head)] if head.mixes and not (head is SPEAKER and knobs) else [])):
        model = head.build(training=True, mask_time_prob=0.05, mask_time_length=2, **knobs, **mix)
        inputs = head.batch(padded=True)
        if knobs and head.output.__name__ == "TokenClassifierOutput":
            inputs["labels"] = inputs["labels"][:, : T // 2]
        if knobs and head is CTC:
            inputs["labels"] = inputs["labels"][:, :3]
        if knobs and head is SPEAKER:
            inputs = head.batch()
        model(**inputs).loss.backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@each_head
def test_gradient_checkpointing_changes_nothing(head: Head) -> None:
    results = []
    for on in (False, True):
        noise = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "final_dropout": 0.1, "layerdrop": 0.3}
        model = head.build(training=True, num_hidden_layers=4, **noise, **mixed(head))
        if on:
            model.gradient_checkpointing_enable()
            assert model.wav2vec2_conformer.encoder.gradient_checkpointing
        torch.manual_seed(4)
        loss = model(**head.batch(padded=True)).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    (a, ga), (b, gb) = results
    assert torch.equal(a, b)
    assert all((g is None) == (gb[n] is None) and (g is None or torch.equal(g, gb[n])) for n, g in ga.items())


@pytest.mark.parametrize("pre_norm", [False, True])
@each_mixing_head
def test_layerdrop_with_mixed_layers_never_fails(head: Head, pre_norm: bool) -> None:
    """In the peer skipped layers are missing from the mixture, and training crashes; here the stream repeats."""
    knobs = {"num_hidden_layers": 4, "layerdrop": 0.5, "hidden_states_pre_norm": pre_norm}
    model, inputs = head.build(training=True, **knobs, **mixed(head)), head.batch(padded=True)
    torch.manual_seed(1)
    losses = set()
    for _ in range(12):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        losses.add(round(loss.item(), 4))
        assert model.layer_weights.grad.isfinite().all()
    assert len(losses) > 3  # layers were skipped
    model.config.layerdrop = 1.0
    assert model(**inputs).loss.isfinite()


@each_mixing_head
def test_the_mixture_can_be_turned_off_and_not_turned_on(head: Head) -> None:
    values = torch.randn(1, SAMPLES)
    model = head.build(**mixed(head))
    both = model(values).logits
    model.config.use_weighted_layer_sum = False  # read at each call
    plain = head.build()
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if n != "layer_weights"})
    assert torch.equal(model(values).logits, plain(values).logits)
    assert not torch.equal(model(values).logits, both)
    model = head.build()
    model.config.use_weighted_layer_sum = True
    with pytest.raises(ValueError, match=r"use_weighted_layer_sum=True .*built"):
        model(values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_head
def test_the_loss_of_half_precision_is_fp32(head: Head, dtype: torch.dtype) -> None:
    model, inputs = head.build(training=True, **mixed(head)), head.batch(padded=True)
    same_noise(model)
    exact = model(**inputs)
    half = model.to(dtype)(**{**inputs, "input_values": inputs["input_values"].to(dtype)})
    assert half[1].dtype == dtype
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, exact.loss, rtol=0.1, atol=0)
    if head.loss is not None:  # nothing but the logits is rounded
        torch.testing.assert_close(half.loss, head.loss(model, half, inputs), rtol=1e-5, atol=1e-4)
    half.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@each_head
def test_the_loss_is_fp32_inside_autocast(head: Head) -> None:
    model, inputs = head.build(**mixed(head)), head.batch(padded=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**inputs)
    assert out[1].dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    if head.loss is not None:
        torch.testing.assert_close(out.loss, head.loss(model, out, inputs), rtol=1e-5, atol=1e-4)


@each_mixing_head
def test_compiles_into_one_graph_with_the_loss_in_it(head: Head) -> None:
    model, inputs = head.build(num_hidden_layers=1, **mixed(head)), head.batch(padded=True)
    torch._dynamo.reset()
    got = torch.compile(model, backend="eager", fullgraph=True)(**inputs)
    for name, value in tensors(model(**inputs)).items():
        torch.testing.assert_close(got[name], value)
    torch._dynamo.reset()


# ---- refused inputs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_values": torch.randn(SAMPLES)}, "input_values"),
        ({"input_values": torch.full((3, SAMPLES), torch.nan)}, "input_values holds NaN"),
        ({"input_values": torch.randn(3, 30)}, "input_values has 30 samples"),
        ({"attention_mask": torch.ones(3, T)}, "attention_mask has shape"),
        ({"attention_mask": torch.ones(3, SAMPLES).tril(-9)}, "attention_mask"),
    ],
    ids=["one axis", "NaN", "too short", "of frames", "empty row"],
)
@each_head
def test_wrong_inputs_are_value_errors(head: Head, change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head.build()(**{**head.batch(padded="attention_mask" in change), **change})


# ---- in and out of files


@each_head
def test_save_and_load_both_ways(head: Head, tmp_path: Path) -> None:
    import transformers

    names = {i: f"word {i}" for i in range(N)}
    knobs = {**PEER, "num_labels": N, "id2label": names, **mixed(head), **(DENSE if head is SPEAKER else {})}
    ours, inputs = head.build(**knobs), head.batch(padded=True)
    want = ours(**inputs)
    ours.save_pretrained(tmp_path / "ours")
    peer = getattr(transformers, head.cls.__name__)
    theirs = peer.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    helpers.assert_close(f"{head.cls.__name__}, loaded by the peer", theirs(**inputs).loss, want.loss)
    assert theirs.config.id2label == names
    theirs.save_pretrained(tmp_path / "theirs")
    again = head.cls.from_pretrained(tmp_path / "theirs", **PEER)
    assert again.load_report.fits
    assert not again.load_report.newly_initialized
    assert torch.equal(again(**inputs)[1], want[1])
    assert again.config.id2label == names
    assert again.config.label2id == {name: i for i, name in names.items()}


@each_head
def test_a_folder_of_another_head_gives_the_base_model_and_a_new_head(head: Head, tmp_path: Path) -> None:
    source = PRETRAINING if head is CTC else CTC
    whole = source.build(mask_time_prob=0.05)
    whole.save_pretrained(tmp_path / "other")
    sizes = {"num_labels": 7, "vocab_size": 11} | mixed(head)
    with pytest.warns(UserWarning, match=rf"{min(head.parts)}.*newly initialised"):
        tuned = head.cls.from_pretrained(tmp_path / "other", **sizes)
    assert all(p.isfinite().all() and (p.dim() < 2 or p.std() > 0) for p in tuned.parameters())
    values = torch.randn(1, SAMPLES)
    want = whole.wav2vec2_conformer(values).last_hidden_state
    assert torch.equal(tuned.wav2vec2_conformer(values).last_hidden_state, want)
    if head.mixes:
        torch.testing.assert_close(tuned.layer_weights, torch.full((3,), 1 / 3))
    tuned.save_pretrained(tmp_path / "tuned")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a head that the base model does not have is no news
        base = Wav2Vec2ConformerModel.from_pretrained(tmp_path / "tuned")
    assert torch.equal(base(values).last_hidden_state, want)
    if head is not PRETRAINING:  # another number of classes does not fit
        with pytest.raises(ValueError, match=r"mis-shaped"):
            head.cls.from_pretrained(tmp_path / "tuned", num_labels=3, vocab_size=3)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@each_head
def test_gpu_equals_cpu(head: Head, training: bool) -> None:
    if head is PRETRAINING and training:
        pytest.skip("the Gumbel noise of the devices differs: see test_pretraining")
    cpu, gpu = head.build(training, **mixed(head)), head.build(training, **mixed(head)).cuda()
    inputs = head.batch(padded=True)
    a, b = gpu(**{k: v.cuda() for k, v in inputs.items()}), cpu(**inputs)
    for name, value in tensors(b).items():
        helpers.assert_close(f"{head.cls.__name__} {name} on the GPU", a[name].cpu(), value, tol=1e-4)
    a.loss.backward()
    b.loss.backward()
    assert helpers.grad_difference(gpu.cpu(), cpu) <= 1e-3
