"""The break-it lab: each fault is noticed by the number, the strip and the test that are named for it, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import randomise_, tiny_config
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.data.corpus import load_speech
from w2vc.explore.faults import (
    FAULTS,
    NUMBERS,
    Diagnosis,
    broken,
    check_up,
    diagnose,
    hidden_accuracy,
    noticed,
    swap,
)
from w2vc.model.ctc import Wav2Vec2ConformerForCTC
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining
from w2vc.training.demo import load_demo

TESTS = Path(__file__).parents[1]
every = pytest.mark.parametrize("name", FAULTS)


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_demo()


@pytest.fixture(scope="module")
def clip() -> Any:
    return load_speech("builtin")[0].audio[:9_600]


@pytest.fixture(scope="module")
def findings(demo: Any, clip: Any) -> dict[str, Diagnosis]:
    return {name: diagnose(demo, clip, name) for name in FAULTS}


@every
def test_each_fault_is_noticed_by_the_number_named_for_it(findings: dict[str, Diagnosis], name: str) -> None:
    found = findings[name]
    assert FAULTS[name].number in found.noticed
    assert len(found.noticed) <= 2, "a number that notices everything tells nothing"


@every
def test_the_strip_names_the_block_or_is_flat(findings: dict[str, Diagnosis], name: str) -> None:
    assert findings[name].departs == FAULTS[name].departs


def test_every_number_is_needed() -> None:
    assert {fault.number for fault in FAULTS.values()} == set(NUMBERS)


def test_nothing_is_left_behind(findings: dict[str, Diagnosis], demo: Any, clip: Any) -> None:
    assert findings
    assert noticed(check_up(demo, clip)) == []
    with contextlib.suppress(RuntimeError), broken("shift_flipped"):
        raise RuntimeError
    assert noticed(check_up(demo, clip)) == []


def test_seeing_the_answers_raises_the_accuracy(demo: Any) -> None:
    speech = load_speech("builtin")
    whole = [hidden_accuracy(demo, speech[i]) for i in range(4)]
    assert sum(whole) / 4 > 0.1
    assert whole == [hidden_accuracy(demo, speech[i]) for i in range(4)]
    with broken("hidden_frames_seen"):
        assert sum(hidden_accuracy(demo, speech[i]) for i in range(4)) > sum(whole)


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"position_embeddings_type": "rotary", "feat_extract_norm": "layer"},
        {"position_embeddings_type": None, "attn_implementation": "eager"},
    ],
    ids=lambda knobs: "-".join(map(str, knobs)) or "plain",
)
def test_any_healthy_model_has_zeros_and_is_left_alone(knobs: dict[str, Any], clip: Any) -> None:
    config: Wav2Vec2ConformerConfig = tiny_config(**knobs)
    model = randomise_(Wav2Vec2ConformerForPreTraining(config)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert noticed(check_up(model, clip)) == []
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.attn_implementation == config.attn_implementation
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_without_a_quantizer_the_numbers_of_pretraining_are_left_out(clip: Any) -> None:
    model = Wav2Vec2ConformerForCTC(tiny_config()).eval()
    numbers = check_up(model, clip)
    assert "leak" not in numbers
    assert len(numbers) >= 8
    found = diagnose(model, clip, "padding_attended")
    assert found.accuracy is None
    assert found.noticed == ["padding"]


def test_faults_are_refused_and_described() -> None:
    with pytest.raises(ValueError, match="is no fault"), broken("bad_hair_day"):
        pass
    with (
        pytest.raises(ValueError, match="in place already"),
        broken("shift_flipped"),
        broken("scale_missing"),
    ):
        pass
    for fault in FAULTS.values():
        assert fault.right != fault.wrong
        assert list((TESTS.parent / "w2vc").rglob(f"{fault.block}.py"))
        file, test = fault.test.split("::")
        assert re.search(rf"^def {test}\(", (TESTS / file).read_text(), re.M), fault.test


def test_swap_restores_what_was_there_and_what_was_inherited() -> None:
    class Parent:
        def word(self) -> str:
            return "parent"

    class Child(Parent): ...

    restore = swap([(Parent, "word", lambda self: "x"), (Child, "word", lambda self: "y")])
    assert (Parent().word(), Child().word()) == ("x", "y")
    restore()
    assert (Parent().word(), Child().word()) == ("parent", "parent")
    assert "word" not in vars(Child)


LAB = """
import contextlib, io, sys, pytest
from w2vc.explore.faults import FAULTS, broken

class Count:
    failed = passed = 0
    def pytest_runtest_logreport(self, report):
        self.failed += report.failed
        self.passed += report.passed and report.when == "call"

for fault in FAULTS.values():
    count = Count()
    with broken(fault.name), contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["-q", "-x", "-p", "no:cacheprovider", sys.argv[1] + "/" + fault.test], plugins=[count])
    for name in [name for name in sys.modules if name.startswith("test_")]:
        del sys.modules[name]  # they hold what they imported while it was broken
    print(fault.name, count.failed)
"""


@pytest.mark.slow
def test_the_test_named_for_each_fault_fails() -> None:
    pytest.importorskip("transformers")
    out = subprocess.run(
        [sys.executable, "-c", LAB, str(TESTS)], cwd=TESTS.parent, capture_output=True, text=True, check=False
    )
    failed = dict(line.split() for line in io.StringIO(out.stdout) if len(line.split()) == 2)
    assert {name: failed.get(name) for name in FAULTS} == dict.fromkeys(FAULTS, "1"), (
        out.stdout + out.stderr[-2000:]
    )
