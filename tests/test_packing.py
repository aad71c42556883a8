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

from helpers import assert_close, difference, randomise_, tiny_config
from w2vc.attention import Packing, SelfAttention
from w2vc.conformer import ConformerEncoder
from w2vc.convolution import ConvolutionModule
from w2vc.features import frame_mask
from w2vc.model import Wav2Vec2ConformerModel
from w2vc.positions import make_positions

NOISES = (
    "hidden_dropout",
    "activation_dropout",
    "attention_dropout",
    "conformer_conv_dropout",
    "feat_proj_dropout",
)
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


def step(
    model: Wav2Vec2ConformerModel, inputs: dict[str, Tensor], seed: int, **asked: Any
) -> dict[str, Tensor]:
    """One forward and backward: everything that comes out, by name. A padded frame has no part in the loss."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = model(**inputs, **asked)
    frames = model._get_feature_vector_attention_mask(
        out.last_hidden_state.shape[1], inputs["attention_mask"]
    )
    early = model._get_feature_vector_attention_mask(
        out.extract_features.shape[1], inputs["attention_mask"], False
    )
    real = out.last_hidden_state[frames]
    loss = (real * torch.linspace(-1, 1, real.numel()).view_as(real)).sum()
    found = {"last": real, "features": out.extract_features[early]}
    for i, state in enumerate(out.hidden_states or ()):
        found[f"state {i}"] = state  # on the padding too: 0
        loss = loss + state[early].square().mean()
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    found["gradients"] = torch.cat([g.flatten() for g in gradients])
    return found | {
        name: b.clone() for name, b in model.named_buffers() if "running" in name or "tracked" in name
    }


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
    *,
    knobs: dict[str, Any],
    frames: list[int],
    extra: int,
    training: bool,
    checkpointing: bool,
    states: bool,
    seed: int,
) -> None:
    packed = build(seed, **knobs).double().train(training)  # in 64 bits, where rounding cannot hide a mistake
    if checkpointing:
        packed.gradient_checkpointing_enable()
    padded = copy.deepcopy(packed)
    inputs = batch([400 + 320 * (n - 1) for n in frames], extra, seed)
    inputs["input_values"] = inputs["input_values"].double()
    with pytest.MonkeyPatch.context() as patch:
        seen = packings(patch)
        ours = step(packed, inputs, seed, output_hidden_states=states)
        assert [p is not None for p in seen] == [True]
        patch.setattr(Packing, "of", never)
        assert_equal_steps(ours, step(padded, inputs, seed, output_hidden_states=states))


@pytest.mark.parametrize("kind", ["relative", "rotary", None])
@pytest.mark.parametrize("training", [False, True])
def test_the_way_of_an_accelerator_gives_the_same(
    kind: str | None, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(position_embeddings_type=kind).train(training)
    one_by_one = step(copy.deepcopy(model), batch(LENGTHS, 700), 0)
    calls: list[int] = []
    together = SelfAttention._mix_padded
    monkeypatch.setattr(SelfAttention, "_mix_one_by_one", lambda *a: (calls.append(1), together(*a))[1])
    assert_equal_steps(one_by_one, step(model, batch(LENGTHS, 700), 0))
    assert len(calls) == model.config.num_hidden_layers


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("kind", ["relative", "rotary", None])
def test_half_precision_is_as_close_to_fp32_packed_as_padded(
    kind: str | None, mode: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 roundings of a number, over three layers; angles, statistics and softmax are computed in fp32."""
    sizes = {
        "num_hidden_layers": 3,
        "layerdrop": 0.0,
        "mask_time_prob": 0.0,
        "position_embeddings_type": kind,
    }
    model, inputs = build(**sizes).train(training), batch([6000, 12_000, 3000])
    dtype = torch.float16 if mode == "float16" else torch.bfloat16

    def states(model: Wav2Vec2ConformerModel) -> Tensor:
        return model(**inputs).last_hidden_state.float()

    with torch.no_grad():
        want, half, gaps = states(copy.deepcopy(model)), copy.deepcopy(model), []
        if mode != "autocast":
            half.to(dtype)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
                gaps.append(difference(states(copy.deepcopy(half)), want))
            monkeypatch.setattr(Packing, "of", never)
    packed, padded = gaps
    assert 0 < packed < 16 * torch.finfo(dtype).eps
    assert packed < 2 * padded


# ------------------------------------------------------------------------------------ no work on padding


class Widest(TorchDispatchMode):
    """Notes the rows of every matrix product with a weight of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            self.rows.add(args[-2].shape[0])
        return func(*args, **(kwargs or {}))


def operations(encoder: ConformerEncoder, hidden: Tensor, mask: Tensor | None) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(hidden, mask)
    return counter.get_total_flops()


def test_layers_do_no_work_on_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products meet N rows and no more; all operations together are those of the utterances alone."""
    encoder = ConformerEncoder(
        tiny_config(position_embeddings_type="rotary", attn_implementation="eager")
    ).eval()
    lengths = [50, 9, 31]
    hidden, mask = torch.randn(3, 50, 32), frame_mask(torch.tensor(lengths), 50)
    with Widest() as widest, torch.no_grad():
        encoder(hidden, mask)
    assert widest.rows == {90}
    packed = operations(encoder, hidden, mask)
    alone = sum(operations(encoder, hidden[i : i + 1, :n], None) for i, n in enumerate(lengths))
    monkeypatch.setattr(Packing, "of", never)
    padded = operations(encoder, hidden, mask)
    depthwise = (
        2 * 60 * 32 * encoder.config.conv_depthwise_kernel_size * len(encoder.layers)
    )  # it meets 60 padded frames
    assert packed == alone + depthwise
    assert packed < 0.62 * padded  # 60 % of the frames are real


def test_nothing_but_the_convolution_is_as_large_as_the_padded_batch() -> None:
    """Among the tensors of a training step, those with B T frames are of width D at most, never the feed-forward's."""
    model = build(intermediate_size=128).train()
    inputs = batch([20_000, 1000, 1000, 1000])
    kept: list[int] = []
    n_frames = model._get_feat_extract_output_lengths(20_000).item()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        hidden = torch.randn(4, n_frames, 32)
        mask = model._get_feature_vector_attention_mask(n_frames, inputs["attention_mask"])
        model.encoder(hidden, mask)
    assert max(kept) < 4 * n_frames * 128 / 2


# ----------------------------------------------------------------------------------------- when it packs


def test_who_wants_to_see_padded_tensors_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, seen = build(), batch(LENGTHS), packings(monkeypatch)
    want = model.eval()(**inputs).last_hidden_state
    assert len(seen) == 1
    maps = model(**inputs, output_attentions=True)
    assert maps.attentions[0].shape[0] == 4
    shapes: list[torch.Size] = []
    hook = model.encoder.layers[0].ffn1.register_forward_hook(lambda *call: shapes.append(call[2].shape))
    hooked = model(**inputs).last_hidden_state
    hook.remove()
    assert shapes == [want.shape]
    model.config.padding_invariant = False
    leaky = model(**inputs).last_hidden_state
    model.config.padding_invariant = True
    assert len(seen) == 1  # none of the three was packed
    for got in (maps.last_hidden_state, hooked):
        assert_close("packing, padded on request", got, want)  # the padding is 0 in both
    assert difference(leaky, want) > 1e-3


@pytest.mark.parametrize("packs", [True, False])
def test_padding_comes_out_as_zero(packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packs:
        monkeypatch.setattr(Packing, "of", never)
    model, inputs = build().eval(), batch(LENGTHS)
    out = model(**inputs, output_hidden_states=True)
    mask = model._get_feature_vector_attention_mask(out.last_hidden_state.shape[1], inputs["attention_mask"])
    for state in (out.last_hidden_state, *out.hidden_states):
        assert state[~mask].abs().max() == 0
        assert (state[mask].abs().amax(-1) > 0).all()


def test_a_mask_is_packed_only_where_it_can_be_and_where_it_helps() -> None:
    lengths = torch.tensor([5, 0, 3])
    packing = Packing.of(frame_mask(lengths, 6), "cpu")
    assert packing is not None
    assert packing.lengths == [5, 3]
    padded = torch.randn(3, 6, 2, 4)
    again = packing.unpack(packing.pack(padded))
    real = frame_mask(lengths, 6)
    assert torch.equal(again[real], padded[real])
    assert again[~real].abs().max() == 0
    assert Packing.of(torch.ones(2, 4, dtype=torch.bool), "cpu") is None  # no padding
    assert Packing.of(torch.tensor([[True, False, True]]), "cpu") is None  # a hole
    assert Packing.of(torch.tensor([[False, True, True]]), "cpu") is None  # padded on the left
    assert Packing.of(torch.tensor([[True, False], [False, False]]), "cpu") is None  # one frame in all
    assert Packing.of(frame_mask(lengths, 6).to("meta"), "meta") is None  # reading it would wait for a device


@pytest.mark.parametrize("kind", ["relative", "rotary", None])
def test_masks_with_holes_and_empty_rows_still_work(kind: str | None) -> None:
    encoder = randomise_(ConformerEncoder(tiny_config(position_embeddings_type=kind))).eval()
    hidden, mask = torch.randn(2, 6, 32), torch.tensor([[True] * 6, [True, True, False, True, True, False]])
    other = hidden.clone()
    other[1, [2, 5]] = 99.0
    assert_close("packing, holes", encoder(other, mask)[0], encoder(hidden, mask)[0])
    empty = frame_mask(torch.tensor([6, 0]), 6)
    assert_close("packing, an empty row", encoder(hidden, empty)[0][:1], encoder(hidden[:1])[0])


def test_one_real_frame_trains() -> None:
    encoder = ConformerEncoder(
        tiny_config(**{k: v for k, v in SILENT.items() if k != "feat_proj_dropout"})
    ).train()
    assert torch.isfinite(encoder(torch.randn(2, 6, 32), frame_mask(torch.tensor([1, 0]), 6))[0]).all()


def test_a_mask_on_the_host_serves_audio_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for an accelerator: its tensors hold no values, so whatever read one would raise."""
    encoder, seen = ConformerEncoder(tiny_config()).eval().to("meta"), packings(monkeypatch)
    mask = frame_mask(torch.tensor([6, 4]), 6)
    hidden = torch.zeros(2, 6, 32, device="meta")
    assert encoder(hidden, mask)[0].shape == (2, 6, 32)
    assert seen[0] is not None
    assert encoder(hidden, mask.to("meta"))[0].shape == (2, 6, 32)
    assert seen[1:] == [None]
    encoder.config.padding_invariant = False
    assert encoder(hidden, mask)[0].device.type == "meta"


def test_packed_frames_that_do_not_fit_are_refused() -> None:
    layer = SelfAttention(tiny_config(position_embeddings_type=None))
    packing = Packing(torch.tensor([3, 2]), 3, "cpu")
    layer(torch.randn(1, 5, 32), packing)
    with pytest.raises(ValueError, match=r"hidden is \[2, 3, 32\].*must be \[1, 5, 32\]"):
        layer(torch.randn(2, 3, 32), packing)
    with pytest.raises(ValueError, match="output_attentions=True needs a padded batch"):
        layer(torch.randn(1, 5, 32), packing, output_attentions=True)
    relative = SelfAttention(tiny_config())
    with pytest.raises(ValueError, match=r"positions has shape \[\[9, 32\]\].*\[\[5, 32\]\]"):
        relative(torch.randn(1, 5, 32), packing, make_positions(relative.config)(5, "cpu", torch.float32))


def test_batch_norm_of_a_packed_batch_counts_each_frame_once() -> None:
    module = ConvolutionModule(tiny_config(conformer_conv_dropout=0.0)).train()
    packing, counts = Packing(torch.tensor([7, 2]), 7, "cpu"), []
    hook = module.batch_norm.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape))
    module(torch.randn(1, 9, 32), packing)
    hook.remove()
    assert counts == [(1, 32, 9)]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["relative", "rotary", None])
def test_packed_equals_padded_on_the_gpu(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = randomise_(ConformerEncoder(tiny_config(position_embeddings_type=kind))).eval().cuda()
    mask = frame_mask(torch.tensor([40, 9, 22]), 40)
    hidden, seen = torch.randn(3, 40, 32, device="cuda"), packings(monkeypatch)
    with torch.no_grad():
        packed, padded = encoder(hidden, mask)[0], encoder(hidden, mask.cuda())[0]
    assert [p is not None for p in seen] == [True, False]
    assert_close("packing, gpu", packed, padded, 1e-3)
