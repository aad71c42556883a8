"""Codes of a model against plain counting: tables, stretches, averages, orders, neighbours, and the page's data."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from helpers import tiny_config
from w2vc.data.audio import Wav2Vec2FeatureExtractor
from w2vc.data.corpus import Segment, Speech, Utterance, load_speech
from w2vc.evaluation.probes import measure_codes, phone_frames
from w2vc.explore.codevectors import (
    CodeFrames,
    CodeSegment,
    code_directions,
    code_information,
    code_phone_table,
    code_segments,
    code_targets,
    code_usage,
    collect_codes,
    hear_segments,
    main_phones,
    mean_patch,
    nearest_codes,
    nearest_segments,
    order_together,
    phone_thirds,
)
from w2vc.explore.page import codevector_explorer, cover_codes
from w2vc.explore.views import flatten_to_plane
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining


@pytest.fixture(scope="module")
def model() -> Wav2Vec2ConformerForPreTraining:
    torch.manual_seed(0)
    return Wav2Vec2ConformerForPreTraining(tiny_config(num_codevectors_per_group=12)).eval()


@pytest.fixture(scope="module")
def speech() -> Speech:
    return load_speech("builtin", split="test").filter(kind="digits")[:10]


@pytest.fixture(scope="module")
def frames(model: Wav2Vec2ConformerForPreTraining, speech: Speech) -> CodeFrames:
    return collect_codes(model, speech)


def by_hand(codes: list[list[int]], phones: list[list[str]], n_codes: int = 4) -> CodeFrames:
    """Frames of one group without sound, one list per utterance."""
    rng = np.random.default_rng(0)
    sizes = [len(c) for c in codes]
    hop, width = 0.02, 0.025
    utterances = [
        Utterance(
            f"u{i}",
            rng.normal(0, 0.1, round((n + 1) * 320)).astype(np.float32),
            speaker=f"s{i}",
            phones=[Segment(p, t * hop, (t + 1) * hop) for t, p in enumerate(names)],
        )
        for i, (n, names) in enumerate(zip(sizes, phones, strict=True))
    ]
    flat = np.concatenate([np.array(c) for c in codes])[:, None]
    return CodeFrames(
        Speech(utterances), flat, np.repeat(np.arange(len(codes)), sizes), np.concatenate([np.arange(n) for n in sizes]),
        np.array([p for names in phones for p in names]), rng.normal(size=(len(flat), 3)).astype(np.float32),
        np.ones((1, n_codes)), np.eye(n_codes, dtype=np.float32)[None], np.zeros(n_codes, np.float32), hop, width,
    )  # fmt: skip


def test_codes_are_those_of_the_model_row_by_row(model, speech, frames) -> None:
    assert frames.codes.shape == (len(frames), 2)
    extractor = Wav2Vec2FeatureExtractor()
    for i in (0, 7):
        sound = extractor(speech[i].audio, sampling_rate=16_000, return_tensors="pt")["input_values"]
        with torch.no_grad():
            latent = model.wav2vec2_conformer(sound).extract_features
            assert (model.quantizer.codes(latent)[0].numpy() == frames.of(i)).all()
            vectors, _ = model.quantizer(latent)
            targets = torch.nn.functional.normalize(model.project_q(vectors)[0], dim=-1).numpy()
        np.testing.assert_allclose(code_targets(frames)[frames.owner == i], targets, atol=1e-5)
        assert (frames.steps[frames.owner == i] == np.arange(latent.shape[1])).all()
    assert (np.diff(frames.owner) >= 0).all()


def test_phones_and_bands_agree_with_the_evaluation(model, speech, frames) -> None:
    theirs, known = phone_frames(model, speech), frames.phones != ""
    for i, u in enumerate(speech):
        here, there = known & (frames.owner == i), theirs.ids == u.id
        assert (frames.phones[here] == theirs.phones[there]).all()
        assert (frames.codes[here] == theirs.codes[there]).all()
        np.testing.assert_allclose(frames.mel[here], theirs.mel[there], atol=1e-5)
    assert (frames.speakers == np.array([u.speaker for u in speech])[frames.owner]).all()


def test_the_model_stays_as_it_was(model, speech) -> None:
    model.train()
    try:
        collect_codes(model, speech[:2])
        assert model.training
        assert model.wav2vec2_conformer.encoder.training
    finally:
        model.eval()


def test_usage_counts_and_perplexities(frames) -> None:
    usage = code_usage(frames)
    for g in (0, 1):
        counts = [int((frames.codes[:, g] == v).sum()) for v in range(12)]
        assert usage.counts[g].tolist() == counts
        shares = np.array([c for c in counts if c]) / len(frames)
        assert usage.hard[g] == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())), rel=1e-5)
        assert usage.dead[g] == [v for v in range(12) if not counts[v]]
    np.testing.assert_allclose(frames.soft.sum(1), len(frames), rtol=1e-4)
    toy = code_usage(by_hand([[0, 0, 1, 1, 2, 2]], [list("aabbcc")]))
    assert toy.hard == [pytest.approx(3)]
    assert toy.soft == [pytest.approx(4)]
    assert toy.dead == [[3]]


def test_stretches_end_with_the_utterance(frames) -> None:
    toy = by_hand([[2, 2, 0, 2], [2, 1]], [list("aabc"), list("xy")])
    found = code_segments(toy, 0, 2)
    assert [(s.utterance, round(s.start, 3), round(s.end, 3), s.phone) for s in found] == [
        (0, 0.0, 0.045, "a"),
        (0, 0.06, 0.085, "c"),
        (1, 0.0, 0.025, "x"),
    ]
    assert code_segments(toy, 0, 3) == []
    everything = [s for v in range(12) for s in code_segments(frames, 1, v)]
    assert sum(round((s.end - s.start - frames.width) / frames.hop) + 1 for s in everything) == len(frames)
    few = code_segments(frames, 0, int(frames.codes[0, 0]), n=2, seed=3)
    assert few == code_segments(frames, 0, int(frames.codes[0, 0]), n=2, seed=3)
    assert len(few) == 2


def test_tables_order_and_names() -> None:
    toy = by_hand([[0, 0, 1, 2], [0, 1, 2]], [["s", "s", "i", ""], ["i", "i", "sil"]])
    assert main_phones(toy, 0) == ["s", "i", "sil", ""]
    table = code_phone_table(toy, 0)
    wanted = {(0, "s"): 2, (0, "i"): 1, (1, "i"): 2, (2, "sil"): 1}
    got = {
        (c, p): int(table.counts[a, b]) for a, c in enumerate(table.codes) for b, p in enumerate(table.phones)
    }
    assert {k: v for k, v in got.items() if v} == wanted
    assert code_phone_table(toy, 0, least=2).phones != table.phones
    with pytest.raises(ValueError, match="no phones"):
        code_phone_table(by_hand([[0, 1]], [["", ""]]), 0)


def test_the_order_finds_a_line() -> None:
    band = np.exp(-0.3 * (np.arange(9)[:, None] - np.arange(9)) ** 2)
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(9), rng.permutation(9)
    by_row, by_column = order_together(band[rows][:, columns])
    found = rows[by_row]
    assert found.tolist() in (list(range(9)), list(range(8, -1, -1)))
    assert (columns[by_column] == found).all()
    heavy = np.array([[50.0, 1, 0], [1, 5, 1], [0, 1, 5]])
    assert order_together(heavy)[1].tolist()[-1] == 0
    for seed in range(8):
        table = np.random.default_rng(seed).integers(1, 9, (7, 6))
        table[:3, 2] += 40
        assert order_together(table)[1].tolist().index(2) >= 3
    with pytest.raises(ValueError, match="above 0"):
        order_together(np.array([[1, 0], [1, 0]]))


def test_thirds_and_information(frames) -> None:
    toy = by_hand([[0] * 9], [[""] * 9])
    toy.speech[0].phones = (Segment("a", 0.0, 0.18),)
    assert phone_thirds(toy).tolist() == ["first"] * 3 + ["middle"] * 3 + ["last"] * 3
    known = frames.phones != ""
    found = code_information(frames)
    speakers = np.unique(frames.speakers[known], return_inverse=True)[1]
    assert found["speaker"]["group 1"] == measure_codes(frames.codes[known, 1], speakers)
    told = code_information(frames, np.unique(frames.speakers, return_inverse=True)[1][:, None])
    assert told["speaker"]["group 0"].known == pytest.approx(1)


def test_mean_patches_do_not_cross_utterances(frames) -> None:
    toy = by_hand([[0, 0, 1], [1, 0, 0]], [list("abc"), list("def")])
    patch = mean_patch(toy, 0, 1, reach=2)
    np.testing.assert_allclose(patch[2], (toy.mel[2] + toy.mel[3]) / 2, rtol=1e-5)
    np.testing.assert_allclose(patch[3], toy.mel[4], rtol=1e-5)  # frame 3 is another utterance's
    np.testing.assert_allclose(patch[0], toy.mel[0], rtol=1e-5)
    assert np.isnan(mean_patch(by_hand([[1]], [["a"]]), 0, 1, reach=1)[[0, 2]]).all()
    np.testing.assert_allclose(mean_patch(frames, 0)[6], frames.mel.mean(0), atol=1e-4)


def test_the_plane() -> None:
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(20, 2)) @ rng.normal(size=(2, 7)) + 5  # lies in a plane: nothing is lost
    points, note = flatten_to_plane(plane)
    wanted = np.linalg.norm(plane[:, None] - plane, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(points[:, None] - points, axis=-1), wanted, atol=1e-4)
    assert "100 %" in note


def test_nearest_codes(frames) -> None:
    code = int(frames.codes[0, 0])
    directions, used = code_directions(frames, 0), set(frames.codes[:, 0].tolist())
    wanted = sorted(((float(directions[v] @ directions[code]), v) for v in used - {code}), reverse=True)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-5)
    away = frames.vectors[0] - frames.vectors[0].mean(
        0
    )  # where they all lie does not matter, only where they part
    np.testing.assert_allclose((directions * away).sum(1), np.linalg.norm(away, axis=1), rtol=1e-4)
    assert [c for c, _ in nearest_codes(frames, 0, code, 3)] == [v for _, v in wanted[:3]]


def test_nearest_segments_find_the_same_codes() -> None:
    toy = by_hand([[0, 1, 2, 3, 0], [3, 3, 1, 2, 3], [2, 0, 1, 1, 2]], [list("abcde")] * 3)
    best, second = nearest_segments(toy, 0, 0.02, 0.08, n=2)
    assert (best.segment.utterance, round(best.segment.start, 3), best.cosine) == (1, 0.04, pytest.approx(1))
    assert second.segment.utterance == 2
    assert second.cosine == pytest.approx(1 / 3)
    seam = by_hand([[1, 2, 3], [0, 0, 1, 2], [3, 0, 0, 3]], [list("abc"), list("defg"), list("hijk")])
    assert max(x.cosine for x in nearest_segments(seam, 0, 0.0, 0.06)) < 0.4  # 1, 2, 3 lies across the seam
    with pytest.raises(ValueError, match="middle of no frame"):
        nearest_segments(toy, 0, 0.5, 0.6)
    same = dataclasses.replace(
        toy, speech=Speech([Utterance(u.id, u.audio, speaker="s") for u in toy.speech])
    )
    assert nearest_segments(same, 0, 0.02, 0.08, other_speakers=True) == []


def test_what_is_heard(frames) -> None:
    one = CodeSegment(0, 0.2, 0.3, "")
    piece = hear_segments(frames, [one], context=0.05, pause=0.1)
    assert len(piece) == pytest.approx(0.3 * 16_000, abs=2)
    assert np.abs(piece).max() <= 0.61
    assert not piece[-1600:].any()
    middle = frames.speech[0].cut(0.17, 0.33)
    assert np.corrcoef(piece[320 : 320 + len(middle)], middle)[0, 1] > 0.999
    assert hear_segments(frames, []).shape == (0,)


def test_cover_takes_few_utterances(frames) -> None:
    chosen = cover_codes(frames, per_code=1)
    heard = {(g, v) for i in chosen for g in (0, 1) for v in frames.of(i)[:, g].tolist()}
    assert heard == {(g, v) for g in (0, 1) for v in frames.codes[:, g].tolist()}
    assert len(set(chosen)) == len(chosen) <= len(frames.speech)


def test_the_explorer_holds_what_was_counted(frames) -> None:
    explorer = codevector_explorer(frames, per_code=2, sound_bytes=20_000)
    assert explorer._repr_html_() == codevector_explorer(frames, per_code=2, sound_bytes=20_000)._repr_html_()
    data, usage = explorer.data, code_usage(frames)
    for g, group in enumerate(data["groups"]):
        table = code_phone_table(frames, g)
        assert group["counts"] == table.counts.tolist()
        assert group["frames"] == usage.counts[g][table.codes].tolist()
        assert group["runs"] == [len(code_segments(frames, g, c)) for c in table.codes]
    whole = codevector_explorer(frames, per_code=2).data["clips"]
    assert len(whole) == len(cover_codes(frames, 2))
    sizes = [sum(len(clip["sound"]) for clip in clips) for clips in (data["clips"], whole)]
    assert 0 < sizes[0] <= 20_000 < sizes[1]
    for clip in data["clips"]:
        i = [u.id for u in frames.speech].index(clip["id"])
        assert np.array_equal(np.array(clip["codes"]).T, frames.of(i))


def test_the_explorer_without_phones(model, speech) -> None:
    bare = Speech([Utterance(u.id, u.audio) for u in speech[:3]])
    data = codevector_explorer(collect_codes(model, bare)).data
    assert data["groups"][0]["phones"] == ["any sound"]
    counts = data["groups"][0]["frames"]
    assert counts == sorted(counts, reverse=True)


def test_errors(model) -> None:
    with pytest.raises(ValueError, match="no utterance gives a frame"):
        collect_codes(model, Speech([Utterance("short", np.zeros(100, np.float32))]))
