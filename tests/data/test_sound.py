"""The sound chapter: samples of every type on one scale, at any rate, at any loudness."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import sound, tone
from w2vc.data.sound import as_float, check_rate, normalise, resample

RATE = 16_000
quick = settings(max_examples=150, deadline=None)


@quick
@given(st.floats(0.1, 100), st.floats(-1, 1))
def test_normalising_forgets_loudness_and_offset(gain: float, offset: float) -> None:
    clip = sound(500, scale=0.5)
    moved = (gain * clip.astype(np.float64) + gain * offset).astype(np.float32)
    out = normalise(moved)
    assert abs(out.mean()) < 1e-4
    assert np.allclose(out, normalise(clip), atol=5e-3)
    assert not normalise(np.zeros(5, np.float32)).any()


def test_pcm_scales_are_exact() -> None:
    for kind, bits in ((np.int8, 7), (np.int16, 15), (np.int32, 31)):
        edges = np.array([np.iinfo(kind).min, 0, np.iinfo(kind).max], kind)
        assert np.array_equal(as_float(edges), (edges.astype(np.float64) / 2**bits).astype(np.float32))
        assert as_float(edges)[0] == -1
    assert as_float(np.array([0, 128, 192], np.uint8)).tolist() == [-1.0, 0.0, 0.5]
    assert as_float([3, -2]).tolist() == [3.0, -2.0]  # a list does not say its width
    assert as_float(torch.tensor([16384], dtype=torch.int16)).tolist() == [0.5]


@pytest.mark.parametrize(
    ("old", "new"), [(48_000, 16_000), (44_100, 16_000), (8000, 16_000), (16_000, 22_050)]
)
def test_resampling_keeps_tones_below_the_limit_and_removes_those_above(old: int, new: int) -> None:
    limit = min(old, new) / 2
    kept = 0.2 * limit
    audio = resample(tone(kept, old), old, new)
    assert audio.shape == (new,)
    assert np.abs(audio - tone(kept, new))[200:-200].max() < 2e-3
    if old > new:
        assert np.abs(resample(tone(1.2 * limit, old), old, new))[200:-200].max() < 2e-3
    rows = resample(np.stack([tone(kept, old)] * 6).reshape(2, 3, -1), old, new)
    assert rows.shape == (2, 3, new)
    assert np.allclose(rows[1, 2], audio, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.sampled_from([8000, 11_025, 22_050, 44_100, 48_000]))
def test_resampled_length_is_the_rounded_one(n: int, old: int) -> None:
    exact = n * RATE / old
    if exact < 0.5:
        with pytest.raises(ValueError, match="less than one"):
            resample(sound(n), old)
    else:
        assert abs(len(resample(sound(n), old)) - exact) <= 0.5 + 1e-9


@pytest.mark.parametrize(
    "rate", [0, -16_000, 99, 10**7, 44_100.5, float("nan"), float("inf"), "fast", None, True]
)
def test_impossible_rates(rate: Any) -> None:
    with pytest.raises(ValueError, match="source_rate"):
        resample(sound(100), rate)


def test_whole_rates_of_other_types_are_fine() -> None:
    for rate in (44_100.0, np.int64(44_100), np.float32(44_100)):
        assert len(resample(sound(441), rate)) == 160


def test_a_rate_comes_back_as_an_integer_or_is_named() -> None:
    assert check_rate(np.float32(44_100), "rate") == 44_100
    assert isinstance(check_rate(np.float32(44_100), "rate"), int)
    with pytest.raises(ValueError, match=r"rate=44100\.5 must be a whole number"):
        check_rate(44_100.5, "rate")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (None, "is a NoneType"),
        ("silence", "is a str"),
        ([[0.0, 1.0], [0.0]], "not a plain row"),
        (np.zeros(9, np.int64), "dtype int64"),
        (np.zeros(3, complex), "dtype complex128"),
        (np.array([0.0, np.nan]), "holds nan at sample 1, 1 such"),
        (torch.tensor([[0.0, 0.0], [np.inf, 0.0]]), "holds inf at sample 0 of row 1"),
        (np.array([0.0, 1e300]), "holds inf at sample 1"),  # beyond float32
    ],
)
def test_what_is_no_sound_is_named(samples: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"voice.*{message}"):
        as_float(samples, "voice")


def test_half_precision_tensors_come_in() -> None:
    assert as_float(torch.tensor([0.5, -1.0], dtype=torch.bfloat16)).tolist() == [0.5, -1.0]
    assert as_float([3, -2]).dtype == np.float32


def test_importing_the_module_needs_no_audio_library() -> None:
    code = "import sys; sys.modules['soundfile'] = sys.modules['soxr'] = None; import w2vc.data.sound"
    subprocess.run([sys.executable, "-c", code], check=True)
