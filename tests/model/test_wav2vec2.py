"""The output class, the adapter, and what the base model promises beyond parity."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import w2vc
from helpers import assert_close, difference, randomise_, tiny_config
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.model.features import frame_mask
from w2vc.model.wav2vec2 import (
    Adapter,
    AdapterLayer,
    Wav2Vec2BaseModelOutput,
    Wav2Vec2ConformerModel,
    adapter_output_lengths,
)

LOUD = dict.fromkeys(
    ("hidden_dropout", "activation_dropout", "attention_dropout", "conformer_conv_dropout"), 0.1
)
QUIET = {**dict.fromkeys(LOUD, 0.0), "feat_proj_dropout": 0.0, "layerdrop": 0.0}
S = 5000


def build(**knobs: Any) -> Wav2Vec2ConformerModel:
    torch.manual_seed(0)
    return randomise_(Wav2Vec2ConformerModel(tiny_config(**knobs))).eval()


def audio(rows: int = 2, samples: int = S, seed: int = 0) -> Tensor:
    return torch.randn(rows, samples, generator=torch.Generator().manual_seed(seed))


# --- ModelOutput -----------------------------------------------------------------------------------------------


def test_output_is_attribute_key_and_index() -> None:
    x, y = torch.zeros(1), torch.ones(2)
    out = Wav2Vec2BaseModelOutput(last_hidden_state=x, attentions=(y,))
    assert out.last_hidden_state is out["last_hidden_state"] is out[0] is x
    assert out["attentions"] is out[1] is out[-1]
    assert out[:2] == out.to_tuple() == (x, (y,))
    assert list(out) == out.keys() == ["last_hidden_state", "attentions"]
    assert len(out) == 2
    assert "attentions" in out
    assert "hidden_states" not in out
    assert out.hidden_states is None
    assert dict(out.items()) == dict(**out) == {"last_hidden_state": x, "attentions": (y,)}
    with pytest.raises(KeyError, match=r"hidden_states.*last_hidden_state"):
        out["hidden_states"]
    with pytest.raises(IndexError):
        out[2]
    out.hidden_states = (x,)
    assert len(out) == 3
    assert out[1] == (x,)


def test_output_keeps_the_documented_order() -> None:
    out = build()(audio(), output_attentions=True, output_hidden_states=True)
    assert out.keys() == ["last_hidden_state", "extract_features", "hidden_states", "attentions"]


def test_output_survives_torchs_tree_pickle_and_copy() -> None:
    out = build()(audio(), output_hidden_states=True)
    leaves, spec = pytree.tree_flatten(out)
    assert len(leaves) == 2 + 3
    again = pytree.tree_unflatten([x + 1 for x in leaves], spec)
    assert isinstance(again, Wav2Vec2BaseModelOutput)
    assert torch.equal(again.last_hidden_state, out.last_hidden_state + 1)
    assert again.attentions is None
    with torch.no_grad():
        out = build()(audio())
    for again in (pickle.loads(pickle.dumps(out)), copy.deepcopy(out)):
        assert torch.equal(again.last_hidden_state, out.last_hidden_state)


# --- adapter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_adapter_lengths_are_what_the_convolution_makes(kernel: int, stride: int) -> None:
    config = tiny_config(add_adapter=True, adapter_kernel_size=kernel, adapter_stride=stride)
    layer = AdapterLayer(config)
    for n in range(max(1, kernel - 2), 30):
        made = layer(torch.zeros(1, config.output_hidden_size, n)).shape[2]
        assert adapter_output_lengths(torch.tensor(n), config).item() == made


@pytest.mark.parametrize(("kernel", "stride"), [(1, 2), (3, 2), (4, 1), (5, 3)])
def test_adapter_treats_padding_as_the_end(kernel: int, stride: int) -> None:
    config = tiny_config(
        add_adapter=True,
        adapter_kernel_size=kernel,
        adapter_stride=stride,
        num_adapter_layers=2,
        output_hidden_size=16,
    )
    adapter = randomise_(Adapter(config)).eval()
    hidden, lengths = torch.randn(3, 20, config.hidden_size), torch.tensor([20, 11, 14])
    out = adapter(hidden, lengths)
    config.padding_invariant = False
    leaky = adapter(hidden, lengths)
    config.padding_invariant = True
    gaps = []
    for row, n in enumerate(lengths.tolist()):
        alone = adapter(hidden[row : row + 1, :n])[0]
        assert_close("adapter, padding", out[row, : len(alone)], alone)
        gaps.append(difference(leaky[row, : len(alone)], alone))
    assert gaps[0] < 1e-5
    assert kernel == 1 or max(gaps) > 1e-3


def test_adapter_never_drops_a_layer() -> None:
    """Behaviours 2.9: with LayerDrop the length would be random; here it is not, even at layerdrop 1."""
    adapter = Adapter(tiny_config(add_adapter=True, layerdrop=1.0, num_adapter_layers=3)).train()
    assert {adapter(torch.randn(1, 40, 32)).shape[1] for _ in range(10)} == {5}


def test_adapter_projects_only_when_widths_differ() -> None:
    same, narrower = (Adapter(tiny_config(add_adapter=True, output_hidden_size=n)) for n in (32, 16))
    assert same.proj is None
    assert same.proj_layer_norm is None
    assert narrower.proj.out_features == 16
    assert narrower(torch.randn(1, 9, 32)).shape[2] == 16


def test_adapter_refuses_too_few_frames() -> None:
    adapter = Adapter(tiny_config(add_adapter=True, adapter_kernel_size=9))
    with pytest.raises(ValueError, match=r"adapter: 3 frames.*adapter_kernel_size=9"):
        adapter(torch.randn(1, 3, 32))


# --- forward ---------------------------------------------------------------------------------------------------


def test_shapes() -> None:
    model = build(num_hidden_layers=2)
    out = model(audio(), output_attentions=True, output_hidden_states=True)
    n, c = model._get_feat_extract_output_lengths(S).item(), model.config
    assert out.last_hidden_state.shape == (2, n, c.hidden_size)
    assert out.extract_features.shape == (2, n, c.conv_dim[-1])
    assert [h.shape for h in out.hidden_states] == [(2, n, c.hidden_size)] * 3
    assert [m.shape for m in out.attentions] == [(2, c.num_attention_heads, n, n)] * 2
    for m in out.attentions:
        assert_close("maps sum to one", m.sum(-1), torch.ones(2, c.num_attention_heads, n), 1e-5)


def test_config_switches_are_read_at_each_call_and_arguments_win() -> None:
    model = build()
    assert len(model(audio())) == 2
    model.config.output_attentions = model.config.output_hidden_states = True
    assert len(model(audio())) == 4
    assert len(model(audio(), output_attentions=False, output_hidden_states=False)) == 2
    model.config.return_dict = False
    assert isinstance(model(audio()), tuple)
    assert isinstance(model(audio(), return_dict=True), Wav2Vec2BaseModelOutput)


@pytest.mark.parametrize("adapter", [False, True])
def test_hidden_states_end_in_the_encoders_output(adapter: bool) -> None:
    model = build(add_adapter=adapter)
    out = model(audio(), output_hidden_states=True)
    if adapter:
        assert out.last_hidden_state.shape[1] < out.hidden_states[-1].shape[1]
        assert torch.equal(out.last_hidden_state, model.adapter(out.hidden_states[-1]))
    else:
        assert torch.equal(out.last_hidden_state, out.hidden_states[-1])


@pytest.mark.parametrize("positions", ["relative", "rotary"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("head", ["Model", "ForCTC"])
def test_each_hidden_state_has_a_gradient(
    head: str, padded: bool, training: bool, checkpointing: bool, positions: str
) -> None:
    """The next block reads the very tensor that is returned: nonzero on real frames, 0 on padding."""
    torch.manual_seed(0)
    config = tiny_config(
        **QUIET, num_hidden_layers=3, mask_time_prob=0.0, vocab_size=12, position_embeddings_type=positions
    )
    model = randomise_(getattr(w2vc, f"Wav2Vec2Conformer{head}")(config)).train(training)
    if checkpointing:
        model.gradient_checkpointing_enable()
    lengths = torch.tensor([S, 3000 if padded else S])
    mask = (torch.arange(S) < lengths[:, None]).long()
    inputs = {"attention_mask": mask} if padded else {}
    n_frames = model._get_feat_extract_output_lengths(lengths)
    real = frame_mask(n_frames, int(n_frames.max()))  # [B, T]
    for i in range(4):
        for frames in (torch.ones_like(real), real):
            out = model(audio() * mask, **inputs, output_hidden_states=True)
            answer = out.logits if head == "ForCTC" else out.last_hidden_state
            (gradient,) = torch.autograd.grad(answer[frames].sum(), out.hidden_states[i])
            assert (gradient[real].abs().sum(-1) > 0).all()
        assert len(out.hidden_states) == 4
        assert (gradient[~real] == 0).all()  # the answer of real frames depends on no padding
        assert (out.hidden_states[i][~real] == 0).all()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_values": torch.randn(S)}, "input_values"),
        ({"input_values": torch.zeros(1, S, dtype=torch.int16)}, "input_values"),
        ({"input_values": torch.full((1, S), float("nan"))}, "input_values"),
        ({"input_values": torch.randn(1, 30)}, "input_values"),
        ({"input_values": torch.randn(1, S), "attention_mask": torch.ones(1, S - 1)}, "attention_mask"),
        ({"input_values": torch.randn(1, S), "attention_mask": torch.ones(1, S).tril(-9)}, "attention_mask"),
        (
            {"input_values": torch.randn(1, S), "attention_mask": torch.ones(1, S).cumsum(1) > 9},
            "attention_mask",
        ),
    ],
)
def test_wrong_inputs_are_value_errors(inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()(**inputs)


def test_inputs_are_left_alone() -> None:
    model, x = build().train(), audio()
    before, mask = x.clone(), torch.ones(2, S, dtype=torch.long)
    model(x, attention_mask=mask)
    assert torch.equal(x, before)
    assert not x.requires_grad  # no trick on the input: it may come from another module
    upstream = torch.nn.Linear(1, 1)
    y = upstream(x.unsqueeze(-1)).squeeze(-1)
    model(y).last_hidden_state.sum().backward()
    assert upstream.weight.grad is not None


def test_seeded_training_repeats() -> None:
    model = build(mask_time_prob=0.3, mask_feature_prob=0.2, mask_feature_length=4).train()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(audio()).last_hidden_state)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_spec_augment_hides_frames_in_training_alone() -> None:
    model = build(**QUIET, mask_time_prob=0.5, mask_time_length=2)
    seen: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(audio())
    model.train()(audio())
    model.config.apply_spec_augment = False
    model(audio())
    same = [(h == model.masked_spec_embed).all(-1).float().mean().item() for h in seen]
    assert same[0] == same[2] == 0
    assert 0.1 < same[1] < 0.9


def test_spec_augment_masks_valid_frames_only() -> None:
    model = build(**QUIET, mask_time_prob=0.9, mask_time_length=2).train()
    mask = (torch.arange(9000) < torch.tensor([[9000], [3000]])).long()
    seen: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for _ in range(5):
        model(audio(2, 9000) * mask, attention_mask=mask)
    n = model._get_feat_extract_output_lengths(3000).item()
    hidden = torch.stack([(h == model.masked_spec_embed).all(-1) for h in seen])  # [5, B, T]
    assert hidden[:, 1, :n].any()
    assert not hidden[:, 1, n:].any()


def test_a_mask_without_its_embedding_is_a_clear_error() -> None:
    model = build(mask_time_prob=0.0)
    assert not hasattr(model, "masked_spec_embed")
    n = model._get_feat_extract_output_lengths(S).item()
    with pytest.raises(ValueError, match="mask_time_prob"):
        model(audio(), mask_time_indices=torch.ones(2, n, dtype=torch.bool))


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"apply_spec_augment": False},
        {"mask_time_prob": 0.0, "mask_feature_prob": 0.2},
        {"add_adapter": True},
    ],
    ids=str,
)
def test_every_trainable_parameter_gets_a_gradient(knobs: dict[str, Any]) -> None:
    """Data-parallel training needs no search for unused parameters: only the dead layer is left out, frozen."""
    model = build(**{**QUIET, "mask_time_prob": 0.3, "mask_feature_length": 4, **knobs}).train()
    model(audio()).last_hidden_state.square().sum().backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert without == frozen == {n for n, _ in model.named_parameters() if "pos_conv_embed" in n}


def test_freeze_feature_encoder() -> None:
    model = build().train()
    model.freeze_feature_encoder()
    model(audio()).last_hidden_state.sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in model.feature_extractor.parameters())
    assert model.feature_projection.projection.weight.grad is not None


def test_gradient_checkpointing_changes_nothing() -> None:
    results = []
    for on in (False, True):
        model = build(**LOUD, layerdrop=0.2, num_hidden_layers=3, feat_extract_norm="group").train()
        if on:
            model.gradient_checkpointing_enable()
            assert model.encoder.gradient_checkpointing
        torch.manual_seed(4)
        out = model(audio()).last_hidden_state
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out, {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
    (a, ga, ba), (b, gb, bb) = results
    assert torch.equal(a, b)
    for name, grad in ga.items():
        assert (grad is None) == (gb[name] is None)
        assert grad is None or torch.equal(grad, gb[name]), name
    assert all(torch.equal(ba[n], bb[n]) for n in ba)


# --- lengths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
def test_output_lengths_take_numbers_and_tensors(adapter: bool) -> None:
    model = build(add_adapter=adapter)
    want = model(audio(1)).last_hidden_state.shape[1]
    assert model._get_feat_extract_output_lengths(S).item() == want
    many = model._get_feat_extract_output_lengths(torch.tensor([[S, S + 5000]]))
    assert many.shape == (1, 2)
    assert many[0, 0] == want
    assert not many.is_floating_point()
    frames = model(audio(1)).extract_features.shape[1]
    assert model._get_feat_extract_output_lengths(S, add_adapter=False).item() == frames


def test_feature_vector_attention_mask() -> None:
    model = build(add_adapter=True)
    mask = (torch.arange(S) < torch.tensor([[S], [3000]])).long()
    for adapter in (None, False, True):
        n = model._get_feat_extract_output_lengths(torch.tensor([S, 3000]), add_adapter=adapter)
        got = model._get_feature_vector_attention_mask(n[0].item(), mask, add_adapter=adapter)
        assert got.dtype == torch.bool
        assert torch.equal(got, frame_mask(n, n[0].item()))


# --- sizes, copies, types --------------------------------------------------------------------------------------


def millions(config: Wav2Vec2ConformerConfig, extra: int = 0) -> float:
    with torch.device("meta"):
        return round((sum(p.numel() for p in Wav2Vec2ConformerModel(config).parameters()) + extra) / 1e6, 2)


def test_sizes_of_the_published_models() -> None:
    assert millions(Wav2Vec2ConformerConfig()) == 179.73
    large = {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
        "hidden_act": "swish", "feat_extract_norm": "layer", "conv_bias": True,
        "codevector_dim": 768, "proj_codevector_dim": 768,
    }  # fmt: skip
    head = 32 * 1024 + 32  # a CTC head for 32 characters, as in the published checkpoints
    assert millions(Wav2Vec2ConformerConfig(**large), head) == 618.59
    rotary = Wav2Vec2ConformerConfig(**large, position_embeddings_type="rotary")
    assert millions(rotary, head) == 593.38
    with torch.device("meta"):
        assert len(Wav2Vec2ConformerModel(Wav2Vec2ConformerConfig(**large)).state_dict()) + 2 == 928
        assert len(Wav2Vec2ConformerModel(rotary).state_dict()) + 2 == 857


@pytest.mark.parametrize("kind", ["relative", "rotary", None])
def test_copies_are_equal_and_apart(kind: str | None) -> None:
    model = build(position_embeddings_type=kind, add_adapter=True)
    with torch.no_grad():
        want = model(audio()).last_hidden_state
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ):
        state = again.state_dict()
        assert list(state) == list(model.state_dict())
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
        with torch.no_grad():
            assert torch.equal(again(audio()).last_hidden_state, want)
            again.feature_projection.projection.weight.zero_()
            assert torch.equal(model(audio()).last_hidden_state, want)
        again.config.hidden_act = "relu"
        assert model.config.hidden_act != "relu"


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("kind", ["relative", "rotary", None])
def test_half_precision_is_finite_and_close(norm: str, kind: str | None) -> None:
    model = build(feat_extract_norm=norm, position_embeddings_type=kind, add_adapter=True)
    mask = (torch.arange(S) < torch.tensor([[S], [3000]])).long()
    with torch.no_grad():
        want = model(audio(), attention_mask=mask).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(audio(), attention_mask=mask).last_hidden_state
        half = model.bfloat16()(audio(), attention_mask=mask).last_hidden_state  # float32 audio is cast
    assert half.dtype == torch.bfloat16
    for got in (mixed, half):
        assert torch.isfinite(got).all()
        assert 0 < difference(got.float(), want) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_on_the_gpu(dtype: torch.dtype) -> None:
    model = build(feat_extract_norm="layer").cuda()
    with torch.no_grad():
        want = model(audio().cuda()).last_hidden_state
        got = model.to(dtype)(audio().cuda()).last_hidden_state
    assert torch.isfinite(got).all()
    assert 0 < difference(got.float(), want) < 0.1


@pytest.mark.gpu
def test_forward_on_the_gpu_equals_the_cpu() -> None:
    model = build(add_adapter=True)
    mask = (torch.arange(S) < torch.tensor([[S], [3000]])).long()
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        want = model(audio(), attention_mask=mask)
        got = model.cuda()(audio().cuda(), attention_mask=mask.cuda())
    assert_close("model, cpu and gpu", got.last_hidden_state.cpu(), want.last_hidden_state)


def test_the_mask_may_stay_on_the_host() -> None:
    """The meta device stands for an accelerator; of the heads, test_heads asks the same."""
    with torch.device("meta"):
        model = Wav2Vec2ConformerModel(tiny_config()).eval()
    output = model(torch.empty(2, 8000, device="meta"), attention_mask=torch.ones(2, 8000).tril(5000))
    assert all(x.device.type == "meta" for x in output.values() if isinstance(x, Tensor))
