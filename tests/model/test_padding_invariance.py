"""The first theorem: in eval, given a mask, an utterance's output is the same alone and in any padded batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import helpers
from helpers import assert_close, difference, randomise_, tiny_config
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.model.features import receptive_field
from w2vc.model.wav2vec2 import Wav2Vec2BaseModelOutput, Wav2Vec2ConformerModel

WIDTH, HOP = receptive_field(tiny_config().conv_kernel, tiny_config().conv_stride)


def build(seed: int = 0, **knobs: Any) -> Wav2Vec2ConformerModel:
    torch.manual_seed(seed)
    return randomise_(Wav2Vec2ConformerModel(tiny_config(**knobs)), seed).eval()


def speak(lengths: list[int], seed: int = 0) -> list[Tensor]:
    """Utterances of random samples, normalised as the feature extractor would."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=g) for n in lengths]


def pad(utterances: list[Tensor], extra: int = 0, noise: float = 0.0) -> dict[str, Tensor]:
    """Right-pad to the longest plus `extra` samples, with zeros or with noise."""
    g = torch.Generator().manual_seed(99)
    width = max(map(len, utterances)) + extra
    audio = noise * torch.randn(len(utterances), width, generator=g)
    mask = torch.zeros(len(utterances), width, dtype=torch.long)
    for row, utterance in enumerate(utterances):
        audio[row, : len(utterance)], mask[row, : len(utterance)] = utterance, 1
    return {"input_values": audio, "attention_mask": mask}


@torch.no_grad()
def run(model: Wav2Vec2ConformerModel, **inputs: Tensor) -> Wav2Vec2BaseModelOutput:
    return model(**inputs, output_hidden_states=True, output_attentions=True)


def assert_alone_equals_batched(
    model: Wav2Vec2ConformerModel, utterances: list[Tensor], **padding: Any
) -> None:
    """Every output of every utterance, cut to its own length, against the utterance alone without a mask."""
    batched = run(model, **pad(utterances, **padding))
    for row, utterance in enumerate(utterances):
        alone = run(model, input_values=utterance[None])
        frames = alone.extract_features.shape[1]
        after = alone.last_hidden_state.shape[1]
        assert frames == model._get_feat_extract_output_lengths(len(utterance), add_adapter=False).item()
        assert after == model._get_feat_extract_output_lengths(len(utterance)).item()
        assert_close("padding, last", batched.last_hidden_state[row, :after], alone.last_hidden_state[0])
        assert_close("padding, features", batched.extract_features[row, :frames], alone.extract_features[0])
        for a, b in zip(batched.hidden_states, alone.hidden_states, strict=True):
            assert_close("padding, states", a[row, :frames], b[0])
        for a, b in zip(batched.attentions, alone.attentions, strict=True):
            assert_close("padding, attentions", a[row, :, :frames, :frames], b[0])
            assert a[row, :, :frames, frames:].abs().max() == 0 if frames < a.shape[-1] else True


def fewest_frames(config: Wav2Vec2ConformerConfig) -> int:
    """The shortest utterance that reaches the end of the adapter."""
    n = 1
    for _ in range(
        config.num_adapter_layers if config.add_adapter else 0
    ):  # from the last layer to the first
        n = max((n - 1) * config.adapter_stride + config.adapter_kernel_size - 2, 1)
    return n


knobs = st.fixed_dictionaries(
    {
        "feat_extract_norm": st.sampled_from(["group", "layer"]),
        "conv_bias": st.booleans(),
        "position_embeddings_type": st.sampled_from(["relative", "rotary", None]),
        "hidden_act": st.sampled_from(["gelu", "swish", "relu"]),
        "num_hidden_layers": st.integers(1, 3),
        "conv_depthwise_kernel_size": st.sampled_from([1, 5, 31]),
        "attn_implementation": st.sampled_from(["sdpa", "eager"]),
        "add_adapter": st.booleans(),
        "num_adapter_layers": st.integers(1, 3),
        "adapter_kernel_size": st.integers(1, 5),
        "adapter_stride": st.integers(1, 3),
        "output_hidden_size": st.sampled_from([None, 16]),
    }
)
ADAPTED = {
    "feat_extract_norm": "group",
    "position_embeddings_type": "relative",
    "num_hidden_layers": 2,
    "add_adapter": True,
    "adapter_kernel_size": 5,
}


@settings(max_examples=60, deadline=None)
@given(
    knobs=knobs,
    frames=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    rest=st.integers(0, HOP - 1),
    extra=st.sampled_from([0, 1, 5000]),
    seed=st.integers(0, 1000),
)
@example(knobs=ADAPTED, frames=[30, 1, 12], rest=0, extra=0, seed=0)
@example(knobs=ADAPTED, frames=[9], rest=HOP - 1, extra=5000, seed=0)  # a batch of one, mostly padding
@example(knobs=ADAPTED, frames=[8, 8, 8], rest=7, extra=0, seed=0)  # equal lengths: a mask of ones
def test_alone_equals_batched(
    knobs: dict[str, Any], frames: list[int], rest: int, extra: int, seed: int
) -> None:
    model = build(seed, **knobs)
    least = fewest_frames(model.config) - 1
    utterances = speak([WIDTH + (least + n - 1) * HOP + rest for n in frames], seed)
    assert_alone_equals_batched(model, utterances, extra=extra)


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(4)), norm=st.sampled_from(["group", "layer"]))
def test_order_does_not_matter(order: list[int], norm: str) -> None:
    model = build(feat_extract_norm=norm, add_adapter=True)
    utterances = speak([4000, 9000, 2500, 6001])
    straight = run(model, **pad(utterances)).last_hidden_state
    shuffled = run(model, **pad([utterances[i] for i in order])).last_hidden_state
    for place, i in enumerate(order):
        n = model._get_feat_extract_output_lengths(len(utterances[i])).item()
        assert_close("padding, order", shuffled[place, :n], straight[i, :n])


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("positions", ["relative", "rotary", None])
def test_what_the_padding_holds_does_not_matter(norm: str, positions: str | None) -> None:
    model = build(feat_extract_norm=norm, position_embeddings_type=positions, add_adapter=True)
    utterances = speak([4000, 7000, 2500])
    assert_alone_equals_batched(model, utterances, extra=3000, noise=50.0)


def test_without_a_mask_every_sample_is_valid() -> None:
    model = build(add_adapter=True)
    audio = pad(speak([4000, 7000]))["input_values"]
    plain = run(model, input_values=audio)
    ones = run(model, input_values=audio, attention_mask=torch.ones_like(audio, dtype=torch.long))
    assert_close("padding, no mask", plain.last_hidden_state, ones.last_hidden_state)
    masked = run(model, **pad(speak([4000, 7000])))
    n = model._get_feat_extract_output_lengths(4000).item()
    assert difference(masked.last_hidden_state[0, :n], plain.last_hidden_state[0, :n]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32], ids=str)
def test_any_kind_of_mask(dtype: torch.dtype) -> None:
    model = build()
    inputs = pad(speak([4000, 7000]))
    want = run(model, **inputs).last_hidden_state
    got = run(model, input_values=inputs["input_values"], attention_mask=inputs["attention_mask"].to(dtype))
    assert torch.equal(got.last_hidden_state, want)


@pytest.mark.parametrize(
    "knobs",
    [
        {"feat_extract_norm": "group"},
        {"feat_extract_norm": "layer"},
        {"feat_extract_norm": "layer", "add_adapter": True},
    ],
    ids=str,
)
def test_the_switch_is_what_does_it(knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the switch off the padding leaks, so that the tests above can fail; it is read at each call."""
    monkeypatch.setattr(helpers, "worst", {})  # the leak is no parity difference
    model = build(**knobs)
    utterances = speak([4000, 9000])
    model.config.padding_invariant = False
    with pytest.raises(AssertionError, match="relative difference"):
        assert_alone_equals_batched(model, utterances)
    model.config.padding_invariant = True
    assert_alone_equals_batched(model, utterances)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_batch_norm_statistics_are_those_of_the_valid_frames(norm: str) -> None:
    quiet = {"layerdrop": 0.0, "mask_time_prob": 0.0, "hidden_dropout": 0.0, "activation_dropout": 0.0}
    quiet |= {"attention_dropout": 0.0, "conformer_conv_dropout": 0.0, "feat_proj_dropout": 0.0}
    model = build(feat_extract_norm=norm, **quiet)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    inputs = pad(speak([4000, 9000, 2500]), extra=2000, noise=50.0)
    frames = model._get_feature_vector_attention_mask(
        model._get_feat_extract_output_lengths(inputs["input_values"].shape[1]).item(),
        inputs["attention_mask"],
    )
    seen: dict[str, Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
        for name, m in model.named_modules()
        if name.endswith("batch_norm")
    ]
    model.train()(**inputs)
    for hook in hooks:
        hook.remove()
    assert len(seen) == model.config.num_hidden_layers
    state = model.state_dict()
    for name, x in seen.items():
        valid = x.transpose(1, 2)[frames]  # [N, D]
        for key, want in (("running_mean", valid.mean(0)), ("running_var", valid.var(0, unbiased=True))):
            old, new = start[f"{name}.{key}"], state[f"{name}.{key}"]
            assert_close("padding, statistics", new, 0.9 * old + 0.1 * want)


def test_training_outputs_do_not_depend_on_how_much_padding_there_is() -> None:
    """With the noise off, train mode too: batch statistics, group norms and gradients see valid frames alone."""
    quiet = {"layerdrop": 0.0, "mask_time_prob": 0.0, "hidden_dropout": 0.0, "activation_dropout": 0.0}
    quiet |= {"attention_dropout": 0.0, "conformer_conv_dropout": 0.0, "feat_proj_dropout": 0.0}
    results = []
    for extra, noise in ((0, 0.0), (4000, 20.0)):
        model = build(**quiet, add_adapter=True).train()
        inputs = pad(speak([4000, 9000, 2500]), extra=extra, noise=noise)
        out = model(**inputs).last_hidden_state
        n = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(-1))
        kept = torch.cat([row[:k] for row, k in zip(out, n.tolist(), strict=True)])
        (kept * torch.linspace(-1, 1, kept.numel()).view_as(kept)).sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((kept, grads))
    assert_close("padding, training", results[1][0], results[0][0])
    assert_close("padding, training gradients", results[1][1], results[0][1])


@pytest.mark.gpu
def test_alone_equals_batched_on_the_gpu() -> None:
    model = build(add_adapter=True).cuda()
    with torch.backends.cudnn.flags(allow_tf32=False):
        utterances = [u.cuda() for u in speak([4000, 9000, 2500])]
        inputs = {k: v.cuda() for k, v in pad([u.cpu() for u in utterances], noise=50.0).items()}
        batched = run(model, **inputs).last_hidden_state
        for row, utterance in enumerate(utterances):
            alone = run(model, input_values=utterance[None]).last_hidden_state[0]
            assert_close("padding, gpu", batched[row, : len(alone)], alone)
