"""Looking inside: the maps of a model, and the numbers that sum a head up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from helpers import tiny_config
from w2vc.data.corpus import load_speech
from w2vc.explore import attention as explore
from w2vc.explore.page import attention_explorer
from w2vc.model.wav2vec2 import Wav2Vec2ConformerModel


@pytest.fixture(scope="module")
def model() -> Wav2Vec2ConformerModel:
    torch.manual_seed(0)
    model = Wav2Vec2ConformerModel(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def maps() -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return (3 * torch.randn(2, 3, 11, 11, generator=g)).softmax(-1)


# ---- maps of a model


def test_maps_are_those_of_the_model(model: Wav2Vec2ConformerModel) -> None:
    from w2vc.data.sound import normalise

    audio = load_speech("builtin", "test")[2].audio[:8000]
    model.train()
    found = explore.attention_maps(model, audio)
    assert model.training  # left as it was
    model.eval()
    with torch.no_grad():
        truth = model(torch.from_numpy(normalise(audio))[None], output_attentions=True).attentions
    assert torch.equal(found, torch.cat(truth))
    some = explore.attention_maps(model, audio, layers=[1], heads=[3, 0])
    assert torch.equal(some, found[[1]][:, [3, 0]])
    some.add_(1)  # an ordinary tensor, not one of inference mode


@pytest.mark.parametrize(
    ("layers", "heads"),
    [
        ([2], None),
        ([-1], None),
        ([], None),
        (None, [4]),
        (None, [0, 0]),
        ([True], None),
        ("01", None),
        (None, [0.0]),
    ],
)
def test_layers_and_heads_are_checked(model: Wav2Vec2ConformerModel, layers: object, heads: object) -> None:
    name = "layers" if layers is not None else "heads"
    for call in (explore.attention_maps, attention_explorer):
        with pytest.raises(ValueError, match=name):
            call(model, np.zeros(8000, np.float32), layers=layers, heads=heads)


# ---- heads in numbers


def test_numbers_of_heads_that_we_know() -> None:
    n = 50
    equal, itself = torch.full((n, n), 1 / n), torch.eye(n)
    ahead = torch.eye(n).roll(3, dims=1)  # 3 frames later, at the end round to the start
    assert explore.attention_distance(equal) == pytest.approx((n * n - 1) / (3 * n) * 20, rel=1e-5)
    assert explore.attention_distance(itself) == 0
    assert explore.attention_distance(ahead, hop=0.01) == pytest.approx(10 * ((n - 3) * 3 + 3 * (n - 3)) / n)
    assert explore.attention_entropy(equal) == pytest.approx(1)
    assert explore.attention_entropy(itself) == 0
    assert explore.diagonality(itself) == 1
    assert explore.diagonality(ahead, reach=2) == 0
    assert explore.diagonality(ahead, reach=3) == pytest.approx((n - 3) / n)
    assert explore.diagonality(equal, reach=2) == pytest.approx((5 * n - 6) / n**2)


def test_numbers_against_loops(maps: torch.Tensor) -> None:
    n = maps.shape[-1]
    labels = [*"aabbca", "", "b", "b", "", "a"]
    known = [i for i in range(n) if labels[i]]
    for each, distance, entropy, same in zip(
        maps.flatten(0, 1), explore.attention_distance(maps).flatten(), explore.attention_entropy(maps).flatten(),
        explore.same_label_share(maps, labels).flatten(), strict=True,
    ):  # fmt: skip
        w = each.tolist()
        assert distance == pytest.approx(
            sum(w[i][j] * abs(i - j) for i in range(n) for j in range(n)) / n * 20, rel=1e-5
        )
        assert entropy == pytest.approx(
            -sum(v * math.log(v) for row in w for v in row) / n / math.log(n), rel=1e-5
        )
        share = sum(w[i][j] for i in known for j in range(n) if labels[i] == labels[j]) / len(known)
        assert same == pytest.approx(share, rel=1e-5)
    profile = explore.offset_profile(maps, 4)
    for o in range(-4, 5):
        pairs = [(i, i + o) for i in range(n) if 0 <= i + o < n]
        assert profile[1, 2, 4 + o] == pytest.approx(
            sum(float(maps[1, 2, i, j]) for i, j in pairs) / len(pairs), rel=1e-5
        )


def test_distance_only_knows_distances_and_nothing_else(maps: torch.Tensor) -> None:
    n = maps.shape[-1]
    alone = explore.distance_only(maps)
    assert torch.allclose(alone.sum(-1), torch.ones(2, 3, n))
    assert torch.allclose(explore.distance_only(torch.eye(n)), torch.eye(n))
    table = torch.randn(2 * n - 1)
    frames = torch.arange(n)
    scores = table[frames - frames[:, None] + n - 1]
    already = scores.exp()  # constant along diagonals before rows are made to sum to one
    assert torch.allclose(explore.distance_only(already), scores.softmax(-1), atol=1e-6)
    equal = torch.full((n, n), 1 / n)
    labels = list("aabbcaabbca")
    assert explore.same_label_share(explore.distance_only(equal), labels) == pytest.approx(
        float(explore.same_label_share(equal, labels))
    )


def test_summary_and_its_picture(maps: torch.Tensor) -> None:
    labels = list("aabbcaabbca")
    summary = explore.head_summary(maps, labels)
    assert {k: tuple(v.shape) for k, v in summary.items()} == dict.fromkeys(
        ("distance", "entropy", "near", "same", "by_chance"), (2, 3)
    )
    assert torch.equal(summary["by_chance"], explore.same_label_share(explore.distance_only(maps), labels))
    assert (
        set(explore.head_summary(maps))
        == set(explore.head_summary(maps, [""] * 11))
        == {"distance", "entropy", "near"}
    )
    for shown, each in ((4, summary), (3, explore.head_summary(maps))):
        axes = explore.plot_heads(each, layers=[4, 5]).axes
        assert sum(bool(ax.get_title()) for ax in axes) == shown
        assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["4", "5"]


@pytest.mark.parametrize("labels", [["a"] * 10, [""] * 11])
def test_labels_are_checked(maps: torch.Tensor, labels: list[str]) -> None:
    with pytest.raises(ValueError, match="labels"):
        explore.same_label_share(maps, labels)


@pytest.mark.parametrize("reach", [-1, 11])
def test_reach_is_checked(maps: torch.Tensor, reach: int) -> None:
    with pytest.raises(ValueError, match="reach"):
        explore.offset_profile(maps, reach)


def test_position_profile_is_the_attention_of_a_head_without_content(model: Wav2Vec2ConformerModel) -> None:
    import copy

    blind = copy.deepcopy(model)
    for block in blind.encoder.layers:
        torch.nn.init.zeros_(block.self_attn.linear_q.weight)  # its bias stays: every frame asks the same
        torch.nn.init.zeros_(block.self_attn.linear_k.weight)
        torch.nn.init.zeros_(block.self_attn.linear_k.bias)
    maps = explore.attention_maps(blind, load_speech("builtin", "test")[2].audio[:16000])
    n = maps.shape[-1]
    assert n % 2 == 1, "the middle frame has as many before as after"
    profile = explore.position_profile(blind, n // 2)
    assert torch.allclose(maps[:, :, n // 2], profile, atol=1e-6)
    assert profile.std() > 0.001
    assert torch.equal(explore.position_profile(model, n // 2), profile)  # content has no part in it


@pytest.mark.parametrize("kind", ["rotary", None])
def test_other_kinds_have_no_position_profile(kind: str | None) -> None:
    with pytest.raises(ValueError, match="relative"):
        explore.position_profile(Wav2Vec2ConformerModel(tiny_config(position_embeddings_type=kind)))
