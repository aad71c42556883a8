"""The pre-training head: the losses against slow ones, the whole head against the peer, and every edge case."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import helpers
from heads import PRETRAINING, SAMPLES
from w2vc.model import quantizer
from w2vc.model.negatives import sample_negative_indices
from w2vc.model.pretraining import (
    Wav2Vec2ConformerForPreTraining,
    contrastive_logits,
    contrastive_loss,
    diversity_loss,
    pretraining_losses,
)
from w2vc.model.wav2vec2 import Wav2Vec2ConformerModel


def plain_loss(
    states: Tensor, targets: Tensor, negatives: Tensor, mask: Tensor, temperature: float
) -> Tensor:
    """The plain version: every candidate vector of every frame is fetched and compared."""
    B, T, P = states.shape
    wrong = targets.reshape(B * T, P)[negatives.flatten()].view(B, T, negatives.shape[2], P)
    candidates = torch.cat([targets[:, :, None], wrong], dim=2)
    logits = torch.cosine_similarity(states[:, :, None], candidates, dim=-1) / temperature
    same = (wrong == targets[:, :, None]).all(-1)
    keep = torch.cat([torch.ones(B, T, 1, dtype=torch.bool), ~same], dim=2)
    logits = logits.masked_fill(~keep, float("-inf"))
    return -logits.log_softmax(-1)[..., 0][mask.bool()].sum()


def toy(  # noqa: PLR0917
    B: int = 3, T: int = 9, P: int = 6, N: int = 5, V: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """States, targets from a small codebook (so that many are equal), negatives, mask, codes."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(V, (B, T, 2), generator=g)
    book = torch.randn(V, V, P, generator=g)
    targets = book[codes[..., 0], codes[..., 1]].requires_grad_()
    states = torch.randn(B, T, P, generator=g).requires_grad_()
    negatives = torch.randint(T, (B, T, N), generator=g) + torch.arange(B)[:, None, None] * T
    return states, targets, negatives, torch.rand(B, T, generator=g) < 0.5, codes


# ---- the losses alone


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 9),
    N=st.integers(0, 6),
    V=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_equals_the_plain_loss(B: int, T: int, N: int, V: int, seed: int) -> None:
    states, targets, negatives, mask, codes = toy(B, T, 6, N, V, seed)
    if N and seed % 2:  # as they are drawn: masked frames only
        negatives = sample_negative_indices((B, T), N, mask)
    fast = contrastive_loss(states, targets, negatives, mask, codes, temperature=0.2)
    slow = plain_loss(states, targets, negatives, mask, 0.2)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(fast, [states, targets]),
        torch.autograd.grad(slow, [states, targets]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_logits_put_the_true_target_first_and_duplicates_out_of_reach() -> None:
    states, targets, negatives, _, codes = toy()
    logits = contrastive_logits(states, targets, negatives, codes, temperature=0.5)
    T = negatives.shape[1]
    assert logits.shape == (3, 9, 6)
    torch.testing.assert_close(logits[..., 0], torch.cosine_similarity(states, targets, dim=-1) / 0.5)
    same = torch.tensor(
        [
            [[torch.equal(codes[b, int(n) % T], codes[b, t]) for n in negatives[b, t]] for t in range(T)]
            for b in range(3)
        ]
    )
    assert 0 < same.sum() < same.numel()
    assert torch.equal(logits[..., 1:].isneginf(), same)
    assert logits[..., 0].isfinite().all()


def test_brute_force_oracle() -> None:
    """The loss in plain Python floats, one frame at a time."""
    rng = random.Random(0)
    B, T, P, N, tau = 2, 4, 3, 3, 0.5
    book = [[rng.gauss(0, 1) for _ in range(P)] for _ in range(3)]
    codes = [[rng.randrange(3) for _ in range(T)] for _ in range(B)]
    states = [[[rng.gauss(0, 1) for _ in range(P)] for _ in range(T)] for _ in range(B)]
    negatives = [[[b * T + rng.randrange(T) for _ in range(N)] for _ in range(T)] for b in range(B)]
    mask = [[1, 0, 1, 1], [0, 1, 0, 1]]

    def cosine(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / (math.hypot(*a) * math.hypot(*b))

    total = 0.0
    for b in range(B):
        for t in range(T):
            if mask[b][t]:
                own = codes[b][t]
                scores = [cosine(states[b][t], book[own]) / tau]
                for n in negatives[b][t]:
                    other = codes[n // T][n % T]
                    if other != own:
                        scores.append(cosine(states[b][t], book[other]) / tau)
                total += math.log(sum(math.exp(s) for s in scores)) - scores[0]
    loss = contrastive_loss(
        torch.tensor(states),
        torch.tensor([[book[c] for c in row] for row in codes]),
        torch.tensor(negatives),
        torch.tensor(mask),
        torch.tensor(codes)[..., None],
        temperature=tau,
    )
    assert math.isclose(loss.item(), total, rel_tol=1e-5)


def test_a_guesser_pays_log_of_the_number_of_candidates() -> None:
    """Equal similarities to all candidates: each masked frame costs log(N + 1)."""
    B, T, N = 2, 8, 5
    targets = torch.eye(T).expand(B, T, T)
    states = torch.ones(B, T, T)  # the same angle to every target
    own = torch.arange(T)[:, None]
    negatives = ((own + 1 + torch.arange(N)) % T)[None] + torch.arange(B)[:, None, None] * T
    mask = torch.ones(B, T, dtype=torch.long)
    codes = torch.arange(T).expand(B, T)[..., None]
    loss = contrastive_loss(states, targets, negatives, mask, codes)
    assert math.isclose(loss.item(), B * T * math.log(N + 1), rel_tol=1e-6)


def test_negatives_equal_to_the_positive_do_not_count() -> None:
    states, targets, negatives, mask, codes = toy(V=1)  # a collapsed codebook: every negative is the positive
    loss = contrastive_loss(states, targets, negatives, mask, codes)
    assert loss.item() == 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [states, targets]))


def test_no_masked_frame_gives_zero_inside_the_graph() -> None:
    states, targets, negatives, mask, codes = toy()
    loss = contrastive_loss(states, targets, negatives, torch.zeros_like(mask), codes)
    assert loss.item() == 0
    assert loss.requires_grad
    assert all((g == 0).all() for g in torch.autograd.grad(loss, [states, targets]))


def test_one_masked_frame() -> None:
    states, targets, negatives, mask, codes = toy()
    mask = torch.zeros_like(mask)
    mask[1, 4] = True
    loss = contrastive_loss(states, targets, negatives, mask, codes)
    torch.testing.assert_close(loss, plain_loss(states, targets, negatives, mask, 0.1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_mask_and_negatives_of_any_integer_type(dtype: torch.dtype) -> None:
    states, targets, negatives, mask, codes = toy()
    expected = contrastive_loss(states, targets, negatives, mask, codes)
    got = contrastive_loss(states, targets, negatives.int(), mask.to(dtype), codes)
    assert torch.equal(got, expected)


def test_only_masked_frames_matter() -> None:
    states, targets, negatives, mask, codes = toy()
    loss = contrastive_loss(states, targets, negatives, mask, codes)
    (grad,) = torch.autograd.grad(loss, [states])
    assert (grad[~mask] == 0).all()
    assert (grad[mask].abs().sum(-1) > 0).all()
    others = torch.where(mask[..., None], negatives, (negatives + 9) % 27)
    assert torch.equal(contrastive_loss(states, targets, others, mask, codes), loss)
    other_states = states.where(mask[..., None], states + 1)
    assert torch.equal(contrastive_loss(other_states, targets, negatives, mask, codes), loss)


class Sizes(TorchDispatchMode):
    """Note the size of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]
        self.seen.extend(t.untyped_storage().nbytes() // t.element_size() for t in made)
        return out


def test_no_tensor_of_negatives_times_width() -> None:
    B, T, P, N, G = 2, 24, 64, 50, 2
    states, targets, negatives, mask, codes = toy(B, T, P, N)
    with Sizes() as sizes:
        contrastive_loss(states, targets, negatives, mask, codes).backward()
    assert max(sizes.seen) <= max(B * T * (N + 1) * 2, B * T * P, B * T * T * G) < B * T * N * P / 8


def test_fp32_inside_autocast_and_half() -> None:
    states, targets, negatives, mask, codes = toy(P=64)
    exact = contrastive_loss(states, targets, negatives, mask, codes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contrastive_loss(states, targets, negatives, mask, codes), exact)
    half = contrastive_loss(states.half(), targets.half(), negatives, mask, codes)
    assert half.dtype == torch.float32
    rounded = [x.detach().half().float() for x in (states, targets)]
    assert torch.equal(
        half, contrastive_loss(*rounded, negatives, mask, codes)
    )  # only the inputs are rounded


def test_compiles_whole() -> None:
    states, targets, negatives, mask, codes = toy()
    compiled = torch.compile(contrastive_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(states, targets, negatives, mask, codes),
        contrastive_loss(states, targets, negatives, mask, codes),
    )


def test_diversity_loss_from_collapsed_to_uniform() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    assert diversity_loss(torch.tensor(16.0), mask, 16).item() == 0
    assert diversity_loss(torch.tensor(2.0), mask, 16).item() == pytest.approx(14 / 16 * 3)
    assert diversity_loss(torch.tensor(2.0), mask * 0, 16).item() == 0


def test_three_losses() -> None:
    states, targets, negatives, mask, codes = toy()
    config, used = PRETRAINING.config(diversity_loss_weight=0.3), torch.tensor(6.0)
    whole, contrastive, diversity = pretraining_losses(states, targets, codes, used, mask, negatives, config)
    temperature = config.contrastive_logits_temperature
    wanted = contrastive_loss(states, targets, negatives, mask, codes, temperature=temperature)
    assert torch.equal(contrastive, wanted)
    assert torch.equal(diversity, diversity_loss(used, mask, 16))
    assert torch.equal(whole, contrastive + 0.3 * diversity)
    assert pretraining_losses(states, targets, codes, used, mask, None, config) == (None, None, None)
    with pytest.raises(ValueError, match="without mask_time_indices"):
        pretraining_losses(states, targets, codes, used, None, negatives, config)


# ---- the whole head


def test_loss_reads_the_config_at_each_call() -> None:
    model = PRETRAINING.build()
    inputs = PRETRAINING.batch()
    first = model(**inputs)
    torch.testing.assert_close(first.loss, first.contrastive_loss + 0.3 * first.diversity_loss)
    model.config.diversity_loss_weight = 0.0
    torch.testing.assert_close(model(**inputs).loss, first.contrastive_loss)
    model.config.contrastive_logits_temperature = 2.0
    assert model(**inputs).contrastive_loss != first.contrastive_loss


def test_masks_of_any_type_and_quantised_frames_for_all() -> None:
    model = PRETRAINING.build()
    inputs = PRETRAINING.batch()
    first = model(**inputs)
    again = model(**{**inputs, "mask_time_indices": inputs["mask_time_indices"].long()})
    assert torch.equal(first.loss, again.loss)
    codes = model.quantizer.codes(model.wav2vec2_conformer(inputs["input_values"]).extract_features)
    book = model.quantizer.codevectors.view(2, 8, -1)
    vectors = torch.cat([book[0, codes[..., 0]], book[1, codes[..., 1]]], -1)
    helpers.assert_close("targets of every frame", first.projected_quantized_states, model.project_q(vectors))


# ---- one seed: the noise of both sides


LOUD = {
    "hidden_dropout": 0.1,
    "activation_dropout": 0.15,
    "attention_dropout": 0.2,
    "feat_proj_dropout": 0.1,
    "feat_quantizer_dropout": 0.2,
    "conformer_conv_dropout": 0.1,
    "layerdrop": 0.4,
    "num_hidden_layers": 4,
}


def skipped(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What `run` returns, and which layers of the model it left out."""
    seen: list[int] = []
    layers = next(m for n, m in model.named_modules() if n.endswith("encoder.layers"))
    hooks = [layer.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, layer in enumerate(layers)]
    result = run()
    for hook in hooks:
        hook.remove()
    return result, sorted(set(range(len(layers))) - set(seen))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_one_seed_gives_the_training_loss_of_transformers(
    positions: str, padded: bool, attention: str
) -> None:
    """Every dropout, LayerDrop and the Gumbel noise draw the same numbers in the same order."""
    options = {**LOUD, "position_embeddings_type": positions, "attn_implementation": attention}
    ours = PRETRAINING.build(training=True, padding_invariant=False, **options)
    theirs = helpers.twin(ours)
    inputs = PRETRAINING.batch(padded)
    losses, left_out = [], set()
    for seed in range(3):
        both = []
        for model in (ours, theirs):
            torch.manual_seed(seed)
            both.append(skipped(model, lambda m=model: m(**inputs).loss))
        (a, drops), (b, their_drops) = both
        assert drops == their_drops
        helpers.assert_close("pretraining loss of one seed", a, b)
        left_out |= set(drops)
        losses.append(a.item())
    assert len(set(losses)) == 3  # another seed, another loss
    assert left_out  # LayerDrop took part
    a.backward()
    b.backward()
    assert helpers.grad_difference(ours, theirs) <= helpers.PARITY


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_one_seed_gives_the_training_states_of_transformers(positions: str, attention: str) -> None:
    options = {**LOUD, "position_embeddings_type": positions, "attn_implementation": attention}
    config = PRETRAINING.config(padding_invariant=False, **options)
    torch.manual_seed(0)
    ours = Wav2Vec2ConformerModel(config).train()
    helpers.randomise_(ours)
    theirs = helpers.twin(ours)
    inputs = PRETRAINING.batch()
    inputs.pop("sampled_negative_indices")
    for seed in range(3):
        torch.manual_seed(seed)
        a = ours(**inputs).last_hidden_state
        torch.manual_seed(seed)
        b = theirs(**inputs).last_hidden_state
        helpers.assert_close("training states of one seed", a, b)
        assert helpers.difference(a, ours.eval()(**inputs).last_hidden_state) > 0.1  # noise took part
        ours.train()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("n_masked", [0, 1])
def test_few_masked_frames(training: bool, n_masked: int) -> None:
    model = PRETRAINING.build(training)
    inputs = PRETRAINING.batch()
    mask = torch.zeros_like(inputs["mask_time_indices"])
    mask[1, 5 : 5 + n_masked] = True
    inputs["mask_time_indices"] = mask
    inputs["sampled_negative_indices"] = sample_negative_indices(tuple(mask.shape), 10, mask)
    out = model(**inputs)
    assert out.loss.isfinite()
    assert out.codevector_perplexity.isfinite()
    if n_masked == 0:
        assert out.loss.item() == 0 == out.contrastive_loss.item() == out.diversity_loss.item()
        assert out.codevector_perplexity.item() == 2  # defined: one code per group
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is None or g.isfinite().all() for g in grads.values())
    assert grads["project_hid.weight"] is not None
    assert grads["wav2vec2_conformer.encoder.layer_norm.weight"] is not None
    if n_masked == 0:
        assert all(g is None or (g == 0).all() for g in grads.values())


def test_freeze_and_temperature() -> None:
    model = PRETRAINING.build(training=True)
    model.freeze_feature_encoder()
    model.set_gumbel_temperature(0.5)
    assert model.quantizer.temperature == 0.5
    model(**PRETRAINING.batch()).loss.backward()
    assert all(p.grad is None for p in model.wav2vec2_conformer.feature_extractor.parameters())
    assert model.quantizer.weight_proj.weight.grad is not None
    with pytest.raises(ValueError, match="temperature"):
        model.set_gumbel_temperature(0)


def test_head_errors() -> None:
    model = PRETRAINING.build()
    inputs = PRETRAINING.batch()
    mask, negatives = inputs.pop("mask_time_indices"), inputs.pop("sampled_negative_indices")

    def rejected(match: str, negatives: Tensor, mask: Tensor | None, head: Any = model) -> None:
        with pytest.raises(ValueError, match=match):
            head(**inputs, mask_time_indices=mask, sampled_negative_indices=negatives)

    rejected("without mask_time_indices", negatives, None)
    rejected("sampled_negative_indices has shape", negatives[:, 1:], mask)
    rejected("sampled_negative_indices has shape", negatives[..., 0], mask)
    rejected(r"dtype torch\.bool", negatives > 0, mask)
    rejected(r"dtype torch\.float32", negatives.float(), mask)
    T = mask.shape[1]
    row, frame = mask[1:].nonzero()[0].tolist()
    for wrong in (0, 2 * T, -1, 10_000):  # of another utterance, or of none
        some = negatives.clone()
        some[row + 1, frame, 3] = wrong
        rejected(rf"\[{row + 1}, {frame}, 3\] = {wrong} is refused: allowed are row \* {T}", some, mask)
    rejected("add_adapter", negatives, mask, PRETRAINING.build(add_adapter=True))


def test_negatives_of_visible_frames_are_not_looked_at() -> None:
    model = PRETRAINING.build()
    inputs = PRETRAINING.batch()
    loss = model(**inputs).loss
    visible = ~inputs["mask_time_indices"][..., None]
    inputs["sampled_negative_indices"] = inputs["sampled_negative_indices"].masked_fill(visible, 0)
    assert torch.equal(model(**inputs).loss, loss)


def test_initialisation_of_the_projections() -> None:
    model = Wav2Vec2ConformerForPreTraining(PRETRAINING.config())
    bound = 1 / math.sqrt(32)
    for p in (*model.project_hid.parameters(), model.quantizer.weight_proj.bias):
        assert p.abs().max() <= bound
    assert model.project_hid.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert model.project_hid.bias.abs().max() > 0  # torch's default, not zero
    assert model.quantizer.weight_proj.weight.std().item() == pytest.approx(1, rel=0.1)
    assert model.quantizer.codevectors.min() >= 0
    assert model.quantizer.codevectors.max() <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_gpu_equals_cpu(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = PRETRAINING.build(training)
    gpu = PRETRAINING.build(training).cuda()
    noise = torch.empty(3 * 100 * 2 * 8).exponential_().log_()

    def relaxed(logits: Tensor, temperature: float) -> Tensor:
        """The same noise on both devices."""
        given = noise[: logits.numel()].view(logits.shape).to(logits.device)
        return ((logits - given) / temperature).softmax(-1)

    monkeypatch.setattr(quantizer, "gumbel_relaxed", relaxed)
    inputs = PRETRAINING.batch()
    a, b = gpu(**{k: v.cuda() for k, v in inputs.items()}), cpu(**inputs)
    helpers.assert_close("pretraining loss on the GPU", a.loss.cpu(), b.loss, tol=1e-4)
    a.loss.backward()
    b.loss.backward()
    assert helpers.grad_difference(gpu.cpu(), cpu) <= 1e-3


# ---- the documentation's example

EXAMPLE = """
import torch
from w2vc.data.audio import Wav2Vec2FeatureExtractor as AutoFeatureExtractor
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining
from w2vc.model.masking import compute_mask_indices as _compute_mask_indices
from w2vc.model.negatives import sample_negative_indices as _sample_negative_indices
from fake_datasets import load_dataset

feature_extractor = AutoFeatureExtractor.from_pretrained("FOLDER")
model = Wav2Vec2ConformerForPreTraining.from_pretrained("FOLDER")

ds = load_dataset("hf-internal-testing/librispeech_asr_dummy", "clean", split="validation")
input_values = feature_extractor(ds[0]["audio"]["array"], return_tensors="pt").input_values  # Batch size 1

# compute masked indices
batch_size, raw_sequence_length = input_values.shape
sequence_length = model._get_feat_extract_output_lengths(raw_sequence_length).item()
mask_time_indices = _compute_mask_indices(
    shape=(batch_size, sequence_length), mask_prob=0.2, mask_length=2
)
sampled_negative_indices = _sample_negative_indices(
    features_shape=(batch_size, sequence_length),
    num_negatives=model.config.num_negatives,
    mask_time_indices=mask_time_indices,
)
mask_time_indices = torch.tensor(data=mask_time_indices, device=input_values.device, dtype=torch.long)
sampled_negative_indices = torch.tensor(
    data=sampled_negative_indices, device=input_values.device, dtype=torch.long
)

with torch.no_grad():
    outputs = model(input_values, mask_time_indices=mask_time_indices)

# compute cosine similarity between predicted (=projected_states) and target (=projected_quantized_states)
cosine_sim = torch.cosine_similarity(outputs.projected_states, outputs.projected_quantized_states, dim=-1)

# show that cosine similarity is much higher than random
answer = cosine_sim[mask_time_indices.to(torch.bool)].mean() > 0.5

# for contrastive loss training model should be put into train mode
model = model.train()
loss = model(
    input_values, mask_time_indices=mask_time_indices, sampled_negative_indices=sampled_negative_indices
).loss
"""


def test_the_documentation_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    from w2vc.data.audio import Wav2Vec2FeatureExtractor

    PRETRAINING.build().save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    sound = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0)).numpy()
    module = types.ModuleType("fake_datasets")
    module.load_dataset = lambda *_, **__: [{"audio": {"array": sound, "sampling_rate": 16_000}}]
    monkeypatch.setitem(sys.modules, "fake_datasets", module)
    scope: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch.tensor(tensor) suggests clone()
        exec(EXAMPLE.replace("FOLDER", str(tmp_path)), scope)
    assert scope["loss"].isfinite()
    assert scope["loss"].shape == ()
    assert scope["answer"].dtype == torch.bool
    assert scope["mask_time_indices"].sum() > 0
