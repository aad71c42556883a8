"""Every fast form gives what its plain one gives: frames, gradients, buffers. A new row of `FAST` is tested by being there."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import w2vc
from helpers import assert_close, difference, randomise_, tiny_config
from w2vc.evaluation.reports import evaluate
from w2vc.files.pretrained import PreTrainedModel
from w2vc.model.attention import SelfAttention
from w2vc.model.classification import Wav2Vec2ConformerForAudioFrameClassification as ForFrames
from w2vc.model.classification import Wav2Vec2ConformerForSequenceClassification as ForSequence
from w2vc.model.conformer import ConformerEncoder
from w2vc.model.convolution import ConvolutionModule
from w2vc.model.ctc import Wav2Vec2ConformerForCTC
from w2vc.model.fast import (
    FAST,
    BlockwiseFeatureEncoder,
    FastSelfAttention,
    PackedConformerEncoder,
    PackedConvolutionModule,
    Packing,
    convolve_rows,
    describe_forms,
    fast_forms,
    fold_group_norm,
    plain_forms,
    slow_down,
    speed_up,
)
from w2vc.model.features import FeatureEncoder, frame_mask, receptive_field
from w2vc.model.masking import compute_mask_indices
from w2vc.model.negatives import sample_negative_indices
from w2vc.model.positions import make_positions
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining
from w2vc.model.speaker import Wav2Vec2ConformerForXVector
from w2vc.model.wav2vec2 import Wav2Vec2ConformerModel

NOISES = (
    "hidden_dropout", "activation_dropout", "attention_dropout", "conformer_conv_dropout", "feat_proj_dropout",
    "feat_quantizer_dropout", "final_dropout",
)  # fmt: skip
HEADS: dict[str, type[PreTrainedModel]] = {
    "base": Wav2Vec2ConformerModel,
    "pretraining": Wav2Vec2ConformerForPreTraining,
    "ctc": Wav2Vec2ConformerForCTC,
    "sequence": ForSequence,
    "frames": ForFrames,
    "xvector": Wav2Vec2ConformerForXVector,
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random_config(seed: int, **fixed: Any) -> Any:
    """Sizes and switches drawn at random; without dropout, whose noise has another shape in a packed batch."""
    draw = random.Random(seed)
    options = {
        "feat_extract_norm": draw.choice(["group", "layer"]),
        "conv_bias": draw.choice([False, True]),
        "position_embeddings_type": draw.choice(["relative", "rotary", None]),
        "attn_implementation": draw.choice(["sdpa", "eager"]),
        "hidden_act": draw.choice(["gelu", "swish", "relu"]),
        "feat_extract_activation": draw.choice(["gelu", "relu"]),
        "conv_depthwise_kernel_size": draw.choice([1, 5, 31]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "hidden_states_pre_norm": draw.choice([False, True]),
        "add_adapter": draw.choice([False, False, True]),
        "layerdrop": draw.choice([0.0, 0.5]),
        "padding_invariant": draw.choice([True, True, True, False]),
        "mask_time_prob": draw.choice([0.0, 0.3]),
        "mask_time_length": 2,
        **dict.fromkeys(NOISES, 0.0),
    }
    return tiny_config(**(options | fixed))


def random_lengths(seed: int, empty: bool = False) -> list[int]:
    """Frames of each row: one row or more, equal or not, a single frame, or (where a part allows it) none at all."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, 25) for _ in range(draw.choice([1, 2, 3, 4]))]
    lengths = [lengths[0]] * len(lengths) if draw.random() < 0.2 else lengths
    return [*lengths, 0] if empty and draw.random() < 0.3 else lengths


def randomised(module: Any, seed: int) -> Any:
    module = randomise_(module, seed)
    for name, p in module.named_parameters():
        if "pos_bias" in name:
            nn.init.normal_(p, std=0.5)
    return module


def inputs_for(part: nn.Module, seed: int, lengths: list[int], extra: int) -> tuple[list[Any], Tensor]:
    """What a part is called with: random numbers and a mask or none; and which frames of its output count."""
    g = torch.Generator().manual_seed(seed)
    config: Any = part.config
    if isinstance(part, FeatureEncoder):
        width, hop = receptive_field(config.conv_kernel, config.conv_stride)
        samples = torch.tensor([width + hop * (n - 1) + n % hop if n else width - 1 for n in lengths])
        audio = torch.randn(len(lengths), int(samples.max()) + hop * extra, generator=g)
        rows = part(audio).shape[1]
        return [audio, samples], frame_mask(torch.tensor(lengths), rows)
    mask = frame_mask(torch.tensor(lengths), max(lengths) + extra)
    hidden = torch.randn(*mask.shape, config.hidden_size, generator=g)
    if isinstance(part, SelfAttention):
        positions = make_positions(config)
        return [hidden, mask, positions and positions(mask.shape[1], "cpu", hidden.dtype)], mask
    return [hidden, mask], mask


def step(part: nn.Module, inputs: list[Any], counts: Tensor, seed: int) -> dict[str, Tensor]:
    """Forward and backward: everything that comes out, by name. The loss reads the frames that count."""
    torch.manual_seed(seed)  # LayerDrop and masks
    leaves = [
        x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    ]
    out = part(*leaves)
    frames = (out if isinstance(out, Tensor) else out[0])[counts]
    found = {"frames": frames}
    weights = torch.linspace(-1, 1, frames.numel(), device=frames.device, dtype=frames.dtype).view_as(frames)
    (frames * weights).sum().backward()
    found["input gradient"] = (
        leaves[0].grad[counts] if counts.shape == leaves[0].shape[:2] else leaves[0].grad
    )
    return found | state_of(part)


def state_of(part: nn.Module) -> dict[str, Tensor]:
    """Gradients of all parameters in one row (so that a true gradient of 0 does not count as its rounding), and buffers."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in part.parameters()]
    missing = torch.tensor([p.grad is None for p in part.parameters()]).double()
    buffers = {name: b.double() for name, b in part.named_buffers()}
    return {"gradients": torch.cat([x.flatten() for x in gradients]), "missing": missing, **buffers}


def assert_same(name: str, fast: dict[str, Tensor], plain: dict[str, Tensor], tol: float = 1e-5) -> None:
    assert fast.keys() == plain.keys()
    for key, x in fast.items():
        assert_close(f"fast {name}, {key.rsplit('.', 1)[-1]}", x, plain[key], tol)


def small_blocks(model: Any) -> Any:
    """Blocks that a toy input fills: 7 frames of the feature encoder, 3 queries of attention."""
    for part in model.modules():
        if isinstance(part, BlockwiseFeatureEncoder):
            part.block = 7
        if isinstance(part, FastSelfAttention):
            part.most_bytes, part.fewest = 1, 3
    return model


# ------------------------------------------------------------------------------------------ pair by pair


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("plain", list(FAST), ids=lambda kind: kind.__name__)
def test_each_pair_is_equal(plain: type[nn.Module], training: bool, device: str) -> None:
    """In 64 bits, where rounding cannot hide a mistake; blocks are made small enough to be many."""
    torch.manual_seed(0)
    for seed in range(14):
        config = random_config(seed)
        part = randomised(plain(config), seed).double().train(training)
        if hasattr(part, "gradient_checkpointing"):
            part.gradient_checkpointing = seed % 3 == 0
        lengths = random_lengths(seed, empty=config.padding_invariant)
        if training and sum(lengths) < 2:
            lengths = [*lengths, 3]  # a batch norm needs two frames
        inputs, counts = inputs_for(copy.deepcopy(part).float(), seed, lengths, extra=seed % 2 * 3)
        if seed % 4 == 3:
            inputs[1], counts = None, torch.ones_like(counts)
        fast = small_blocks(speed_up(copy.deepcopy(part)))
        assert type(fast) is FAST[plain]
        move = [x.to(device) if isinstance(x, Tensor) else x for x in map(to_double, inputs)]
        got, want = (step(form.to(device), move, counts.to(device), seed) for form in (fast, part))
        assert_same(plain.__name__, got, want)
        if not training:  # without gradients there are other ways to put blocks together
            with torch.no_grad():
                got, want = (form(*move) for form in (fast, part))
            got, want = (x if isinstance(x, Tensor) else x[0] for x in (got, want))
            assert_close(f"fast {plain.__name__}, no_grad", got[counts.to(device)], want[counts.to(device)])


def to_double(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(to_double, x))
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


# ------------------------------------------------------------------------------------------ whole models


def build(seed: int = 0, head: str = "base", **fixed: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    return randomised(HEADS[head](random_config(seed, **fixed)), seed)


def batch(lengths: list[int], seed: int = 0, extra: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mask = frame_mask(torch.tensor(lengths), max(lengths) + extra)
    return {"input_values": torch.randn(mask.shape, generator=g), "attention_mask": mask.long()}


def with_targets(head: str, model: PreTrainedModel, inputs: dict[str, Tensor], seed: int) -> dict[str, Any]:
    """What a head needs for its loss, and the base model for none."""
    base: Any = getattr(model, model.base_model_prefix, model) if head != "base" else model
    g, rows = torch.Generator().manual_seed(seed), len(inputs["input_values"])
    mask = inputs["attention_mask"]
    n_frames = int(base._get_feat_extract_output_lengths(mask.shape[1]))
    frames = base._get_feature_vector_attention_mask(n_frames, mask)
    if head == "pretraining":
        hidden = compute_mask_indices(frames.shape, 0.5, 2, attention_mask=frames, min_masks=1, generator=g)
        negatives = sample_negative_indices(frames.shape, 5, hidden, generator=g)
        return {"mask_time_indices": hidden, "sampled_negative_indices": negatives}
    if head == "ctc":
        return {"labels": torch.randint(1, 5, (rows, 2), generator=g)}
    if head == "frames":
        return {"labels": torch.nn.functional.one_hot(torch.randint(0, 2, frames.shape, generator=g), 2)}
    return {} if head == "base" else {"labels": torch.randint(0, 2, (rows,), generator=g)}


def model_step(model: Any, inputs: dict[str, Any], seed: int, **wanted: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    out = model(**inputs, **wanted)
    loss = out[0] if "labels" in inputs or "sampled_negative_indices" in inputs else None
    found = {"loss": loss}
    if loss is None:
        last = out.last_hidden_state
        mask = model._get_feature_vector_attention_mask(last.shape[1], inputs["attention_mask"])
        found = {"frames": last[mask], "features": out.extract_features.detach()}
        loss = (last[mask] * torch.linspace(-1, 1, last[mask].numel()).view_as(last[mask])).sum()
    loss.backward()
    return found | state_of(model)


@pytest.mark.parametrize("head", list(HEADS))
def test_whole_models_are_equal(head: str) -> None:
    """All heads over random configs: norms, positions, masks, checkpointing, LayerDrop, training and not."""
    for seed in range(6):
        fixed: dict[str, Any] = {"add_adapter": False} if head != "base" else {}
        if head == "pretraining":
            fixed["mask_time_prob"] = 0.5  # with a mask embedding
        plain: Any = build(seed, head, **fixed, num_labels=2).double().train(seed % 2 == 0)
        if seed % 3 == 0:
            plain.gradient_checkpointing_enable()
        draw = random.Random(seed)
        inputs: dict[str, Any] = batch(
            [draw.randint(6000, 9000) for _ in range(3)], seed, extra=seed % 2 * 900
        )
        inputs["input_values"] = inputs["input_values"].double()
        inputs |= with_targets(head, plain, inputs, seed)
        fast = small_blocks(speed_up(copy.deepcopy(plain)))
        if head == "base" and not plain.config.padding_invariant:
            plain.config.mask_time_prob = fast.config.mask_time_prob = 0.0
        assert_same(head, model_step(fast, inputs, seed), model_step(plain, inputs, seed))


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_low_precision_is_as_close_to_fp64_fast_as_plain(norm: str, mode: str) -> None:
    model = build(
        1, feat_extract_norm=norm, padding_invariant=True, add_adapter=False, mask_time_prob=0.0
    ).eval()
    inputs = batch([6000, 12_000, 3000])
    exact = copy.deepcopy(model).double()(inputs["input_values"].double(), inputs["attention_mask"])
    dtype = torch.float32 if mode == "autocast" else getattr(torch, mode)
    gaps, dtypes = [], set()
    for form in (speed_up, slow_down):
        low = form(copy.deepcopy(model)).to(dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            out = low(**inputs).last_hidden_state
        gaps.append(difference(out, exact.last_hidden_state))
        dtypes.add(out.dtype)
    assert len(dtypes) == 1
    bound = torch.finfo(torch.bfloat16 if mode == "autocast" else dtype).eps
    assert 0 < gaps[0] < max(2 * gaps[1], 16 * bound)


def test_dropout_still_drops() -> None:
    fast = speed_up(build(0, hidden_dropout=0.5, padding_invariant=True)).train()
    a, b = (fast(**batch([4000, 9000])).last_hidden_state for _ in range(2))
    assert difference(a, b) > 0.01


# ------------------------------------------------------------------------------------------ what a swap leaves alone


def test_a_swap_keeps_keys_parameters_copies_and_files(tmp_path: Path) -> None:
    plain: Any = build(head="ctc", padding_invariant=True)
    types = [type(m) for m in plain.modules()]
    keys, parameters = list(plain.state_dict()), list(map(id, plain.parameters()))
    inputs = batch([4000, 7000])
    want = plain.eval()(**inputs).logits
    fast: Any = speed_up(plain)
    assert fast is plain
    assert list(fast.state_dict()) == keys
    assert list(map(id, fast.parameters())) == parameters
    fast.save_pretrained(tmp_path)
    stream = io.BytesIO()
    torch.save(fast, stream)
    stream.seek(0)
    others = {
        "a copy": copy.deepcopy(fast),
        "pickle": pickle.loads(pickle.dumps(fast)),
        "torch.save": torch.load(stream, weights_only=False),
    }
    for name, other in others.items():
        assert describe_forms(other) == describe_forms(fast), name
        assert_close(f"fast, {name}", other(**inputs).logits, want)
    loaded: Any = Wav2Vec2ConformerForCTC.from_pretrained(tmp_path)
    assert [type(m) for m in loaded.modules()] == types, "what is loaded is plain"
    assert_close("fast, saved and loaded", loaded.eval()(**inputs).logits, want)
    fast.load_state_dict(loaded.state_dict(), strict=True)
    assert slow_down(fast) is plain
    assert [type(m) for m in plain.modules()] == types
    assert torch.equal(plain(**inputs).logits, want)


def test_a_model_may_be_sped_up_twice() -> None:
    model = speed_up(speed_up(build()))
    assert type(model.encoder) is PackedConformerEncoder
    assert type(slow_down(slow_down(model)).encoder) is ConformerEncoder


class ForeignLinear(nn.Linear):
    """A layer of somebody else's."""


class OwnAttention(SelfAttention):
    """A part of somebody's own: it knows nothing of packing."""


OwnAttention.__module__ = "w2vc.own"  # even where it calls itself ours


def touch(model: Any, how: str) -> set[str]:
    """Change a model in a way that a fast form could not bear; returns what has to stay plain."""
    block = model.encoder.layers[0]
    if how == "hook":
        block.ffn1.register_forward_hook(lambda module, inputs, output: None)
    elif how == "backward hook":
        block.conv_module.glu.register_full_backward_hook(lambda module, inputs, outputs: None)
        return {"encoder", "encoder.layers.0.conv_module"}
    elif how == "foreign class":
        block.self_attn.linear_q = ForeignLinear(32, 32)
        return {"encoder", "encoder.layers.0.self_attn"}
    elif how == "subclass":
        block.self_attn.__class__ = OwnAttention
        return {"encoder", "encoder.layers.0.self_attn"}
    elif how == "replaced forward":
        layer = model.feature_extractor.conv_layers[1]
        layer.forward = layer.forward
        return {"feature_extractor"}
    elif how == "parametrization":
        nn.utils.parametrizations.weight_norm(model.feature_extractor.conv_layers[2].conv)
        return {"feature_extractor"}
    return {"encoder"}


@pytest.mark.parametrize(
    "how", ["hook", "backward hook", "foreign class", "subclass", "replaced forward", "parametrization"]
)
def test_what_was_touched_stays_plain_and_is_named(how: str, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = build(
        0, padding_invariant=True, num_hidden_layers=2, mask_time_prob=0.0, add_adapter=False
    ).eval()
    plain = touch(model, how)
    want = model(**batch([4000, 9000])).last_hidden_state
    with caplog.at_level(logging.INFO, logger="w2vc.model.fast"):
        speed_up(model)
    assert {
        name
        for name, m in model.named_modules()
        if isinstance(m, tuple(FAST)) and type(m) not in FAST.values()
    } == plain
    (line,) = caplog.messages
    assert set(line.split("; plain: ")[1].split(", ")) == plain
    assert "FastSelfAttention" in line
    assert_close(f"fast, {how}", model(**batch([4000, 9000])).last_hidden_state, want)


def test_an_untouched_model_is_all_fast(caplog: pytest.LogCaptureFixture) -> None:
    model = build(num_hidden_layers=2)
    assert describe_forms(model).startswith("fast forms: none; plain: feature_extractor, encoder")
    with caplog.at_level(logging.INFO, logger="w2vc.model.fast"):
        speed_up(model)
    assert caplog.messages == [
        "fast forms: 1 BlockwiseFeatureEncoder, 1 PackedConformerEncoder, 2 FastSelfAttention, 2 PackedConvolutionModule"
    ]


def test_int8_weights_run_packed() -> None:
    model: Any = build(0, padding_invariant=True, mask_time_prob=0.0).eval()
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    want = small(**batch([4000, 9000])).last_hidden_state
    assert "plain" not in describe_forms(speed_up(small))
    got = small(**batch([4000, 9000])).last_hidden_state
    assert difference(got, want) < 0.1  # one scale for a whole batch: its range decides, and padding is in it


# ------------------------------------------------------------------------------------------ graphs, states, maps


def test_a_compiled_or_exported_model_is_the_plain_one() -> None:
    torch._dynamo.reset()
    model: Any = build(3, padding_invariant=True, layerdrop=0.0, mask_time_prob=0.0, add_adapter=False).eval()
    inputs = batch([4000, 9000])
    want = model(**inputs).last_hidden_state
    compiled = torch.compile(speed_up(model), backend="eager", fullgraph=True)
    assert_close("fast, compiled", compiled(**inputs).last_hidden_state, want)
    attention = speed_up(SelfAttention(tiny_config())).eval().requires_grad_(False)
    attention.most_bytes, attention.fewest = 1, 4
    hidden, table = torch.randn(2, 9, 32), make_positions(attention.config)(9, "cpu", torch.float32)
    traced = torch.jit.trace(lambda x: attention(x, None, table)[0], hidden, check_trace=False)
    assert str(traced.graph).count("softmax") + str(traced.graph).count("scaled_dot_product") == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("wanted", [{"output_hidden_states": True}, {"output_attentions": True}])
def test_states_and_maps_are_those_of_the_plain_model(wanted: dict[str, bool]) -> None:
    plain: Any = build(2, padding_invariant=True, layerdrop=0.0, mask_time_prob=0.0, add_adapter=False)
    fast = small_blocks(speed_up(copy.deepcopy(plain)))
    inputs = batch([4000, 9000, 2500], extra=700)
    for form in (plain, fast):
        out = form(**inputs, **wanted)
        seen = out.hidden_states or out.attentions
        torch.autograd.grad(seen[-1].sum(), seen[0])  # a graph from the last to the first
    got, want = (form.eval()(**inputs, **wanted) for form in (fast, plain))
    for x, y in zip(got.hidden_states or got.attentions, want.hidden_states or want.attentions, strict=True):
        assert_close("fast, states and maps", x, y)
    assert_close("fast, with states and maps", got.last_hidden_state, want.last_hidden_state)


def test_padding_comes_out_as_zero() -> None:
    model: Any = speed_up(build(padding_invariant=True, add_adapter=False)).eval()
    inputs = batch([4000, 9000, 2500], extra=700)
    out = model(**inputs).last_hidden_state
    mask = model._get_feature_vector_attention_mask(out.shape[1], inputs["attention_mask"])
    assert out[~mask].abs().max() == 0
    assert (out[mask].abs().amax(-1) > 0).all()


# ------------------------------------------------------------------------------------------ less work


def operations(part: nn.Module, *inputs: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        part(*inputs)
    return counter.get_total_flops()


def test_no_operation_is_done_on_padding() -> None:
    """All operations of a packed batch are those of the utterances alone, and those of the unpacked depthwise convolution."""
    encoder = ConformerEncoder(
        tiny_config(position_embeddings_type="rotary", attn_implementation="eager")
    ).eval()
    lengths = [50, 9, 31]
    hidden, mask = torch.randn(3, 50, 32), frame_mask(torch.tensor(lengths), 50)
    padded = operations(encoder, hidden, mask)
    alone = sum(operations(encoder, hidden[i : i + 1, :n], None) for i, n in enumerate(lengths))
    depthwise = (
        2 * 60 * 32 * encoder.config.conv_depthwise_kernel_size * len(encoder.layers)
    )  # 60 padded frames
    assert operations(speed_up(encoder), hidden, mask) == alone + depthwise
    assert alone + depthwise < 0.62 * padded  # 60 % of the frames are real


def test_packing_is_its_own_inverse_and_leaves_out_empty_rows() -> None:
    real = frame_mask(torch.tensor([5, 0, 3]), 6)
    packing, padded = Packing(real), torch.randn(3, 6, 2, 4)
    assert packing.lengths == [5, 3]
    again = packing.unpack(packing.pack(padded))
    assert torch.equal(again[real], padded[real])
    assert again[~real].abs().max() == 0


def test_a_mask_is_packed_only_where_it_can_be_and_where_it_helps() -> None:
    assert Packing.helps(frame_mask(torch.tensor([5, 0, 3]), 6))
    assert not Packing.helps(torch.ones(2, 4, dtype=torch.bool))  # no padding
    assert not Packing.helps(torch.tensor([[True, False, True]]))  # a hole
    assert not Packing.helps(torch.tensor([[False, True, True]]))  # padded on the left
    assert not Packing.helps(torch.tensor([[True, False], [False, False]]))  # one frame in all
    assert not Packing.helps(torch.zeros(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["relative", "rotary", None])
def test_masks_with_holes_are_those_of_the_plain_encoder(kind: str | None) -> None:
    encoder = randomised(ConformerEncoder(tiny_config(position_embeddings_type=kind)), 0).eval()
    hidden, mask = torch.randn(2, 6, 32), torch.tensor([[True] * 6, [True, True, False, True, True, False]])
    want = encoder(hidden, mask)[0]
    assert torch.equal(speed_up(encoder)(hidden, mask)[0], want)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_long_sound_in_blocks_is_equal_with_its_dropout(training: bool, dropout: float) -> None:
    """Blocks are made again in the backward pass with the dropout that they had: the gradient fits the output."""
    layer = SelfAttention(tiny_config(attention_dropout=dropout, attn_implementation="eager"))
    fast = small_blocks(speed_up(randomised(layer, 0).double().train(training)))
    hidden = torch.randn(2, 23, 32, dtype=torch.double)
    table = make_positions(layer.config)(23, "cpu", torch.double)
    mask = frame_mask(torch.tensor([23, 15]), 23)

    def out(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return fast(x, mask, table)[0][mask]

    if dropout == 0 or not training:
        assert_close(
            "fast, blocks", out(hidden), slow_down(copy.deepcopy(fast))(hidden, mask, table)[0][mask]
        )
    direction, x = torch.randn_like(hidden), hidden.clone().requires_grad_()
    out(x).square().sum().backward()
    slope = (
        out(hidden + 1e-6 * direction).square().sum() - out(hidden - 1e-6 * direction).square().sum()
    ) / 2e-6
    assert_close("fast, gradient of blocks", (x.grad * direction).sum(), slope, 1e-6)


class PeakMemory(TorchDispatchMode):
    """Adds up the bytes of the tensors that are made while it is entered, for as long as they live (the speed chapter)."""

    now = peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                storage = x.untyped_storage()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, n_bytes: int) -> None:
        self.now -= n_bytes


def peak(work: Any) -> int:
    with PeakMemory() as memory:
        work()
    return memory.peak


def test_fast_forms_hold_less() -> None:
    """A form earns its keep with 0.6 of the memory: the feature encoder, long sound, and a batch with padding in training."""
    layer = SelfAttention(tiny_config()).eval()
    hidden, table = torch.randn(1, 600, 32), make_positions(layer.config)(600, "cpu", torch.float32)
    blocks = speed_up(copy.deepcopy(layer))
    blocks.most_bytes = 1
    plain, fast = (peak(lambda f=f: f(hidden, None, table)[0].sum().backward()) for f in (layer, blocks))
    assert fast < 0.3 * plain
    encoder = FeatureEncoder(tiny_config(conv_dim=[256] * 3))
    audio = torch.randn(2, 80_000)
    with torch.no_grad():
        plain, fast = (peak(lambda f=f: f(audio)) for f in (encoder, speed_up(copy.deepcopy(encoder))))
    assert fast < 0.4 * plain
    model = build(0, padding_invariant=True, add_adapter=False, layerdrop=0.0).train()
    inputs = batch([40_000, 4000, 4000, 4000])
    plain, fast = (
        peak(lambda f=f: model_step(f, inputs, 0)) for f in (model, speed_up(copy.deepcopy(model)))
    )
    assert fast < 0.6 * plain


# ------------------------------------------------------------------------------------------ the formulas


@pytest.mark.parametrize("bias", [False, True])
def test_rows_are_convolved_as_channels_are(bias: bool) -> None:
    for width, taps, stride in [(1, 10, 5), (6, 3, 2), (6, 2, 2), (4, 1, 1), (5, 2, 3)]:
        conv = nn.Conv1d(width, 7, taps, stride, bias=bias).double()
        rows = torch.randn(41, width, dtype=torch.double)
        assert_close("fast, rows", convolve_rows(rows, conv), conv(rows.T[None])[0].T)


def test_a_group_norm_folds_into_kernels_that_nearly_cancel() -> None:
    """Kernels that look at differences, on sound whose neighbours are alike: 32 bits would leave noise."""
    sound = torch.randn(8000).cumsum(0) + 100
    conv, norm = nn.Conv1d(1, 16, 10, 5, bias=False), nn.GroupNorm(16, 16)
    with torch.no_grad():
        conv.weight -= conv.weight.mean(2, keepdim=True)
        kernel, bias = fold_group_norm(sound.unfold(0, 10, 5), conv, norm)
        got = nn.functional.conv1d(sound[None, None].double(), kernel.double(), bias.double(), 5)
        want = norm.double()(conv.double()(sound[None, None].double()))
    assert_close("fast, folded norm", got, want, 1e-4)


def test_a_bias_that_cancels_has_a_gradient_of_zero() -> None:
    encoder = speed_up(FeatureEncoder(tiny_config(feat_extract_norm="group", conv_bias=True)))
    encoder(torch.randn(2, 4000)).sum().backward()
    assert encoder.conv_layers[0].conv.bias.grad.abs().max() == 0


def test_batch_norm_of_a_packed_batch_counts_each_frame_once() -> None:
    module: Any = speed_up(ConvolutionModule(tiny_config(conformer_conv_dropout=0.0))).train()
    assert type(module) is PackedConvolutionModule
    packing, shapes = Packing(frame_mask(torch.tensor([7, 2]), 7)), []
    module.batch_norm.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    module(torch.randn(1, 9, 32), packing)
    assert shapes == [(1, 32, 9)]


# ------------------------------------------------------------------------------------------------ the jobs


def forms_of(model: nn.Module) -> set[str]:
    """Names of the classes of the parts that have two forms."""
    return {type(part).__name__ for part in model.modules() if isinstance(part, tuple(FAST))}


PLAIN, SPED_UP = ({form.__name__ for form in forms} for forms in (FAST, FAST.values()))


def test_transcribe_and_evaluate_take_the_fast_forms_and_give_the_model_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, speech = w2vc.load_demo("ctc"), w2vc.load_speech("builtin", "test").filter(kind="keyword")[:2]
    seen = []
    model.lm_head.register_forward_pre_hook(
        lambda *_: seen.append(forms_of(model))
    )  # outside of every part with two forms
    with caplog.at_level(logging.INFO, "w2vc.model.fast"):
        w2vc.transcribe(list(speech), model)
        evaluate(model, speech, draws=10)
    assert seen
    assert all(found == SPED_UP for found in seen)
    assert forms_of(model) == PLAIN
    assert {record.message for record in caplog.records} == {
        "fast forms: 1 BlockwiseFeatureEncoder, 1 PackedConformerEncoder, 4 FastSelfAttention, 4 PackedConvolutionModule"
    }


def test_a_model_shared_by_jobs_is_given_back_by_the_last() -> None:
    model = Wav2Vec2ConformerModel(tiny_config())
    first, second = fast_forms(model), fast_forms(model)
    with first:
        with second:
            assert forms_of(model) == SPED_UP
        assert forms_of(model) == SPED_UP
    assert forms_of(model) == PLAIN
    speed_up(model)
    with plain_forms(model):
        assert forms_of(model) == PLAIN
    assert forms_of(model) == SPED_UP


def test_who_looks_inside_sees_the_plain_forms() -> None:
    """A trace of a model that was sped up has the same rows, and the padded shapes, of the plain one."""
    model = w2vc.load_demo("ctc")
    utterance = w2vc.load_speech("builtin", "test")[0]
    plain = str(w2vc.trace(model, utterance, timed=False))
    assert str(w2vc.trace(speed_up(model), utterance, timed=False)) == plain
    assert forms_of(model) == SPED_UP
