"""Forced alignment: the Viterbi path against every path, its words and times against the truth, and every refusal."""

from __future__ import annotations

import itertools
import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import helpers
from w2vc.data.audio import Wav2Vec2FeatureExtractor
from w2vc.data.corpus import load_speech
from w2vc.model.ctc import collapse, ctc_loss
from w2vc.model.features import FrameClock
from w2vc.model.wav2vec2 import Wav2Vec2ConformerModel
from w2vc.text import alignment as module
from w2vc.text.alignment import (
    WILDCARD,
    Alignment,
    LabelSpan,
    align_words,
    best_path,
    force_align,
    read_words,
)
from w2vc.text.tokenizer import Wav2Vec2CTCTokenizer, Wav2Vec2Processor, build_vocabulary

TEXTS = ["the happy girl sees a yellow fish", "a quiet zebra jumps over vexed brown dogs"]


def tokenizer(**knobs: Any) -> Wav2Vec2CTCTokenizer:
    return Wav2Vec2CTCTokenizer(build_vocabulary(TEXTS), **knobs)


def draw(T: int, V: int, seed: int, scale: float = 2.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(T, V, generator=g, dtype=torch.float64) * scale).log_softmax(-1)


def every_score(log_probs: Tensor, labels: list[int], blank: int) -> dict[tuple[int, ...], float]:
    """The log probability of every path that spells the labels."""
    T, V = log_probs.shape
    table = log_probs.tolist()
    paths = (p for p in itertools.product(range(V), repeat=T) if collapse(p, blank) == labels)
    return {path: sum(table[t][s] for t, s in enumerate(path)) for path in paths}


# ---- the path


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(1, 6),
    V=st.integers(2, 4),
    blank=st.integers(0, 1),
    n=st.integers(0, 4),
    seed=st.integers(0, 9999),
)
def test_equals_the_best_of_all_paths(T: int, V: int, blank: int, n: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    labels = [s for s in torch.randint(V, (n,), generator=g).tolist() if s != blank]
    log_probs = draw(T, V, seed)
    scores = every_score(log_probs, labels, blank)
    if not scores:
        with pytest.raises(ValueError, match="need"):
            force_align(log_probs, labels, blank)
        return
    found = force_align(log_probs, labels, blank)
    best = max(scores, key=scores.get)
    assert tuple(found.path.tolist()) == best
    assert math.isclose(found.score, scores[best], rel_tol=1e-12)
    torch.testing.assert_close(found.scores, log_probs.gather(1, found.path[:, None])[:, 0])


@settings(max_examples=30, deadline=None)
@given(T=st.integers(1, 60), n=st.integers(0, 12), seed=st.integers(0, 9999))
def test_spells_the_labels_and_no_path_beats_their_sum(T: int, n: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(1, 5, (n,), generator=g)
    log_probs = draw(T, 5, seed)
    try:
        found = force_align(log_probs, labels)
    except ValueError as error:
        assert "need" in str(error)  # noqa: PT017
        return
    assert collapse(found.path) == labels.tolist()
    spans = found.spans
    assert [s.label for s in spans] == labels.tolist()
    assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
    assert all(0 <= s.start < s.end <= T and 0 < s.score <= 1 for s in spans)
    for s in spans:
        assert (found.path[s.start : s.end] == s.label).all()
        assert s.score == pytest.approx(found.scores[s.start : s.end].mean().exp().item())
    assert found.score <= -ctc_loss(log_probs[None], labels[None]).item() + 1e-9


def walk_in_one_piece(emissions: Tensor, states: Tensor, skips: Tensor) -> list[int]:
    """Viterbi with every step kept, one state at a time."""
    reach, steps = [0.0] + [-math.inf] * (len(states) - 1), []
    for frame in emissions.tolist():
        came = []
        for s in range(len(states)):
            ways = [(reach[s], 0)]
            ways += [(reach[s - 1], 1)] if s else []
            ways += [(reach[s - 2], 2)] if s > 1 and skips[s] else []
            came.append(max(ways, key=lambda way: way[0]))
        reach = [best + frame[states[s]] for s, (best, _) in enumerate(came)]
        steps.append([step for _, step in came])
    state = len(states) - 1
    state -= int(state > 0 and reach[state - 1] >= reach[state])
    walk = []
    for row in reversed(steps):
        walk.append(state)
        state -= row[state]
    return walk[::-1]


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 8, 9, 10, 24, 25, 26, 60])
def test_keeping_few_frames_changes_nothing(T: int) -> None:
    """Block borders at every remainder, and ties everywhere: probabilities are rounded to one decimal."""
    for seed in range(5):
        emissions = (draw(T, 4, seed) * 1).round(decimals=0)
        labels = torch.randint(1, 4, (1, min(T // 2, 6)), generator=torch.Generator().manual_seed(seed))
        states = module.extend_labels(labels)[0]
        skips = torch.tensor([s > 1 and bool(states[s] != states[s - 2]) for s in range(len(states))])
        walk = module.viterbi(emissions, states, torch.where(skips, 0.0, -math.inf).double())
        assert walk.tolist() == walk_in_one_piece(emissions, states, skips)


def test_memory_does_not_hold_the_whole_trellis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the steps back, about sqrt(T) frames are alive at a time."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    peak, step = 0, module._step

    def watched(*args: Any) -> tuple[Tensor, Tensor]:
        nonlocal peak
        best, came = step(*args)
        alive.add(came)
        peak = max(peak, len(alive))
        return best, came

    monkeypatch.setattr(module, "_step", watched)
    force_align(draw(400, 3, 0), [1, 2, 1])
    assert 20 <= peak <= 2 * 20 + 2


def test_equally_good_paths_enter_early() -> None:
    flat = torch.zeros(5, 3).log_softmax(-1)
    assert force_align(flat, [1, 2]).path.tolist() == [1, 2, 2, 2, 2]
    assert force_align(flat, [1, 1]).path.tolist() == [1, 0, 1, 1, 1]
    assert force_align(flat, []).path.tolist() == [0] * 5


def test_no_frames() -> None:
    empty = torch.zeros(0, 3)
    found = force_align(empty, [])
    assert (found.path.tolist(), found.spans, found.score) == ([], [], 0.0)
    with pytest.raises(ValueError, match="1 labels need 1 frames"):
        force_align(empty, [1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_type_and_gradients_in_the_way(dtype: torch.dtype) -> None:
    log_probs = draw(20, 5, 0).to(dtype).requires_grad_()
    found = force_align(log_probs, torch.tensor([1, 2, 2, 3]))
    assert found.scores.dtype == torch.float64
    assert not found.scores.requires_grad
    assert found.path.dtype == torch.int64


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    log_probs = draw(50, 6, 3).float()
    here, there = (force_align(log_probs.to(d), [1, 2, 2, 5]) for d in ("cpu", "cuda"))
    assert torch.equal(here.path, there.path)


@pytest.mark.parametrize(
    ("log_probs", "labels", "blank", "message"),
    [
        (torch.zeros(4), [1], 0, r"float32 \(4,\), expected floats \[T, A\]"),
        (torch.zeros(2, 4, 3), [1], 0, "one utterance"),
        (torch.zeros(4, 3, dtype=torch.long), [1], 0, "int64"),
        ([[0.0]], [1], 0, "got list"),
        (torch.ones(4, 3), [1], 0, "log_softmax"),
        (torch.full((4, 3), math.nan), [1], 0, "NaN"),
        (
            torch.zeros(4, 3) - 1,
            [1, 3],
            0,
            r"labels\[1\] = 3 is refused: allowed are 0..2 without the blank 0",
        ),
        (torch.zeros(4, 3) - 1, [-2], 0, "is refused"),
        (torch.zeros(4, 3) - 1, [1, 0], 0, r"labels\[1\] = 0"),
        (torch.zeros(4, 3) - 1, [2], 2, "without the blank 2"),
        (torch.zeros(4, 3) - 1, [1, 1, 2, 2], 0, "4 labels need 6 frames.*there are 4"),
        (torch.tensor([[0.0, -math.inf, -math.inf]] * 4), [1], 0, "no path .* above 0"),
    ],
)
def test_refusals(log_probs: Any, labels: list[int], blank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        force_align(log_probs, labels, blank)


def test_impossible_symbols_elsewhere_do_no_harm() -> None:
    log_probs = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]).log()
    found = force_align(log_probs, [1, 2])
    assert found.path.tolist() == [1, 2, 0]
    assert [round(s.score, 6) for s in found.spans] == [0.5, 1.0]


# ---- the wildcard


def test_the_wildcard_takes_what_was_said_and_no_more() -> None:
    said = [0, 1, 1, 0, 3, 4, 0, 3, 0, 0, 2, 2, 0]  # 1, then 3 4 3, then 2
    log_probs = torch.full((len(said), 5), 0.02).scatter(1, torch.tensor(said)[:, None], 0.92).log()
    found = force_align(log_probs, [1, WILDCARD, 2])
    assert [tuple(s[:3]) for s in found.spans] == [(1, 1, 3), (WILDCARD, 4, 8), (2, 10, 12)]
    assert collapse(found.path) == [1, WILDCARD, 2]
    plain = force_align(log_probs, [1, 2])
    assert plain.spans[0].score < 0.5 or plain.spans[1].score < 0.5 or plain.score < found.score


@settings(max_examples=30, deadline=None)
@given(T=st.integers(1, 5), seed=st.integers(0, 999), where=st.integers(0, 2))
def test_the_wildcard_equals_a_column_of_its_own(T: int, seed: int, where: int) -> None:
    log_probs = draw(T, 3, seed)
    wide = torch.cat([log_probs, log_probs.max(1, keepdim=True).values + math.log(0.9)], 1)
    labels = [1, 2]
    labels.insert(where, 3)
    scores = every_score(wide, labels, 0)
    with_wildcard = [WILDCARD if s == 3 else s for s in labels]
    if scores:
        found = force_align(log_probs, with_wildcard)
        assert math.isclose(found.score, max(scores.values()), rel_tol=1e-12)
        assert collapse(found.path) == with_wildcard


# ---- words


def posteriors(path: list[int], V: int, sure: float = 0.9) -> Tensor:
    """Logits of a model that says this path."""
    rest = (1 - sure) / (V - 1)
    return torch.full((len(path), V), rest).scatter(1, torch.tensor(path)[:, None], sure).log()


def test_words_letters_and_times() -> None:
    tok = tokenizer()
    path = tok.convert_tokens_to_ids([*"tthe", "<pad>", "<pad>", "|", *"ggirl", "<pad>"])
    logits = posteriors(path, len(tok))
    words = align_words(logits, "the girl", tok, seconds=0.3)
    assert [w.label for w in words] == ["the", "girl"]
    assert [c.label for w in words for c in w.chars] == [*"thegirl"]
    times = [(320 * a + 40) / 16_000 for a in (0, 4, 7, 12)]
    assert [t for w in words for t in (w.start, w.end)] == pytest.approx(times)
    assert all(w.confidence == pytest.approx(0.9, abs=1e-6) for w in words)
    assert words == read_words(best_path(logits.log_softmax(-1)), tok, seconds=0.3)
    processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tok)
    assert align_words(logits, "the girl", processor, seconds=0.3) == words


@settings(max_examples=40, deadline=None)
@given(
    n_words=st.integers(0, 5),
    extra=st.integers(0, 30),
    short=st.integers(0, 500),
    seed=st.integers(0, 999),
    adapter=st.booleans(),
)
def test_times_are_ordered_and_inside_the_audio(
    n_words: int, extra: int, short: int, seed: int, adapter: bool
) -> None:
    """Whatever the model says, and whatever is left of the audio's last frame."""
    tok = tokenizer()
    g = torch.Generator().manual_seed(seed)
    text = " ".join(TEXTS[0].split()[i] for i in torch.randint(7, (n_words,), generator=g).tolist())
    ids = tok.encode(text)
    T = 2 * len(ids) + extra
    config = helpers.tiny_config(add_adapter=adapter)
    hop, width, _ = FrameClock.of(config, adapter=True)
    seconds = max((hop * (T - 1) + width - short) / 16_000, 0.0)
    words = align_words(torch.randn(T, len(tok), generator=g), text, tok, config=config, seconds=seconds)
    assert " ".join(w.label for w in words) == text
    for w in words:
        assert 0 <= w.start <= w.end <= seconds
        assert 0 <= w.confidence <= 1
        assert (w.start, w.end) == (w.chars[0].start, w.chars[-1].end)
        assert "".join(c.label for c in w.chars) == w.label
    for these in (words, [c for w in words for c in w.chars]):
        assert all(a.end <= b.start for a, b in itertools.pairwise(these))


def test_confidence_falls_where_the_text_is_wrong() -> None:
    tok = tokenizer()
    right = "the happy girl sees a fish"
    path = [i for s in tok.encode(right) for i in (s, 0)]
    logits = posteriors(path, len(tok))
    assert min(w.confidence for w in align_words(logits, right, tok)) > 0.85
    wrong = align_words(logits, "the happy zebra sees a fish", tok)
    assert wrong[2].confidence < 0.3 < min(w.confidence for w in wrong[:2] + wrong[3:])


def test_confidence_counts_frames() -> None:
    path = torch.tensor([3, 4, 4, 4, *[WILDCARD] * 5])
    scores = torch.tensor([0.9, 0.4, 0.4, 0.4, *[0.1] * 5], dtype=torch.float64).log()
    letters = list(zip("abc", Alignment(path, scores).spans, strict=True))
    word = module._time_word("abc", letters, FrameClock(), None)
    assert word.confidence == pytest.approx((0.9 * 0.4**3) ** 0.25)
    assert [c.confidence for c in word.chars] == pytest.approx([0.9, 0.4, 0.0])
    assert module._time_word("a", [("a", LabelSpan(1, 0, 1, 0.0))], FrameClock(), None).confidence < 1e-99


def test_unknown_characters() -> None:
    tok = tokenizer()
    logits = torch.zeros(40, len(tok))
    with pytest.raises(ValueError, match=r"word '1984' needs '1'.*wildcard=True"):
        align_words(logits, "the 1984 girl", tok)
    with pytest.raises(ValueError, match=r"'T'.*mind upper and lower case"):
        align_words(logits, "The girl", tok)
    with pytest.raises(ValueError, match="'<unk>'"):
        align_words(logits, "the <unk>", tok)
    words = align_words(logits, "the 1984 girl's", tok, wildcard=True)
    assert [w.label for w in words] == ["the", "1984", "girl's"]
    assert [c.label for c in words[1].chars] == ["1984"]
    assert words[1].confidence == 0
    assert [c.label for c in words[2].chars] == ["g", "i", "r", "l", "'", "s"]
    assert words[2].confidence > 0
    (word,) = align_words(logits, "a12b3", tok, wildcard=True)
    assert [c.label for c in word.chars] == ["a", "12", "b", "3"]
    assert [c.confidence > 0 for c in word.chars] == [True, False, True, False]


def test_symbols_that_the_model_has_no_output_for() -> None:
    tok = tokenizer()
    V = tok.encode("z")[0]
    with pytest.raises(ValueError, match="'z'"):
        align_words(torch.zeros(40, V), "zebra", tok)


def test_lower_case_and_long_symbols_and_no_delimiter() -> None:
    upper = Wav2Vec2CTCTokenizer(build_vocabulary([t.upper() for t in TEXTS], ["SH"]), do_lower_case=True)
    words = align_words(torch.zeros(40, len(upper)), "the fish", upper)
    assert [[c.label for c in w.chars] for w in words] == [["t", "h", "e"], ["f", "i", "sh"]]
    assert [
        w.label
        for w in read_words(
            force_align(torch.zeros(40, len(upper)).log_softmax(-1), upper.encode("the fish")), upper
        )
    ] == ["the", "fish"]
    phones = Wav2Vec2CTCTokenizer(
        {"<pad>": 0, "a": 1, "b": 2}
    )  # the tokenizer adds "|" behind: no output of the model
    words = align_words(torch.zeros(8, 3), "ab ba", phones)
    assert [w.label for w in words] == ["ab", "ba"]
    assert [len(w.chars) for w in words] == [2, 2]


def test_empty_text() -> None:
    tok = tokenizer()
    assert align_words(torch.zeros(10, len(tok)), "  ", tok) == []
    assert align_words(torch.zeros(0, len(tok)), "", tok) == []
    assert read_words(best_path(torch.zeros(0, len(tok))), tok) == []
    with pytest.raises(ValueError, match="3 labels need 3 frames"):
        align_words(torch.zeros(2, len(tok)), "the", tok)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 9999), T=st.integers(0, 40), lower=st.booleans())
def test_reading_a_path_equals_the_tokenizer(seed: int, T: int, lower: bool) -> None:
    texts = [t.upper() for t in TEXTS] if lower else TEXTS
    tok = Wav2Vec2CTCTokenizer(build_vocabulary(texts), do_lower_case=lower)
    g = torch.Generator().manual_seed(seed)
    ids = torch.tensor([0, 0, tok.word_delimiter_token_id, *range(5, 12)])[
        torch.randint(10, (T,), generator=g)
    ]
    found = read_words(Alignment(ids, torch.zeros(T, dtype=torch.float64)), tok)
    output = tok.decode(ids, output_word_offsets=True)
    assert [w.label for w in found] == output.text.split()
    assert [w["word"] for w in output.word_offsets] == [w.label for w in found]
    starts = [(320 * w["start_offset"] + 40) / 16_000 for w in output.word_offsets]
    assert [w.start for w in found] == pytest.approx(starts)


# ---- where frames lie


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"add_adapter": True},
        {"add_adapter": True, "num_adapter_layers": 1, "adapter_kernel_size": 5, "adapter_stride": 3},
    ],
)
def test_the_clock_says_where_a_frame_listens(knobs: dict[str, Any]) -> None:
    """The samples that change frame 5, found by its gradient, have the middle that the numbers say."""
    config = helpers.tiny_config(**knobs, feat_extract_norm="layer")  # group norm would hear everything
    hop, width, _ = clock = FrameClock.of(config, adapter=True)
    model = Wav2Vec2ConformerModel(config).eval()
    audio = torch.randn(1, hop * 9 + width, requires_grad=True)
    frames, _ = model.feature_projection(model.feature_extractor(audio))
    frames = frames if model.adapter is None else model.adapter(frames)
    assert frames.shape[1] == 10
    assert int(model._get_feat_extract_output_lengths(hop * 9 + width - 1)) == 9
    (frames[0, 5] * torch.randn(frames.shape[2])).sum().backward()
    assert audio.grad is not None
    heard = audio.grad[0].nonzero()[:, 0]
    assert (heard[0] + heard[-1] + 1).item() / 2 == clock.middle(5) * 16_000 == 5 * hop + width / 2


def test_words_of_the_builtin_speech_are_found_to_a_frame() -> None:
    """Posteriors made from the true times plus noise: all words within 60 ms, most within 20."""
    speech = load_speech("builtin").filter(kind="sentence")[:8]
    tok = Wav2Vec2CTCTokenizer(build_vocabulary([u.text for u in speech]))
    errors = []
    for i, u in enumerate(speech):
        T = (u.n_samples - 400) // 320 + 1
        ids = torch.zeros(T, dtype=torch.long)
        for word in u.words:
            edges = torch.linspace(word.start, word.end, len(word.label) + 1).tolist()
            for a, b, letter in zip(edges[:-1], edges[1:], word.label, strict=True):
                first, last = (round((16_000 * x - 40) / 320) for x in (a, b))
                ids[first : max(last, first + 1)] = tok.encode(letter)[0]
        g = torch.Generator().manual_seed(i)
        logits = torch.nn.functional.one_hot(ids, len(tok)) * 4 + torch.randn(T, len(tok), generator=g)
        found = align_words(logits, u.text, tok, seconds=u.seconds)
        errors += [
            abs(getattr(a, k) - getattr(b, k))
            for a, b in zip(found, u.words, strict=True)
            for k in ("start", "end")
        ]
    assert max(errors) <= 0.061
    assert sorted(errors)[len(errors) // 2] <= 0.02
