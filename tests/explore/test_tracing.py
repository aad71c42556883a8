"""Tracing: letters and fields that are checked by gradients, exact maps, strips that name the culprit, masks and games."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import w2vc
from helpers import randomise_, tiny_config, twin
from w2vc.data.corpus import load_speech
from w2vc.explore.tracing import (
    _letter_size,
    as_input,
    block_map,
    dependency_map,
    dependency_spans,
    frozen_statistics,
    html_table,
    layerwise_diff,
    main_tensor,
    masked_audio,
    masked_samples,
    record,
    spot_the_negative,
    trace,
)
from w2vc.model.convolution import ConvolutionModule
from w2vc.model.features import FeatureEncoder, receptive_field
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining, contrastive_loss
from w2vc.model.speaker import TDNNLayer
from w2vc.model.wav2vec2 import Adapter, Wav2Vec2ConformerModel
from w2vc.training.demo import load_demo

SHORT = {"tdnn_dim": (12, 10), "tdnn_kernel": (3, 2), "tdnn_dilation": (1, 2), "xvector_output_dim": 14}
SIZES = {"proj_codevector_dim": 12, "classifier_proj_size": 18, "num_labels": 3, "vocab_size": 29, **SHORT}
HEADS = [
    w2vc.Wav2Vec2ConformerModel,
    w2vc.Wav2Vec2ConformerForPreTraining,
    w2vc.Wav2Vec2ConformerForCTC,
    w2vc.Wav2Vec2ConformerForSequenceClassification,
    w2vc.Wav2Vec2ConformerForAudioFrameClassification,
    w2vc.Wav2Vec2ConformerForXVector,
]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"add_adapter": True, "use_weighted_layer_sum": True},
    {"add_adapter": True, "output_hidden_size": 24, "num_adapter_layers": 2},
    {"position_embeddings_type": "rotary", "feat_extract_norm": "layer", "use_weighted_layer_sum": True},
    {"position_embeddings_type": None, "attn_implementation": "eager", "conv_dim": (8, 6, 10)},
]
heads = pytest.mark.parametrize(
    "head", HEADS, ids=lambda head: head.__name__.removeprefix("Wav2Vec2Conformer")
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stack(config: Any) -> dict[str, Any]:
    return {"conv_kernel": config.conv_kernel, "conv_stride": config.conv_stride}


@heads
@pytest.mark.parametrize("knobs", VARIANTS, ids=lambda knobs: "-".join(knobs) or "plain")
def test_every_part_of_every_head_has_letters_that_fit(head: Any, knobs: dict[str, Any]) -> None:
    knobs = {
        k: v for k, v in knobs.items() if k != "output_hidden_size" or "PreTraining" not in head.__name__
    }
    config = tiny_config(**SIZES)
    if "conv_dim" in knobs:  # as many layers as the tiny stack
        knobs = {**knobs, "conv_dim": tuple((8, 6, 9, 10, 11, 7, 10)[: len(config.conv_kernel)])}
    model = head(tiny_config(**SIZES, **knobs))
    found = trace(model, noise(2, 16_000), timed=False)
    unknown = [(row.name, row.kind, row.shape) for row in found if row.letters is None]
    assert unknown == []
    for row in found:
        want = tuple(_letter_size(x, found.table) for x in row.letters)
        assert want == row.shape, row
    assert len(found.legend()) >= 4
    assert all(name in str(found) for name in ("conv_layers.0", "self_attn", "[B, T, D]"))


def test_letters_come_from_the_part_and_not_from_the_number() -> None:
    """C = D = F = H·K = P: every number is ambiguous, the letters are not."""
    n_conv = len(tiny_config().conv_kernel)
    config = tiny_config(
        conv_dim=(32,) * n_conv, intermediate_size=32, proj_codevector_dim=32, codevector_dim=32
    )
    found = trace(Wav2Vec2ConformerForPreTraining(config), noise(32, 1600), timed=False)
    want = {
        "feature_extractor": "B T C",
        "feature_projection": "B T D",
        "feature_projection.layer_norm": "B T C",
        "encoder.layers.1.ffn1.intermediate_dense": "B T F",
        "encoder.layers.1.conv_module.glu": "B D T",
        "quantizer": "B T G·d",
        "project_q": "B T P",
    }
    assert {name: " ".join(found[name].letters) for name in want} == want


@pytest.mark.parametrize("name", ["Model", "ForPreTraining", "ForCTC", "ForXVector"])
def test_the_peer_can_be_traced_too(name: str) -> None:
    pytest.importorskip("transformers")
    ours = getattr(w2vc, f"Wav2Vec2Conformer{name}")(tiny_config(**SIZES, add_adapter=name == "ForCTC"))
    found = trace(twin(ours.eval()), noise(1, 16_000), timed=False)
    assert [(row.name, row.shape) for row in found if row.letters is None] == []


def test_parameters_add_up_and_what_is_not_called_is_named() -> None:
    model = Wav2Vec2ConformerForPreTraining(tiny_config())
    found = trace(model, noise(1, 8000), timed=False)
    assert list(found.unused) == ["wav2vec2_conformer.encoder.pos_conv_embed"]
    assert found[0].parameters == sum(p.numel() for p in model.parameters())
    leaves = {n for n, m in model.named_modules() if not list(m.children())}
    own = {
        n: sum(p.numel() for p in m._parameters.values() if p is not None) for n, m in model.named_modules()
    }
    called = {row.name: row.parameters for row in found}
    spread = sum(n for name, n in called.items() if name in leaves)
    spread += sum(n for name, n in own.items() if name not in leaves and name in called)
    assert spread + sum(found.unused.values()) == found[0].parameters
    assert "pos_conv_embed" in str(found)


def steps_seen(output: torch.Tensor, axis: int, of: torch.Tensor, time_axis: int) -> tuple[int, int]:
    """How many steps of a tensor the middle step of an output spans, from first to last, and of how many."""
    middle = output.select(axis, output.shape[axis] // 2)
    signs = torch.randint(0, 2, middle.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    (grad,) = torch.autograd.grad((middle * signs).sum(), of, retain_graph=True, materialize_grads=True)
    steps = grad.movedim(time_axis, 0).flatten(1).ne(0).any(1).nonzero()[:, 0]
    return int(steps[-1] - steps[0] + 1), grad.shape[time_axis]


@pytest.mark.parametrize("head", ["ForPreTraining", "ForXVector", "ForAudioFrameClassification"])
def test_the_columns_of_the_trace_are_what_gradients_say(head: str) -> None:
    torch.manual_seed(1)
    knobs: dict[str, Any] = {"feat_extract_norm": "layer", "add_adapter": "Frame" in head}
    model = (
        randomise_(getattr(w2vc, f"Wav2Vec2Conformer{head}")(tiny_config(**SIZES, **knobs))).double().eval()
    )
    config, audio = model.config, noise(1, 5000).double().requires_grad_()
    found, calls = trace(model, audio.detach(), timed=False), {}
    for name, part in model.named_modules():
        part.register_forward_hook(
            lambda part, given, output, name=name: calls.update({name: (given, main_tensor(output))})
        )
    model(audio)
    width, hop = receptive_field(config.conv_kernel, config.conv_stride)
    used, seen = ((5000 - width) // hop) * hop + width, 0
    for row in found:
        axis = next((i for i, x in enumerate(row.letters or ()) if x[0] == "T"), None)
        if (
            axis is None or not row.field or re.search(r"quantizer$|project_q", row.name)
        ):  # a choice has no gradient
            continue
        (given, *_), output = calls[row.name]
        field, _ = steps_seen(output, axis, audio, 1)
        assert field == (used if math.isinf(row.field) else row.field), row.name
        if given is not audio:
            window, n_steps = steps_seen(output, axis, given, axis)
            assert window == min(row.window, n_steps) or "adapter" in row.name, row.name
        seen += 1
    assert seen > 40


def test_without_times_a_trace_is_deterministic_and_with_them_they_add_up() -> None:
    model, audio = Wav2Vec2ConformerForPreTraining(tiny_config()), noise(1, 8000)
    plain = [str(trace(model, audio, timed=False)) for _ in range(2)]
    assert plain[0] == plain[1]
    assert "share" not in plain[0]
    timed = trace(model, audio, repeats=2)
    assert "share" in str(timed)
    assert (
        timed[0].milliseconds
        > timed["encoder"].milliseconds
        > timed["encoder.layers.0.ffn1"].milliseconds
        > 0
    )


def test_layers_that_are_alike_share_a_line() -> None:
    model = Wav2Vec2ConformerModel(tiny_config(num_hidden_layers=4))
    text = str(trace(model, noise(1, 8000), timed=False))
    assert "layers.1 … 3" in text
    assert text.count("depthwise_conv") == 1
    assert "conv_layers.1" in text
    shallow = trace(model, noise(1, 8000), timed=False, depth=1)
    assert len(str(shallow).splitlines()) < 12
    assert shallow["encoder.layers.3.ffn2"].shape


def test_the_model_is_left_as_it_was() -> None:
    model = Wav2Vec2ConformerForPreTraining(tiny_config()).train()
    model.quantizer.eval()
    modes = [m.training for m in model.modules()]
    utterance = load_speech("builtin")[0]
    trace(model, utterance, timed=False)
    record(model, utterance)
    block_map(model, utterance.audio[:4000], "encoder.layers.0.ffn1")
    spot_the_negative(model, utterance, distractors=1)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_tables_are_accessible_and_escaped() -> None:
    page = trace(Wav2Vec2ConformerModel(tiny_config()), noise(1, 8000), timed=False)._repr_html_()
    assert 'tabindex="0"' in page
    assert 'scope="col"' in page
    assert 'scope="row"' in page
    assert "aria-label=" in page
    assert "<b>" not in html_table("t", ["<b>"], [(0, ["<b>"])], ["<b>"])
    with pytest.raises(KeyError, match="was not called"):
        trace(Wav2Vec2ConformerModel(tiny_config()), noise(1, 8000), timed=False)["nothing"]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=4), st.integers(0, 40))
def test_frame_t_depends_on_exactly_its_receptive_field(layers: list[tuple[int, int]], more: int) -> None:
    kernels, strides = zip(*layers, strict=True)
    config = tiny_config(
        conv_dim=(6,) * len(layers), conv_kernel=kernels, conv_stride=strides, feat_extract_norm="layer"
    )
    torch.manual_seed(len(layers))
    encoder = randomise_(FeatureEncoder(config)).double()
    width, hop = receptive_field(kernels, strides)
    found = dependency_map(lambda x: encoder(x[None])[0], noise(width + 3 * hop + more).double(), chunk=3) > 0
    reached = {0}  # samples of frame 0, with the holes that strides beyond the kernel leave
    for kernel, stride in reversed(layers):
        reached = {step * stride + tap for step in reached for tap in range(kernel)}
    want = torch.zeros_like(found)
    for t in range(len(found)):
        want[t, [t * hop + sample for sample in reached]] = True
    assert torch.equal(found, want)
    spans = dependency_spans(found.float())
    assert spans[:, 0].tolist() == [t * hop for t in range(len(found))]
    assert spans[:, 1].tolist() == [t * hop + width - 1 for t in range(len(found))]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 8), st.integers(3, 30), st.booleans())
def test_the_convolution_module_reaches_half_its_kernel(half: int, n_frames: int, cut: bool) -> None:
    config = tiny_config(conv_depthwise_kernel_size=2 * half + 1)
    torch.manual_seed(half)
    module = randomise_(ConvolutionModule(config)).double().eval()
    mask = torch.arange(n_frames)[None] < n_frames - cut
    found = dependency_map(lambda x: module(x[None], mask)[0], noise(n_frames, 32).double()) > 0
    i, j = torch.arange(n_frames)[:, None], torch.arange(n_frames)
    assert torch.equal(found, ((i - j).abs() <= half) & (j < n_frames - cut))


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(12, 20))
def test_adapter_and_tdnn_have_exact_maps(kernel: int, stride: int, dilation: int, n_frames: int) -> None:
    torch.manual_seed(kernel)
    config = tiny_config(
        add_adapter=True, num_adapter_layers=1, adapter_kernel_size=kernel, adapter_stride=stride
    )
    adapter = Adapter(config).double()
    found = dependency_map(lambda x: adapter(x[None])[0], noise(n_frames, 32).double()) > 0
    for t, row in enumerate(found):
        start = t * stride - 1  # one zero of padding on the left
        assert row.nonzero()[:, 0].tolist() == [i for i in range(start, start + kernel) if 0 <= i < n_frames]
    taps = min(kernel, 3)
    layer = TDNNLayer(
        tiny_config(tdnn_dim=(32, 64), tdnn_kernel=(1, taps), tdnn_dilation=(1, dilation)), 1
    ).double()
    found = dependency_map(lambda x: layer(x[None])[0], noise(n_frames, 32).double()) > 0
    for t, row in enumerate(found):
        assert row.nonzero()[:, 0].tolist() == [t + i * dilation for i in range(taps)]


@pytest.mark.parametrize("positions", ["relative", "rotary", None])
def test_attention_sees_all_and_the_feed_forward_one(positions: str | None) -> None:
    model = randomise_(Wav2Vec2ConformerModel(tiny_config(position_embeddings_type=positions))).double()
    audio = noise(1, 4000).double()
    assert (block_map(model, audio, "encoder.layers.0.self_attn") > 0).all()
    for part in ("ffn1", "ffn2_layer_norm", "conv_module.pointwise_conv1"):
        found = block_map(model, audio, f"encoder.layers.1.{part}") > 0
        assert torch.equal(found, torch.eye(len(found), dtype=torch.bool)), part


def test_group_norm_mixes_all_and_frozen_statistics_do_not() -> None:
    model = randomise_(Wav2Vec2ConformerModel(tiny_config())).double().eval()
    audio = noise(1, 4000).double()
    width, hop = receptive_field(*stack(model.config).values())
    before = model(audio).last_hidden_state
    whole = block_map(model, audio, "feature_extractor")
    with frozen_statistics(model):
        same = model(audio).last_hidden_state
        alone = block_map(model, audio, "feature_extractor") > 0
        lengths = model.feature_extractor(audio, torch.tensor([3000]))
    assert torch.allclose(same, before, atol=1e-12)
    valid = model.feature_extractor(audio, torch.tensor([3000]))
    n = (3000 - width) // hop + 1
    assert torch.allclose(lengths[:, :n], valid[:, :n], atol=1e-12)
    assert (whole[:, : (len(whole) - 1) * hop + width] > 0).all()
    assert dependency_spans(alone).tolist() == [[hop * t, hop * t + width - 1] for t in range(len(alone))]
    assert "forward" not in vars(model.feature_extractor.conv_layers[0].layer_norm)


def test_maps_refuse_what_has_no_map() -> None:
    model = Wav2Vec2ConformerForPreTraining(tiny_config())
    with pytest.raises(ValueError, match="without gradients"):
        dependency_map(lambda x: x.detach(), noise(4, 2))
    with pytest.raises(ValueError, match="is no part"):
        block_map(model, noise(1, 4000), "encoder.layers.9")
    with pytest.raises(ValueError, match="2 rows"):
        block_map(model, noise(2, 4000), "encoder")
    assert dependency_spans(torch.zeros(2, 3)).tolist() == [[-1, -1], [-1, -1]]


@pytest.mark.parametrize("name", ["Model", "ForPreTraining", "ForCTC"])
def test_the_strip_of_the_peer_is_flat(name: str) -> None:
    pytest.importorskip("transformers")
    ours = randomise_(getattr(w2vc, f"Wav2Vec2Conformer{name}")(tiny_config(**SIZES))).eval()
    found = layerwise_diff(ours, twin(ours), load_speech("builtin")[0])
    assert len(found) >= 15
    assert found.first is None
    assert max(found.gaps.values()) <= 1e-5
    assert "agree" in str(found)


@pytest.mark.parametrize(
    "block",
    [
        "feature_extractor.conv_layers.1",
        "encoder.layers.0.ffn2",
        "encoder.layers.1.conv_module",
        "project_hid",
    ],
)
def test_the_strip_names_the_block_that_was_changed(block: str) -> None:
    ours = Wav2Vec2ConformerForPreTraining(tiny_config()).eval()
    theirs = copy.deepcopy(ours)
    part = theirs.get_submodule(block if block == "project_hid" else f"wav2vec2_conformer.{block}")
    with torch.no_grad():
        next(p for p in part.parameters() if p.dim() > 1).mul_(1.01)
    found = layerwise_diff(ours, theirs, load_speech("builtin")[0])
    assert found.first == block
    names = list(found.gaps)
    assert all(found[name] == 0 for name in names[: names.index(block)])


def test_the_strip_compares_dtypes_heads_and_recordings() -> None:
    model, audio = Wav2Vec2ConformerForPreTraining(tiny_config()).eval(), load_speech("builtin")[0]
    half = layerwise_diff(copy.deepcopy(model).bfloat16(), model, audio, tolerance=0.1)
    assert 1e-4 < half["encoder.layers.0.ffn1"] < 0.1
    below = layerwise_diff(model.wav2vec2_conformer, model, audio)
    assert below.first is None
    assert "project_hid" not in below.gaps
    kept = record(model, audio)
    kept["encoder.layers.0.ffn1"][0, 0, 0] = math.nan
    assert layerwise_diff(kept, model, audio).first == "encoder.layers.0.ffn1"
    with pytest.raises(ValueError, match="audio is missing"):
        layerwise_diff(model, kept)
    with pytest.raises(ValueError, match="share no block"):
        layerwise_diff({"x": noise(1)}, model, audio)
    ax = half.plot(title="bf16")
    assert ax.get_yscale() == "log"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 300))
def test_unheard_is_what_no_visible_frame_sees(mask: list[bool], more: int) -> None:
    n_samples = 320 * (len(mask) - 1) + 400 + more
    want = np.zeros(n_samples, bool)
    want[: n_samples - more] = True
    for t, hidden in enumerate(mask):
        if not hidden:
            want[320 * t : 320 * t + 400] = False
    assert np.array_equal(masked_samples(torch.tensor(mask), n_samples), want)
    sound = np.full(n_samples, 0.5, np.float32)
    quiet, noisy = masked_audio(sound, mask), masked_audio(sound, mask, fill="noise")
    assert np.array_equal(quiet[~want], sound[~want])
    assert np.array_equal(noisy[~want], sound[~want])
    deep = [i for i in range(n_samples) if want[max(i - 64, 0) : i + 65].all()]
    assert not quiet[deep].any()
    assert not deep or noisy[deep].std() > 0.3


def test_what_is_unheard_changes_no_visible_frame() -> None:
    config = tiny_config(
        conv_dim=(8,) * 7,
        conv_kernel=(10, 3, 3, 3, 3, 2, 2),
        conv_stride=(5, 2, 2, 2, 2, 2, 2),
        feat_extract_norm="layer",
    )
    encoder, sound = FeatureEncoder(config), noise(1, 16_000)
    mask = torch.arange(49) % 11 > 6
    gone = torch.from_numpy(masked_samples(mask, 16_000, config))
    other = torch.where(gone, noise(1, 16_000, seed=1), sound)
    a, b = encoder(sound)[0], encoder(other)[0]
    assert torch.equal(a[~mask], b[~mask])
    assert (a[mask] != b[mask]).any(1).all()
    one_more = gone.clone()
    one_more[int(gone.nonzero()[0]) - 1] = True  # one sample earlier is seen by a visible frame
    c = encoder(torch.where(one_more, other + 1, sound))[0]
    assert not torch.equal(a[~mask], c[~mask])
    with pytest.raises(ValueError, match="fill='hum'"):
        masked_audio(sound[0], mask, fill="hum")
    with pytest.raises(ValueError, match="50 frames"):
        masked_samples(torch.ones(50), 16_000)


def test_a_game_is_a_question_of_the_loss() -> None:
    model, utterance = load_demo(), load_speech("builtin")[3]
    game = spot_the_negative(model, utterance, 40, distractors=5, seed=2)
    assert game.frame == 40
    assert game.mask[40]
    assert len({tuple(c) for c in game.codes.tolist()}) == 6
    assert all(game.mask[t] for t in game.candidates)
    assert game.candidates[game.letters.index(game.answer)] == 40
    assert game.letters[int(game.chances.argmax())] == game.choice
    with torch.no_grad():
        output = model(as_input(model, utterance), mask_time_indices=game.mask[None])
        features = model.base_model(
            as_input(model, utterance), mask_time_indices=game.mask[None]
        ).extract_features
        codes = model.quantizer.codes(features)
    states, targets = output.projected_states, output.projected_quantized_states
    wrong = [t for t in game.candidates if t != 40]
    negatives = torch.tensor(wrong).expand(1, states.shape[1], -1)
    only = torch.zeros_like(game.mask)[None]
    only[0, 40] = True
    loss = contrastive_loss(
        states, targets, negatives, only, codes, temperature=model.config.contrastive_logits_temperature
    )
    assert torch.allclose(-game.chances[game.candidates.index(40)].log(), loss, atol=1e-4)
    again = spot_the_negative(model, utterance, 40, distractors=5, seed=2)
    assert again.candidates == game.candidates
    page = game._repr_html_()
    assert page.count("<audio") == 7
    assert page.count("aria-label=") == 7
    assert "true" not in page.split("base64")[0]
    assert len(game.clip(0)) == len(game.clip(40)) == round(game.seconds * 16_000)
    fig = game.plot()
    assert "(true)" in "".join(t.get_text() for t in fig.axes[2].get_xticklabels())


def test_the_demo_model_plays_better_than_chance() -> None:
    model, speech = load_demo(), load_speech("builtin")
    games = [spot_the_negative(model, speech[i], distractors=3, seed=i) for i in range(8)]
    assert sum(game.choice == game.answer for game in games) >= 5  # by chance 2
    assert len({game.answer for game in games}) > 1


def test_games_refuse_what_cannot_be_played() -> None:
    model, utterance = Wav2Vec2ConformerForPreTraining(tiny_config()), load_speech("builtin")[0]
    with pytest.raises(ValueError, match="with a quantizer"):
        spot_the_negative(Wav2Vec2ConformerModel(tiny_config()), utterance)
    with pytest.raises(ValueError, match="has the frames"):
        spot_the_negative(model, utterance, 10_000)
    with pytest.raises(ValueError, match="distractors=0"):
        spot_the_negative(model, utterance, distractors=0)
    with torch.no_grad():
        model.quantizer.weight_proj.weight.zero_()  # every frame has the same codes
    with pytest.raises(ValueError, match="codes of their own"):
        spot_the_negative(model, utterance)


@pytest.mark.gpu
def test_tracing_on_a_gpu() -> None:
    model, audio = load_demo(device="cuda"), load_speech("builtin")[0]
    assert trace(model, audio)[0].milliseconds > 0
    assert layerwise_diff(model, load_demo(), audio, tolerance=1e-2).first is None
    assert (block_map(model, audio.audio[:8000], "encoder.layers.0.ffn1") > 0).sum() == 24
    assert spot_the_negative(model, audio).answer
