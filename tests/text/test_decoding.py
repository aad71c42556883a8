"""The decoding chapter: beam search, language model and hot-words, each against the enumeration of all paths; and the folders of others."""

from __future__ import annotations

import gc
import gzip
import itertools
import json
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Wav2Vec2CTCTokenizer as PeerTokenizer

from w2vc.data.audio import Wav2Vec2FeatureExtractor
from w2vc.data.corpus import load_speech
from w2vc.model.ctc import collapse
from w2vc.text.decoding import (
    CTCDecoder,
    HotWords,
    Hypothesis,
    NGramModel,
    TextScorer,
    _Prefix,
    beam_search,
    estimate_ngram,
    greedy,
)
from w2vc.text.tokenizer import (
    AutoProcessor,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2Processor,
    build_vocabulary,
    offsets_in_seconds,
)

LN10 = math.log(10)
FULL: dict[str, Any] = {
    "beam_width": 10**6, "n_best": 10**6, "token_min_logp": None, "beam_prune_logp": None,
}  # fmt: skip
few = settings(max_examples=25, deadline=None)


def random_logits(seed: int, T: int, V: int, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(T, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


def enumerate_paths(logits: torch.Tensor, blank: int) -> tuple[dict[tuple[int, ...], float], dict[Any, Any]]:
    """Every path, one by one: the log probability of each label string, and its best path."""
    log_probs = logits.double().log_softmax(-1).tolist()
    totals: dict[tuple[int, ...], float] = {}
    best: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
    for path in itertools.product(range(logits.shape[1]), repeat=len(log_probs)):
        score = sum(log_probs[t][symbol] for t, symbol in enumerate(path))
        labels = tuple(collapse(path, blank))
        totals[labels] = float(np.logaddexp(totals.get(labels, -math.inf), score))
        best[labels] = max(best.get(labels, (-math.inf, path)), (score, path))
    return totals, best


def beam_search_plain(  # noqa: PLR0917
    log_probs: Any, blank: int, width: int, scorer: TextScorer, token_floor: float, floor: float
) -> Any:
    """Algorithm 1 of Hannun et al. with dicts, as one would write it down; returns {labels: acoustic score}, in order."""
    beam = {(): (0.0, -math.inf)}

    def said(labels: tuple[int, ...]) -> float:
        state = scorer.start()
        for symbol in labels:
            state = scorer.extend(state, symbol)
        return state.rank

    for frame in np.asarray(log_probs):
        grown: dict[tuple[int, ...], list[float]] = {}
        kept = [s for s in range(len(frame)) if frame[s] >= min(token_floor, frame.max())]
        for labels, (in_blank, in_label) in beam.items():
            for symbol in kept:
                total = np.logaddexp(in_blank, in_label)
                if symbol == blank:
                    moves = [(labels, 0, total)]
                elif labels and symbol == labels[-1]:
                    moves = [(labels, 1, in_label), ((*labels, symbol), 1, in_blank)]
                else:
                    moves = [((*labels, symbol), 1, total)]
                for to, column, score in moves:
                    pair = grown.setdefault(to, [-math.inf, -math.inf])
                    pair[column] = np.logaddexp(pair[column], score + frame[symbol])
        ranks = {labels: np.logaddexp(*pair) + said(labels) for labels, pair in grown.items()}
        best = max(ranks.values())
        order = sorted(
            (labels for labels in grown if ranks[labels] > -math.inf), key=lambda x: (-ranks[x], x)
        )
        beam = {x: tuple(grown[x]) for x in order[:width] if ranks[x] >= best + floor}
    return {labels: float(np.logaddexp(*pair)) for labels, pair in beam.items()}


# ------------------------------------------------------------------------------------------------------------- greedy


def test_greedy_takes_the_best_of_each_frame() -> None:
    logits = torch.tensor([[0.0, 3, 1], [0, 3, 1], [3, 0, 1], [0, 3, 1], [0, 1, 3]])
    assert greedy(logits) == [1, 1, 2]
    assert greedy(logits, 3) == [1]
    assert greedy(logits.numpy(), blank=1) == [0, 2]
    assert greedy(logits.log_softmax(-1).half()) == [1, 1, 2]
    batch = torch.stack([logits, logits.flip(0)])
    assert greedy(batch) == [[1, 1, 2], [2, 1, 1]]
    assert greedy(batch, torch.tensor([2, 0])) == [[1], []]
    assert greedy(torch.zeros(0, 3)) == []


@pytest.mark.parametrize(
    ("logits", "more", "message"),
    [
        (torch.zeros(3), {}, r"shape \(3,\), expected \(frames, symbols\) or \(batch, frames, symbols\)"),
        (torch.zeros(2, 0), {}, "shape"),
        (torch.zeros(4, 3, dtype=torch.long), {}, "dtype torch.int64"),
        (torch.tensor([[0.0, 1], [0, math.nan]]), {}, r"logits\[1, 1\] = nan"),
        (torch.tensor([[0.0, math.inf]]), {}, r"logits\[0, 1\] = inf"),
        (torch.full((2, 2), -math.inf), {}, r"logits\[0, 0\] = -inf"),
        (torch.zeros(4, 3), {"blank": 3}, "blank=3 is refused: the logits have the symbols 0..2"),
        (torch.zeros(4, 3), {"lengths": 5}, r"lengths=\[5\] .* 1 whole numbers of frames in 0..4"),
        (torch.zeros(2, 4, 3), {"lengths": [4, 1.5]}, "lengths"),
        (torch.zeros(2, 4, 3), {"lengths": [4]}, "lengths"),
    ],
)
def test_greedy_refuses(logits: torch.Tensor, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        greedy(logits, **more)


# -------------------------------------------------------------------------------------------------------- beam search


@few
@given(seed=st.integers(0, 10**6), T=st.integers(0, 5), V=st.integers(1, 4), data=st.data())
def test_a_full_beam_is_the_enumeration(seed: int, T: int, V: int, data: st.DataObject) -> None:
    blank = data.draw(st.integers(0, V - 1))
    logits = random_logits(seed, T, V)
    totals, best = enumerate_paths(logits, blank)
    found = beam_search(logits, blank=blank, **FULL)
    assert {h.ids for h in found} == set(totals)
    assert [h.acoustic for h in found] == sorted((h.acoustic for h in found), reverse=True)
    assert math.isclose(sum(math.exp(h.acoustic) for h in found), 1.0, rel_tol=1e-9)
    log_probs = logits.log_softmax(-1)
    for h in found:
        assert abs(h.acoustic - totals[h.ids]) < 1e-9
        assert h.total == h.acoustic
        assert tuple(collapse(h.path, blank)) == h.ids
        assert abs(sum(float(log_probs[t, s]) for t, s in enumerate(h.path)) - best[h.ids][0]) < 1e-9
        assert len(h.frames) == len(h.ids)
        assert all(h.path[t] == i for i, (a, b) in zip(h.ids, h.frames, strict=True) for t in range(a, b))
        assert all(a < b <= c < T + 1 for (a, b), (c, _) in itertools.pairwise([*h.frames, (T, T)]))


def toy_scorer(**knobs: Any) -> TextScorer:
    model = estimate_ngram(["a ab", "b a", "ab"], 2)
    return TextScorer(["_", "|", "a", "b"], "|", model, **{"hotwords": {"ba": 2.0, "a b": 1.0}, **knobs})


@few
@given(
    seed=st.integers(0, 10**6), T=st.integers(1, 14), coarse=st.booleans(), text=st.booleans(), data=st.data()
)
def test_a_pruned_beam_is_the_plain_algorithm(
    seed: int, T: int, coarse: bool, text: bool, data: st.DataObject
) -> None:
    """Ties (coarse scores) included; prefixes die and come back."""
    logits = random_logits(seed, T, 4, 1.5)
    logits = logits.round() if coarse else logits
    width, floor = (
        data.draw(st.sampled_from([1, 2, 3, 7])),
        data.draw(st.sampled_from([-math.inf, -6.0, -2.0])),
    )
    token_floor = data.draw(st.sampled_from([-math.inf, -4.0, -1.5]))
    scorer = toy_scorer() if text else TextScorer([])
    log_probs = logits.log_softmax(-1)
    plain = beam_search_plain(log_probs, 0, width, scorer, token_floor, floor)
    found = beam_search(
        log_probs, beam_width=width, n_best=width, scorer=scorer, normalise=False,
        token_min_logp=None if token_floor == -math.inf else token_floor, beam_prune_logp=None if floor == -math.inf else floor,
    )  # fmt: skip
    assert {h.ids for h in found} == set(plain)
    assert all(abs(h.acoustic - plain[h.ids]) < 1e-9 for h in found)
    if not text:
        assert [h.ids for h in found] == list(plain)


def test_long_noise_dies_and_comes_back_as_in_the_plain_algorithm() -> None:
    log_probs = random_logits(5, 120, 6, 1.0).log_softmax(-1)
    plain = beam_search_plain(log_probs, 0, 8, TextScorer([]), -math.inf, -math.inf)
    found = beam_search(log_probs, beam_width=8, n_best=8, token_min_logp=None, beam_prune_logp=None)
    assert [h.ids for h in found] == list(plain)
    np.testing.assert_allclose([h.acoustic for h in found], list(plain.values()), rtol=1e-12)


def test_equal_scores_are_sorted_by_labels() -> None:
    found = beam_search(torch.zeros(1, 4), **FULL)
    assert [h.ids for h in found] == [(), (1,), (2,), (3,)]
    assert [h.ids for h in beam_search(torch.zeros(2, 3), **FULL)] == [(1,), (2,), (), (1, 2), (2, 1)]
    assert [h.ids for h in beam_search(torch.zeros(2, 3), beam_width=2, n_best=9)] == [(1,), ()]


def test_sums_of_paths_beat_the_best_path() -> None:
    logits = torch.tensor([[0.4, 0.35, 0.25]]).expand(2, 3).log()
    assert greedy(logits) == []
    assert beam_search(logits)[0].ids == (1,)
    assert math.isclose(
        math.exp(beam_search(logits, **FULL)[0].acoustic), 2 * 0.4 * 0.35 + 0.35**2, rel_tol=1e-6
    )


@few
@given(seed=st.integers(0, 10**6), T=st.integers(1, 30))
def test_a_beam_of_one_is_greedy_where_each_winner_has_three_quarters(seed: int, T: int) -> None:
    g = torch.Generator().manual_seed(seed)
    losers = torch.rand(T, 4, generator=g).softmax(-1)
    winners = torch.randint(0, 4, (T,), generator=g)
    share = 0.751 + 0.2 * torch.rand(T, generator=g)
    probs = losers.scatter(1, winners[:, None], 0.0)
    probs = probs / probs.sum(-1, keepdim=True) * (1 - share[:, None])
    probs = probs.scatter(1, winners[:, None], share[:, None])
    assert list(beam_search(probs.log(), beam_width=1, token_min_logp=None)[0].ids) == greedy(probs)


def test_a_beam_of_one_is_not_always_greedy() -> None:
    probs = torch.tensor([[0.49, 0.51], [0.49, 0.51], [0.49, 0.51], [0.01, 0.99]])
    assert greedy(probs) == [1]
    assert beam_search(probs.log(), beam_width=1)[0].ids == (1, 1)


def test_knobs_of_pruning() -> None:
    probs = torch.tensor([[0.6, 0.3, 0.09, 0.01], [0.6, 0.01, 0.3, 0.09]])
    ids = lambda **knobs: {h.ids for h in beam_search(probs.log(), **{**FULL, **knobs})}  # noqa: E731
    assert ids(top_k=1) == {()}
    assert ids(top_k=2) == {(), (1,), (2,), (1, 2)}
    assert ids(token_min_logp=math.log(0.29)) == {(), (1,), (2,), (1, 2)}
    assert ids(token_min_logp=math.log(0.9)) == {()}, "the best symbol always stays"
    assert ids(beam_prune_logp=-1e-9) == {()}
    assert len(beam_search(probs.log(), n_best=5, beam_width=3)) == 3


def test_scores_are_taken_in_any_form() -> None:
    logits = random_logits(1, 6, 4)
    wanted = beam_search(logits, **FULL)
    same = beam_search(logits.log_softmax(-1), **FULL)
    assert [h.ids for h in same] == [h.ids for h in wanted]
    np.testing.assert_allclose([h.acoustic for h in same], [h.acoustic for h in wanted], atol=1e-12)
    assert beam_search((logits + 7).requires_grad_(), **FULL)[0].ids == wanted[0].ids
    assert beam_search(logits.numpy().astype(np.float32), **FULL)[0].ids == wanted[0].ids
    with pytest.raises(ValueError, match="is no log probability"):
        beam_search(logits, normalise=False)
    with pytest.raises(ValueError, match="these are probabilities: pass their logarithm"):
        beam_search(logits.softmax(-1).float())
    raw = beam_search(logits.log_softmax(-1) - 1, normalise=False, **FULL)[0]
    assert math.isclose(raw.acoustic, wanted[0].acoustic - 6), "taken as they are"


def test_forbidden_symbols() -> None:
    logits = random_logits(2, 5, 3)
    logits[:, 2] = -math.inf
    assert all(2 not in h.ids for h in beam_search(logits, **FULL))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_scores_from_any_device(device: str) -> None:
    logits = random_logits(3, 20, 6).float()
    assert beam_search(logits.to(device), n_best=5) == beam_search(logits, n_best=5)
    assert greedy(logits.to(device)) == greedy(logits)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"beam_width": 0}, "beam_width=0"),
        ({"n_best": 1.5}, "n_best=1.5"),
        ({"top_k": 0}, "top_k=0"),
        ({"token_min_logp": 0.1}, "token_min_logp=0.1"),
        ({"beam_prune_logp": 10}, "beam_prune_logp=10"),
        ({"symbols": ["_", "a"]}, "symbols: got 2, and the logits have 3"),
        ({"hotwords": ["a"]}, "symbols= is needed: hotwords"),
        ({"alhpa": 1.0, "symbols": ["_", "|", "a"]}, "alhpa"),
        ({"scorer": TextScorer([]), "alpha": 1.0}, "so alpha would have no effect"),
        ({"scorer": TextScorer([]), "beam_widht": 5}, "so beam_widht would have no effect"),
        ({"scorer": TextScorer([]), "symbols": ["_", "|", "a"]}, "so symbols would have no effect"),
    ],
)
def test_beam_search_refuses(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        beam_search(torch.zeros(4, 3), **knobs)


def test_the_tree_holds_no_more_than_the_beam_needs() -> None:
    """At the end, the prefixes in memory are those of the beam and their beginnings."""
    nodes: list[_Prefix] = []

    class Counting(TextScorer):
        def finish(self, said: Any) -> Any:
            if not nodes:
                nodes.extend(x for x in gc.get_objects() if type(x) is _Prefix)
            return super().finish(said)

    logits = random_logits(4, 300, 6, 1.0)
    found = beam_search(logits, scorer=Counting([]), beam_width=10, n_best=10)
    assert len(nodes) == len({h.ids[:n] for h in found for n in range(len(h.ids) + 1)})


# ----------------------------------------------------------------------------------------------------- text is scored


def reference_text_score(text: str, model: NGramModel, knobs: Mapping[str, Any]) -> float:
    """Language model and hot-words of a whole text, written down directly."""
    words = text.split("|") if knobs["unit"] == "word" else list(text)
    words = [word for word in words if word]
    score = knobs["alpha"] * model.score(words, boundary=knobs["score_boundary"]) + knobs["beta"] * len(words)
    score += knobs["alpha"] * knobs["unk_score_offset"] * LN10 * sum(word not in model for word in words)
    said = [word for word in text.split("|") if word]
    for hot, weight in knobs["hotwords"].items():
        parts = hot.split()
        score += weight * sum(said[i : i + len(parts)] == parts for i in range(len(said)))
    return score


@few
@given(
    seed=st.integers(0, 10**6), T=st.integers(0, 5), alpha=st.floats(0, 2), beta=st.floats(-1, 2),
    unk=st.sampled_from([0.0, -0.5, -10.0]), boundary=st.booleans(), unit=st.sampled_from(["word", "symbol"]),
    hotwords=st.dictionaries(st.sampled_from(["a", "ab", "ba", "a b", "b ab", "bb"]), st.floats(0.1, 5), max_size=3),
)  # fmt: skip
def test_shallow_fusion_is_the_enumeration(  # noqa: PLR0917
    seed: int,
    T: int,
    alpha: float,
    beta: float,
    unk: float,
    boundary: bool,
    unit: str,
    hotwords: dict[str, float],
) -> None:
    symbols = ["a", "|", "_", "b"]
    model = estimate_ngram(
        ["a ab", "b a", "ab", "bb ab"] if unit == "word" else [list("ab|a"), list("b|b")], 3
    )
    knobs = {
        "alpha": alpha,
        "beta": beta,
        "unk_score_offset": unk,
        "score_boundary": boundary,
        "unit": unit,
        "hotwords": hotwords,
    }
    logits = random_logits(seed, T, 4)
    totals, _ = enumerate_paths(logits, blank=2)
    texts = {ids: "".join(symbols[i] for i in ids) for ids in totals}
    wanted = {
        ids: acoustic + reference_text_score(texts[ids], model, knobs) for ids, acoustic in totals.items()
    }
    found = beam_search(logits, blank=2, symbols=symbols, language_model=model, **FULL, **knobs)
    assert {h.ids for h in found} == set(wanted)
    assert [h.total for h in found] == sorted((h.total for h in found), reverse=True)
    for h in found:
        assert abs(h.total - wanted[h.ids]) < 1e-8, texts[h.ids]
        assert h.text == texts[h.ids].replace("|", " ").strip()


def test_the_share_of_a_hot_word_is_taken_back() -> None:
    scorer = TextScorer(["_", "|", *"fishng"], "|", hotwords={"fishing": 7.0, "fish fin": 4.0})
    said, ranks = scorer.start(), []
    for letter in "fishing|fish|fish|fin|":
        said = scorer.extend(said, scorer.symbols.index(letter))
        ranks.append(round(said.rank, 6))
    assert ranks[:8] == [1, 2, 3, 4, 5, 6, 7, 7], "one more for each letter, the whole at the end"
    assert ranks[8:12] == [8, 9, 10, 11], "the larger of the two shares"
    assert ranks[12] == 9.5, "fish is said: only 'fish ' of 'fish fin' is left, 5 of 8 letters"
    assert ranks[-1] == 7 + 4 == scorer.finish(said).hot
    assert scorer.finish(scorer.extend(scorer.start(), 2)).rank == 0


def test_a_word_that_no_word_begins_with_pays_at_once() -> None:
    model = estimate_ngram(["ab ba"], 1)
    scorer = TextScorer(["_", "|", "a", "b"], "|", model, unk_score_offset=-10.0, alpha=0.5)
    a = scorer.extend(scorer.start(), 2)
    assert a.ahead == 0
    aa = scorer.extend(a, 2)
    assert math.isclose(aa.ahead, -5 * LN10)
    end = scorer.extend(aa, 1)
    assert end.ahead == 0
    assert math.isclose(end.lm, 0.5 * (model.logp["<unk>",] - 10 * LN10) + 1.5)
    narrow = TextScorer(["_", "|", "a", "b"], "|", model, known_words=["ba", "zz"])
    assert narrow.extend(a._replace(part=""), 2).ahead < 0, (
        "ab is in the model, but not among the known words"
    )


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"alpha": math.nan}, "alpha=nan"),
        ({"unit": "letter"}, "unit='letter'"),
        ({"word_delimiter": None}, "need a word delimiter"),
        (
            {"language_model": estimate_ngram(["AB A"])},
            r"none of its words \('A', 'AB', …\) can be spelled .* upper case",
        ),
        (
            {"language_model": estimate_ngram(["ab ba"]), "unit": "symbol"},
            "can be spelled .* unit='symbol' wrong",
        ),
        (
            {"language_model": NGramModel({("a",): -1.0}, {})},
            "has no <s> or no </s>: pass score_boundary=False",
        ),
        ({"hotwords": ["ab", "aqb"]}, "'aqb' cannot be spelled, no symbol has 'q'"),
        ({"hotwords": ["p"]}, "no symbol has 'p'"),  # the letters of <pad> spell nothing
        ({"hotwords": {"a": 0}}, "'a' with the weight 0"),
        ({"hotwords": [" "]}, "a word and a weight above 0 are needed"),
        ({"hotwords": ["a"], "hotword_weight": math.inf}, "weight inf"),
    ],
)
def test_text_scorer_refuses(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextScorer(["<pad>", "|", "a", "b"], **{"language_model": estimate_ngram(["ab"]), **knobs})


def test_hot_words_in_any_form() -> None:
    assert HotWords(None).bonus == {}
    assert HotWords("two fish").bonus == {"two fish": 10.0}
    assert HotWords(["two  fish", "a"], 3).bonus == {"two fish": 3.0, "a": 3.0}
    assert HotWords({"a": 1}).bonus == {"a": 1.0}


# ------------------------------------------------------------------------------------------------------ language model

ARPA = """\
\\data\\
ngram 1=7
ngram 2=6
ngram 3=2

\\1-grams:
-99\t<s>\t-0.40
-1.20\t</s>
-2.50\t<unk>\t-0.05
-0.80\tthe\t-0.30
-1.10\tfish\t-0.25
-1.30\tking\t-0.20
-1.60\tsees

\\2-grams:
-0.30\t<s> the\t-0.15
-0.50\tthe fish\t-0.10
-0.55\tthe king\t-0.12
-0.45\tking sees\t0.07
-0.60\tsees the
-0.35\tfish </s>

\\3-grams:
-0.20\t<s> the king
-0.10\tking sees the

\\end\\
"""
# of the file above, by KenLM 0.3.0: log10 of the sentence, with and without <s> and </s>
KENLM = [
    ("the king sees the fish", -2.12, -2.52),
    ("the fish", -1.4, -1.3),
    ("fish the", -4.05, -2.15),
    ("the zebra sees fish", -6.35, -6.35),
    ("sees sees", -4.8, -3.2),
    ("", -1.6, 0.0),
    ("king the king", -4.77, -2.85),
]


@pytest.fixture
def arpa(tmp_path: Path) -> Any:
    def write(text: str | bytes, name: str = "lm.arpa") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_scores_are_kenlms(arpa: Any) -> None:
    model = NGramModel.from_arpa(arpa(ARPA))
    assert (model.order, model.words) == (3, {"the", "fish", "king", "sees"})
    assert "fish" in model
    assert "<s>" not in model
    assert "zebra" not in model
    for text, whole, inner in KENLM:
        assert abs(model.score(text) / LN10 - whole) < 1e-5, text
        assert abs(model.score(text.split(), boundary=False) / LN10 - inner) < 1e-5, text


def test_the_same_file_in_other_clothes(arpa: Any) -> None:
    wanted = NGramModel.from_arpa(arpa(ARPA))
    for name, data in {
        "zipped.arpa.gz": gzip.compress(ARPA.encode()),
        "zipped, and not called so": gzip.compress(ARPA.encode()),
        "windows": ARPA.replace("\n", "\r\n").encode(),
        "with a mark": ARPA.encode("utf-8-sig"),
        "with a preface": b"made by hand\n\n" + ARPA.encode(),
        "with spaces": ARPA.replace("\t", "  ").encode(),
        "with <UNK>": ARPA.replace("<unk>", "<UNK>").encode(),
        "with more behind": ARPA.encode() + b"what follows the end is not read",
    }.items():
        model = NGramModel.from_arpa(arpa(data, name))
        assert (model.logp, model.backoff) == (wanted.logp, wanted.backoff), name


def test_words_may_hold_unusual_spaces_and_be_numbers(arpa: Any) -> None:
    text = "\\data\\\nngram 1=4\n\n\\1-grams:\n-1\t<s>\n-1\t</s>\n-1\tnew\u00a0york\n-0.5\t1984\t-0.25\n\n\\end\\\n"
    model = NGramModel.from_arpa(arpa(text))
    assert model.words == {"new\u00a0york", "1984"}
    assert math.isclose(model.backoff["1984",], -0.25 * LN10)
    assert math.isclose(model.step((), "zebra")[1], -100 * LN10), "no <unk>: as good as never"
    assert model.start() == (), "a model of single words remembers nothing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: "", "it has no line"),
        (lambda t: "hello\nworld\n", "it has no line"),
        (lambda t: t.replace("\\data\\\n", ""), "line 5: .1-grams: where .data is expected"),
        (lambda t: t.replace("ngram 2=6", "ngram 3=6"), "line 3: 'ngram 3=6' is not 'ngram 2=<how many>'"),
        (lambda t: t.replace("ngram 2=6", "ngram 2=7"), "line 23: 7 2-grams are promised, 6 came before"),
        (lambda t: t.replace("ngram 3=2\n", ""), "line 22: .3-grams: where .end is expected"),
        (lambda t: t.replace("\\2-grams:", "\\3-grams:"), "line 15: .3-grams: where .2-grams: is expected"),
        (lambda t: t.replace("-1.10\tfish", "-1.10 fish fish two"), "line 11: .* is no 1-gram"),
        (lambda t: t.replace("-1.10\tfish\t-0.25", "fish\t-1.10"), "line 11: .* is no 1-gram"),
        (lambda t: t.replace("-1.10\tfish", "1.10\tfish"), "line 11: .* is no 1-gram"),
        (lambda t: t.replace("-1.10\tfish", "nan\tfish"), "line 11"),
        (lambda t: t.replace("-1.10\tfish", "-inf\tfish"), "line 11"),
        (
            lambda t: t.replace("the fish\t", "the fishes\t"),
            "line 17: 'the fishes' is there twice, or has a word that is no 1-gram",
        ),
        (lambda t: t.replace("-0.55\tthe king", "-0.55\tthe fish"), "line 18: 'the fish' is there twice"),
        (lambda t: t[: t.index("sees the\n")], "line 20"),
        (lambda t: t[: t.index("\\end")], "line 27: the file ends without .end.: it is cut short"),
        (lambda t: t.encode().replace(b"fish\t-0.25", b"f\xecsh\t-0.25"), "line 11: not UTF-8 text"),
        (lambda t: gzip.compress(t.encode())[:-20], "the archive is cut short or damaged"),
        (
            lambda t: b"mmap lm http://kheafield.com/code format version 5\n\0" + bytes(64),
            "is a KenLM binary",
        ),
        (
            lambda t: gzip.compress(b"mmap lm http://kheafield.com/code format version 5\n\0"),
            "is a KenLM binary",
        ),
    ],
)
def test_broken_files_are_refused(arpa: Any, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NGramModel.from_arpa(arpa(change(ARPA)))


def test_a_file_cut_at_any_place_is_refused(arpa: Any) -> None:
    end = ARPA.index("\\end\\") + len("\\end")
    for n in range(0, end, 7):
        with pytest.raises(ValueError, match=r"lm\.arpa"):
            NGramModel.from_arpa(arpa(ARPA[:n]))
    with pytest.raises(FileNotFoundError):
        NGramModel.from_arpa("no such file")


@pytest.mark.parametrize("name", ["lm.arpa", "lm.arpa.gz"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    model = estimate_ngram([u.text for u in load_speech("builtin", split="test")], 3)
    model.to_arpa(tmp_path / name)
    again = NGramModel.from_arpa(tmp_path / name)
    assert again.logp.keys() == model.logp.keys()
    assert all(abs(again.logp[gram] - score) < 1e-6 for gram, score in model.logp.items())
    assert all(abs(again.backoff.get(gram, 0) - score) < 1e-6 for gram, score in model.backoff.items())
    before = (tmp_path / name).read_bytes()
    again.to_arpa(tmp_path / name)
    assert (tmp_path / name).read_bytes() == before


texts = st.lists(st.lists(st.sampled_from([*"abcde", "<unk>"]), max_size=5), min_size=1, max_size=6)


@few
@given(
    texts=texts,
    order=st.integers(1, 4),
    context=st.lists(st.sampled_from([*"abcdez", "<s>", "<unk>"]), max_size=3),
)
def test_estimated_probabilities_sum_to_one(texts: list[list[str]], order: int, context: list[str]) -> None:
    model = estimate_ngram(texts, order)
    past = tuple(context)[-(order - 1) :] if order > 1 else ()
    chances = [math.exp(model.step(past, word)[1]) for word in [*model.words, "</s>", "<unk>"]]
    assert math.isclose(sum(chances), 1.0, rel_tol=1e-12)
    assert all(p > 0 for p in chances)


def test_estimate_by_hand() -> None:
    model = estimate_ngram(["a b", "a a"], 2)
    # unigrams: a 3, b 1, </s> 2; 3 kinds of 6; one share in 4 (with <unk>) of 3/9
    single = {"a": (3 + 3 / 4) / 9, "b": (1 + 3 / 4) / 9, "</s>": (2 + 3 / 4) / 9, "<unk>": (3 / 4) / 9}
    for word, p in single.items():
        assert math.isclose(math.exp(model.step((), word)[1]), p), word
    # after a: b 1, a 1, </s> 1: 3 kinds of 3
    assert math.isclose(math.exp(model.step(("a",), "b")[1]), (1 + 3 * single["b"]) / 6)
    assert math.isclose(math.exp(model.step(("a",), "zebra")[1]), 3 * single["<unk>"] / 6)
    assert math.isclose(math.exp(model.step(("<s>",), "a")[1]), (2 + 1 * single["a"]) / 3)
    assert math.exp(model.step((), "<s>")[1]) < 1e-90


@pytest.mark.parametrize(
    ("texts", "order", "message"),
    [
        ([], 2, "texts is empty"),
        (["a"], 0, "order=0"),
        (["a", "a <s>"], 2, "number 1 contains '<s>'"),
        ([["a b"]], 1, "'a b'"),
        ([[""]], 1, "''"),
    ],
)
def test_estimate_refuses(texts: Any, order: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_ngram(texts, order)


# ------------------------------------------------------------------------------------------------------------- decoder

LETTERS = {s: i for i, s in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"])}


def logits_of(tokenizer: Wav2Vec2CTCTokenizer, text: str, sure: float = 8.0, seed: int = 0) -> torch.Tensor:
    """Scores that say a text: two frames a symbol, a blank between."""
    ids = [i for label in tokenizer.encode(text) for i in (label, label, tokenizer.pad_token_id)]
    noise = random_logits(seed, len(ids), max(tokenizer.decoder) + 1, 1.0)
    return noise + sure * torch.nn.functional.one_hot(torch.tensor(ids), noise.shape[1])


TOKENIZERS = {
    "released": (Wav2Vec2CTCTokenizer(LETTERS), "HELLO WORLD"),
    "lower": (Wav2Vec2CTCTokenizer(LETTERS, do_lower_case=True), "hello world"),
    "blank at the end": (
        Wav2Vec2CTCTokenizer({s: i for i, s in enumerate([*"|dehlorw", "[UNK]", "[PAD]"])}, unk_token="[UNK]", pad_token="[PAD]"),
        "hello world",
    ),
    "digraphs": (Wav2Vec2CTCTokenizer({s: i for i, s in enumerate(["<pad>", "<unk>", "|", *"hefis", "sh", "ee"])}), "she sees fish"),
    "other space": (Wav2Vec2CTCTokenizer(LETTERS, word_delimiter_token="'", replace_word_delimiter_char="-"), "HELLO WORLD"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_sure_scores_are_read_as_the_tokenizer_reads_them(kind: str) -> None:
    tokenizer, text = TOKENIZERS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = logits_of(tokenizer, text)
    read = tokenizer.decode(logits.argmax(-1), output_char_offsets=True, output_word_offsets=True)
    spoken = text.lower() if tokenizer.do_lower_case else text
    model = estimate_ngram([spoken], 2)
    for decoder in (
        CTCDecoder(tokenizer),
        CTCDecoder(tokenizer, model),
        CTCDecoder(tokenizer, hotwords=spoken.split()),
    ):
        best = decoder.decode(logits)
        assert isinstance(best, Hypothesis)
        assert best.text == read.text
        assert list(best.char_offsets) == read.char_offsets
        assert list(best.word_offsets) == read.word_offsets
        assert (decoder.language_model is None) == (best.lm == 0)
        assert bool(best.hot) == ("hotwords" in decoder.options)


def test_n_best_has_no_text_twice() -> None:
    tokenizer = TOKENIZERS["blank at the end"][0]
    logits = logits_of(tokenizer, "hello world", sure=3.0)
    logits[-1, tokenizer.word_delimiter_token_id] = 3.0  # at the end perhaps a space
    found = CTCDecoder(tokenizer).decode(logits, n_best=8)
    words = [" ".join(h.text.split()) for h in found]
    assert len(words) == 8 == len(set(words))
    assert [h.total for h in found] == sorted((h.total for h in found), reverse=True)
    symbols = [tokenizer.decoder[i] for i in range(logits.shape[1])]
    doubled = beam_search(logits, blank=9, n_best=60, symbols=symbols)
    assert len({" ".join(h.text.split()) for h in doubled}) < 60, "without distinct=True there are such"


def test_words_have_single_spaces_between_them() -> None:
    tokenizer = TOKENIZERS["released"][0]
    path = [LETTERS[s] for s in ["|", "<pad>", "|", "O", "<pad>", "|", "<pad>", "|", "<pad>", "|", "D", "|"]]
    best = CTCDecoder(tokenizer).decode(20.0 * torch.nn.functional.one_hot(torch.tensor(path), 32))
    assert best.path == tuple(path)
    assert best.text == "O D"
    assert [row["word"] for row in best.word_offsets] == ["O", "D"]


def test_hypotheses_and_decoders_say_what_they_are() -> None:
    found = beam_search(torch.tensor([[0.9, 0.1]]).log())[0]
    assert repr(found) == "Hypothesis((): -0.11 = acoustic -0.11)"
    model = estimate_ngram(["A"], 1)
    assert (
        repr(CTCDecoder(TOKENIZERS["released"][0], model, alpha=1.0))
        == f"CTCDecoder(32 symbols, {model!r}, alpha=1.0)"
    )


def test_a_batch_is_its_rows() -> None:
    tokenizer = TOKENIZERS["released"][0]
    rows = [logits_of(tokenizer, text, sure=4.0) for text in ("HELLO WORLD", "HOLLOW", "OLD")]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=3.0)
    decoder = CTCDecoder(tokenizer)
    alone = [decoder.decode(row) for row in rows]
    assert decoder.decode_batch(batch, torch.tensor([len(row) for row in rows])) == alone
    assert decoder.decode_batch(rows) == alone
    assert decoder.decode(batch[2], len(rows[2])) == alone[2]
    assert [h[0] for h in decoder.decode_batch(rows, n_best=2)] == alone


def test_words_have_times_inside_the_audio() -> None:
    tokenizer = TOKENIZERS["released"][0]
    for T, seed in ((1, 0), (7, 1), (60, 2), (61, 3)):
        samples = 320 * (T - 1) + 400
        found = CTCDecoder(tokenizer).decode(random_logits(seed, T, 32), n_best=4)
        for h in found:
            times = offsets_in_seconds(h.word_offsets, seconds=samples / 16_000)
            assert [row["word"] for row in times] == h.text.split()
            assert all(0 <= row["start"] < row["end"] <= samples / 16_000 for row in times)
            assert all(a["end"] <= b["start"] for a, b in itertools.pairwise(times))


def test_language_model_and_hot_words_change_the_text() -> None:
    symbols = build_vocabulary(["to two too fish"])
    tokenizer = Wav2Vec2CTCTokenizer(symbols)
    logits = logits_of(tokenizer, "to fish", sure=6.0)
    model = estimate_ngram(["two fish", "to the"], 2)
    assert CTCDecoder(tokenizer).decode(logits).text == "to fish"
    logits[2, symbols["w"]] = 6.0  # after t, where a blank was
    base = CTCDecoder(tokenizer)
    assert base.decode(logits).text == "to fish"
    assert CTCDecoder(tokenizer, model, alpha=2.0).decode(logits).text == "two fish"
    assert base.decode(logits, hotwords=["two"]).text == "two fish"
    assert base.decode(logits, hotwords=["fishi"]).text == "to fish", "hot, but not there"
    assert base.decode(logits).text == "to fish", "a knob for one call stays with that call"


@pytest.mark.parametrize(
    ("logits", "knobs", "message"),
    [
        (torch.zeros(5, 31), {}, "got 31 symbols a frame, and the vocabulary has 32"),
        (torch.zeros(5, 40), {}, "got 40 symbols a frame, and the vocabulary has 32"),
        (torch.zeros(2, 5, 32), {}, r"shape \(2, 5, 32\), expected \(frames, symbols\)"),
        (
            torch.zeros(5, 32),
            {"beamwidth": 3},
            "beamwidth= is no option of a decoder; did you mean 'beam_width'",
        ),
        (torch.zeros(5, 32), {"length": 6}, "lengths"),
        (torch.zeros(5, 32), {"hotwords": ["hello"]}, "'hello' cannot be spelled"),
        (torch.full((5, 32), math.nan), {}, "nan"),
    ],
)
def test_decoder_refuses(logits: torch.Tensor, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CTCDecoder(Wav2Vec2CTCTokenizer(LETTERS)).decode(logits, **knobs)


def test_decoder_refuses_when_it_is_made() -> None:
    tokenizer = Wav2Vec2CTCTokenizer(LETTERS)
    with pytest.raises(ValueError, match="no option of a decoder"):
        CTCDecoder(tokenizer, gamma=1)
    with pytest.raises(ValueError, match="upper case"):
        CTCDecoder(tokenizer, estimate_ngram(["hello world", "the sun is a fish"]))
    with pytest.raises(ValueError, match="tokenizer must be a Wav2Vec2CTCTokenizer or a Wav2Vec2Processor"):
        CTCDecoder(LETTERS)
    with pytest.raises(ValueError, match="with a pad_token"):
        CTCDecoder(Wav2Vec2CTCTokenizer(LETTERS, pad_token=None))


def test_symbols_beyond_the_vocabulary_file() -> None:
    """`<s>` and `</s>` added by the tokenizer: models with and without outputs for them both fit."""
    vocab = {s: i for i, s in enumerate(["<pad>", "<unk>", "|", *"abc"])}
    decoder = CTCDecoder(Wav2Vec2CTCTokenizer(vocab))
    assert len(decoder.symbols) == 8
    for size in (6, 7, 8):
        assert decoder.decode(torch.eye(size)[[3, 0, 4]] * 9).text == "ab"
    with pytest.raises(ValueError, match="has 6 to 8"):
        decoder.decode(torch.zeros(3, 5))


# ------------------------------------------------------------------------------------------------- folders of others


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A processor with a language model, typed out as transformers' Wav2Vec2ProcessorWithLM and pyctcdecode write it."""
    path = tmp_path / "with-lm"
    PeerTokenizer(str(_write(path / "vocab.json", LETTERS))).save_pretrained(path)
    kind = {"processor_class": "Wav2Vec2ProcessorWithLM"}
    settings = json.loads((path / "tokenizer_config.json").read_text())
    _write(path / "tokenizer_config.json", settings | kind)
    extractor = {"do_normalize": True, "feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1, "padding_side": "right",
                 "padding_value": 0, "return_attention_mask": True, "sampling_rate": 16000}  # fmt: skip
    _write(path / "preprocessor_config.json", extractor | kind)
    labels = ["", "<s>", "</s>", "⁇", " ", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
    _write(path / "alphabet.json", {"labels": labels, "is_bpe": False})
    lm = path / "language_model"
    _write(lm / "attrs.json", {"alpha": 0.7, "beta": 0.25, "unk_score_offset": -8.0, "score_boundary": False})
    (lm / "unigrams.txt").write_text("FISH\nKING\nTHE\n", encoding="utf-8")
    (lm / "4gram.arpa").write_text(
        ARPA.replace("the", "THE").replace("fish", "FISH").replace("king", "KING").replace("sees", "SEES")
    )
    return path


def _write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_a_folder_with_a_language_model(folder: Path) -> None:
    decoder = CTCDecoder.from_pretrained(folder)
    assert decoder.language_model is not None
    assert decoder.language_model.order == 3
    scorer = decoder.scorer
    assert (scorer.alpha, scorer.beta, scorer.boundary) == (0.7, 0.25, False)
    assert math.isclose(scorer.unknown, 0.7 * -8 * LN10)
    assert scorer.known == {"FISH", "KING", "THE"}, "SEES is in the model, but not in unigrams.txt"
    best = decoder.decode(logits_of(decoder.tokenizer, "THE FISH"))
    assert best.text == "THE FISH"
    assert math.isclose(best.lm, 0.7 * LN10 * (-0.80 - 0.50) + 2 * 0.25)
    assert CTCDecoder.from_pretrained(folder, alpha=0.1).scorer.alpha == 0.1


def test_the_processor_of_such_a_folder_opens_too(folder: Path) -> None:
    for processor in (AutoProcessor.from_pretrained(folder), Wav2Vec2Processor.from_pretrained(folder)):
        assert isinstance(processor, Wav2Vec2Processor)
        assert processor.tokenizer.get_vocab() == LETTERS
        assert processor.feature_extractor.return_attention_mask
        assert CTCDecoder(processor, folder / "language_model" / "4gram.arpa").language_model is not None
    (folder / "processor_config.json").write_text('{"processor_class": "Wav2Vec2ProcessorWithLM"}')
    assert isinstance(AutoProcessor.from_pretrained(folder), Wav2Vec2Processor)


def test_a_folder_without_a_language_model(folder: Path) -> None:
    shutil.rmtree(folder / "language_model")
    assert CTCDecoder.from_pretrained(folder).language_model is None
    (folder / "alphabet.json").unlink()
    assert (
        CTCDecoder.from_pretrained(folder, hotwords=["FISH"])
        .decode(logits_of(Wav2Vec2CTCTokenizer(LETTERS), "FISH"))
        .hot
        == 10
    )


def test_a_folder_with_a_binary(folder: Path) -> None:
    (folder / "language_model" / "4gram.arpa").unlink()
    binary = folder / "language_model" / "4gram.bin"
    binary.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0" + bytes(100))
    with pytest.raises(
        ValueError, match=r"4gram\.bin is a KenLM binary, which only KenLM reads: give the ARPA file"
    ):
        CTCDecoder.from_pretrained(folder)
    (folder / "language_model" / "4gram.arpa").write_text(
        ARPA.upper()
        .replace("NGRAM", "ngram")
        .replace("DATA", "data")
        .replace("GRAMS", "grams")
        .replace("END", "end")
        .replace("<S>", "<s>")
        .replace("</S>", "</s>")
    )
    assert CTCDecoder.from_pretrained(folder).language_model is not None, "the ARPA file beside it is taken"
    (folder / "language_model" / "other.arpa").write_text(ARPA)
    with pytest.raises(ValueError, match=r"must hold one ARPA file, and holds 4gram\.arpa, other\.arpa"):
        CTCDecoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda labels: {"labels": [labels[0], labels[2], labels[1], *labels[3:]], "is_bpe": False},
            "symbol 1 is '</s>' there and '<s>' here",
        ),
        (lambda labels: {"labels": labels[:-2], "is_bpe": False}, "30 symbols there, 32 here"),
        (lambda labels: {"labels": labels, "is_bpe": True}, "'is_bpe' false"),
        (lambda labels: {"labels": "abc"}, "must be a list"),
    ],
)
def test_a_foreign_alphabet_is_refused(folder: Path, change: Any, message: str) -> None:
    labels = json.loads((folder / "alphabet.json").read_text())["labels"]
    _write(folder / "alphabet.json", change(labels))
    with pytest.raises(ValueError, match=message):
        CTCDecoder.from_pretrained(folder)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    texts = ["two fish see the king", "the king sees two fish"]
    processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), Wav2Vec2CTCTokenizer(build_vocabulary(texts)))
    decoder = CTCDecoder(processor, estimate_ngram(texts), alpha=0.8, beam_width=20)
    processor.save_pretrained(tmp_path)
    decoder.save_pretrained(tmp_path)
    again = CTCDecoder.from_pretrained(tmp_path, beam_width=20)
    logits = logits_of(decoder.tokenizer, "two fish sees", sure=2.5)
    for one, other in zip(decoder.decode(logits, n_best=9), again.decode(logits, n_best=9), strict=True):
        assert one.ids == other.ids
        assert math.isclose(one.total, other.total, abs_tol=1e-4)
    names = sorted(path.name for path in (tmp_path / "language_model").iterdir())
    assert names == ["attrs.json", "lm.arpa", "unigrams.txt"], "pyctcdecode wants these three, and no more"
    assert set(json.loads((tmp_path / "language_model" / "attrs.json").read_text())) == {
        "alpha",
        "beta",
        "unk_score_offset",
        "score_boundary",
    }
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), Wav2Vec2Processor)
    with pytest.raises(ValueError, match="unit='symbol'"):
        CTCDecoder(processor, estimate_ngram([list("two|fish")]), unit="symbol").save_pretrained(tmp_path)


def test_a_name_that_nobody_has() -> None:
    with pytest.raises(FileNotFoundError):
        CTCDecoder.from_pretrained("w2vc/no-such-checkpoint")


@pytest.mark.network
def test_a_language_model_from_the_hub() -> None:
    with pytest.raises(ValueError, match="KenLM binary"):
        CTCDecoder.from_pretrained("patrickvonplaten/wav2vec2-base-100h-with-lm")


def test_a_hub_checkpoint_with_a_language_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The offline sibling: the folder lies in the hub's cache, as a download would have left it."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    commit, repository = "0123456789" * 4, tmp_path / "cache" / "models--somebody--with-lm"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name in ("added_tokens.json", "special_tokens_map.json"):
        missing = repository / ".no_exist" / commit / name
        missing.parent.mkdir(parents=True, exist_ok=True)
        missing.touch()
    decoder = CTCDecoder.from_pretrained("somebody/with-lm")
    assert decoder.language_model is not None
    assert decoder.scorer.alpha == 0.7
