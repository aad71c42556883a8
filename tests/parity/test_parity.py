"""The whole base model against transformers: outputs, maps, states, gradients, in every combination of the knobs."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import assert_close, difference, grad_difference, peer_config, randomise_, tiny_config, worst
from w2vc.model.wav2vec2 import Wav2Vec2ConformerModel

transformers = pytest.importorskip("transformers")

POSITIONS = ("relative", "rotary", None)
COMBINATIONS = list(
    itertools.product(POSITIONS, ("group", "layer"), (False, True), ("gelu", "swish"), (False, True))
)
NAMES = [
    f"{p}-{n}-{'bias' if b else 'nobias'}-{a}-{'adapter' if d else 'plain'}" for p, n, b, a, d in COMBINATIONS
]
LENGTHS = (6400, 4100, 5000)  # samples: 3 rows of one padded batch
NOISES = ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout")
SILENT = dict.fromkeys((*NOISES, "conformer_conv_dropout", "layerdrop"), 0.0)  # train mode becomes comparable


def make_pair(**knobs: Any) -> tuple[Wav2Vec2ConformerModel, nn.Module]:
    """Our model and the peer's with the same random weights, loaded strictly in both directions."""
    torch.manual_seed(0)
    config = tiny_config(**knobs)
    ours = Wav2Vec2ConformerModel(config)
    theirs = transformers.Wav2Vec2ConformerModel(peer_config(config))
    randomise_(theirs, 1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval(), theirs.eval()


@lru_cache(maxsize=64)
def cached_pair(
    combination: tuple[Any, ...], silent: bool = False
) -> tuple[Wav2Vec2ConformerModel, nn.Module]:
    positions, norm, bias, activation, adapter = combination
    knobs = dict(
        position_embeddings_type=positions,
        feat_extract_norm=norm,
        conv_bias=bias,
        hidden_act=activation,
        feat_extract_activation=activation,
        add_adapter=adapter,
        output_hidden_size=24 if adapter else None,
        num_adapter_layers=2,
    )
    return make_pair(**knobs, **(SILENT if silent else {}))


@lru_cache(maxsize=1)
def batch() -> tuple[Tensor, Tensor]:
    """Audio `[3, S]`, padded with zeros, and its mask."""
    g = torch.Generator().manual_seed(7)
    audio = torch.randn(len(LENGTHS), max(LENGTHS), generator=g)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return audio * mask, mask


def count_frames(model: Wav2Vec2ConformerModel) -> int:
    """Frames of the padded batch before an adapter."""
    return model._get_feat_extract_output_lengths(max(LENGTHS), add_adapter=False).item()


def weigh(*tensors: Tensor) -> Tensor:
    """A scalar that depends on every entry, with fixed random weights: its gradient tests all of them."""
    g = torch.Generator().manual_seed(11)
    return sum((t.float() * torch.randn(t.shape, generator=g).to(t.device)).sum() for t in tensors)


def compare(name: str, ours: Wav2Vec2ConformerModel, theirs: nn.Module, **inputs: Tensor | None) -> None:
    """Compare outputs, states, maps and gradients of one forward and backward on both sides."""
    wanted = {"output_attentions": True, "output_hidden_states": True}
    ours.zero_grad()
    theirs.zero_grad()
    a, b = ours(**inputs, **wanted), theirs(**inputs, **wanted)
    for field in ("last_hidden_state", "extract_features"):
        assert_close(f"{name} {field}", a[field], b[field])
    assert len(a.hidden_states) == len(b.hidden_states) == ours.config.num_hidden_layers + 1
    assert len(a.attentions) == len(b.attentions) == ours.config.num_hidden_layers
    if ours.config.hidden_states_pre_norm:
        pairs = zip(a.hidden_states, b.hidden_states, strict=True)
    else:  # the documented convention ends in the normalised state, which the peer has before its adapter
        last = theirs.encoder.layer_norm(b.hidden_states[-1])
        pairs = zip(a.hidden_states, (*b.hidden_states[:-1], last), strict=True)
    for x, y in pairs:
        assert_close(f"{name} hidden_states", x, y)
    for x, y in zip(a.attentions, b.attentions, strict=True):
        assert_close(f"{name} attentions", x, y)
    weigh(a.last_hidden_state, a.extract_features).backward()
    weigh(b.last_hidden_state, b.extract_features).backward()
    gap = grad_difference(ours, theirs)
    worst[f"{name} gradients"] = max(worst.get(f"{name} gradients", 0.0), gap)
    assert gap <= 1e-5, f"{name} gradients: {gap:.2e}"


@pytest.mark.parametrize("combination", COMBINATIONS, ids=NAMES)
def test_evaluation(combination: tuple[Any, ...]) -> None:
    ours, theirs = cached_pair(combination)
    audio, mask = batch()
    ours.config.hidden_states_pre_norm = False
    compare("model", ours, theirs, input_values=audio)
    ours.config.hidden_states_pre_norm = True
    ours.config.padding_invariant = False  # the peer lets padding leak: so do we, when asked to
    try:
        compare("model, padded", ours, theirs, input_values=audio, attention_mask=mask)
    finally:
        ours.config.hidden_states_pre_norm, ours.config.padding_invariant = False, True


@pytest.mark.parametrize("combination", COMBINATIONS[::5], ids=NAMES[::5])
def test_kernels_agree_with_the_peer(combination: tuple[Any, ...]) -> None:
    ours, theirs = cached_pair(combination)
    audio, mask = batch()
    with torch.no_grad():
        wanted = theirs(audio, attention_mask=mask).last_hidden_state
    ours.config.padding_invariant = False
    try:
        for kernel in ("eager", "sdpa"):
            ours.config.attn_implementation = kernel
            with torch.no_grad():
                got = ours(audio, attention_mask=mask).last_hidden_state
            assert_close(f"model, {kernel}", got, wanted)
    finally:
        ours.config.padding_invariant, ours.config.attn_implementation = True, "sdpa"


@pytest.mark.parametrize("combination", COMBINATIONS[1::4], ids=NAMES[1::4])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_training(combination: tuple[Any, ...], padded: bool) -> None:
    """Train mode without noise: batch statistics, their running averages, explicit masks, all gradients."""
    ours, theirs = cached_pair(combination, silent=True)
    start = {k: v.clone() for k, v in theirs.state_dict().items()}
    audio, mask = batch()
    hidden_frames = torch.rand(3, count_frames(ours)) < 0.4
    ours.train(), theirs.train()
    ours.config.hidden_states_pre_norm, ours.config.padding_invariant = True, not padded
    try:
        compare(
            "model, training",
            ours,
            theirs,
            input_values=audio,
            attention_mask=mask if padded else None,
            mask_time_indices=hidden_frames,
        )
        buffers = dict(theirs.named_buffers())
        for name, buffer in ours.named_buffers():
            if "running" in name or "batches" in name:
                assert_close("running statistics", buffer, buffers[name])
                assert not torch.equal(buffer, start[name]), (
                    "the statistics did not move: nothing was compared"
                )
    finally:
        ours.load_state_dict(start), theirs.load_state_dict(start)
        ours.eval(), theirs.eval()
        ours.config.hidden_states_pre_norm, ours.config.padding_invariant = False, True


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.int32], ids=str)
def test_explicit_mask_time_indices(dtype: torch.dtype) -> None:
    ours, theirs = cached_pair(COMBINATIONS[0])
    audio, _ = batch()
    hidden_frames = torch.rand(3, count_frames(ours)) < 0.4
    with torch.no_grad():
        wanted = theirs(audio, mask_time_indices=hidden_frames).last_hidden_state
        got = ours(audio, mask_time_indices=hidden_frames.to(dtype)).last_hidden_state
        plain = ours(audio).last_hidden_state
    assert_close("model, masked", got, wanted)
    assert difference(plain, wanted) > 1e-2  # the mask did something


@pytest.mark.parametrize("wanted", [{}, {"output_hidden_states": True}, {"output_attentions": True}], ids=str)
def test_tuple_outputs(wanted: dict[str, bool]) -> None:
    ours, theirs = cached_pair(COMBINATIONS[1])
    ours.config.hidden_states_pre_norm = True
    audio, _ = batch()
    with torch.no_grad():
        a = ours(audio, return_dict=False, **wanted)
        b = theirs(audio, return_dict=False, **wanted)
    ours.config.hidden_states_pre_norm = False
    assert isinstance(a, tuple)
    assert len(a) == len(b) == 2 + len(wanted)
    for x, y in zip(a, b, strict=True):
        assert isinstance(x, tuple) == isinstance(y, tuple)
        for u, v in zip(x, y, strict=True) if isinstance(x, tuple) else [(x, y)]:
            assert_close("model, tuple", u, v)


@pytest.mark.parametrize("seed", range(4))
def test_layerdrop_skips_the_layers_that_the_peer_skips(seed: int) -> None:
    ours, theirs = make_pair(**{**SILENT, "layerdrop": 0.5, "mask_time_prob": 0.0, "num_hidden_layers": 5})
    audio, _ = batch()
    ours.train(), theirs.train()
    torch.manual_seed(seed)
    a = ours(audio, output_hidden_states=True)
    torch.manual_seed(seed)
    b = theirs(audio, output_hidden_states=True)
    assert_close("model, layerdrop", a.last_hidden_state, b.last_hidden_state)
    assert len(a.hidden_states) == 6
    skipped = sum(torch.equal(x, y) for x, y in itertools.pairwise(a.hidden_states[:-1]))
    assert len(b.hidden_states) <= 6 - skipped  # the peer leaves skipped layers out


@pytest.mark.parametrize(
    "knobs", [{}, {"mask_time_prob": 0.0}, {"add_adapter": True}, {"num_hidden_layers": 1}], ids=str
)
def test_state_dicts_have_the_same_keys_shapes_and_types(knobs: dict[str, Any]) -> None:
    ours, theirs = make_pair(**knobs)
    mine = {k: (v.shape, v.dtype) for k, v in ours.state_dict().items()}
    assert mine == {k: (v.shape, v.dtype) for k, v in theirs.state_dict().items()}
    assert ("masked_spec_embed" in mine) == (knobs.get("mask_time_prob") != 0.0)


@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (2, 2), (3, 1), (4, 3), (5, 2)])
def test_adapter_lengths_are_exact(kernel_size: int, stride: int) -> None:
    """The peer's formula holds for kernel 3 alone; its convolutions are right for all."""
    ours, theirs = make_pair(
        add_adapter=True, adapter_kernel_size=kernel_size, adapter_stride=stride, num_adapter_layers=2
    )
    audio, _ = batch()
    with torch.no_grad():
        got, wanted = ours(audio).last_hidden_state, theirs(audio).last_hidden_state
    assert_close("model, adapter", got, wanted)
    assert ours._get_feat_extract_output_lengths(audio.shape[1]).item() == wanted.shape[1]


@pytest.mark.gpu
@pytest.mark.parametrize("combination", COMBINATIONS[::3], ids=NAMES[::3])
def test_evaluation_on_the_gpu(combination: tuple[Any, ...]) -> None:
    knobs = dict(
        zip(
            ("position_embeddings_type", "feat_extract_norm", "conv_bias", "hidden_act", "add_adapter"),
            combination,
            strict=True,
        )
    )
    ours, theirs = (m.cuda() for m in make_pair(**knobs))
    audio, mask = (x.cuda() for x in batch())
    with torch.backends.cudnn.flags(allow_tf32=False):
        compare("model, gpu", ours, theirs, input_values=audio)
        ours.config.padding_invariant = False
        compare("model, gpu, padded", ours, theirs, input_values=audio, attention_mask=mask)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("positions", POSITIONS)
def test_half_precision_on_the_gpu(positions: str | None, dtype: torch.dtype) -> None:
    half_precision("cuda", positions, dtype)


@pytest.mark.parametrize("positions", POSITIONS)
def test_half_precision(positions: str | None) -> None:
    half_precision("cpu", positions, torch.bfloat16)


def half_precision(device: str, positions: str | None, dtype: torch.dtype) -> None:
    """Finite, and about as far from fp32 as the peer is in the same type."""
    ours, theirs = (
        m.to(device) for m in make_pair(position_embeddings_type=positions, feat_extract_norm="layer")
    )
    audio, mask = (x.to(device) for x in batch())
    real = ours._get_feature_vector_attention_mask(count_frames(ours), mask)
    with torch.no_grad():
        wanted = ours(audio, attention_mask=mask).last_hidden_state[real]
        alike = theirs(audio).last_hidden_state
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        theirs.encoder.embed_positions = type(theirs.encoder.embed_positions or nn.Identity())(theirs.config)
        got = ours(audio, attention_mask=mask).last_hidden_state[real]
        peer = theirs(audio.to(dtype)).last_hidden_state
    assert got.dtype == dtype
    assert torch.isfinite(got).all()
    gap = difference(got.float(), wanted)
    assert 0 < gap < 0.1, gap
    assert gap < 3 * difference(peer.float(), alike)
