"""The skeleton: each line does what its chapter says, and the game is learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from w2vc import skeleton
from w2vc.data.corpus import load_speech


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return skeleton.long_clips(load_speech("builtin"))


def test_normalise_takes_offset_and_loudness_away() -> None:
    waves = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(skeleton.normalise(0.01 * waves + 3), skeleton.normalise(waves), atol=2e-2)
    assert skeleton.normalise(torch.zeros(1, 500)).abs().max() == 0, "silence stays silence"


def test_one_frame_for_each_320_samples_and_a_code_for_each_frame(clips: list[np.ndarray]) -> None:
    model, waves = skeleton.make_skeleton(clips), skeleton.pieces(clips, np.random.default_rng(0))
    frames = model.frames(waves)
    vectors, codes = model.codes(waves, frames)
    assert frames.shape == vectors.shape == (8, 49, 64)
    distances = torch.cdist(skeleton.spectrum(waves)[:, :49], model.codes.examples)
    assert torch.equal(distances.gather(-1, codes[..., None])[..., 0], distances.amin(-1))


def test_contrastive_loss_equals_a_loop_and_leaves_right_codes_out() -> None:
    torch.manual_seed(0)
    codes, others = torch.tensor([0, 1, 2, 0, 1, 1]), torch.randint(6, (6, 4))
    book = torch.randn(3, 8)
    c, q = torch.randn(6, 8), book[codes]
    paid, guessed = [], []
    for r in range(6):
        wrong = [q[o] for o in others[r] if codes[o] != codes[r]]
        scores = torch.stack([torch.cosine_similarity(c[r], x, dim=0) for x in (q[r], *wrong)]) / 0.1
        paid.append(-scores.log_softmax(0)[0])
        guessed.append(np.log(1 + len(wrong)))
    game = skeleton.contrastive(c, q, codes, others)
    assert torch.allclose(game.loss, torch.stack(paid).mean(), atol=1e-5)
    assert float(game.guesser) == pytest.approx(np.mean(guessed), abs=1e-5)


def test_information_of_phones_is_1_for_a_name_each_and_0_for_independence() -> None:
    assert skeleton.phone_information(torch.eye(5)) == pytest.approx(1, abs=1e-5)
    assert skeleton.phone_information(torch.ones(4, 5)) == pytest.approx(0, abs=1e-5)


def test_a_linear_reader_reads_what_is_linear() -> None:
    torch.manual_seed(0)
    phones = ["a" if i % 3 else "b" for i in range(200)]
    clear = torch.stack([torch.randn(4) + (6 if phone == "a" else -6) for phone in phones])
    assert skeleton.phones_read(clear, phones) == 1
    assert skeleton.phones_read(torch.randn(200, 4), phones) < 0.9


def test_it_learns_and_a_seed_repeats_it(clips: list[np.ndarray]) -> None:
    first, again = (skeleton.train(skeleton.make_skeleton(clips), clips, steps=30) for _ in range(2))
    assert torch.equal(first[-1].loss, again[-1].loss)
    assert first[-1].loss < first[0].loss - 0.5


def test_a_part_is_replaced_by_assignment(clips: list[np.ndarray]) -> None:
    model = skeleton.make_skeleton(clips)
    model.context = torch.nn.Linear(64, 64)
    model.mask = lambda shape: torch.ones(shape, dtype=torch.bool)
    game = model(skeleton.pieces(clips, np.random.default_rng(0)))
    assert game.loss.isfinite()
    assert "context.weight" in dict(model.named_parameters())
