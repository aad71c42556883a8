"""Two processes do what one does: each with a whole model (DDP), or with a piece of it (FSDP 2)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import w2vc
import w2vc.model.quantizer
from training_runs import (
    IN_PIECES,
    agree_with_the_whole,
    child_in_pieces,
    child_of_two,
    few_steps,
    fixed_noise,
    largest_gap,
    make_recipe,
    poisoned_child,
    together,
)
from w2vc.model.ctc import Wav2Vec2ConformerForCTC
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining
from w2vc.training.distributed import find_processes, train
from w2vc.training.monitoring import read_metrics
from w2vc.training.objectives import build
from w2vc.training.recipes import gather_speech

SETTINGS = Path(w2vc.__file__).parent / "assets" / "scale"  # for `accelerate launch`


@pytest.fixture(scope="module")
def of_two_whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found that trained together."""
    folder = tmp_path_factory.mktemp("two")
    together(child_of_two, folder)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in "01"]


@pytest.mark.parametrize("objective", ["pretraining", "ctc"])
def test_two_processes_see_the_gradient_of_one(
    objective: str, of_two_whole: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agree_with_the_whole(objective, of_two_whole, tmp_path, monkeypatch)


@pytest.mark.parametrize("objective", ["pretraining", "ctc"])
def test_two_processes_stay_together(objective: str, of_two_whole: list[dict[str, Any]]) -> None:
    """LayerDrop, a frozen feature encoder, and a base model that is frozen for two steps; resumed after each step."""
    parameters = dict(trainer_parameters(objective))
    for kind in ("whole", "pieces"):
        first, second = (found[f"{objective}-{kind}"] for found in of_two_whole)
        assert all(torch.equal(first[name], second[name]) for name in parameters)
    whole, pieces = of_two_whole[0][f"{objective}-whole"], of_two_whole[0][f"{objective}-pieces"]
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    moved = {name for name, start in parameters.items() if not torch.equal(whole[name], start)}
    assert any(".encoder.layers.0." in name for name in moved)
    assert any(".feature_extractor." in name for name in moved) == (objective == "ctc")


def trainer_parameters(objective: str) -> list[tuple[str, torch.Tensor]]:
    """The first weights of a run."""
    plan = make_recipe(objective)
    _, model = build(plan, gather_speech(plan.data.train))
    return [(name, p.detach()) for name, p in model.named_parameters()]


def test_accelerate_launch_starts_two_processes(tmp_path: Path) -> None:
    """As the settings file says; `--cpu` would start one. What they learn together is what one learns from the same batches."""
    settings = SETTINGS / "cpu_2.yaml"
    plan = make_recipe("ctc", "run.steps=2", "run.log_every=2", "run.evaluate_every=2", "run.threads=1")
    (tmp_path / "recipe.yaml").write_text(plan.to_yaml())
    line = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings), "-m", "w2vc.cli", "finetune",
        str(tmp_path / "recipe.yaml"), str(tmp_path / "run"),
    ]  # fmt: skip
    out = subprocess.run(line, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-2000:]
    state = torch.load(tmp_path / "run" / "last" / "training_state.pt", weights_only=True)
    assert len(state["rng"]) == 2
    assert "x 2 process(es)" in out.stdout
    with pytest.raises(ValueError, match=r"of 2 process\(es\), and there are 1"):
        train(plan, tmp_path / "run", progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they found."""
    place = tmp_path_factory.mktemp("pieces")
    together(child_in_pieces, place, seconds=200, **IN_PIECES)
    return place


@pytest.fixture(scope="module")
def of_two(folder: Path) -> list[dict[str, Any]]:
    """What two processes found."""
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in "01"]


@pytest.mark.parametrize("objective", ["pretraining", "ctc"])
def test_pieces_see_the_gradient_of_the_whole(
    objective: str, of_two: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agree_with_the_whole(objective, of_two, tmp_path, monkeypatch)


@pytest.mark.parametrize("objective", ["pretraining", "ctc", "xvector"])
def test_pieces_take_the_steps_of_the_whole(
    objective: str, of_two: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three clipped steps, and before them an evaluation, are those of one process with twice the micro-batches."""
    monkeypatch.setattr(w2vc.model.quantizer, "gumbel_relaxed", fixed_noise)
    weights, figures = few_steps(objective, tmp_path, "data.batch_rows=2", "run.accumulate=2")
    for found in of_two:
        got, seen = found[f"{objective}-steps"]
        assert largest_gap(got, weights) <= 1e-6
        for figure in (seen, figures):
            figure.pop("hard_perplexity_groups", None)
        assert seen == pytest.approx(figures, rel=1e-5)


@pytest.mark.parametrize("objective", ["pretraining", "ctc"])
def test_a_run_in_pieces_goes_on_as_if_nothing_had_happened(
    objective: str, of_two: list[dict[str, Any]], folder: Path
) -> None:
    """Recomputed blocks, a base model frozen at first, running averages; resumed after each step."""
    whole = of_two[0][f"{objective}-whole"]
    for found in of_two:
        for kind in ("whole", "pieces"):
            got = found[f"{objective}-{kind}"]
            assert all(torch.equal(whole[name], got[name]) for name in whole)
    assert curve(folder / f"{objective}-whole") == curve(folder / f"{objective}-pieces")
    one, other = (folder / f"{objective}-{kind}" / "best/model.safetensors" for kind in ("whole", "pieces"))
    assert one.read_bytes() == other.read_bytes()


def curve(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log without the times."""
    times = {"seconds", "waiting", "audio"}
    return [{key: value for key, value in r.items() if key not in times} for r in read_metrics(folder)]


def test_a_run_in_pieces_goes_on_with_whole_models(of_two: list[dict[str, Any]], folder: Path) -> None:
    """Its checkpoint is that of any run of two processes."""
    whole, other = (read_metrics(folder / name, "train") for name in ("ctc-whole", "other"))
    assert len(other) == 4
    assert [r["loss"] for r in other] == pytest.approx([r["loss"] for r in whole], rel=1e-5)


def test_half_precision_is_that_of_whole_models(of_two: list[dict[str, Any]], folder: Path) -> None:
    """Autocast of the same operations, not weights and sums in bfloat16."""
    whole, pieces = (read_metrics(folder / f"half-{kind}", "train") for kind in ("whole", "pieces"))
    assert [r["loss"] for r in pieces] == pytest.approx([r["loss"] for r in whole], rel=1e-5)


def test_the_folders_of_a_run_in_pieces_are_ordinary(folder: Path, of_two: list[dict[str, Any]]) -> None:
    """Whole tensors under the name of the class; `best/` has the running average, `last/` the weights."""
    for objective, head in (
        ("pretraining", Wav2Vec2ConformerForPreTraining),
        ("ctc", Wav2Vec2ConformerForCTC),
    ):
        run = folder / f"{objective}-whole"
        for name in ("last", "best"):
            config = json.loads((run / name / "config.json").read_text())
            assert config["architectures"] == [head.__name__]
            head.from_pretrained(run / name)
        last = load_file(run / "last/model.safetensors")
        assert torch.equal(last[KEY], of_two[0][f"{objective}-whole"][KEY])
    state = torch.load(folder / "ctc-whole/last/training_state.pt", weights_only=True)
    best = load_file(folder / "ctc-whole/best/model.safetensors")
    assert torch.equal(best[KEY], state["average"][KEY])
    assert not torch.equal(best[KEY], last[KEY])
    kinds = {type(t) for moments in state["optimizer"]["state"].values() for t in moments.values()}
    assert kinds == {torch.Tensor}


KEY = "wav2vec2_conformer.encoder.layers.0.ffn1.output_dense.weight"


def test_a_bad_clip_of_one_process_is_named_and_left_out(tmp_path: Path) -> None:
    """The other process has nothing to blame, and helps; nobody waits for ever."""
    together(poisoned_child, tmp_path, seconds=60, **IN_PIECES)
    skips = read_metrics(tmp_path / "run", "skip")
    bad = gather_speech(make_recipe("ctc").data.train)[3].id
    assert {tuple(skip["samples"]) for skip in skips} == {(bad,)}
    assert [torch.load(tmp_path / f"skipped-{rank}.pt") for rank in "01"] == [len(skips)] * 2
    assert all(bool(t.isfinite().all()) for t in load_file(tmp_path / "run/last/model.safetensors").values())
    assert len(read_metrics(tmp_path / "run", "valid")) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FSDP_VERSION": "1"}, r"fsdp_version='1' is refused: .*fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params=True is refused"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, r"set model\.checkpointing"),
    ],
)
def test_what_this_loop_cannot_do_is_refused(
    settings: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in (IN_PIECES | settings).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=message):
        find_processes(cpu=True)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"layerdrop": 0.1}, r"layerdrop=0\.1 is refused.*model\.config\.layerdrop=0"),
        ({"precision": "fp16"}, r"run\.precision='fp16' is refused: it must be 'bf16' or 'no' with FSDP"),
    ],
)
def test_what_pieces_do_not_bear_is_refused(
    wish: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LayerDrop, as all processes gather the same blocks; a loss scale."""
    for key, value in IN_PIECES.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match=message):
        find_processes(cpu=True, **wish)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM"])
def test_other_ways_to_cut_a_model_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(ValueError, match=f"distributed_type='{kind}' is refused"):
        find_processes()


def test_a_lone_process_keeps_its_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in IN_PIECES.items():
        monkeypatch.setenv(key, value)
    assert not find_processes(cpu=True).sharded


def test_accelerate_launch_starts_two_processes_with_a_piece_each(tmp_path: Path) -> None:
    plan = make_recipe("ctc", "run.steps=2", "run.log_every=2", "run.evaluate_every=2", "run.threads=1")
    (tmp_path / "recipe.yaml").write_text(plan.to_yaml())
    line = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(SETTINGS / "cpu_2_fsdp.yaml"), "-m", "w2vc.cli",
        "finetune", str(tmp_path / "recipe.yaml"), str(tmp_path / "run"),
    ]  # fmt: skip
    out = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
    assert out.returncode == 0, out.stderr[-2000:]
    assert "each of 2 processes holds a piece of the weights" in out.stdout
    Wav2Vec2ConformerForCTC.from_pretrained(tmp_path / "run" / "best")
