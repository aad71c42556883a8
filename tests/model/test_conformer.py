"""The block and the stack: half steps, the peer's numbers, LayerDrop, checkpointing, what comes out when."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers import assert_close, difference, grad_difference, peer_config, randomise_, tiny_config
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.model.attention import SelfAttention
from w2vc.model.conformer import ConformerBlock, ConformerEncoder, FeedForward, KeepBuffers
from w2vc.model.features import frame_mask

peer = pytest.importorskip("transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer")

B, T = 3, 17
LENGTHS = torch.tensor([17, 9, 12])
POSITIONS = ("relative", "rotary", None)
NOISES = ("hidden_dropout", "activation_dropout", "attention_dropout", "conformer_conv_dropout")
SILENT = dict.fromkeys((*NOISES, "layerdrop"), 0.0)


def frames(seed: int = 0, config: Wav2Vec2ConformerConfig | None = None) -> Tensor:
    config = config or tiny_config()
    return torch.randn(B, T, config.hidden_size, generator=torch.Generator().manual_seed(seed))


def pair(ours: type[nn.Module], theirs: type[nn.Module], **knobs: Any) -> tuple[Any, Any]:
    config = tiny_config(**knobs)
    a, b = ours(config), theirs(peer_config(config))
    randomise_(b, 3)
    a.load_state_dict(b.state_dict(), strict=True)
    b.load_state_dict(a.state_dict(), strict=True)
    return a.eval(), b.eval()


# --- feed-forward ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu", "swish", "relu", "gelu_new"])
def test_feed_forward_equals_the_peer(activation: str) -> None:
    a, b = pair(FeedForward, peer.Wav2Vec2ConformerFeedForward, hidden_act=activation)
    x = frames()
    assert_close("feed-forward", a(x), b(x))
    a(x).square().sum().backward()
    b(x).square().sum().backward()
    assert grad_difference(a, b) <= 1e-5


def test_feed_forward_knows_no_neighbours() -> None:
    ffn, x = FeedForward(tiny_config()).eval(), frames()
    whole = ffn(x)
    assert_close("feed-forward, one frame", ffn(x[:, 5:6]), whole[:, 5:6])


def test_feed_forward_accepts_a_function() -> None:
    config = tiny_config(hidden_act=torch.tanh)
    ffn, x = FeedForward(config).eval(), frames()
    want = F.linear(torch.tanh(ffn.intermediate_dense(x)), ffn.output_dense.weight, ffn.output_dense.bias)
    assert_close("feed-forward, function", ffn(x), want)


def test_each_dropout_sits_where_its_knob_says() -> None:
    """Same seed, same draws as the peer: the inner dropout by activation_dropout, the outer by hidden_dropout."""
    a, b = pair(FeedForward, peer.Wav2Vec2ConformerFeedForward, activation_dropout=0.3, hidden_dropout=0.6)
    x = frames()
    torch.manual_seed(1)
    got = a.train()(x)
    torch.manual_seed(1)
    assert_close("feed-forward, training", got, b.train()(x))
    assert abs((got == 0).float().mean().item() - 0.6) < 0.05


# --- block -----------------------------------------------------------------------------------------------------


def peer_positions(config: Any, x: Tensor) -> Tensor | None:
    kinds = {
        "relative": peer.Wav2Vec2ConformerRelPositionalEmbedding,
        "rotary": peer.Wav2Vec2ConformerRotaryPositionalEmbedding,
    }
    kind = config.position_embeddings_type
    return kinds[kind](config)(x) if kind else None


def our_positions(config: Wav2Vec2ConformerConfig, x: Tensor) -> Any:
    table = ConformerEncoder(config).embed_positions
    return None if table is None else table(x.shape[1], x.device, x.dtype)


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("activation", ["gelu", "swish"])
def test_block_equals_the_peer(kind: str | None, activation: str) -> None:
    a, b = pair(
        ConformerBlock,
        peer.Wav2Vec2ConformerEncoderLayer,
        position_embeddings_type=kind,
        hidden_act=activation,
    )
    config = tiny_config(position_embeddings_type=kind)
    x = frames()
    got, maps = a(x, None, our_positions(config, x), output_attentions=True)
    want = b(x, relative_position_embeddings=peer_positions(peer_config(config), x))
    assert_close("block", got, want)
    assert maps.shape == (B, config.num_attention_heads, T, T)
    assert a(x, None, our_positions(config, x))[1] is None
    weights = torch.randn(got.shape)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    assert grad_difference(a, b) <= 1e-5


def test_block_is_the_published_equation() -> None:
    """Conformer, Eq. 1, written out with the block's own parts."""
    block = randomise_(ConformerBlock(tiny_config(position_embeddings_type=None))).eval()
    x = frames()
    h = x + block.ffn1(block.ffn1_layer_norm(x)) / 2
    h = h + block.self_attn(block.self_attn_layer_norm(h))[0]
    h = h + block.conv_module(h)
    h = block.final_layer_norm(h + block.ffn2(block.ffn2_layer_norm(h)) / 2)
    assert_close("block, equation", block(x)[0], h)


def test_block_norms_ignore_layer_norm_eps() -> None:
    encoder = ConformerEncoder(tiny_config(layer_norm_eps=0.5))
    inside = [m.eps for m in encoder.layers.modules() if isinstance(m, nn.LayerNorm)]
    assert set(inside) == {1e-5}
    assert len(inside) == 5 * encoder.config.num_hidden_layers
    assert encoder.layer_norm.eps == 0.5


def test_attention_dropout_acts_on_the_output_too() -> None:
    block = ConformerBlock(tiny_config(**{**SILENT, "attention_dropout": 0.4})).train()
    seen: dict[str, Tensor] = {}
    block.self_attn_dropout.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    block(frames(), None, our_positions(tiny_config(), frames()))
    assert (seen["x"] != 0).all()
    assert abs((seen["y"] == 0).float().mean().item() - 0.4) < 0.05


# --- stack -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_encoder_equals_the_peer(kind: str | None, masked: bool) -> None:
    a, b = pair(
        ConformerEncoder,
        peer.Wav2Vec2ConformerEncoder,
        position_embeddings_type=kind,
        padding_invariant=False,
        num_hidden_layers=3,
    )
    x = frames()
    mask = frame_mask(LENGTHS, T) if masked else None
    last, states, maps = a(x, mask, output_attentions=True, output_hidden_states=True)
    assert_close("encoder", last, b(x.clone(), attention_mask=mask).last_hidden_state)
    assert len(states) == 4
    assert len(maps) == 3
    assert torch.equal(states[-1], last)
    assert a(x, mask)[1:] == (None, None)
    weights = torch.randn(last.shape)
    (last * weights).sum().backward()
    (b(x.clone(), attention_mask=mask).last_hidden_state * weights).sum().backward()
    assert grad_difference(a, b) <= 1e-5


@pytest.mark.parametrize("kind", POSITIONS)
def test_one_seed_gives_the_peers_training_pass(kind: str | None) -> None:
    """All dropouts and LayerDrop on: the same places draw the same numbers in the same order."""
    noisy = {**dict.fromkeys(NOISES, 0.2), "layerdrop": 0.4, "num_hidden_layers": 4}
    a, b = pair(
        ConformerEncoder,
        peer.Wav2Vec2ConformerEncoder,
        position_embeddings_type=kind,
        padding_invariant=False,
        attn_implementation="eager",
        **noisy,
    )
    a.train()
    b.train()
    mask = frame_mask(LENGTHS, T)
    for seed in range(3):
        torch.manual_seed(seed)
        last = a(frames(), mask)[0]
        torch.manual_seed(seed)
        assert_close("encoder, training", last, b(frames(), attention_mask=mask).last_hidden_state)
    weights = torch.linspace(-1, 1, last.numel()).view_as(last)
    torch.manual_seed(7)
    (a(frames(), mask)[0] * weights).sum().backward()
    torch.manual_seed(7)
    (b(frames(), attention_mask=mask).last_hidden_state * weights).sum().backward()
    assert grad_difference(a, b) <= 1e-5
    for name, buffer in a.named_buffers():
        if "batch_norm" in name:
            assert_close("encoder, running statistics", buffer, dict(b.named_buffers())[name])


def test_each_hidden_state_is_what_the_next_block_reads_and_zero_on_padding() -> None:
    encoder = randomise_(ConformerEncoder(tiny_config(num_hidden_layers=3))).eval()
    read: list[Tensor] = []
    for block in encoder.layers:
        block.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    encoder.config.hidden_states_pre_norm = True
    mask = frame_mask(LENGTHS, T)
    last, states, _ = encoder(frames(), mask, output_hidden_states=True)
    assert all(state is x for state, x in zip(states[:-1], read, strict=True))
    for state in (*states, last):
        assert (state[~mask] == 0).all()
        assert (state[mask] != 0).any(-1).all()


def test_padded_frames_start_at_zero_and_the_input_is_left_alone() -> None:
    encoder = ConformerEncoder(tiny_config()).eval()
    x = frames()
    before = x.clone()
    _, states, _ = encoder(x, frame_mask(LENGTHS, T), output_hidden_states=True)
    assert torch.equal(x, before)
    assert states[0][1, 9:].abs().max() == 0
    assert torch.equal(states[0][1, :9], x[1, :9])


@pytest.mark.parametrize("pre_norm", [False, True])
def test_hidden_states_pre_norm_is_read_at_each_call(pre_norm: bool) -> None:
    encoder = randomise_(ConformerEncoder(tiny_config(num_hidden_layers=2))).eval()
    encoder.config.hidden_states_pre_norm = pre_norm
    last, states, _ = encoder(frames(), output_hidden_states=True)
    end = encoder.layer_norm(states[-1]) if pre_norm else states[-1]
    assert torch.equal(end, last)
    assert torch.equal(states[-1], last) != pre_norm


def test_hidden_dropout_acts_on_the_input_of_the_stack() -> None:
    encoder = ConformerEncoder(tiny_config(**{**SILENT, "hidden_dropout": 0.5})).train()
    _, states, _ = encoder(frames(), output_hidden_states=True)
    assert abs((states[0] == 0).float().mean().item() - 0.5) < 0.05


def test_positions_are_computed_once_per_forward() -> None:
    encoder = ConformerEncoder(tiny_config(num_hidden_layers=3)).eval()
    calls: list[int] = []
    encoder.embed_positions.register_forward_hook(lambda *_: calls.append(1))
    encoder(frames())
    assert len(calls) == 1


def test_only_the_dead_layer_is_frozen() -> None:
    encoder = ConformerEncoder(tiny_config())
    frozen = {n for n, p in encoder.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in encoder.named_parameters() if n.startswith("pos_conv_embed.")}
    called: list[int] = []
    encoder.pos_conv_embed.register_forward_hook(lambda *_: called.append(1))
    encoder(frames())
    assert not called


@pytest.mark.parametrize("kind", POSITIONS)
def test_a_row_of_a_padded_batch_equals_itself_alone(kind: str | None) -> None:
    encoder = randomise_(ConformerEncoder(tiny_config(position_embeddings_type=kind))).eval()
    batched = encoder(frames(), frame_mask(LENGTHS, T))[0]
    for row, n in enumerate(LENGTHS.tolist()):
        assert_close("encoder, padding", batched[row, :n], encoder(frames()[row : row + 1, :n])[0][0])


# --- LayerDrop -------------------------------------------------------------------------------------------------


def test_layerdrop_repeats_the_stream_and_keeps_every_slot() -> None:
    encoder = ConformerEncoder(tiny_config(**{**SILENT, "layerdrop": 0.5}, num_hidden_layers=6)).train()
    shares = []
    for seed in range(40):
        torch.manual_seed(seed)
        _, states, maps = encoder(frames(), output_attentions=True, output_hidden_states=True)
        assert len(states) == 7
        assert len(maps) == 6
        same = [torch.equal(x, y) for x, y in itertools.pairwise(states[:-1])]
        assert same == [m is None for m in maps[:-1]]
        shares += [m is None for m in maps]
    assert 0.4 < sum(shares) / len(shares) < 0.6  # 240 draws, 4 standard errors are 0.13


@pytest.mark.parametrize(
    ("layerdrop", "training", "draws"), [(0.5, True, 2), (0.0, True, 0), (0.5, False, 0)]
)
def test_layerdrop_draws_only_when_it_can_skip(layerdrop: float, training: bool, draws: int) -> None:
    """One number per layer from torch's generator, as in transformers 5, so that equal seeds agree."""
    encoder = ConformerEncoder(tiny_config(**{**SILENT, "layerdrop": layerdrop}, num_hidden_layers=2))
    torch.manual_seed(5)
    encoder.train(training)(frames())
    after = torch.rand([])
    torch.manual_seed(5)
    for _ in range(draws):
        torch.rand([])
    assert torch.equal(after, torch.rand([]))


def test_layerdrop_of_one_skips_everything_and_is_read_at_each_call() -> None:
    encoder = ConformerEncoder(tiny_config(**SILENT)).train()
    encoder.config.layerdrop = 1.0
    x = frames()
    assert torch.equal(encoder(x)[0], encoder.layer_norm(x))
    encoder.config.layerdrop = 0.0
    assert not torch.equal(encoder(x)[0], encoder.layer_norm(x))


# --- gradient checkpointing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_checkpointing_changes_nothing_but_memory(padded: bool) -> None:
    """Values, gradients and running statistics, with every dropout and LayerDrop on."""
    noisy = {**dict.fromkeys(NOISES, 0.2), "layerdrop": 0.3, "num_hidden_layers": 4}
    x, mask, results = frames(), frame_mask(LENGTHS, T) if padded else None, []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = ConformerEncoder(tiny_config(**noisy)).train()
        encoder.gradient_checkpointing = checkpointing
        inputs = x.clone().requires_grad_()
        torch.manual_seed(2)
        last, states, _ = encoder(inputs, mask, output_hidden_states=True)
        (last * torch.linspace(-1, 1, last.numel()).view_as(last)).sum().backward()
        grads = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
        results.append((last, states, inputs.grad, grads, dict(encoder.named_buffers())))
    plain, saved = results
    assert torch.equal(plain[0], saved[0])
    assert torch.equal(plain[2], saved[2])
    assert all(torch.equal(x, y) for x, y in zip(plain[1], saved[1], strict=True))
    assert plain[3].keys() == saved[3].keys()
    assert all(torch.equal(plain[3][n], saved[3][n]) for n in plain[3])
    for name, buffer in plain[4].items():
        assert torch.equal(buffer, saved[4][name]), f"{name}: the second run of the block was counted too"
    assert any("running_mean" in n and b.abs().max() > 0 for n, b in saved[4].items())


def test_checkpointing_keeps_fewer_tensors() -> None:
    def kept(checkpointing: bool) -> int:
        encoder = ConformerEncoder(tiny_config(**SILENT, num_hidden_layers=4)).train()
        encoder.gradient_checkpointing = checkpointing
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            encoder(frames())
        return sum(sizes)

    assert kept(True) < kept(False) / 4


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_second_run_leaves_other_graphs_alone(padded: bool) -> None:
    """The backward pass of a run without checkpointing still finds the buffers that it kept."""
    mask, gradients = frame_mask(LENGTHS, T) if padded else None, []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = ConformerEncoder(tiny_config(**SILENT)).train()
        first = encoder(frames(0), mask)[0].square().sum()
        encoder.gradient_checkpointing = checkpointing
        encoder(frames(1), mask)[0].square().sum().backward()
        first.backward()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_keep_buffers_gives_the_very_buffers_back() -> None:
    encoder = ConformerEncoder(tiny_config(**SILENT)).train()
    before = {name: (buffer, buffer.clone()) for name, buffer in encoder.named_buffers()}

    def run() -> None:
        with KeepBuffers(encoder):
            encoder(frames())
            counts = [b.item() for n, b in encoder.named_buffers() if n.endswith("num_batches_tracked")]
            assert counts == [1] * encoder.config.num_hidden_layers
            raise RuntimeError("enough")  # so torch leaves a recomputation

    with pytest.raises(RuntimeError, match="enough"):
        run()
    after = dict(encoder.named_buffers())
    assert after.keys() == before.keys()
    for name, (buffer, value) in before.items():
        assert after[name] is buffer
        assert torch.equal(buffer, value)


# --- what else can be asked of it ------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_and_pickles_give_the_same_numbers(duplicate: Any) -> None:
    encoder = randomise_(ConformerEncoder(tiny_config())).eval()
    twin = duplicate(encoder)
    assert torch.equal(twin(frames())[0], encoder(frames())[0])
    assert twin.state_dict().keys() == encoder.state_dict().keys()
    assert {n for n, p in twin.named_parameters() if not p.requires_grad} == {
        n for n, p in encoder.named_parameters() if not p.requires_grad
    }


def test_one_frame_and_long_inputs() -> None:
    encoder = ConformerEncoder(tiny_config(max_source_positions=4)).eval()
    for n in (1, 2, 50):
        assert torch.isfinite(encoder(torch.randn(2, n, 32))[0]).all()


def test_a_frame_alone_reaches_everything_through_attention() -> None:
    """The block's dependency map is full; without attention it is the band of the convolution."""
    config = tiny_config(conv_depthwise_kernel_size=5)
    block = randomise_(ConformerBlock(config)).eval()
    positions = our_positions(config, frames())

    def reach() -> Tensor:
        x = frames()[:1].requires_grad_()
        rows = [
            torch.autograd.grad(block(x, None, positions)[0][0, t].square().sum(), x)[0][0].abs().sum(-1)
            for t in range(T)
        ]
        return torch.stack(rows) > 0

    assert reach().all()
    nn.init.zeros_(block.self_attn.linear_out.weight)
    i = torch.arange(T)
    assert torch.equal(reach(), (i[:, None] - i).abs() <= 2)


@pytest.mark.parametrize("kind", POSITIONS)
def test_half_precision_is_finite(kind: str | None) -> None:
    encoder = randomise_(ConformerEncoder(tiny_config(position_embeddings_type=kind))).eval()
    with torch.no_grad():
        want = encoder(frames(), frame_mask(LENGTHS, T))[0]
        got = encoder.bfloat16()(frames().bfloat16(), frame_mask(LENGTHS, T))[0]
    assert got.dtype == torch.bfloat16
    assert torch.isfinite(got).all()
    assert difference(got.float(), want) < 0.1


def test_the_block_uses_the_chapters_parts() -> None:
    block = ConformerBlock(tiny_config())
    assert isinstance(block.self_attn, SelfAttention)
    names = [n for n, _ in block.named_children()]
    assert names == [
        "ffn1_layer_norm", "ffn1", "self_attn_layer_norm", "self_attn", "self_attn_dropout",
        "conv_module", "ffn2_layer_norm", "ffn2", "final_layer_norm",
    ]  # fmt: skip


def test_a_graph_with_recomputed_blocks_can_be_walked_twice() -> None:
    """Two saliency maps of one forward pass, or a loss whose parts are weighed by their gradients."""
    encoder = ConformerEncoder(tiny_config(**SILENT)).train()
    encoder.gradient_checkpointing = True
    hidden = torch.randn(2, 9, 32, requires_grad=True)
    last, _, _ = encoder(hidden)
    counted = {name: b.clone() for name, b in encoder.named_buffers()}
    first = torch.autograd.grad(last.square().sum(), hidden, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(last.square().sum(), hidden)[0])
    assert all(torch.equal(b, counted[name]) for name, b in encoder.named_buffers())
