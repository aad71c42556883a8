"""The audio chapter: sound from any file or array to one batch, equal to transformers where it is right, and right where it is not."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Wav2Vec2FeatureExtractor as Peer

from helpers import sound, tone
from w2vc.data import audio as module
from w2vc.data.audio import BatchFeature, Wav2Vec2FeatureExtractor, load_audio, pad_rows
from w2vc.data.sound import normalise, resample

RATE = 16_000
quick = settings(max_examples=150, deadline=None)


def file_of(samples: np.ndarray, rate: int = RATE, form: str = "WAV", **how: Any) -> bytes:
    soundfile = pytest.importorskip("soundfile")
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, **how)
    return file.getvalue()


def rows_of(value: Any) -> list[np.ndarray]:
    return [np.asarray(row) for row in value]


def assert_same_rows(ours: Any, theirs: Any) -> None:
    """Row by row, to the last bit."""
    ours, theirs = rows_of(ours), rows_of(theirs)
    assert [r.shape for r in ours] == [r.shape for r in theirs]
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ------------------------------------------------------------------------------------------- against transformers


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    return {
        "lengths": lengths,
        "form": draw(
            st.sampled_from(["arrays", "lists", "tuples", "float64", "matrix", "single", "single list"])
        ),
        "settings": {
            "do_normalize": draw(st.booleans()),
            "return_attention_mask": draw(st.booleans()),
            "padding_value": draw(st.sampled_from([0.0, -1.5])),
            "padding_side": draw(st.sampled_from(["right", "left"])),
        },
        "options": {
            "padding": draw(st.sampled_from([True, False, "longest", "max_length", "do_not_pad"])),
            "max_length": draw(st.sampled_from([None, 1, 17, 40, 100])),
            "truncation": draw(st.booleans()),
            "pad_to_multiple_of": draw(st.sampled_from([None, 1, 8, 50])),
            "return_attention_mask": draw(st.sampled_from([None, True, False])),
            "return_tensors": draw(st.sampled_from([None, "np", "pt"])),
        },
    }


def speech_in_form(lengths: list[int], form: str) -> Any:
    clips = [sound(n, seed=i) + 0.05 for i, n in enumerate(lengths)]
    if form == "matrix" and len(clips) not in {0, 2}:
        return np.stack([np.resize(c, max(lengths) + 8) for c in clips])
    return {
        "lists": [c.tolist() for c in clips],
        "tuples": tuple(clips),
        "float64": [c.astype(np.float64) for c in clips],
        "single": clips[0],
        "single list": clips[0].tolist(),
    }.get(form, clips)


def compare(raw: Any, knobs: dict[str, Any], options: dict[str, Any]) -> bool:
    """Ask both; True where there is an answer and it has to be equal, bit by bit."""
    ours, theirs = Wav2Vec2FeatureExtractor(**knobs), Peer(**knobs)
    try:
        expected = theirs(raw, sampling_rate=RATE, **options)
    except ValueError as error:
        stumbles = "inhomogeneous" in str(error) or "array element with a sequence" in str(error)
        if stumbles and options["return_tensors"] != "pt":  # it cannot normalise under ragged masks
            assert len(ours(raw, sampling_rate=RATE, **options).attention_mask) == len(raw)
            return False
        with pytest.raises(ValueError, match=r"max_length is missing|pass padding=True"):
            ours(raw, sampling_rate=RATE, **options)
        return False
    got = ours(raw, sampling_rate=RATE, **options)
    assert set(got) == set(expected)
    assert all(row.dtype == np.float32 for row in rows_of(got["input_values"]))
    if "attention_mask" in got:
        assert_same_rows(got["attention_mask"], expected["attention_mask"])
    padded = options["padding"] not in {False, "do_not_pad"}
    masked = "attention_mask" in got and knobs["padding_side"] == "right"
    if not knobs["do_normalize"] or not padded or masked:
        assert_same_rows(got["input_values"], expected["input_values"])
        return True
    # here transformers normalises over the padding (two tests below); the lengths still agree
    assert [len(r) for r in got["input_values"]] == [len(r) for r in expected["input_values"]]
    return False


def test_the_product_of_all_options_gives_what_transformers_gives() -> None:
    """Every combination of options, with every combination of knobs met many times on the way."""
    options = {
        "padding": [True, False, "longest", "max_length", "do_not_pad"],
        "max_length": [None, 1, 17, 40, 100],
        "truncation": [True, False],
        "pad_to_multiple_of": [None, 1, 8, 50],
        "return_attention_mask": [None, True, False],
        "return_tensors": [None, "np", "pt"],
    }
    knobs = {
        "do_normalize": [True, False],
        "return_attention_mask": [True, False],
        "padding_value": [0.0, -1.5],
        "padding_side": ["right", "left"],
    }
    settings_ = [dict(zip(knobs, values, strict=True)) for values in itertools.product(*knobs.values())]
    clips = [sound(n, seed=n) + 0.05 for n in (30, 45, 12)]
    equal = sum(
        compare(clips, settings_[i % 16], dict(zip(options, values, strict=True)))
        for i, values in enumerate(itertools.product(*options.values()), start=1)
        for i in (i, i + i // 16)
    )
    assert equal > 1200  # most of the 3600 have an answer that has to be equal


@quick
@given(requests())
def test_every_kind_of_input_gives_what_transformers_gives(request: dict[str, Any]) -> None:
    compare(speech_in_form(request["lengths"], request["form"]), request["settings"], request["options"])


@quick
@given(requests())
def test_each_row_is_the_utterance_alone(request: dict[str, Any]) -> None:
    """Whatever the options: cut, normalised on its own, filled up on one side. Nothing of its neighbours is in it."""
    clips = [sound(n, seed=i) + 0.05 for i, n in enumerate(request["lengths"])]
    ours = Wav2Vec2FeatureExtractor(**request["settings"])
    options = {k: v for k, v in request["options"].items() if k != "return_tensors"}
    lengths = [len(c) for c in clips]
    plan_options = {k: v for k, v in options.items() if k != "return_attention_mask"}
    try:
        plan = module._plan_lengths(lengths, *plan_options.values())
    except ValueError:
        return
    got = ours(clips, sampling_rate=RATE, **options)
    for clip, row, (kept, total) in zip(clips, got.input_values, plan, strict=True):
        alone = clip[:kept]
        alone = normalise(alone) if ours.do_normalize else alone
        gap = total - kept
        real = row[gap:] if ours.padding_side == "left" else row[: len(row) - gap]
        filled = row[:gap] if ours.padding_side == "left" else row[len(row) - gap :]
        assert np.array_equal(real, alone)
        assert (filled == np.float32(ours.padding_value)).all()
        assert len(row) == total


def test_transformers_normalises_over_padding_without_a_mask_and_ours_does_not() -> None:
    clips = [sound(4000, 1) + 0.1, sound(1000, 2) + 0.1]
    options = {"sampling_rate": RATE, "padding": True, "return_tensors": "np"}
    theirs = Peer()(clips, **options).input_values
    ours = Wav2Vec2FeatureExtractor()(clips, **options).input_values
    assert np.array_equal(theirs[0], ours[0])  # the longest row has no padding
    assert abs(theirs[1, -1]) > 0.1  # there: what should be silence is not
    assert np.abs(theirs[1, :1000] - normalise(clips[1])).max() > 0.1
    assert np.array_equal(ours[1, :1000], normalise(clips[1]))  # here: as with a mask
    masked = Wav2Vec2FeatureExtractor()(clips, return_attention_mask=True, **options).input_values
    assert np.array_equal(ours, masked)


def test_transformers_breaks_left_padding_and_ours_does_not() -> None:
    clips = [sound(400, 1), sound(300, 2)]
    options = {"sampling_rate": RATE, "padding": True, "return_tensors": "np", "return_attention_mask": True}
    theirs = Peer(padding_side="left")(clips, **options)
    ours = Wav2Vec2FeatureExtractor(padding_side="left")(clips, **options)
    assert (theirs.input_values[1, 300:] == 0).all()  # there: the end of the recording is gone
    assert np.array_equal(ours.input_values[1, 100:], normalise(clips[1]))
    assert np.array_equal(ours.attention_mask, theirs.attention_mask)


@pytest.mark.parametrize("padding", [True, "longest", "max_length"])
@pytest.mark.parametrize("multiple", [None, 7])
@pytest.mark.parametrize("form", ["dict", "list of dicts", "BatchFeature", "tensors"])
def test_pad_gives_what_transformers_gives(padding: Any, multiple: int | None, form: str) -> None:
    clips = [sound(30, 1), sound(20, 2), sound(9, 3)]
    options = {
        "padding": padding,
        "max_length": 32,
        "pad_to_multiple_of": multiple,
        "return_attention_mask": True,
    }
    rows: Any = {"input_values": clips, "labels": [3, 1, 2], "weight": [0.5, 1.0, 2.0]}
    if form == "tensors":
        rows["input_values"] = [torch.from_numpy(c) for c in clips]
    if form == "list of dicts":
        rows = [{key: value[i] for key, value in rows.items()} for i in range(3)]
    given_ = BatchFeature(rows) if form == "BatchFeature" else rows
    ours = Wav2Vec2FeatureExtractor().pad(given_, **options)
    theirs = Peer().pad(rows, **options)
    assert set(ours) == set(theirs)
    for key in theirs:
        assert type(ours[key]) is type(theirs[key]), key
        if key == "weight":
            assert ours[key].dtype == theirs[key].dtype  # float64 becomes float32
        assert_same_rows(ours[key], theirs[key])
    assert np.array_equal(np.asarray(ours.input_values[0][:30]), clips[0])  # nothing is normalised again


def test_pad_keeps_a_mask_that_was_there_and_cuts_it() -> None:
    rows = {"input_values": [sound(6), sound(3)], "attention_mask": [[1, 1, 1, 1, 0, 0], [1, 1, 1]]}
    for wanted in (True, None):
        padded = Wav2Vec2FeatureExtractor().pad(
            rows, max_length=5, truncation=True, return_attention_mask=wanted, return_tensors="pt"
        )
        assert padded.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
        assert padded.attention_mask.dtype == torch.int64
    one = Wav2Vec2FeatureExtractor().pad({"input_values": [0.5, 0.25]})
    assert one.input_values.tolist() == [[0.5, 0.25]]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"audio": [[1.0]]}, "needs the key 'input_values'; got \\['audio'\\]"),
        ({"input_values": []}, "nothing to pad"),
        ([], "a list of dicts"),
        ([{"input_values": [1.0]}, {"labels": 1}], "the same keys"),
        ({"input_values": [[1.0], [2.0]], "labels": [1]}, "different sizes"),
        ({"input_values": [[1.0], [float("nan")]]}, "input_values 1 holds nan at sample 0"),
        ({"input_values": [np.zeros((2, 5), np.float32)]}, "shape \\(2, 5\\)"),
        ({"input_values": [[1.0, 2.0]], "attention_mask": [[1]]}, "attention_mask 0 has shape"),
        (7, "got a int"),
    ],
)
def test_pad_refuses(features: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Wav2Vec2FeatureExtractor().pad(features)


# ------------------------------------------------------------------------------------------- the extractor's own contract


def test_mask_is_int64_as_a_tensor_and_int32_otherwise() -> None:
    extract = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    clips = [sound(9), sound(5)]
    assert extract(clips, True, sampling_rate=RATE, return_tensors="pt").attention_mask.dtype == torch.int64
    assert extract(clips, True, sampling_rate=RATE, return_tensors="np").attention_mask.dtype == np.int32
    assert [m.dtype for m in extract(clips, sampling_rate=RATE)["attention_mask"]] == [np.int32] * 2


def test_stereo_is_refused_with_a_way_out() -> None:
    stereo = np.stack([sound(2000, 1), sound(2000, 2)])
    assert len(Peer()(stereo, sampling_rate=RATE).input_values) == 2  # transformers: two utterances
    extract = Wav2Vec2FeatureExtractor()
    for wrong, axis in ((stereo, 0), (stereo.T, 1), (torch.from_numpy(stereo), 0)):
        with pytest.raises(ValueError, match=rf"2 channels of one recording.*raw_speech\.mean\({axis}\)"):
            extract(wrong, sampling_rate=RATE)
        mixed = extract(
            wrong.mean(axis), sampling_rate=RATE, return_tensors="np"
        ).input_values  # the advice works
        assert np.allclose(mixed, normalise(stereo.mean(0)), atol=1e-5)
    assert len(extract(list(stereo), sampling_rate=RATE).input_values) == 2  # and so does the other one
    with pytest.raises(ValueError, match="utterance 1 has shape"):
        extract([stereo[0], stereo], sampling_rate=RATE)
    with pytest.raises(ValueError, match="raw_speech has shape"):
        extract(stereo[None], sampling_rate=RATE)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_samples_are_refused_with_their_place(bad: float) -> None:
    clip = sound(50)
    clip[33] = bad
    extract = Wav2Vec2FeatureExtractor()
    with pytest.raises(ValueError, match=r"utterance 1 holds .* at sample 33"):
        extract([sound(50), clip], sampling_rate=RATE)
    with pytest.raises(ValueError, match=r"raw_speech holds .* at sample 33"):
        extract(torch.from_numpy(clip), sampling_rate=RATE)
    with pytest.raises(ValueError, match="at sample 33"):
        load_audio(clip, source_rate=8000)
    with pytest.raises(ValueError, match="at sample 33 of row 1"):
        load_audio(np.stack([sound(50), clip]), source_rate=8000)


@pytest.mark.parametrize(
    "raw", [[], np.zeros(0), [np.zeros(0)], [sound(3), []], None, "voice.wav", b"RIFF", {"array": [0.0]}, [None], ["a"],
            np.zeros(3, complex), np.zeros(3, bool), np.zeros(3, np.int64), np.array([1e300]), np.float32(1), [[1.0], "b"]],
)  # fmt: skip
def test_what_is_no_speech_is_a_value_error(raw: Any) -> None:
    with pytest.raises(ValueError, match=r"raw_speech|utterance"):
        Wav2Vec2FeatureExtractor()(raw, sampling_rate=RATE)


def test_integers_are_sound() -> None:
    whole = np.array([-32768, -1, 0, 16384, 32767], np.int16)
    plain = Wav2Vec2FeatureExtractor(do_normalize=False)
    got = plain(whole, sampling_rate=RATE, return_tensors="np").input_values[0]
    assert got.dtype == np.float32
    assert np.array_equal(got, whole / np.float32(32768))
    normal = Wav2Vec2FeatureExtractor()
    assert np.allclose(
        normal(whole, sampling_rate=RATE).input_values[0], normal(got, sampling_rate=RATE).input_values[0]
    )
    assert (
        Peer()([whole], sampling_rate=RATE, return_tensors="np").input_values.dtype == np.float64
    )  # the peer's trap
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        assert plain(torch.tensor([0.5, -0.25], dtype=kind), sampling_rate=RATE).input_values[0].tolist() == [
            0.5,
            -0.25,
        ]
    mixed = plain([torch.tensor([0.5]), [1, 0], np.array([0.25])], sampling_rate=RATE)
    assert [row.tolist() for row in mixed.input_values] == [[0.5], [1.0, 0.0], [0.25]]


def test_input_is_never_changed() -> None:
    clips = [sound(30), sound(20)]
    before = [c.copy() for c in clips]
    for do_normalize in (True, False):
        out = Wav2Vec2FeatureExtractor(do_normalize=do_normalize)(
            clips, True, sampling_rate=RATE, return_tensors="pt"
        )
        out.input_values.mul_(3)
    assert all(np.array_equal(a, b) for a, b in zip(clips, before, strict=True))


def test_rate_is_checked_or_warned_about() -> None:
    extract = Wav2Vec2FeatureExtractor()
    with pytest.raises(ValueError, match=r"sampling_rate=8000.*resample\(audio, 8000, 16000\)"):
        extract(sound(9), sampling_rate=8000)
    with pytest.warns(UserWarning, match="pass sampling_rate=16000") as caught:
        extract(sound(9))
    assert caught[0].filename == __file__  # the warning points at the caller's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(sound(9), sampling_rate=RATE)


def test_unscaled_floats_without_normalisation_are_warned_about() -> None:
    loud = 20_000 * sound(100, scale=1)
    with pytest.warns(UserWarning, match="16-bit"):
        Wav2Vec2FeatureExtractor(do_normalize=False)(loud, sampling_rate=RATE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Wav2Vec2FeatureExtractor()(loud, sampling_rate=RATE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "widest"}, "padding='widest' must be"),
        ({"padding": None}, "padding=None must be"),
        ({"padding": "max_length"}, "max_length is missing"),
        ({"truncation": True}, "max_length is missing"),
        ({"truncation": True, "max_length": 0}, "max_length=0 must be"),
        ({"truncation": True, "max_length": 2.5}, "max_length=2.5 must be"),
        ({"padding": True, "pad_to_multiple_of": 0}, "pad_to_multiple_of=0 must be"),
        ({"return_tensors": "tf"}, "return_tensors='tf' must be"),
        ({"return_tensors": "pt"}, "input_values has rows of 5 to 9 values.*padding=True"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Wav2Vec2FeatureExtractor()([sound(9), sound(5)], sampling_rate=RATE, **options)


def test_enums_of_transformers_are_understood() -> None:
    from transformers.utils import PaddingStrategy, TensorType

    out = Wav2Vec2FeatureExtractor()(
        [sound(9), sound(5)], PaddingStrategy.LONGEST, sampling_rate=RATE, return_tensors=TensorType.PYTORCH
    )
    assert out.input_values.shape == (2, 9)


def test_padding_value_none_is_refused_only_where_it_is_needed() -> None:
    extract = Wav2Vec2FeatureExtractor(padding_value=None)
    assert len(extract([sound(5), sound(5)], True, sampling_rate=RATE).input_values) == 2
    with pytest.raises(ValueError, match="padding_value is None"):
        extract([sound(9), sound(5)], True, sampling_rate=RATE)


def test_settings_are_checked() -> None:
    for options, message in (
        ({"feature_size": 80}, "feature_size=80 must be 1"),
        ({"padding_side": "both"}, "padding_side='both'"),
        ({"sampling_rate": 0}, "sampling_rate=0"),
    ):
        with pytest.raises(ValueError, match=message):
            Wav2Vec2FeatureExtractor(**options)
    with pytest.raises(TypeError):
        Wav2Vec2FeatureExtractor(do_normalise=True)


@quick
@given(
    st.lists(st.lists(st.integers(-9, 9), max_size=6), min_size=1, max_size=4),
    st.sampled_from([None, 0, 4, 9]),
    st.sampled_from(["left", "right"]),
)
def test_rows_are_padded_to_one_rectangle(rows: list[list[int]], length: int | None, side: str) -> None:
    total = max(length or 0, *map(len, rows), 0)
    for kind in (list, np.int64, np.float32, torch.tensor):
        given_ = [
            row if kind is list else kind(row) if kind is torch.tensor else np.array(row, kind)
            for row in rows
        ]
        padded, mask = pad_rows(given_, -100, length, side)
        assert padded.shape == mask.shape == (len(rows), total)
        for row, out, real in zip(rows, padded, mask, strict=True):
            gap = [-100] * (total - len(row))
            assert out.tolist() == (gap + row if side == "left" else row + gap)
            assert out[real].tolist() == row
        if kind is np.float32 or (kind is np.int64 and any(rows)):
            assert padded.dtype == kind


# ------------------------------------------------------------------------------------------- BatchFeature


def test_batch_is_a_dict_with_attributes() -> None:
    batch = BatchFeature(
        {
            "input_values": torch.ones(2, 3),
            "attention_mask": torch.ones(2, 3, dtype=torch.long),
            "id": ["a", "b"],
        }
    )
    assert batch.input_values is batch["input_values"]
    assert set({**batch}) == {"input_values", "attention_mask", "id"}
    with pytest.raises(AttributeError, match=r"no 'labels' here, only input_values, attention_mask, id"):
        _ = batch.labels
    copy = pickle.loads(pickle.dumps(batch))
    assert isinstance(copy, BatchFeature)
    assert torch.equal(copy.input_values, batch.input_values)


def test_batch_moves_and_casts_floats_only() -> None:
    def make() -> BatchFeature:
        return BatchFeature(
            {
                "input_values": torch.ones(2, 3),
                "attention_mask": torch.ones(2, 3, dtype=torch.long),
                "id": ["a"],
            }
        )

    for batch in (make().to(torch.float16), make().to(dtype=torch.float16), make().to("cpu", torch.float16)):
        assert batch.input_values.dtype == torch.float16
        assert batch.attention_mask.dtype == torch.int64
        assert batch.id == ["a"]
    batch = make()
    assert batch.to("meta") is batch
    assert {batch.input_values.device.type, batch.attention_mask.device.type} == {"meta"}
    with pytest.raises(ValueError, match="must be floating"):
        make().to(torch.int16)


@pytest.mark.gpu
def test_batch_moves_to_a_gpu() -> None:
    batch = Wav2Vec2FeatureExtractor(return_attention_mask=True)(
        [sound(900).tolist(), torch.from_numpy(sound(500)).cuda()],
        True,
        sampling_rate=RATE,
        return_tensors="pt",
    )
    batch.to("cuda", torch.bfloat16, non_blocking=True)
    assert batch.input_values.is_cuda
    assert batch.input_values.dtype == torch.bfloat16
    assert batch.attention_mask.is_cuda
    assert batch.attention_mask.dtype == torch.int64


# ------------------------------------------------------------------------------------------- the settings' file

KNOBS = {
    "sampling_rate": 8000,
    "padding_value": -1.0,
    "return_attention_mask": True,
    "do_normalize": False,
    "padding_side": "left",
}


def test_settings_go_to_transformers_and_back(tmp_path: Path) -> None:
    ours = Wav2Vec2FeatureExtractor(**KNOBS)
    ours.save_pretrained(tmp_path / "ours")
    peer = Peer.from_pretrained(tmp_path / "ours")
    assert peer.to_dict() == ours.to_dict()
    peer.save_pretrained(tmp_path / "theirs")
    assert Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "theirs").to_dict() == ours.to_dict()
    files = [(tmp_path / side / "preprocessor_config.json").read_text() for side in ("ours", "theirs")]
    assert files[0] == files[1]
    assert Wav2Vec2FeatureExtractor().to_dict() == Peer(return_attention_mask=False).to_dict()


def test_unknown_keys_are_kept(tmp_path: Path) -> None:
    content = {
        "do_normalize": True,
        "processor_class": "Wav2Vec2Processor",
        "note": {"by": ["them"]},
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    ours = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path, return_attention_mask=True)
    assert ours.return_attention_mask is True
    ours.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())
    assert written == {**Wav2Vec2FeatureExtractor(return_attention_mask=True).to_dict(), **content}
    assert Peer.from_pretrained(tmp_path / "again").return_attention_mask is True
    ours.to_dict()["note"]["by"].append("me")  # a copy, not the thing itself
    assert ours.to_dict()["note"] == {"by": ["them"]}


def test_settings_inside_processor_config_are_read_and_kept_in_step(tmp_path: Path) -> None:
    joint = tmp_path / "processor_config.json"
    joint.write_text(
        json.dumps({"processor_class": "Wav2Vec2Processor", "feature_extractor": Peer(**KNOBS).to_dict()})
    )
    ours = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    assert ours.sampling_rate == 8000
    assert Wav2Vec2FeatureExtractor.from_pretrained(joint).sampling_rate == 8000
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)  # otherwise the old nested copy would win
    for cls in (Wav2Vec2FeatureExtractor, Peer):
        assert cls.from_pretrained(tmp_path).sampling_rate == RATE
    assert json.loads(joint.read_text())["processor_class"] == "Wav2Vec2Processor"
    joint.write_text(
        json.dumps({"processor_class": "Wav2Vec2Processor"})
    )  # without a nested copy: left alone
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    assert json.loads(joint.read_text()) == {"processor_class": "Wav2Vec2Processor"}


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError):
        Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "nowhere")
    file = tmp_path / "preprocessor_config.json"
    for text, message in (
        ("{", r"preprocessor_config\.json is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"feature_extractor_type": "SeamlessM4TFeatureExtractor"}', "SeamlessM4TFeatureExtractor"),
        ('{"feature_size": 80}', "feature_size=80"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'do_normalize'"):
        Wav2Vec2FeatureExtractor.from_dict({}, do_normalise=False)


# ------------------------------------------------------------------------------------------- files, arrays, rates


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_files_of_every_width_give_the_same_sound(subtype: str, tmp_path: Path) -> None:
    clip = sound(RATE // 2)
    data = file_of(clip, subtype=subtype)
    path = tmp_path / "voice.wav"
    path.write_bytes(data)
    with path.open("rb") as file:
        loaded = [
            load_audio(path),
            load_audio(str(path)),
            load_audio(data),
            load_audio(io.BytesIO(data)),
            load_audio(file),
        ]
    for audio in loaded:
        assert audio.dtype == np.float32
        assert np.abs(audio - clip).max() <= (2**-7 if subtype == "PCM_U8" else 2**-15)
        assert audio.flags.c_contiguous


@pytest.mark.parametrize("form", ["FLAC", "OGG", "MP3", "AIFF"])
def test_other_formats(form: str) -> None:
    clip = 0.5 * tone(440, RATE)
    audio = load_audio(file_of(clip, form=form))
    assert abs(len(audio) - len(clip)) <= 1200
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))
    assert abs(spectrum.argmax() * RATE / len(audio) - 440) < 2


def test_channels_are_mixed_or_kept() -> None:
    left, right = sound(4000, 1), sound(4000, 2)
    stereo = np.stack([left, right])
    for source in (stereo, stereo.T, torch.from_numpy(stereo)):
        assert np.allclose(load_audio(source, source_rate=RATE), (left + right) / 2, atol=1e-7)
        assert np.array_equal(load_audio(source, mono=False, source_rate=RATE), stereo)
    data = file_of(stereo.T, subtype="FLOAT")
    assert np.allclose(load_audio(data), (left + right) / 2, atol=1e-7)
    assert np.array_equal(load_audio(data, mono=False), stereo)
    half = load_audio(stereo, 8000, False, source_rate=RATE)
    assert np.allclose(
        half[1], resample(right, RATE, 8000), atol=1e-6
    )  # channels do not leak into each other
    assert load_audio(left, source_rate=RATE, mono=False).shape == (1, 4000)


def test_rows_of_a_data_set() -> None:
    clip = sound(3000)
    data = file_of(clip, subtype="FLOAT")
    assert np.array_equal(load_audio({"array": clip, "sampling_rate": RATE}), clip)
    assert np.array_equal(load_audio({"bytes": data, "path": "gone.wav"}), clip)
    assert len(load_audio({"array": clip, "sampling_rate": 8000})) == 6000
    with pytest.raises(ValueError, match="'array', 'bytes' or 'path'"):
        load_audio({"bytes": None, "path": None})


@pytest.mark.parametrize("rate", [0, 99, 44_100.5, float("nan"), "fast"])
def test_impossible_rates_of_files_and_arrays(rate: Any) -> None:
    with pytest.raises(ValueError, match="source_rate"):
        load_audio(sound(100), source_rate=rate)
    with pytest.raises(ValueError, match="sampling_rate"):
        load_audio(sound(100), rate, source_rate=RATE)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros(0), "empty"),
        (np.zeros((2, 0)), "empty"),
        (np.zeros((9, 12)), "shape \\(9, 12\\)"),
        (np.zeros((2, 2)), "shape \\(2, 2\\)"),
        (np.zeros((1, 2, 100)), "shape \\(1, 2, 100\\)"),
        (np.float32(0.5), "shape \\(\\)"),
        (np.zeros(9, np.int64), "int64"),
        (None, "NoneType"),
        ([[0.0, 1.0], [0.0]], "not a plain row"),
    ],
)
def test_arrays_that_are_no_recording(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_audio(source, source_rate=RATE)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    with pytest.raises(FileNotFoundError, match=r"gone\.wav is not there"):
        load_audio(tmp_path / "gone.wav")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_audio(tmp_path)
    flac = file_of(sound(9000), form="FLAC")
    for name, data in (
        ("text.wav", b"hello, hello"),
        ("empty.wav", b""),
        ("half.flac", flac[: len(flac) // 2]),
        ("voice.raw", b"\0\0\0\0"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            load_audio(tmp_path / name)
        with pytest.raises(ValueError, match=rf"source \({len(data)} bytes\)"):
            load_audio(data)
    mp3 = file_of(sound(3 * RATE), form="MP3")
    with pytest.raises(ValueError, match=r"is cut short: it states 48000 samples and holds \d+"):
        load_audio(mp3[: len(mp3) // 2])
    with (tmp_path / "text.wav").open("rb") as file, pytest.raises(ValueError, match=r"text\.wav"):
        load_audio(file)
    with (tmp_path / "text.wav").open() as file, pytest.raises(ValueError, match="binary mode"):
        load_audio(file)
    (tmp_path / "silent.wav").write_bytes(file_of(np.zeros(0, np.float32)))
    with pytest.raises(ValueError, match=r"silent\.wav is empty"):
        load_audio(tmp_path / "silent.wav")
    broken = sound(100)
    broken[7] = np.nan
    (tmp_path / "broken.wav").write_bytes(file_of(broken, subtype="FLOAT"))
    with pytest.raises(ValueError, match=r"broken\.wav holds nan at sample 7"):
        load_audio(tmp_path / "broken.wav")


def test_the_rate_is_asked_for_where_it_is_unknown() -> None:
    with pytest.raises(ValueError, match="source_rate is missing"):
        load_audio(sound(100))
    data = file_of(sound(100), 8000)
    with pytest.raises(ValueError, match=r"source_rate=16000, but .* says 8000"):
        load_audio(data, source_rate=RATE)
    assert len(load_audio(data, source_rate=8000)) == 200


@pytest.mark.parametrize("missing", ["soundfile", "soxr"])
def test_a_missing_package_is_named_with_its_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of(sound(100), 8000)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf'{missing}: pip install "w2vc\[audio\]"'):
        load_audio(data)


def test_importing_the_module_needs_neither() -> None:
    code = "import sys; sys.modules['soundfile'] = sys.modules['soxr'] = sys.modules['huggingface_hub'] = None; import w2vc.data.audio"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert module.Wav2Vec2FeatureExtractor().sampling_rate == RATE


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("kind", [None, "np", "pt"])
def test_the_result_never_shares_memory_with_the_callers_audio(kind: str | None, many: bool) -> None:
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False)
    given = [sound(50), sound(50 if kind == "pt" else 70)]
    before = [row.copy() for row in given]
    out = extractor(given if many else given[0], sampling_rate=RATE, return_tensors=kind)
    padded = extractor.pad({"input_values": given}, padding=False, return_tensors=kind or "np")
    for rows in (out.input_values, padded.input_values):
        for row in rows:
            row[:] = 9.0
    assert all(np.array_equal(row, old) for row, old in zip(given, before, strict=True))
