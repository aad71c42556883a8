"""The training loop: exact losses, exact resume, learning, and what it does when something is wrong."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import w2vc.cli
import w2vc.model.quantizer
import w2vc.training.monitoring
import w2vc.training.trainer
from training_runs import (
    agree_with_the_whole,
    child_of_two,
    cut_gradients,
    fixed_noise,
    in_child,
    largest_gap,
    make_recipe,
    together,
    trainer_for,
)
from w2vc.data.corpus import Speech, Utterance
from w2vc.model.conformer import ConformerEncoder
from w2vc.model.ctc import Wav2Vec2ConformerForCTC
from w2vc.model.fast import PackedConformerEncoder
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining
from w2vc.text.tokenizer import AutoProcessor
from w2vc.training.monitoring import healthy_bands, stored_bands
from w2vc.training.recipes import SourceConfig
from w2vc.training.trainer import (
    OBJECTIVE_CLASSES,
    gather_speech,
    keep_usable,
    make_optimizer,
    make_trainer,
    read_metrics,
    train,
)


@pytest.mark.parametrize("objective", ["pretraining", "ctc", "sequence", "frame"])
def test_cutting_a_batch_changes_nothing(objective: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(w2vc.model.quantizer, "gumbel_relaxed", fixed_noise)
    one = cut_gradients(objective, ("data.batch_rows=4", "run.accumulate=1"), tmp_path / "one")
    four = cut_gradients(objective, ("data.batch_rows=1", "run.accumulate=4"), tmp_path / "four")
    assert largest_gap(four, one) <= 1e-6


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found that trained together."""
    folder = tmp_path_factory.mktemp("two")
    together(child_of_two, folder)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in "01"]


@pytest.mark.parametrize("objective", ["pretraining", "ctc"])
def test_two_processes_see_the_gradient_of_one(
    objective: str, of_two: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agree_with_the_whole(objective, of_two, tmp_path, monkeypatch)


@pytest.mark.parametrize("objective", ["pretraining", "ctc"])
def test_two_processes_stay_together(objective: str, of_two: list[dict[str, Any]]) -> None:
    """LayerDrop, a frozen feature encoder, and a base model that is frozen for two steps; resumed after each step."""
    parameters = dict(trainer_parameters(objective))
    for kind in ("whole", "pieces"):
        first, second = (found[f"{objective}-{kind}"] for found in of_two)
        assert all(torch.equal(first[name], second[name]) for name in parameters)
    whole, pieces = of_two[0][f"{objective}-whole"], of_two[0][f"{objective}-pieces"]
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    moved = {name for name, start in parameters.items() if not torch.equal(whole[name], start)}
    assert any(".encoder.layers.0." in name for name in moved)
    assert any(".feature_extractor." in name for name in moved) == (objective == "ctc")


def trainer_parameters(objective: str) -> list[tuple[str, torch.Tensor]]:
    """The first weights of a run."""
    plan = make_recipe(objective)
    model, _ = OBJECTIVE_CLASSES[objective].build(plan, gather_speech(plan.data.train))
    return [(name, p.detach()) for name, p in model.named_parameters()]


def same_weights(a: Path, b: Path) -> bool:
    return (a / "last/model.safetensors").read_bytes() == (b / "last/model.safetensors").read_bytes()


def curve(folder: Path) -> list[tuple[Any, ...]]:
    return [(r["kind"], r["step"], r.get("loss"), r.get("gradient")) for r in read_metrics(folder)]


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


# What follows runs whole small trainings in this process.


def small(folder: Path, objective: str = "pretraining", *overrides: str, **knobs: Any) -> Any:
    return train(make_recipe(objective, *overrides, **knobs), folder, progress=False)


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


def test_a_loss_without_a_value_never_reaches_the_optimiser(tmp_path: Path) -> None:
    """One poisoned clip: its steps are left out, it is named, and weights, statistics and moments stay finite."""
    plan = make_recipe("ctc", "run.steps=9", mask_time_prob=0.0)
    speech = gather_speech(plan.data.train)
    trainer = trainer_for(plan, speech, tmp_path, double=False)
    bad, forward = speech[3].id, trainer.objective.forward
    seen: list[dict[str, torch.Tensor]] = []

    def poisoned(model: Any, batch: Any, count: int) -> Any:
        loss, output = forward(model, batch, count)
        if bad in batch["ids"]:
            if trainer.model.training:
                trainer.model.wav2vec2_conformer.encoder.layers[
                    0
                ].conv_module.batch_norm.running_mean.data.fill_(math.nan)
            loss = loss * math.nan
        return loss, output

    trainer.objective.forward = poisoned  # type: ignore[method-assign]
    update = trainer.update

    def watched() -> None:
        before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        skipped = trainer.skipped
        update()
        if trainer.skipped > skipped:
            seen.append(before)
            after = trainer.model.state_dict()
            assert all(torch.equal(after[k], v) for k, v in before.items())

    trainer.update = watched  # type: ignore[method-assign]
    outcome = trainer.run()
    assert outcome.finished
    skips = read_metrics(tmp_path, "skip")
    assert len(skips) == len(seen) == trainer.skipped > 0
    assert {name for skip in skips for name in skip["samples"]} == {bad}
    assert all(bool(t.isfinite().all()) for t in outcome.model.state_dict().values())
    assert read_metrics(tmp_path, "train")[-1]["skipped"] == len(skips)


def test_a_run_that_has_only_such_losses_stops_and_says_why(tmp_path: Path) -> None:
    plan = make_recipe("ctc", "run.tolerance=3")
    trainer = trainer_for(plan, gather_speech(plan.data.train), tmp_path, double=False)
    forward = trainer.objective.forward
    trainer.objective.forward = lambda *a: (forward(*a)[0] * math.inf, None)  # type: ignore[method-assign]
    trainer.objective.measure = trainer.objective.summarise = lambda *a: {}  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"3 steps in a row .* optimizer\.lr"):
        trainer.run()


def test_base_frozen_at_first_and_feature_encoder_frozen_always(tmp_path: Path) -> None:
    plan = make_recipe(
        "ctc", "model.frozen_steps=2", "model.features_gradient=0", "run.steps=4", mask_time_prob=0.0
    )
    trainer = trainer_for(plan, gather_speech(plan.data.train), tmp_path, double=False)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    moved: list[set[str]] = []
    update = trainer.update

    def watched() -> None:
        update()
        moved.append({n for n, p in trainer.model.named_parameters() if not torch.equal(p, start[n])})

    trainer.update = watched  # type: ignore[method-assign]
    trainer.run()
    assert moved[0] == moved[1] == {"lm_head.weight", "lm_head.bias"}
    assert any(".layers.1." in name for name in moved[2])
    assert not any("feature_extractor" in name for name in moved[3])
    assert any("feature_projection" in name for name in moved[3])


def test_a_base_model_frozen_for_good_keeps_its_running_statistics(tmp_path: Path) -> None:
    plan = make_recipe("sequence", "model.frozen=true", "run.steps=4", "run.evaluate_every=2")
    trainer = trainer_for(plan, gather_speech(plan.data.train), tmp_path, double=False)
    start = {n: t.detach().clone() for n, t in trainer.model.state_dict().items()}
    trainer.run()
    moved = {n for n, t in trainer.model.state_dict().items() if not torch.equal(t, start[n])}
    assert moved == {"projector.weight", "projector.bias", "classifier.weight", "classifier.bias"}


def test_features_gradient_and_penalty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w2vc.model.quantizer, "gumbel_relaxed", fixed_noise)
    whole = ("data.batch_rows=4",)
    one = cut_gradients("pretraining", whole, tmp_path)
    tenth = cut_gradients("pretraining", (*whole, "model.features_gradient=0.1"), tmp_path)
    for name, gradient in one.items():
        factor = 0.1 if "feature_extractor" in name else 1.0
        torch.testing.assert_close(tenth[name], gradient * factor, rtol=1e-6, atol=1e-9)
    loud = cut_gradients("pretraining", (*whole, "pretraining.features_penalty=2.0"), tmp_path)
    changed = {name for name in one if not torch.allclose(loud[name], one[name])}
    assert changed
    assert all("feature_extractor" in name for name in changed)  # the penalty sees nothing else
    four = cut_gradients(
        "pretraining", ("data.batch_rows=1", "run.accumulate=4", "pretraining.features_penalty=2.0"), tmp_path
    )
    assert (
        largest_gap(four, loud) <= 2e-3
    )  # a mean per micro-batch, weighted by its hidden frames: near, not equal


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


def test_the_running_average_is_what_is_judged_and_kept(tmp_path: Path) -> None:
    plan = make_recipe("ctc", "run.ema=0.5", "run.steps=3", "run.evaluate_every=3", mask_time_prob=0.0)
    trainer = trainer_for(
        plan, gather_speech(plan.data.train), tmp_path, gather_speech(plan.data.valid), double=False
    )
    name = "lm_head.weight"
    expected, update = trainer.model.state_dict()[name].clone(), trainer.update

    def watched() -> None:
        update()
        expected.lerp_(trainer.model.state_dict()[name], 0.5)

    trainer.update = watched  # type: ignore[method-assign]
    outcome = trainer.run()
    assert not any(value.requires_grad for value in trainer.average.values())  # no graph that grows
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


def test_metrics_after_a_kill_hold_no_step_twice(tmp_path: Path) -> None:
    plan = make_recipe("ctc", "run.steps=6", "run.save_every=4")
    train(plan, tmp_path / "whole", progress=False)
    trainer = make_trainer(plan, tmp_path, progress=False)
    update = trainer.update

    def dying() -> None:
        if trainer.step == 5:
            raise KeyboardInterrupt
        update()

    trainer.update = dying  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
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


def test_ctc_leaves_out_what_has_no_text(tmp_path: Path) -> None:
    plan = make_recipe("ctc")
    speech = gather_speech(plan.data.train)
    trainer = trainer_for(plan, speech, tmp_path, double=False)
    silent = Utterance("silent", speech[0].audio)
    dense = Utterance("dense", speech[0].audio[:2000], text="yes no" * 20)
    foreign = Utterance("foreign", speech[0].audio, text="ж")
    assert [
        u.id for u in keep_usable(speech[:1] + Speech([silent, dense, foreign]), trainer.objective, "train")
    ] == [speech[0].id]
    with pytest.raises(ValueError, match=r"data\.valid: none of 1"):
        keep_usable(Speech([silent]), trainer.objective, "valid")


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


def test_the_command_line_prints_the_cost_and_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.yaml").write_text(make_recipe("ctc").to_yaml())
    overrides = ["run.steps=2", "run.evaluate_every=2"]
    w2vc.cli.main(["finetune", str(tmp_path / "plan.yaml"), str(tmp_path / "run"), *overrides])
    out, err = capsys.readouterr()
    assert "effective batch: " in out
    assert "step 2: loss" in out
    assert "step 2, the last step" in err


@pytest.mark.parametrize("objective", ["pretraining", "ctc"])
def test_the_model_gets_both_masks(objective: str, tmp_path: Path) -> None:
    """An attention mask only where something is padded; the collator's time mask reaches the base model."""
    plan = make_recipe(objective, "data.batch_seconds=40", "data.label=speaker", mask_time_prob=0.5)
    trainer = trainer_for(plan, gather_speech(plan.data.train), tmp_path, double=False)
    batch = next(trainer.stream)
    assert len(set(batch["lengths"])) > 1
    given: list[Any] = []
    trainer.model.base_model.encoder.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    trainer.model.train()
    trainer.objective.forward(trainer.model, batch, trainer.objective.count(batch))
    masked = batch["mask_time_indices"].bool()
    assert masked.any()
    assert torch.equal((given[0] == trainer.model.base_model.masked_spec_embed).all(-1), masked)
    assert torch.equal(trainer.objective.inputs(batch)["attention_mask"], batch["attention_mask"])
    row = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    row |= {"lengths": [row["input_values"].shape[1]]}
    assert "attention_mask" not in trainer.objective.inputs(row)  # type: ignore[arg-type]


def test_a_run_on_a_cpu_takes_the_fast_forms_and_gives_back_a_plain_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(make_recipe("ctc", "run.steps=1"), tmp_path)
    assert "fast forms: 1 BlockwiseFeatureEncoder, 1 PackedConformerEncoder" in capsys.readouterr().out
    assert type(trainer.model.base_model.encoder) is PackedConformerEncoder
    assert type(trainer.run().model.base_model.encoder) is ConformerEncoder


def test_accelerate_launch_starts_two_processes(tmp_path: Path) -> None:
    """As the settings file says; `--cpu` would start one. What they learn together is what one learns from the same batches."""
    settings = Path(w2vc.training.trainer.__file__).parent / "assets" / "scale" / "cpu_2.yaml"
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


def test_tensorboard_has_numbers_texts_pictures_and_sounds(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    every = ("run.tensorboard=true", "run.steps=2", "run.evaluate_every=1")
    small(tmp_path / "codes", "pretraining", *every)
    board = EventAccumulator(str(tmp_path / "codes" / "tensorboard")).Reload()
    assert {"train/loss", "valid/loss", "valid/score"} <= set(board.Tags()["scalars"])
    assert [e.step for e in board.Images("valid/codes")] == [1, 2]
    assert board.Images("valid/gradients")[0].height > 100
    (sound, _) = board.Audio("valid/sound")
    assert sound.sample_rate == 16_000
    pcm = torch.frombuffer(bytearray(sound.encoded_audio_string[44:]), dtype=torch.int16)
    assert 4_000 < len(pcm) <= 16_000  # a crop of a second at most
    pcm = pcm[: len(pcm) // 320 * 320]
    silent = (pcm.view(-1, 320) == 0).all(1).float().mean()
    assert 0.2 < silent < 0.9  # the hidden frames
    small(tmp_path / "letters", "ctc", *every)
    board = EventAccumulator(str(tmp_path / "letters" / "tensorboard")).Reload()
    (text, _) = board.Tensors("valid/samples/text_summary")
    assert b"(meant: " in text.tensor_proto.string_val[0]
