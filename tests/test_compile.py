"""`torch.compile(model, fullgraph=True)`: one graph, the eager numbers, LayerDrop included, and no wait for a device."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import lookup_backend
from torch._dynamo.testing import CompileCounterWithBackend

import w2vc.conformer as module
from helpers import assert_close, grad_difference, randomise_, tiny_config
from w2vc import attention
from w2vc.conformer import ConformerEncoder
from w2vc.ctc import Wav2Vec2ConformerForCTC
from w2vc.features import frame_mask
from w2vc.model import Wav2Vec2ConformerModel
from w2vc.negatives import sample_negative_indices
from w2vc.pretrained import PreTrainedModel
from w2vc.pretraining import Wav2Vec2ConformerForPreTraining

SILENT = dict.fromkeys(
    ("hidden_dropout", "activation_dropout", "attention_dropout", "conformer_conv_dropout", "feat_proj_dropout",
     "feat_quantizer_dropout", "final_dropout"), 0.0
)  # fmt: skip
HEADS = {
    "base": Wav2Vec2ConformerModel,
    "ctc": Wav2Vec2ConformerForCTC,
    "pretraining": Wav2Vec2ConformerForPreTraining,
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(head: str, **knobs: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "mask_time_prob": 0.0 if head == "ctc" else 0.5, **SILENT, **knobs}
    model = randomise_(HEADS[head](tiny_config(**small)))
    for name, p in model.named_parameters():
        if "pos_bias" in name:
            torch.nn.init.normal_(p, std=0.5)
    return model


def inputs_for(head: str, model: PreTrainedModel, samples: int = 3000) -> dict[str, Tensor]:
    """Audio with padding; for pre-training also the masks and the negatives, drawn outside the graph."""
    g = torch.Generator().manual_seed(samples)
    mask = frame_mask(torch.tensor([samples, samples // 2]), samples)
    inputs = {"input_values": torch.randn(2, samples, generator=g), "attention_mask": mask.long()}
    if head != "ctc":
        frames = model._get_feature_vector_attention_mask(
            model._get_feat_extract_output_lengths(samples, add_adapter=False).item(),
            inputs["attention_mask"],
        )
        hidden = (torch.rand(frames.shape, generator=g) < 0.6) & frames
        inputs["mask_time_indices"] = hidden
        if head == "pretraining":
            inputs["sampled_negative_indices"] = sample_negative_indices(
                tuple(hidden.shape), 4, mask_time_indices=hidden, generator=g
            )
    return inputs


def step(run: Any, model: PreTrainedModel, inputs: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Outputs, and in training all gradients in a row and the buffers, by name."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = run(**inputs)
    found = {name: x for name, x in out.items() if isinstance(x, Tensor)}
    if model.training:
        loss = out.loss if "loss" in found else out[0].square().mean()
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found["gradients"] = torch.cat(gradients)
    return found | {n: b.clone().double() for n, b in model.named_buffers() if n.split(".")[-1] != "inv_freq"}


EVERY = [
    (head, kind, training, layerdrop)
    for head in HEADS
    for kind in ("relative", "rotary", None)
    for training in (False, True)
    for layerdrop in (0.0, 0.1)
]
FEW = {
    ("base", "relative", True, 0.1),
    ("ctc", None, False, 0.0),
    ("pretraining", "relative", True, 0.0),
}


@pytest.mark.parametrize(
    ("head", "kind", "training", "layerdrop"),
    [pytest.param(*case, marks=[] if case in FEW else [pytest.mark.slow]) for case in EVERY],
)
def test_one_graph_with_the_eager_numbers(
    head: str, kind: str | None, training: bool, layerdrop: float
) -> None:
    """aot_eager traces forward and backward as inductor does, and draws the same random numbers as eager."""
    layerdrop *= 5  # two layers: with 0.5 one of the seeds below skips, one does not
    plain = build(head, position_embeddings_type=kind, layerdrop=layerdrop).train(training)
    traced = copy.deepcopy(plain)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    inputs = inputs_for(head, plain)
    for seed in (0, 2) if training and layerdrop else (0,):
        want, got = step(plain, plain, inputs, seed), step(compiled, traced, inputs, seed)
        for name in want:
            if name != "gradients":
                assert_close(f"compiled, {name.split('.')[-1]}", got[name], want[name])
    if training:
        assert_gradients(plain, traced)


def assert_gradients(plain: PreTrainedModel, traced: PreTrainedModel) -> None:
    """A skipped layer has no gradient in eager and one of 0 when compiled; all others are equal."""
    largest = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
    for (name, a), b in zip(traced.named_parameters(), plain.parameters(), strict=True):
        if a.requires_grad and a.grad is not None:
            want = torch.zeros_like(a) if b.grad is None else b.grad
            assert (a.grad - want).abs().max() <= 1e-5 * largest, name
        else:
            assert b.grad is None, name


def test_the_seeds_above_skip_and_do_not() -> None:
    skips = []
    for seed in (0, 2):
        torch.manual_seed(seed)
        skips.append([bool(torch.rand([]) < 0.5) for _ in range(2)])
    assert any(sum(s) for s in skips)
    assert not all(all(s) for s in skips)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_skipped_layer_leaves_no_trace(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the layer has to run although it is skipped: the stream, its statistics and its gradients."""
    encoder = randomise_(
        ConformerEncoder(tiny_config(**{**SILENT, "layerdrop": 0.5}, num_hidden_layers=6))
    ).train()
    encoder.gradient_checkpointing = checkpointing
    tensors = copy.deepcopy(encoder)
    hidden, results = torch.randn(2, 9, 32), []
    for model, together in ((encoder, False), (tensors, True)):
        monkeypatch.setattr(module, "in_process_group", lambda together=together: together)
        torch.manual_seed(1)
        last, states, _ = model(hidden, output_hidden_states=True)
        last.square().sum().backward()
        results.append((last, states, dict(model.named_buffers()), dict(model.named_parameters())))
    (a, sa, ba, pa), (b, sb, bb, pb) = results
    skipped = [torch.equal(x, y) for x, y in itertools.pairwise(sa[:-1])]
    assert any(skipped)
    assert not all(skipped)
    assert torch.equal(a, b)
    assert all(torch.equal(x, y) for x, y in zip(sa, sb, strict=True))
    assert all(torch.equal(x, bb[name]) for name, x in ba.items())
    for name, p in pa.items():
        if p.requires_grad:
            got = pb[name].grad
            assert got is not None, f"{name}: other processes would wait for its gradient"
            assert torch.equal(got, torch.zeros_like(p) if p.grad is None else p.grad)


@pytest.mark.parametrize("kind", ["relative", pytest.param("rotary", marks=pytest.mark.slow)])
def test_new_lengths_do_not_compile_again_and_again(kind: str) -> None:
    """The second length makes the graph one of any length; the third and fourth find it."""
    model = build("ctc", position_embeddings_type=kind, num_hidden_layers=1).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for samples in (3000, 4000, 5123, 7000):
            inputs = inputs_for("ctc", model, samples)
            assert_close("compiled, another length", compiled(**inputs).logits, model(**inputs).logits)
    assert counter.frame_count == 2


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["relative", "rotary", None])
def test_forward_never_waits_for_a_device(kind: str | None, training: bool) -> None:
    """The meta device stands for an accelerator: its tensors hold no values, so whatever read one would raise."""
    model = (
        build("base", position_embeddings_type=kind, layerdrop=0.5, add_adapter=True)
        .train(training)
        .to("meta")
    )
    inputs = {name: x.to("meta") for name, x in inputs_for("base", model).items()}
    out = model(**inputs, output_hidden_states=True)
    assert out.last_hidden_state.device.type == "meta"


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_inductor_gives_the_eager_numbers(training: bool) -> None:
    plain = build("pretraining", layerdrop=0.0).train(training)
    plain.set_gumbel_temperature(0.01)
    traced = copy.deepcopy(plain)
    compiled = torch.compile(traced, fullgraph=True)
    inputs = inputs_for("pretraining", plain)
    want, got = step(plain, plain, inputs, 0), step(compiled, traced, inputs, 0)
    assert_close(
        "inductor, states", got["projected_states"], want["projected_states"]
    )  # the Gumbel noise differs
    if not training:
        assert_close("inductor, loss", got["loss"], want["loss"])
    for name in want:
        if "running" in name:
            assert_close("inductor, statistics", got[name], want[name])


# --------------------------------------------------------------------------------------- flex attention


def flex_pair(kind: str | None, **knobs: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    plain = build("ctc", position_embeddings_type=kind, num_hidden_layers=1, **knobs).eval()
    flex = copy.deepcopy(plain)
    flex.config.attn_implementation = "flex"
    return plain, flex


@pytest.mark.parametrize("kind", ["relative", pytest.param("rotary", marks=pytest.mark.slow)])
def test_flex_attention_is_a_part_of_the_graph(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, at any length; here aot_eager stands for the compiler of CUDA."""
    monkeypatch.setattr(attention, "flex_fits", lambda query, relative, p: True)
    plain, flex = flex_pair(kind)
    graphs: list[str] = []

    def note(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(flex, fullgraph=True, backend=note)
    with torch.no_grad():
        for samples in (3000, 4000, 5123):
            inputs = inputs_for("ctc", plain, samples)
            assert_close("compiled, flex", compiled(**inputs).logits, plain(**inputs).logits)
    assert len(graphs) == 2  # of the first length, and of any
    assert all("torch.ops.higher_order.flex_attention" in graph for graph in graphs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["relative", "rotary", None])
def test_inductor_takes_sdpa_for_flex_on_a_cpu(kind: str | None) -> None:
    plain, flex = flex_pair(kind)
    compiled = torch.compile(flex, fullgraph=True)
    with torch.no_grad():
        inputs = inputs_for("ctc", plain)
        assert_close("inductor, flex", compiled(**inputs).logits, plain(**inputs).logits)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["relative", "rotary", None])
def test_gpu_compiles_flex_into_the_model(kind: str | None, training: bool) -> None:
    plain, flex = flex_pair(kind, hidden_size=64)  # heads of 16 channels
    plain.train(training).cuda(), flex.train(training).cuda()
    compiled = torch.compile(flex, fullgraph=True)
    for samples in (3000, 4000) if not training else (3000,):
        inputs = {name: x.cuda() for name, x in inputs_for("ctc", plain, samples).items()}
        with torch.set_grad_enabled(training):
            want, got = plain(**inputs).logits, compiled(**inputs).logits
        assert_close("gpu, flex", got, want, 1e-3)
    if training:
        want.square().sum().backward()
        got.square().sum().backward()
        assert grad_difference(flex, plain) <= 1e-3
