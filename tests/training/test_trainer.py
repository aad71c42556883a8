"""The training loop: exact resume, learning, and what it does when something is wrong."""

from __future__ import annotations

import json
import math
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import w2vc.cli
import w2vc.training.distributed
import w2vc.training.monitoring
from training_runs import in_child, make_recipe, state_for
from w2vc.model.conformer import ConformerEncoder
from w2vc.model.ctc import Wav2Vec2ConformerForCTC
from w2vc.model.fast import PackedConformerEncoder
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining
from w2vc.text.tokenizer import AutoProcessor
from w2vc.training.distributed import Run, continue_run, start_run, train, train_step
from w2vc.training.monitoring import healthy_bands, read_metrics, stored_bands
from w2vc.training.objectives import build
from w2vc.training.recipes import SourceConfig, gather_speech, make_optimizer


def same_weights(a: Path, b: Path) -> bool:
    return (a / "last/model.safetensors").read_bytes() == (b / "last/model.safetensors").read_bytes()


def curve(folder: Path) -> list[tuple[Any, ...]]:
    return [(r["kind"], r["step"], r.get("loss"), r.get("gradient")) for r in read_metrics(folder)]


def watch_steps(monkeypatch: pytest.MonkeyPatch, look: Callable[[Run], None]) -> None:
    """Have a look at a run after each of its steps."""

    def watched(state: Run) -> Any:
        line = train_step(state)
        look(state)
        return line

    monkeypatch.setattr(w2vc.training.distributed, "train_step", watched)


def small(folder: Path, objective: str = "pretraining", *overrides: str, **knobs: Any) -> Any:
    return train(make_recipe(objective, *overrides, **knobs), folder, progress=False)


def test_resume_in_pieces_is_the_same_run(tmp_path: Path) -> None:
    plan = make_recipe(hidden_dropout=0.1, layerdrop=0.2)
    whole = train(plan, tmp_path / "whole", progress=False)
    assert whole.finished
    while not (piece := train(plan, tmp_path / "pieces", max_minutes=0, progress=False)).finished:
        assert piece.reason == "the end of the time"
    assert piece.step == 6
    assert same_weights(tmp_path / "whole", tmp_path / "pieces")
    assert curve(tmp_path / "whole") == curve(tmp_path / "pieces")


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Killed four times at instants that nobody chose: weights and curves are those of the run that was left alone."""
    plan = make_recipe(
        "pretraining", "run.steps=16", "run.save_every=1", "run.evaluate_every=8", hidden_dropout=0.1
    )
    train(plan, tmp_path / "whole", progress=False)
    killed = tmp_path / "killed"
    for step, pause in ((1, 0.002), (4, 0.02), (8, 0.05), (11, 0.0)):
        child = in_child(train, plan, killed, progress=False)
        while not any(r["step"] >= step for r in read_metrics(killed)):
            assert child.is_alive()
            time.sleep(0.001)
        time.sleep(pause)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    assert not any(r["step"] == 16 for r in read_metrics(killed))
    train(plan, killed, progress=False)
    assert same_weights(tmp_path / "whole", killed)
    assert curve(tmp_path / "whole") == curve(killed)


def test_pretraining_learns(tmp_path: Path) -> None:
    """On sixteen clips, questions are answered far better than by guessing; the codes stay in use."""
    plan = make_recipe(
        "pretraining", "run.steps=120", "run.log_every=12", "run.evaluate_every=120", "run.save_every=120",
        "optimizer.lr=5e-3", "data.batch_rows=8", "pretraining.temperature_share=0.5", "data.preload=true",
        "data.crop=shortest",
    )  # fmt: skip
    train(plan, tmp_path, progress=False)
    curve = read_metrics(tmp_path, "train")
    first, last = curve[0], curve[-1]
    assert last["contrastive"] < first["contrastive"] - 0.3
    assert last["accuracy"] > 2 / 6  # five negatives: chance is 1/6
    assert last["used"] > 0.3
    assert 0 < last["diversity_share"] < 1
    assert last["temperature"] == 0.5


def test_ctc_learns(tmp_path: Path) -> None:
    plan = make_recipe(
        "ctc", "run.steps=60", "run.log_every=5", "run.evaluate_every=60", "optimizer.lr=1e-2", "run.per=label",
        "data.batch_rows=16", "data.batch_seconds=30", "optimizer.clip=1", mask_time_prob=0.0,
    )  # fmt: skip
    train(plan, tmp_path, progress=False)
    curve = read_metrics(tmp_path, "train")
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    valid = read_metrics(tmp_path, "valid")[-1]
    assert set(valid) >= {"cer", "wer", "blanks", "loss", "samples"}
    assert "(meant: " in valid["samples"][0]
    last = tmp_path / "last"  # a standard folder
    assert {"config.json", "model.safetensors", "vocab.json", "preprocessor_config.json"} <= {
        p.name for p in last.iterdir()
    }
    model = Wav2Vec2ConformerForCTC.from_pretrained(last)
    assert model.config.vocab_size == len(AutoProcessor.from_pretrained(last).tokenizer)


@pytest.mark.parametrize(
    ("objective", "label"),
    [("sequence", "text"), ("frame", "phones"), ("frame", "turns"), ("xvector", "speaker")],
)
def test_classifiers_learn(objective: str, label: str, tmp_path: Path) -> None:
    train_set = "[{name: builtin, split: dev, kinds: [keyword]}]"
    plan = make_recipe(
        objective, f"data.label={label}", f"data.train={train_set}", f"data.valid={train_set}", "run.steps=25",
        "run.log_every=5", "run.evaluate_every=25", "optimizer.lr=5e-3", "optimizer.clip=5", "data.batch_rows=16",
        "data.batch_seconds=30", apply_spec_augment=False,
    )  # fmt: skip
    outcome = train(plan, tmp_path, progress=False)
    curve = read_metrics(tmp_path, "train")
    assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]
    assert outcome.best is not None
    if label == "text":
        assert len(outcome.model.config.id2label) > 2


def test_a_loss_without_a_value_never_reaches_the_optimiser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One poisoned clip: its steps are left out, it is named, and weights, statistics and moments stay finite."""
    plan = make_recipe("ctc", "run.steps=9", mask_time_prob=0.0)
    speech = gather_speech(plan.data.train)
    state = state_for(plan, speech, tmp_path, double=False)
    bad, forward = speech[3].id, state.objective.forward
    seen: list[int] = []

    def poisoned(model: Any, batch: Any) -> Any:
        loss, result = forward(model, batch)
        if bad in batch["ids"]:
            if model.training:
                norm = model.wav2vec2_conformer.encoder.layers[0].conv_module.batch_norm
                norm.running_mean.data.fill_(math.nan)
            loss = loss * math.nan
        return loss, result

    def watched(state: Run) -> Any:
        before = {k: v.clone() for k, v in state.model.state_dict().items()}
        skipped = state.skipped
        line = train_step(state)
        if state.skipped > skipped:
            seen.append(state.step)
            after = state.model.state_dict()
            assert all(torch.equal(after[k], v) for k, v in before.items())
        return line

    state.objective.forward = poisoned
    monkeypatch.setattr(w2vc.training.distributed, "train_step", watched)
    outcome = continue_run(state)
    assert outcome.finished
    skips = read_metrics(tmp_path, "skip")
    assert [skip["step"] for skip in skips] == seen
    assert len(seen) == state.skipped > 0
    assert {name for skip in skips for name in skip["samples"]} == {bad}
    assert all(bool(t.isfinite().all()) for t in outcome.model.state_dict().values())
    lines = read_metrics(tmp_path, "train")
    assert lines[-1]["skipped"] == len(skips)
    assert all((line["loss"] is None) == (line["step"] in seen) for line in lines)  # missing, never 0


def test_a_run_that_has_only_such_losses_stops_and_says_why(tmp_path: Path) -> None:
    plan = make_recipe("ctc", "run.tolerance=3")
    state = state_for(plan, gather_speech(plan.data.train), tmp_path, double=False)
    forward = state.objective.forward
    state.objective.forward = lambda *a: (forward(*a)[0] * math.inf, None)
    state.objective.measure = state.objective.summarise = lambda *a: {}
    with pytest.raises(RuntimeError, match=r"3 steps in a row .* optimizer\.lr"):
        continue_run(state)


def test_base_frozen_at_first_and_feature_encoder_frozen_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_recipe(
        "ctc", "model.frozen_steps=2", "model.features_gradient=0", "run.steps=4", mask_time_prob=0.0
    )
    state = state_for(plan, gather_speech(plan.data.train), tmp_path, double=False)
    start = {n: p.detach().clone() for n, p in state.model.named_parameters()}
    moved: list[set[str]] = []

    def look(state: Run) -> None:
        moved.append({n for n, p in state.model.named_parameters() if not torch.equal(p, start[n])})

    watch_steps(monkeypatch, look)
    continue_run(state)
    assert moved[0] == moved[1] == {"lm_head.weight", "lm_head.bias"}
    assert any(".layers.1." in name for name in moved[2])
    assert not any("feature_extractor" in name for name in moved[3])
    assert any("feature_projection" in name for name in moved[3])


def test_a_base_model_frozen_for_good_keeps_its_running_statistics(tmp_path: Path) -> None:
    plan = make_recipe("sequence", "model.frozen=true", "run.steps=4", "run.evaluate_every=2")
    state = state_for(plan, gather_speech(plan.data.train), tmp_path, double=False)
    start = {n: t.detach().clone() for n, t in state.model.state_dict().items()}
    continue_run(state)
    moved = {n for n, t in state.model.state_dict().items() if not torch.equal(t, start[n])}
    assert moved == {"projector.weight", "projector.bias", "classifier.weight", "classifier.bias"}


def test_weight_decay_leaves_norms_and_biases_alone() -> None:
    model = Wav2Vec2ConformerForPreTraining(make_recipe().model_config())
    optimizer = make_optimizer(model, make_recipe("pretraining", "optimizer.weight_decay=0.5"))
    names = {id(p): name for name, p in model.named_parameters()}
    pulled, free = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert {"quantizer.codevectors", "project_q.weight"} <= pulled
    assert all("norm" in n or "bias" in n or n.endswith("masked_spec_embed") for n in free)
    assert not any("norm" in n or "bias" in n for n in pulled)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert len(pulled) + len(free) + len(frozen) == len(names)


def test_the_running_average_is_what_is_judged_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_recipe("ctc", "run.ema=0.5", "run.steps=3", "run.evaluate_every=3", mask_time_prob=0.0)
    valid = gather_speech(plan.data.valid)
    state = state_for(plan, gather_speech(plan.data.train), tmp_path, valid, double=False)
    name = "lm_head.weight"
    expected = state.model.state_dict()[name].clone()
    watch_steps(monkeypatch, lambda state: expected.lerp_(state.model.state_dict()[name], 0.5))
    outcome = continue_run(state)
    best = load_file(tmp_path / "best/model.safetensors")[name]
    torch.testing.assert_close(best, expected)
    assert not torch.allclose(best, outcome.model.state_dict()[name])
    assert torch.equal(load_file(tmp_path / "last/model.safetensors")[name], outcome.model.state_dict()[name])


def test_early_stop_and_the_best_model(tmp_path: Path) -> None:
    """The learning rate is 0: nothing gets better after the first evaluation."""
    outcome = small(
        tmp_path, "ctc", "optimizer.lr=0", "run.steps=50", "run.evaluate_every=2", "run.patience=2"
    )
    assert outcome.finished
    assert outcome.step == 6
    assert outcome.reason == "2 evaluations without a better one"
    assert outcome.best is not None
    assert outcome.best[1] == 2
    again = small(tmp_path, "ctc", "optimizer.lr=0", "run.steps=50", "run.evaluate_every=2", "run.patience=2")
    assert again.step == 6  # it stays stopped


def test_another_recipe_does_not_continue_a_run(tmp_path: Path) -> None:
    small(tmp_path, "ctc", "run.steps=2")
    with pytest.raises(ValueError, match=r"another recipe: model\.config\.layerdrop, optimizer\.lr differ"):
        small(tmp_path, "ctc", "run.steps=2", "optimizer.lr=2e-3", layerdrop=0.1)
    assert small(tmp_path, "ctc", "run.steps=2", "run.log_every=2").step == 2  # that changes nothing
    with pytest.raises(ValueError, match="holds a run"):
        train(make_recipe("ctc"), tmp_path, resume=False, progress=False)


def test_metrics_after_a_kill_hold_no_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_recipe("ctc", "run.steps=6", "run.save_every=4")
    train(plan, tmp_path / "whole", progress=False)

    def die(state: Run) -> None:
        if state.step == 5:
            raise KeyboardInterrupt

    watch_steps(monkeypatch, die)
    with pytest.raises(KeyboardInterrupt):
        train(plan, tmp_path, progress=False)
    monkeypatch.undo()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # cut short
    train(plan, tmp_path, progress=False)
    assert curve(tmp_path) == curve(tmp_path / "whole")


def test_half_precision_trains_too(tmp_path: Path) -> None:
    outcome = small(tmp_path, "pretraining", "run.precision=bf16", "run.steps=3")
    assert all(math.isfinite(r["loss"]) for r in read_metrics(tmp_path, "train"))
    assert next(outcome.model.parameters()).dtype == torch.float32
    assert small(tmp_path / "b", "ctc", "run.steps=1").finished  # and the next run may be in fp32 again


def test_sources_are_joined_repeated_and_bounded() -> None:
    sources = [
        SourceConfig("builtin", "dev", repeat=2, kinds=["keyword"]),
        SourceConfig("builtin", "test", hours=10 / 3600),
    ]
    speech = gather_speech(sources, min_seconds=0.1)
    ids = [u.id for u in speech]
    assert len(set(ids)) == len(ids)  # the second round has crops and masks of its own
    assert sum(name.endswith("#2") for name in ids) == sum(
        u.kind == "keyword" for u in speech if "#2" not in u.id and "/dev" in u.id
    )
    assert 5 < sum(u.seconds for u in speech if u.id.startswith("builtin/test")) <= 10
    with pytest.raises(ValueError, match="no utterance of at least 99"):
        gather_speech(sources, min_seconds=99)


def test_a_finished_run_is_compared_with_healthy_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_recipe("ctc", "name=known", "run.steps=4")
    train(plan, tmp_path / "healthy", progress=False)
    bands = healthy_bands([read_metrics(tmp_path / "healthy")], points=2, name="known")
    bands["figures"]["gradient"] = {"low": [-2.0, -2.0], "high": [-1.0, -1.0]}
    (tmp_path / "known.health.json").write_text(json.dumps(bands))
    monkeypatch.setattr(w2vc.training.monitoring, "recipe_folder", lambda: tmp_path)
    train(plan, tmp_path / "run")
    assert "share outside the bands of healthy runs: loss 0%, gradient 100%" in capsys.readouterr().out
    assert stored_bands("unknown") is None


def test_a_run_on_a_cpu_takes_the_fast_forms_and_gives_back_a_plain_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = start_run(make_recipe("ctc", "run.steps=1"), tmp_path)
    assert "fast forms: 1 BlockwiseFeatureEncoder, 1 PackedConformerEncoder" in capsys.readouterr().out
    assert type(state.model.base_model.encoder) is PackedConformerEncoder
    assert type(continue_run(state).model.base_model.encoder) is ConformerEncoder


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_recipe("ctc", "run.steps=1")
    speech = gather_speech(plan.data.train)
    short = [u.id for u in speech if u.seconds < 0.5]
    start_run(plan, tmp_path)
    out = capsys.readouterr().out
    assert f"{short[0]}: it has 0.4" in out
    assert re.search(r"left out: \d+ utterances", out)


def test_vocabulary_and_labels_of_a_run_are_never_derived_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts have changed since: the run goes on with the numbers that it began with."""
    plan = make_recipe("ctc", "run.steps=2", "data.valid=[]")
    train(plan, tmp_path, max_minutes=0, progress=False)
    before = (tmp_path / "last" / "vocab.json").read_text()
    speech = gather_speech(plan.data.train, 0.5, 8.0)
    monkeypatch.setattr(w2vc.training.distributed, "gather_speech", lambda *options: speech)
    speech[0].text = speech[0].text + "q"
    assert build(plan, speech)[1].config.vocab_size == len(json.loads(before)) + 1
    monkeypatch.setattr(w2vc.training.distributed, "keep_usable", lambda speech, *options: speech)
    state = start_run(plan, tmp_path, progress=False)
    assert state.step == 1
    assert state.objective.processor.tokenizer.get_vocab() == json.loads(before)


def test_the_command_line_prints_the_batch_and_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.yaml").write_text(make_recipe("ctc").to_yaml())
    overrides = ["run.steps=2", "run.evaluate_every=2"]
    w2vc.cli.main(["finetune", str(tmp_path / "plan.yaml"), str(tmp_path / "run"), *overrides])
    out, err = capsys.readouterr()
    assert "effective batch: " in out
    assert "step 2: loss" in out
    assert "step 2, the last step" in err


def test_tensorboard_has_numbers_and_texts(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    small(tmp_path, "ctc", "run.tensorboard=true", "run.steps=2", "run.evaluate_every=1")
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/loss", "valid/loss", "valid/cer"} <= set(board.Tags()["scalars"])
    (text, _) = board.Tensors("valid/samples/text_summary")
    assert b"(meant: " in text.tensor_proto.string_val[0]
