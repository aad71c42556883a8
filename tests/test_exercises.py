"""Exercises: the verdict is right, the words help, nothing raises, and nobody's inputs or random numbers change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from w2vc import exercises
from w2vc.exercises import Verdict, check, check_property, describe, difference, predict, progress, reveal

RIGHT = torch.arange(6.0).reshape(2, 3)


@pytest.fixture(autouse=True)
def _fresh_session() -> None:
    exercises._verdicts.clear()
    exercises._guesses.clear()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (RIGHT.T, "another order"),
        (RIGHT.reshape(-1), "same number of values"),
        (RIGHT[:1], "wrong shape: got [1, 3], expected [2, 3]"),
        (RIGHT.numpy(), "got a numpy array, expected a tensor"),
        (RIGHT.tolist(), "got list, expected a tensor"),
        (RIGHT > 2, "got bool"),
        (None, "got None"),
        (RIGHT * 3, "3 times the right ones"),
        (RIGHT + 2, "2 too large"),
        (RIGHT - 2, "2 too small"),
        (-RIGHT, "only the sign"),
        (RIGHT**2, "the squares"),
        (RIGHT.roll(1, 1), "shifted by one along dimension 1"),
        (RIGHT + torch.tensor([[0, 0, 0], [0, 0, 9]]), "1 of 6 values differ, first at index [1, 2]: got 14.0, expected 5.0"),
        (RIGHT * 1.002, "close but not exact: max difference 0.01"),
        (RIGHT / 0, "6 of 6 values are NaN or infinite"),
    ],
)  # fmt: skip
def test_difference_says_why(answer: object, words: str) -> None:
    assert words in difference(answer, RIGHT)


def test_difference_of_squares_and_masks() -> None:
    square = torch.tensor([[0.0, 1.0], [5.0, 9.0]])
    assert "transpose" in difference(square.T, square)
    mask = torch.tensor([True, False, False])
    assert "inverted" in difference(~mask, mask)
    assert "shifted by one" in difference(mask.roll(-1), mask)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (RIGHT + 1e-7, RIGHT),
        (RIGHT.long(), RIGHT),
        (RIGHT.double().requires_grad_(), RIGHT),
        (torch.tensor(3.0), 3),
        (3, torch.tensor(3)),
        (np.float32(3), 3),
        (float("nan"), float("nan")),
        ({"a": [1, (2.0,)]}, {"a": (1, [2])}),
        (torch.empty(0, 3), torch.empty(0, 3)),
        (RIGHT.bfloat16(), RIGHT),
        ("x", "x"),
        (None, None),
        (torch.float32, torch.float32),
    ],
)
def test_what_counts_as_equal(a: object, b: object) -> None:
    assert difference(a, b) == ""


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (True, 1),
        (torch.tensor([1, 0]), torch.tensor([True, False])),
        (torch.empty(0, 3), torch.empty(3, 0)),
        (float("inf"), float("-inf")),
        ({"a": 1}, {"b": 1}),
        ([1, 2], [1, 2, 3]),
        ("1", 1),
        (1, "1"),
        (torch.float16, torch.float32),
        (torch.tensor([3.0]), 3.0),
    ],
)
def test_what_counts_as_different(a: object, b: object) -> None:
    assert difference(a, b)


def test_a_wrong_kind_is_called_so() -> None:
    assert difference(1, "1") == "wrong type: got int, expected str"
    assert difference("2", "1") == "got '2', expected '1'"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=0, max_size=3),
    st.integers(0, 2**31 - 1),
    st.sampled_from([torch.float32, torch.int64, torch.bool, torch.bfloat16]),
)
def test_one_wrong_value_is_always_found(shape: list[int], seed: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    want = torch.randint(-9, 9, shape, generator=g).to(dtype)
    assert difference(want.clone(), want) == ""
    got = want.clone().reshape(-1)
    place = int(torch.randint(0, got.numel(), (), generator=g))
    got[place] = ~got[place] if dtype == torch.bool else got[place] + 4
    assert difference(got.reshape(shape), want)


def test_passing_and_failing(capsys: pytest.CaptureFixture[str]) -> None:
    good = check(lambda x: x + x, lambda x: 2 * x, RIGHT, torch.zeros(0), name="1.1")
    bad = check(lambda x: x, lambda x: 2 * x, torch.zeros(2), RIGHT, name="1.2")
    assert good
    assert not bad
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1.1: passed, all 2 cases agree"
    assert len(lines) == 2, "one line per check"
    assert lines[1].startswith("1.2: not yet")
    assert "case 2 of 2" in lines[1]
    assert bad.message == lines[1]
    assert "1 of 2 exercises" in progress()
    assert "open: 1.2" in progress()


@pytest.mark.parametrize(
    "answer", [None, ..., 3, lambda: None, lambda x: ..., lambda x: 1 / 0, lambda x, y: x, lambda x: print]
)
def test_never_raises(answer: object) -> None:
    verdict = check(answer, lambda x: x, RIGHT)
    assert isinstance(verdict, Verdict)
    assert not verdict
    assert not check_property(answer, lambda r, x: r == x, 1)


def test_arguments_are_told_from_tuples() -> None:
    assert check(lambda a, b: a - b, lambda a, b: -(b - a), (3, 2), (2.0, 5.0))
    assert check(sum, lambda t: t[0] + t[1], ([1, 2],), [3, 4])
    assert check(lambda: 3, lambda: 3)


def test_errors_must_match() -> None:
    def spec(x: float) -> float:
        if x < 0:
            raise ValueError("negative")
        return x

    assert check(spec, spec, -1.0, 1.0)
    assert "should raise ValueError" in check(abs, spec, -1.0).message
    assert "should raise ValueError, but it raised TypeError" in check(lambda x: x + "", spec, -1.0).message
    assert "it raised ZeroDivisionError" in check(lambda x: x / 0, spec, 1.0).message


def test_inputs_are_safe() -> None:
    x = RIGHT.clone()
    assert "changes its input" in check(lambda x: x.mul_(2), lambda x: 2 * x, x).message
    assert torch.equal(x, RIGHT)
    assert check(lambda x: x.mul_(2), lambda x: x.mul_(2), x), "allowed where the reference does it"


def test_equal_noise_for_both_and_none_taken_from_the_caller() -> None:
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(5)
    state, own = torch.get_rng_state(), generator.get_state()
    assert check(lambda x: x + torch.rand(2), lambda x: x + torch.rand(2), torch.zeros(2))
    assert check(lambda g: torch.rand(2, generator=g), lambda g: torch.rand(2, generator=g), generator)
    known = torch.rand(2, generator=torch.Generator().manual_seed(3))
    assert check(lambda g: torch.rand(2, generator=g), lambda g: known, generator), "a copy in the same state"
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(own, generator.get_state())
    assert not check(lambda x: x + torch.rand(2) + torch.rand(2), lambda x: x + torch.rand(2), torch.zeros(2))


def test_properties() -> None:
    assert check_property(
        lambda x: x.sort().values, lambda r, x: bool((r.diff() >= 0).all()), torch.tensor([2, 1])
    )
    told = check_property(lambda x: x, lambda r, x: f"falls at {x.tolist()}", torch.tensor([2, 1]))
    assert "falls at [2, 1]" in told.message
    assert (
        "must stay sorted"
        in check_property(lambda x: x, lambda r, x: False, 1, hint="must stay sorted").message
    )
    broken = check_property(lambda x: x, lambda r, x: r.nothing, 1, hint="a number")
    assert "could not be tested" in broken.message
    assert "a number" in broken.message
    assert "it raised" in check_property(lambda x: 1 / 0, lambda r, x: True, 1).message


@pytest.mark.parametrize(
    ("guess", "truth", "right", "words"),
    [
        (50, 50, True, "right"),
        (48.0, 50, True, "close enough"),
        (300, 50, False, "6 times too large"),
        (25, 50, False, "2 times too small"),
        (-1, 50, False, "off by 51"),
        (1, 0, False, "off by 1"),
        (" Blue", "blue", True, "right"),
        ("red", "blue", False, "not so"),
        ((2, 3), [2, 3], True, "right"),
        (True, False, False, ""),
        ("many", 3, False, "wrong type"),
    ],
)
def test_guesses(
    guess: object, truth: object, right: bool, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    predict("7.1", guess)
    verdict = reveal("7.1", truth)
    assert bool(verdict) is right
    assert words in verdict.message
    sealed, opened = capsys.readouterr().out.splitlines()
    assert sealed == "7.1: sealed."
    assert opened == verdict.message


def test_no_guess(capsys: pytest.CaptureFixture[str]) -> None:
    predict("7.2")
    assert not reveal("7.2", 5)
    out = capsys.readouterr().out
    assert "no guess yet" in out
    assert "the answer is 5" in out


def test_descriptions_have_no_addresses() -> None:
    for value in (object(), print, torch.nn.Linear, lambda: 1, torch.Generator(), RIGHT, [object()]):
        assert "0x" not in describe(value), value


def test_a_verdict_shows_nothing_twice(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = check(lambda: 1, lambda: 1, name="1.1")
    capsys.readouterr()
    verdict._ipython_display_()
    assert capsys.readouterr().out == ""


def test_feedback_stays_on_one_line() -> None:
    pair = torch.tensor([1, 2]).sort()  # its repr has line breaks
    assert "\n" in repr(pair)
    assert "\n" not in describe(pair)
    assert "\n" not in check_property(lambda: pair, lambda result: result[5], name="x").message
