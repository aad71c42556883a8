"""`torch.compile(model, fullgraph=True)`: one graph, the eager numbers, and no wait for a device; LayerDrop breaks the graph and no number."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from helpers import assert_close, randomise_, tiny_config
from w2vc.files.pretrained import PreTrainedModel
from w2vc.model.ctc import Wav2Vec2ConformerForCTC
from w2vc.model.features import frame_mask
from w2vc.model.negatives import sample_negative_indices
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining
from w2vc.model.wav2vec2 import Wav2Vec2ConformerModel

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
    """aot_eager traces forward and backward as inductor does, and draws the same random numbers as eager.

    In training LayerDrop is a choice of the host, at which torch cuts the graph.
    """
    layerdrop *= 5  # two layers: with 0.5 one of the seeds below skips, one does not
    plain = build(head, position_embeddings_type=kind, layerdrop=layerdrop).train(training)
    traced = copy.deepcopy(plain)
    whole = not (training and layerdrop)
    compiled = torch.compile(traced, fullgraph=whole, backend="aot_eager")
    inputs = inputs_for(head, plain)
    for seed in (0, 2) if training and layerdrop else (0,):
        want, got = step(plain, plain, inputs, seed), step(compiled, traced, inputs, seed)
        for name in want:
            if name != "gradients":
                assert_close(f"compiled, {name.split('.')[-1]}", got[name], want[name])
    if training:
        assert_gradients(plain, traced)


def assert_gradients(plain: PreTrainedModel, traced: PreTrainedModel) -> None:
    """A layer that is skipped, or a parameter without a use, has no gradient in either."""
    largest = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
    for (name, a), b in zip(traced.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            assert (a.grad - b.grad).abs().max() <= 1e-5 * largest, name


def test_the_seeds_above_skip_and_do_not() -> None:
    skips = []
    for seed in (0, 2):
        torch.manual_seed(seed)
        skips.append([bool(torch.rand([]) < 0.5) for _ in range(2)])
    assert any(sum(s) for s in skips)
    assert not all(all(s) for s in skips)


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
