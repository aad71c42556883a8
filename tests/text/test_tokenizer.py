"""The tokenizer chapter: text in and out, equal to transformers where it is right, and right where it is not."""

from __future__ import annotations

import json
import random
import warnings
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor as PeerAutoProcessor
from transformers import AutoTokenizer as PeerAutoTokenizer
from transformers import Wav2Vec2CTCTokenizer as Peer
from transformers import Wav2Vec2FeatureExtractor as PeerExtractor
from transformers import Wav2Vec2Processor as PeerProcessor

from w2vc.data.audio import Wav2Vec2FeatureExtractor
from w2vc.data.corpus import load_speech
from w2vc.model.features import FrameClock
from w2vc.text.tokenizer import (
    AutoFeatureExtractor,
    AutoProcessor,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2Processor,
    build_vocabulary,
    offsets_in_seconds,
    vocabulary_problems,
)

# the vocabulary of the released checkpoints
LETTERS = {s: i for i, s in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"])}
# as people fine-tune: specials at the end under other names, <s> and </s> in no file
BLOG = {s: i for i, s in enumerate([*"|abcdeflohrw", "[UNK]", "[PAD]"])}
PHONES = {
    s: i
    for i, s in enumerate(
        ["<pad>", "<s>", "</s>", "<unk>", "|", *"acehinostu", "sh", "ch", "tch", "ee", "oo"]
    )
}

pytestmark = pytest.mark.filterwarnings("ignore:.* become .*, but the vocabulary has")


@pytest.fixture
def pair(tmp_path: Path) -> Any:
    """Make the same tokenizer on both sides."""

    def make(vocab: dict[str, Any], **knobs: Any) -> tuple[Wav2Vec2CTCTokenizer, Any]:
        path = tmp_path / f"vocab{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps(vocab), encoding="utf-8")
        return Wav2Vec2CTCTokenizer(path, **knobs), Peer(str(path), **knobs)

    return make


def letters(**knobs: Any) -> Wav2Vec2CTCTokenizer:
    return Wav2Vec2CTCTokenizer(LETTERS, **knobs)


KINDS: dict[str, tuple[dict[str, int], dict[str, Any], str]] = {
    "released": (LETTERS, {}, "HELO WRD|'  xé\n"),
    "lower": (LETTERS, {"do_lower_case": True}, "helo wrd|ßE"),
    "blog": (BLOG, {"unk_token": "[UNK]", "pad_token": "[PAD]"}, "helo wrd|?"),
    "no sentence marks": (LETTERS, {"bos_token": None, "eos_token": None}, "HELO W|"),
    "no space back": (LETTERS, {"replace_word_delimiter_char": ""}, "HELO W|"),
    "dash": (LETTERS, {"word_delimiter_token": "'", "replace_word_delimiter_char": "-"}, "HELO W|'"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_random_strings_as_transformers(pair: Any, kind: str) -> None:
    vocab, knobs, alphabet = KINDS[kind]
    ours, theirs = pair(vocab, **knobs)
    draw = random.Random(kind)
    pieces = [*alphabet * 3, " ", " ", *ours.all_special_tokens, "<", ">"]
    for _ in range(1000):
        text = "".join(draw.choices(pieces, k=draw.randrange(14)))
        assert ours.tokenize(text) == theirs.tokenize(text), repr(text)
        if "[UNK]" in vocab or ours.unk_token in vocab:
            assert ours.encode(text) == theirs.encode(text), repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_random_paths_as_transformers(pair: Any, kind: str) -> None:
    vocab, knobs, _ = KINDS[kind]
    ours, theirs = pair(vocab, **knobs)
    draw = random.Random(kind)
    pad, delimiter = ours.pad_token_id, ours.word_delimiter_token_id
    for _ in range(1000):
        few = [pad, pad, delimiter, *draw.choices(range(-1, len(ours) + 2), k=4)]
        ids = [i for i in draw.choices(few, k=draw.randrange(12)) for _ in range(draw.choice((1, 1, 2, 3)))]
        options = {"group_tokens": draw.random() < 0.8, "spaces_between_special_tokens": draw.random() < 0.2,
                   "clean_up_tokenization_spaces": draw.choice((None, True))}  # fmt: skip
        assert ours.decode(ids, **options) == theirs.decode(ids, **options), (ids, options)
        assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
        a = ours.decode(ids, output_char_offsets=True, output_word_offsets=True, **options)
        b = theirs.decode(ids, output_char_offsets=True, output_word_offsets=True, **options)
        assert a.text == b.text
        lower = (lambda s: s.lower()) if ours.do_lower_case else (lambda s: s)
        assert a.char_offsets == [{**c, "char": lower(c["char"])} for c in b.char_offsets], ids
        assert a.word_offsets == [{**w, "word": lower(w["word"])} for w in b.word_offsets], ids


def test_random_phones_as_transformers(pair: Any) -> None:
    """Several characters per symbol; words apart by the delimiter itself, because of the next test but one."""
    ours, theirs = pair(PHONES)
    draw = random.Random(1)
    for _ in range(2000):
        text = "".join(draw.choices([*[*PHONES][3:], "x"], k=draw.randrange(12)))
        assert ours.tokenize(text) == theirs.tokenize(text), text
        assert ours.encode(text) == theirs.encode(text), text


def test_skipping_comes_after_joining(pair: Any) -> None:
    """transformers skips the blank first: HELLO becomes HELO (1.12). Random paths agree once they are joined."""
    ours, theirs = pair(LETTERS)
    h, e, el, o = (LETTERS[c] for c in "HELO")
    path = [h, h, e, el, 0, el, o]
    assert ours.decode(path, skip_special_tokens=True) == "HELLO"
    assert theirs.decode(path, skip_special_tokens=True) == "HELO"
    draw = random.Random(2)
    special = set(ours.all_special_ids)
    for _ in range(1000):
        ids = draw.choices([0, 0, 1, 2, 3, 4, h, e, el, o], k=draw.randrange(14))
        joined = [i for i, _ in groupby(ids) if i not in special]
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(joined, group_tokens=False)
        out = ours.decode(ids, skip_special_tokens=True, output_char_offsets=True)
        for char in out.char_offsets:  # and the offsets are still frames of the path
            symbol = "|" if char["char"] == " " else char["char"]
            assert {ids[t] for t in range(char["start_offset"], char["end_offset"])} == {LETTERS[symbol]}


def test_delimiter_is_text(pair: Any) -> None:
    """transformers 5 counts the word delimiter as special (1.12, HF#46552)."""
    ours, theirs = pair(LETTERS)
    ids = ours.encode("A B")
    assert ours.all_special_tokens == ["<s>", "</s>", "<unk>", "<pad>"]
    assert "|" in theirs.all_special_tokens
    assert ours.get_special_tokens_mask([*ids, 0]) == [0, 0, 0, 1]
    assert theirs.get_special_tokens_mask(ids, already_has_special_tokens=True) == [0, 1, 0]
    assert ours.convert_ids_to_tokens(ids, skip_special_tokens=True) == ["A", "|", "B"]
    assert theirs.convert_ids_to_tokens(ids, skip_special_tokens=True) == ["A", "B"]
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True) == "A B"


def test_words_stay_apart_beside_long_symbols(pair: Any) -> None:
    """transformers eats the spaces beside a symbol of several characters."""
    ours, theirs = pair(PHONES)
    assert ours.tokenize("teach us") == ["t", "e", "a", "ch", "|", "u", "s"]
    assert theirs.tokenize("teach us") == ["t", "e", "a", "ch", "u", "s"]
    assert ours.tokenize("a <unk> a") == theirs.tokenize("a <unk> a") == ["a", "<unk>", "a"]


def test_longest_match(pair: Any) -> None:
    """transformers' search loses a match when an earlier candidate fails at the same character."""
    ours, theirs = pair(PHONES)
    assert ours.tokenize("hitchee") == theirs.tokenize("hitchee") == ["h", "i", "tch", "ee"]
    vocab = {s: i for i, s in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdex", "abcd", "bc"])}
    ours, theirs = pair(vocab)
    assert ours.tokenize("abced") == ["a", "bc", "e", "d"]
    assert theirs.tokenize("abced") == ["a", "b", "c", "e", "d"]


def test_longest_of_those_that_start_alike(pair: Any) -> None:
    vocab = {
        s: i for i, s in enumerate(["<", "<pad>", "<pad", "</s>", "<unk>", "|", *"bers", "ee", "eer", "eers"])
    }
    ours, theirs = pair(vocab, bos_token="<pad")
    for text, tokens in (("beer", ["b", "eer"]), ("beers", ["b", "eers"]), ("e<pad>e", ["e", "<pad>", "e"])):
        assert ours.tokenize(text) == theirs.tokenize(text) == tokens


def test_delimiter_that_ends_sentences_too(pair: Any) -> None:
    ours, theirs = pair(LETTERS, eos_token="|")
    path = [5, 4, 5, 2]
    assert ours.all_special_tokens == ["<s>", "<unk>", "<pad>"]
    assert (
        ours.decode(path, skip_special_tokens=True)
        == theirs.decode(path, skip_special_tokens=True)
        == "E E</s>"
    )


def test_long_delimiter(pair: Any) -> None:
    """transformers spells a long delimiter letter by letter."""
    vocab = {s: i for i, s in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<sep>", "A", "B"])}
    ours, theirs = pair(vocab, word_delimiter_token="<sep>")
    assert ours.tokenize("A B") == ["A", "<sep>", "B"]
    assert ours.decode(ours.encode("A B")) == "A B"
    assert theirs.tokenize("A B") == ["A", *"<sep>", "B"]


def test_lower_case_reaches_long_symbols_and_offsets(pair: Any) -> None:
    vocab = {s: i for i, s in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"ASH", "SH"])}
    ours, theirs = pair(vocab, do_lower_case=True)
    assert ours.tokenize("ash") == ["A", "SH"]
    assert theirs.tokenize("ash") == ["A", "S", "H"]
    ids = ours.encode("ash")
    a, b = (t.decode(ids, output_char_offsets=True) for t in (ours, theirs))
    assert a.text == b.text == "ash"
    assert [c["char"] for c in a.char_offsets] == ["a", "sh"]
    assert [c["char"] for c in b.char_offsets] == [
        "A",
        "SH",
    ]


def test_offsets_are_plain_ints(pair: Any) -> None:
    """transformers' are numpy's, which JSON refuses (1.12)."""
    ours, theirs = pair(LETTERS)
    a, b = (
        t.decode(torch.tensor([5, 5, 0, 6]), output_char_offsets=True, output_word_offsets=True)
        for t in (ours, theirs)
    )
    assert json.loads(json.dumps(a.char_offsets)) == a.char_offsets == [
        {"char": "E", "start_offset": 0, "end_offset": 2}, {"char": "T", "start_offset": 3, "end_offset": 4},
    ]  # fmt: skip
    assert a.word_offsets == [{"word": "ET", "start_offset": 0, "end_offset": 4}] == a["word_offsets"]
    with pytest.raises(TypeError):
        json.dumps(b.char_offsets)


def test_labels_keep_doubled_letters(pair: Any) -> None:
    ours, theirs = pair(LETTERS)
    ids = ours.encode("HELLO ALL")
    assert ours.decode(ids) == theirs.decode(ids) == "HELO AL"
    assert ours.decode_labels(ids) == "HELLO ALL"
    assert ours.decode_labels(torch.tensor([*ids, -100, -100, 0])) == "HELLO ALL"
    assert "<unk>" in theirs.decode([*ids, -100], group_tokens=False)
    for u in load_speech()[:200]:
        text = "".join(c for c in u.text.upper() if c in LETTERS or c == " ").strip()
        assert ours.decode_labels(ours.encode(text)) == text


@pytest.mark.parametrize("padding", [False, True, "longest", "max_length"])
@pytest.mark.parametrize("kind", [None, "pt", "np"])
def test_batches_as_transformers(pair: Any, padding: bool | str, kind: str | None) -> None:
    ours, theirs = pair(LETTERS)
    options: dict[str, Any] = {"padding": padding, "return_tensors": kind}
    options |= {"max_length": 9} if padding == "max_length" else {}
    for texts in ("HELLO WORLD", ["HELLO", "A B", "O"], ["SAME", "SIZE"]):
        for more in (
            {},
            {"pad_to_multiple_of": 4},
            {"truncation": True, "max_length": 3},
            {"padding_side": "left"},
        ):
            lengths = {len(t) for t in ([texts] if isinstance(texts, str) else texts)}
            if kind and not padding and len(lengths) > 1 and "truncation" not in more:
                with pytest.raises(ValueError, match="pass padding=True"):
                    ours(texts, **options | more)
                continue
            if kind and not padding and "truncation" in more and min(lengths) < 3:
                continue
            a, b = ours(texts, **options | more), theirs(texts, **options | more)
            assert list(a) == list(b)
            for key in a:
                assert type(a[key]) is type(b[key]), key
                assert getattr(a[key], "dtype", None) == getattr(b[key], "dtype", None)
                assert np.array_equal(np.asarray(a[key], dtype=object), np.asarray(b[key], dtype=object)), (
                    texts,
                    more,
                )


def test_pad_as_transformers(pair: Any) -> None:
    ours, theirs = pair(LETTERS)
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8]}]
    for options in (
        {},
        {"return_tensors": "pt"},
        {"padding": "max_length", "max_length": 5},
        {"pad_to_multiple_of": 4},
    ):
        a, b = ours.pad(rows, **options), theirs.pad(rows, **options)
        assert {k: torch.as_tensor(v).tolist() for k, v in a.items()} == {
            k: torch.as_tensor(v).tolist() for k, v in b.items()
        }
    tensors = ours.pad([{"input_ids": torch.tensor([5, 6])}, {"input_ids": torch.tensor([5])}], fill=-100)
    assert tensors.input_ids.tolist() == [[5, 6], [5, -100]]
    assert tensors.attention_mask.tolist() == [
        [1, 1],
        [1, 0],
    ]
    assert ours.pad({"input_ids": [5, 6]}, padding="max_length", max_length=3).input_ids == [5, 6, 0]
    for bad in ({"labels": [1]}, [], [{"a": 1}], 3):
        with pytest.raises(ValueError, match="encoded_inputs"):
            ours.pad(bad)


def test_batch_decode_as_transformers(pair: Any) -> None:
    ours, theirs = pair(LETTERS)
    ids = torch.randint(0, 8, (5, 30), generator=torch.Generator().manual_seed(0))
    assert (
        ours.batch_decode(ids)
        == theirs.batch_decode(ids)
        == ours.batch_decode(ids.numpy())
        == ours.batch_decode(ids.tolist())
    )
    a, b = (t.batch_decode(ids, output_word_offsets=True) for t in (ours, theirs))
    assert a.text == b.text
    assert a.word_offsets == b.word_offsets
    assert a.char_offsets is None
    assert ours.batch_decode([]) == []
    assert ours.batch_decode([], output_char_offsets=True).char_offsets == []
    assert ours.decode([]) == theirs.decode([]) == ""
    assert ours.decode(np.int64(5)) == theirs.decode(5) == "E"


def test_what_decode_refuses() -> None:
    t = letters()
    with pytest.raises(ValueError, match="argmax"):
        t.decode(torch.zeros(4, 32))
    with pytest.raises(ValueError, match="argmax"):
        t.batch_decode(torch.zeros(2, 4, 32))
    with pytest.raises(ValueError, match="batch_decode"):
        t.decode([[1, 2]])
    with pytest.raises(ValueError, match="whole numbers"):
        t.decode([1.0])
    for text in (None, 3, ["A", 3], [["A"]]):
        with pytest.raises(ValueError, match="text must be"):
            t(text)
    with pytest.raises(ValueError, match="truncation=True needs"):
        t("A", truncation=True)
    with pytest.raises(ValueError, match="max_length=2 needs"):
        t("A", max_length=2)


def test_unknown_characters() -> None:
    t = letters()
    assert t.encode("É#") == [3, 3]
    assert t.convert_tokens_to_ids("É") == 3
    assert t.convert_tokens_to_ids(["E", "|"]) == [5, 4]
    assert t.convert_ids_to_tokens(99) == "<unk>"
    strict = letters(unk_token=None)
    with pytest.raises(ValueError, match="'É' cannot be spelled"):
        strict.encode("SÉ")
    with pytest.raises(ValueError, match="no symbol has the id 99"):
        strict.decode([99])


@pytest.mark.filterwarnings("default")
def test_case_mismatch_is_said() -> None:
    with pytest.warns(
        UserWarning, match=r"'h', 'e' become <unk>, but the vocabulary has 'H', 'E': mind upper"
    ):
        letters().encode("he")
    with pytest.warns(UserWarning, match="do_lower_case=True"):
        Wav2Vec2CTCTokenizer(PHONES, do_lower_case=True).encode("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert letters(do_lower_case=True).encode("he") == letters().encode("HE")
        letters().encode("é#")


NESTED = {"eng": {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "a": 5, "b": 6},
          "fra": {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "é": 5, "à": 6, "ch": 7}}  # fmt: skip


def test_languages(pair: Any, tmp_path: Path) -> None:
    ours, theirs = pair(NESTED, target_lang="eng")
    assert ours.encode("ab é") == theirs.encode("ab é")
    ours.set_target_lang("fra")
    theirs.set_target_lang("fra")
    assert ours.encode("éachà") == theirs.encode("éachà") == [5, 3, 7, 6]
    assert ours.decode([5, 7]) == theirs.decode([5, 7]) == "éch"
    ours.save_pretrained(tmp_path / "t")
    again = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "t")
    assert again.target_lang == "fra"
    assert again.get_vocab() == ours.get_vocab()
    assert Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "t", target_lang="eng").encode("ab") == [5, 6]
    with pytest.raises(ValueError, match="must be one of eng, fra"):
        ours.set_target_lang("deu")
    with pytest.raises(ValueError, match="must be one of eng, fra"):
        Wav2Vec2CTCTokenizer(NESTED)
    with pytest.raises(ValueError, match="not nested"):
        letters(target_lang="eng")


FILES = {
    "released": (LETTERS, {}),
    "blog": (BLOG, {"unk_token": "[UNK]", "pad_token": "[PAD]"}),
    "other": (
        PHONES,
        {
            "word_delimiter_token": "#",
            "bos_token": None,
            "do_lower_case": True,
            "replace_word_delimiter_char": "_",
        },
    ),
    "nested": (NESTED, {"target_lang": "fra"}),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_byte_by_byte(pair: Any, tmp_path: Path, kind: str) -> None:
    ours, theirs = pair(FILES[kind][0], **FILES[kind][1])
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    names = sorted(p.name for p in (tmp_path / "theirs").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "ours").iterdir())
    for name in names:
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text(), name
    a = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "theirs")
    b = PeerAutoTokenizer.from_pretrained(tmp_path / "ours")
    assert isinstance(b, Peer)
    assert a.get_vocab() == ours.get_vocab() == b.get_vocab()
    assert repr(a) == repr(ours)
    a.save_pretrained(tmp_path / "again")
    for name in names:
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "ours" / name).read_text(), name


def test_older_files(tmp_path: Path) -> None:
    """As transformers 4 wrote them, with tokens as dicts, and a map of special tokens and added ids in files of their own."""
    token = {
        "__type": "AddedToken",
        "content": "<s>",
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    }
    files = {
        "vocab.json": BLOG,
        "tokenizer_config.json": {"bos_token": token, "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
                                  "do_lower_case": False, "word_delimiter_token": "|", "return_attention_mask": False,
                                  "do_normalize": True, "tokenizer_class": "Wav2Vec2CTCTokenizer"},
        "special_tokens_map.json": {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": {"content": "<s>"}},
        "added_tokens.json": {"</s>": 15, "<s>": 14},
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    ours, theirs = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path), Peer.from_pretrained(tmp_path)
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.get_vocab()["</s>"], ours.get_vocab()["<s>"]) == (
        15,
        14,
    )
    assert (ours.unk_token, ours.pad_token_id) == (theirs.unk_token, theirs.pad_token_id) == ("[UNK]", 13)
    assert ours.to_dict()["return_attention_mask"] is False  # kept, though it means nothing to a tokenizer
    (tmp_path / "tokenizer_config.json").unlink()
    assert Wav2Vec2CTCTokenizer.from_pretrained(tmp_path).unk_token == "[UNK]"
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no vocab\.json"):
        Wav2Vec2CTCTokenizer.from_pretrained(tmp_path)


def test_added_id_that_is_taken(tmp_path: Path) -> None:
    """A file may say that <s> has an id that a letter has: the vocabulary is right, or the letter could not be read."""
    (tmp_path / "vocab.json").write_text(json.dumps(BLOG))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<s>": 3, "</s>": 40}))
    ours = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path, unk_token="[UNK]", pad_token="[PAD]")
    assert ours.get_vocab() == BLOG | {"<s>": 14, "</s>": 40}
    assert ours.decode([BLOG["c"]]) == "c"


def test_added_tokens(pair: Any, tmp_path: Path) -> None:
    ours, theirs = pair(PHONES)
    assert ours.add_tokens(["ng", "a"]) == theirs.add_tokens(["ng", "a"]) == 1
    assert ours.encode("sing us") == theirs.encode("sing us")
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "theirs")
    assert (
        again.encode("sing us")
        == ours.encode("sing us")
        == Peer.from_pretrained(tmp_path / "ours").encode("sing us")
    )


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("[1]")
    with pytest.raises(ValueError, match="JSON object"):
        Wav2Vec2CTCTokenizer.from_pretrained(tmp_path)
    for bad in ({"a": "b"}, {"a": -1}, {"a": 1.5}, {"a": True}):
        with pytest.raises(ValueError, match="whole number"):
            Wav2Vec2CTCTokenizer(bad)
    with pytest.warns(UserWarning, match="'a', 'b' share an id"):
        Wav2Vec2CTCTokenizer({"a": 0, "b": 0, "<pad>": 1})
    (tmp_path / "vocab.json").write_text(json.dumps(LETTERS))
    with pytest.raises(ValueError, match="did you mean 'pad_token'"):
        Wav2Vec2CTCTokenizer.from_pretrained(tmp_path, padtoken="x")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(ValueError, match="BertTokenizer"):
        Wav2Vec2CTCTokenizer.from_pretrained(tmp_path)


# --- vocabularies


def test_problems_are_found() -> None:
    assert vocabulary_problems(LETTERS, blank=0, size=32) == []
    cases: list[tuple[dict[str, int], dict[str, Any], str]] = [
        (LETTERS, {"blank": 31}, "blank is 31, which is not the id of '<pad>'"),
        (LETTERS, {"size": 31}, "31 outputs, and the ids go up to 31"),
        (LETTERS, {"word_delimiter_token": "#"}, "'#' is not in"),
        (LETTERS | {"a|b": 32}, {}, "the word delimiter is in 'a|b'"),
        (LETTERS | {" ": 32}, {}, "a space or the word delimiter is in ' '"),
        (LETTERS | {"É": 5}, {}, "'E', 'É' share an id"),
        (LETTERS | {"É": 40}, {}, "no symbol has the id 32, 33, 34, 35 and 4 more"),
    ]
    for vocab, knobs, message in cases:
        found = vocabulary_problems(vocab, **knobs)
        assert len(found) == 1, found
        assert message in found[0]


def test_built_vocabulary() -> None:
    texts = [u.text.lower() for u in load_speech()]
    vocab = build_vocabulary(texts)
    assert list(vocab)[:6] == ["<pad>", "<s>", "</s>", "<unk>", "|", "e"]
    assert vocabulary_problems(vocab, blank=0) == []
    assert list(vocab.values()) == list(range(len(vocab)))
    tokenizer = Wav2Vec2CTCTokenizer(vocab)
    assert all(tokenizer.unk_token_id not in tokenizer.encode(t) for t in texts)
    assert all(tokenizer.decode_labels(tokenizer.encode(t)) == t for t in texts)
    assert list(build_vocabulary(["aab"], ["aa"], bos_token=None, eos_token=None)) == [
        "<pad>",
        "<unk>",
        "|",
        "a",
        "b",
        "aa",
    ]
    for bad in ("a|b", "a <pad>"):
        with pytest.raises(ValueError, match="text 1 contains"):
            build_vocabulary(["a", bad])
    with pytest.raises(ValueError, match="nothing to build"):
        build_vocabulary([" "])


# --- runs and times


def test_seconds() -> None:
    timed = offsets_in_seconds([{"word": "A", "start_offset": 0, "end_offset": 49}])
    assert timed == [{"word": "A", "start": 0.0025, "end": 0.9825}]
    # a clip of 1 s has 49 frames; the last frame's time must not lie beyond the clip, whatever the hop says
    late = offsets_in_seconds([{"char": "A", "start_offset": 48, "end_offset": 50}], seconds=1.0)
    assert late[0]["end"] == 1.0
    assert json.dumps(late)


# --- processor


@pytest.fixture
def both(pair: Any) -> tuple[Wav2Vec2Processor, Any]:
    ours, theirs = pair(LETTERS)
    knobs: dict[str, Any] = {"return_attention_mask": True}
    return Wav2Vec2Processor(Wav2Vec2FeatureExtractor(**knobs), ours), PeerProcessor(
        PeerExtractor(**knobs), theirs
    )


AUDIO = [np.sin(np.arange(n) / 9).astype(np.float32) for n in (800, 500)]


def test_processor_as_transformers(both: tuple[Wav2Vec2Processor, Any]) -> None:
    ours, theirs = both
    calls: list[dict[str, Any]] = [
        {"audio": AUDIO[0]},
        {"audio": AUDIO, "padding": True},
        {"text": "HELLO"},
        {"text": ["HELLO", "A"], "padding": True},
        {"audio": AUDIO[0], "text": "HELLO"},
        {"audio": AUDIO, "text": ["HELLO", "HALLO"], "padding": True},
        {"audio": AUDIO, "text": ["AB", "BA"], "audio_kwargs": {"padding": "max_length", "max_length": 900}},
    ]
    for call in calls:
        options = {"return_tensors": "pt"} | ({"sampling_rate": 16_000} if "audio" in call else {})
        a, b = ours(**call, **options), theirs(**call, **options)
        assert set(a) == set(b)
        for key in a:
            assert a[key].shape == b[key].shape, key
            assert torch.allclose(a[key].float(), b[key].float(), atol=1e-6), key
    assert ours(AUDIO[0], sampling_rate=16_000, return_tensors="pt").input_values.shape == (1, 800)
    assert ours.model_input_names == theirs.model_input_names
    ids = torch.tensor([[5, 5, 0, 5, 4, 6]])
    assert ours.batch_decode(ids) == theirs.batch_decode(ids) == ["EE T"]
    assert ours.decode(ids[0]) == "EE T"


def test_padding_of_labels_does_not_count(both: tuple[Wav2Vec2Processor, Any]) -> None:
    """transformers pads labels with the blank's id, which a loss that leaves out -100 counts as a label."""
    ours, theirs = both
    call: dict[str, Any] = {
        "audio": AUDIO,
        "text": ["AB", "A"],
        "padding": True,
        "return_tensors": "pt",
        "sampling_rate": 16_000,
    }
    a, b = LETTERS["A"], LETTERS["B"]
    assert ours(**call).labels.tolist() == [[a, b], [a, -100]]
    assert theirs(**call).labels.tolist() == [[a, b], [a, 0]]
    assert ours(**call | {"return_tensors": None}).labels == [[a, b], [a, -100]]
    assert ours(**call | {"return_tensors": "np"}).labels.tolist() == [[a, b], [a, -100]]
    rows = [{"input_values": x} for x in AUDIO]
    labels = [{"input_ids": [a, b]}, {"input_ids": [a]}]
    ours_padded, theirs_padded = (p.pad(rows, labels=labels, return_tensors="pt") for p in (ours, theirs))
    assert ours_padded.labels.tolist() == [[a, b], [a, -100]]
    assert theirs_padded.labels.tolist() == [
        [a, b],
        [a, 0],
    ]
    assert torch.equal(ours_padded.input_values, theirs_padded.input_values)
    alone = ours.pad(labels=labels, return_tensors="pt")  # the usual recipe then masks by attention_mask
    assert (
        alone.input_ids.tolist()
        == theirs.pad(labels=labels, return_tensors="pt").input_ids.tolist()
        == [[a, b], [a, 0]]
    )
    assert ours.pad(input_features=rows, return_tensors="pt").input_values.shape == (2, 800)


def test_what_a_processor_refuses(both: tuple[Wav2Vec2Processor, Any]) -> None:
    ours, _ = both
    for call, message in (
        ({}, "audio= or text="),
        ({"audio": "HELLO"}, "passed as text="),
        ({"audio": ["HELLO"]}, "passed as text="),
        ({"text": "A", "paddin": True}, "did you mean 'padding'"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(**call)
    with pytest.raises(ValueError, match="input_features= or labels="):
        ours.pad()
    with pytest.raises(ValueError, match="tokenizer must be a"):
        Wav2Vec2Processor(ours.feature_extractor, None)


@pytest.mark.parametrize("door", [PeerProcessor, PeerAutoProcessor])
def test_transformers_opens_what_we_save(
    both: tuple[Wav2Vec2Processor, Any], tmp_path: Path, door: Any
) -> None:
    ours, _ = both
    ours.save_pretrained(tmp_path)
    theirs = door.from_pretrained(tmp_path)
    assert isinstance(theirs, PeerProcessor)
    assert theirs.feature_extractor.return_attention_mask is True
    assert theirs.tokenizer.get_vocab() == LETTERS
    assert theirs(text="HELLO").input_ids == ours(text="HELLO").input_ids
    (tmp_path / "processor_config.json").unlink()  # what older versions know
    again = door.from_pretrained(tmp_path)
    assert isinstance(again, PeerProcessor)
    assert again.feature_extractor.return_attention_mask is True


@pytest.mark.parametrize("door", [Wav2Vec2Processor, AutoProcessor])
def test_we_open_what_transformers_saves(
    both: tuple[Wav2Vec2Processor, Any], tmp_path: Path, door: Any
) -> None:
    _, theirs = both
    theirs.save_pretrained(tmp_path)
    ours = door.from_pretrained(tmp_path)
    assert isinstance(ours, Wav2Vec2Processor)
    assert ours.feature_extractor.return_attention_mask is True
    assert ours.tokenizer.get_vocab() == LETTERS
    assert (
        AutoFeatureExtractor.from_pretrained(tmp_path, return_attention_mask=False).return_attention_mask
        is False
    )
    assert door.from_pretrained(tmp_path, unk_token="E").tokenizer.unk_token == "E"
    with pytest.raises(ValueError, match=r"no (option|knob)"):
        door.from_pretrained(tmp_path, nonsense=1)


def test_released_layout(tmp_path: Path) -> None:
    """The files of wav2vec2-conformer-rope-large-960h-ft; a pre-trained checkpoint has the first of them only."""
    extractor = {"do_normalize": True, "feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1,
                 "padding_side": "right", "padding_value": 0, "return_attention_mask": True, "sampling_rate": 16000}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(extractor))
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), Wav2Vec2FeatureExtractor)
    files = {
        "vocab.json": LETTERS,
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        "tokenizer_config.json": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
                                  "do_lower_case": False, "word_delimiter_token": "|", "tokenizer_class": "Wav2Vec2CTCTokenizer"},
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, Wav2Vec2Processor)
    assert processor.feature_extractor.return_attention_mask is True
    labels = processor(text="MISTER QUILTER", return_tensors="pt").input_ids
    assert torch.equal(
        labels, PeerProcessor.from_pretrained(tmp_path)(text="MISTER QUILTER", return_tensors="pt").input_ids
    )
    with pytest.raises(FileNotFoundError):
        AutoProcessor.from_pretrained(tmp_path / "nowhere")
    processor.save_pretrained(tmp_path)  # over it: nothing of the old files is left to disagree
    assert not (tmp_path / "special_tokens_map.json").exists()
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), Wav2Vec2Processor)


def test_times_never_start_before_the_sound() -> None:
    # With an adapter a frame is apart from the next by more than it hears, so its middle would lie before 0.
    times = offsets_in_seconds(
        [{"char": "a", "start_offset": 0, "end_offset": 1}], FrameClock(hop=2560, width=400)
    )
    assert times[0]["start"] == 0.0
    assert times[0]["end"] > 0
