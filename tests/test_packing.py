"""A packed batch gives what a padded one gives, in every output, gradient and buffer, and does no work on padding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import w2vc.attention
from helpers import assert_close, difference, randomise_, tiny_config
from w2vc.attention import Packing, SelfAttention
from w2vc.conformer import ConformerEncoder
from w2vc.convolution import ConvolutionModule
from w2vc.features import frame_mask
from w2vc.model import Wav2Vec2ConformerModel
from w2vc.positions import make_positions

NOISES = ("hidden_dropout", "activation_dropout", "attention_dropout", "conformer_conv_dropout", "feat_proj_dropout")
SILENT = dict.fromkeys(NOISES, 0.0)
LENGTHS = [4000, 9000, 2500, 6001]  # samples


def never(mask: Tensor, device: Any) -> None:
    """Stands in for `Packing.of`: the batch stays padded."""


def build(seed: int = 0, **knobs: Any) -> Wav2Vec2ConformerModel:
    torch.manual_seed(seed)
    model = randomise_(Wav2Vec2ConformerModel(tiny_config(**{**SILENT, **knobs})), seed)
    for name, p in model.named_parameters():
        if "pos_bias" in name:
            torch.nn.init.normal_(p, std=0.5)
    return model


def batch(lengths: list[int], extra: int = 0, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mask = frame_mask(torch.tensor(lengths), max(lengths) + extra)
    return {"input_values": torch.randn(mask.shape, generator=g), "attention_mask": mask.long()}


def packings(monkeypatch: pytest.MonkeyPatch) -> list[Packing | None]:
    """Notes what `Packing.of` gives from now on."""
    seen: list[Packing | None] = []
    real = Packing.of
    monkeypatch.setattr(Packing, "of", lambda mask, device: (seen.append(real(mask, device)), seen[-1])[1])
    return seen


def step(model: Wav2Vec2ConformerModel, inputs: dict[str, Tensor], seed: int, **asked: Any) -> dict[str, Tensor]:
    """One forward and backward: everything that comes out, by name. A padded frame has no part in the loss."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = model(**inputs, **asked)
    frames = model._get_feature_vector_attention_mask(out.last_hidden_state.shape[1], inputs["attention_mask"])
    early = model._get_feature_vector_attention_mask(out.extract_features.shape[1], inputs["attention_mask"], False)
    real = out.last_hidden_state[frames]
    loss = (real * torch.linspace(-1, 1, real.numel()).view_as(real)).sum()
    found = {"last": real, "features": out.extract_features[early]}
    for i, state in enumerate(out.hidden_states or ()):
        found[f"state {i}"] = state  # on the padding too: 0
        loss = loss + state[early].square().mean()
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    found["gradients"] = torch.cat([g.flatten() for g in gradients])
    return found | {name: b.clone() for name, b in model.named_buffers() if "running" in name or "tracked" in name}


def assert_equal_steps(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert_close(f"packing, {name.split('.')[-1]}", x, b[name])


knobs = st.fixed_dictionaries(
    {
        "feat_extract_norm": st.sampled_from(["group", "layer"]),
        "position_embeddings_type": st.sampled_from(["relative", "rotary", None]),
        "attn_implementation": st.sampled_from(["sdpa", "eager"]),
        "hidden_act": st.sampled_from(["gelu", "swish", "relu"]),
        "num_hidden_layers": st.integers(1, 3),
        "conv_depthwise_kernel_size": st.sampled_from([1, 5, 31]),
        "add_adapter": st.booleans(),
        "hidden_states_pre_norm": st.booleans(),
        "layerdrop": st.sampled_from([0.0, 0.5]),
        "mask_time_prob": st.sampled_from([0.0, 0.3]),
        "mask_time_length": st.just(2),
    }
)


@settings(max_examples=40, deadline=None)
@given(
    knobs=knobs,
    frames=st.lists(st.integers(1, 30), min_size=2, max_size=5).filter(lambda n: len(set(n)) > 1),
    extra=st.sampled_from([0, 3000]),
    training=st.booleans(),
    checkpointing=st.booleans(),
    states=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_packed_equals_padded(
    *, knobs: dict[str, Any], frames: list[int], extra: int, training: bool, checkpointing: bool, states: bool, seed: int
) -> None:
    packed = build(seed, **knobs).train(training)
    if checkpointing:
        packed.gradient_checkpointing_enable()
    padded = copy.deepcopy(packed)
    inputs = batch([400 + 320 * (n - 1) for n in frames], extra, seed)
    with pytest.MonkeyPatch.context() as patch:
        seen = packings(patch)
        ours = step(packed, inputs, seed, output_hidden_states=states)
        assert [p is not None for p in seen] == [True]
        patch.setattr(Packing, "of", never)
        assert_equal_steps(ours, step(padded, inputs, seed, output_hidden_states=states))
