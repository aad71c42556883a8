"""Recipes: schedules, files with overrides, refusals, and the cost of a run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import tiny_config
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.model.pretraining import Wav2Vec2ConformerForPreTraining
from w2vc.training.recipes import (
    PretrainingPlan,
    Recipe,
    SchedulePlan,
    describe_cost,
    estimate_cost,
    gumbel_temperature,
    learning_rate,
    matmul_speed,
    read_overrides,
    recipe_folder,
    training_flops,
)


def test_polynomial_climbs_to_one_and_falls_to_its_end() -> None:
    plan = SchedulePlan(kind="polynomial", warmup=0.1, end=0.2)
    rates = [learning_rate(step, 100, plan) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.6)  # half way down, from 1 to 0.2
    assert learning_rate(100, 100, plan) == pytest.approx(0.2)
    squared = SchedulePlan(kind="polynomial", warmup=0.0, power=2.0)
    assert learning_rate(50, 100, squared) == pytest.approx(0.25)


def test_tri_stage_is_fairseqs() -> None:
    plan = SchedulePlan(kind="tri_stage", warmup=0.1, hold=0.4, decay=0.5, start=0.01, end=0.05)
    assert learning_rate(0, 1000, plan) == pytest.approx(0.01)
    assert learning_rate(50, 1000, plan) == pytest.approx(0.01 + 0.99 / 2)
    assert {learning_rate(step, 1000, plan) for step in (100, 300, 499)} == {1.0}
    for step in (600, 750, 1000):  # its decay factor is -ln(end) / steps
        assert learning_rate(step, 1000, plan) == pytest.approx(math.exp(math.log(0.05) * (step - 500) / 500))


def test_cosine_and_constant() -> None:
    plan = SchedulePlan(kind="cosine", warmup=0.0, end=0.1)
    assert [learning_rate(s, 4, plan) for s in (0, 2, 4)] == pytest.approx([1.0, 0.55, 0.1])
    assert learning_rate(9, 10, SchedulePlan(kind="constant", warmup=0.5)) == 1.0


def test_schedules_are_stretched_not_cut() -> None:
    for kind in ("polynomial", "cosine", "tri_stage"):
        plan = SchedulePlan(kind=kind, warmup=0.2)
        for share in (0.3, 0.5, 0.9):
            short, long = (learning_rate(round(share * n), n, plan) for n in (100, 1000))
            assert short == pytest.approx(long)


def test_temperature_falls_to_its_floor() -> None:
    plan = PretrainingPlan(temperature_start=2.0, temperature_end=0.5, temperature_decay=0.9)
    assert gumbel_temperature(0, 100, plan) == 2.0
    assert gumbel_temperature(3, 100, plan) == pytest.approx(2 * 0.9**3)
    assert gumbel_temperature(99, 100, plan) == 0.5
    plan.temperature_share = 0.7
    assert gumbel_temperature(35, 100, plan) == pytest.approx(1.0)  # half way in the logarithm
    assert gumbel_temperature(69, 100, plan) > 0.5
    assert gumbel_temperature(70, 100, plan) == pytest.approx(0.5)


def test_every_recipe_of_the_package_loads_and_comes_back() -> None:
    names = {path.stem for path in recipe_folder().glob("*.yaml")}
    large = {f"finetune_{hours}" for hours in ("10m", "1h", "10h", "100h", "960h")}
    assert names >= {"demo_pretrain", "demo_ctc", "librispeech_base", "librivox_large"} | large
    for name in names:
        recipe = Recipe.load(name)
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        assert recipe.name == name
        if recipe.model.start is None:
            recipe.model_config().validate()


def test_the_file_that_a_run_writes_is_a_recipe(tmp_path: Path) -> None:
    recipe = Recipe.load("demo_pretrain", ["run.steps=7", "data.noise_db=[10, 30]"])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


def test_released_values_of_fairseq() -> None:
    """behaviours 4.2: effective batches of 1.4 M samples x 64 and 1.2 M x 128, and the schedules."""
    for name, processes, samples, warm in (
        ("librispeech_base", 8, 1.4e6 * 64, 32000),
        ("librivox_large", 16, 1.2e6 * 128, 32000),
    ):
        recipe = Recipe.load(name)
        cost = estimate_cost(recipe, recipe.model_config(), 1, processes=processes)
        assert cost.batch_seconds == pytest.approx(samples / 16000)
        assert recipe.schedule.warmup * recipe.run.steps == pytest.approx(warm)
        assert recipe.optimizer.betas == (0.9, 0.98)
    tuned = Recipe.load("finetune_960h")
    assert (tuned.run.steps, tuned.optimizer.lr, tuned.model.frozen_steps) == (320_000, 3e-5, 10_000)
    assert (tuned.model.config["mask_time_prob"], tuned.model.features_gradient) == (0.5, 0.0)


def test_overrides() -> None:
    recipe = Recipe.load(
        "demo_pretrain",
        [
            "run.steps=12",
            "optimizer.lr=5e-4",
            "data.train.0.repeat=3",
            "model.config.hidden_size=32",
            "run.patience=null",
        ],
    )
    assert (recipe.run.steps, recipe.optimizer.lr, recipe.data.train[0].repeat) == (12, 5e-4, 3)
    assert recipe.model_config().hidden_size == 32
    whole = Recipe.load("demo_pretrain", ["data.train=[{name: builtin}, {name: librivox, hours: 0.1}]"])
    assert [source.name for source in whole.data.train] == ["builtin", "librivox"]
    data = {"a": {"b": 1}}
    assert read_overrides(data, ["a.c.d=[1, 2]"]) == {"a": {"b": 1, "c": {"d": [1, 2]}}}
    assert data == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.stebs=3", "'run.stebs' is no key of a recipe; did you mean 'steps'"),
        ("optimiser.lr=1", "'optimiser' is no key of a recipe; did you mean 'optimizer'"),
        ("run.steps=three", "run.steps='three' is refused: it must be of type int"),
        ("run.steps=0", "run.steps=0 is refused: it must be at least 1"),
        ("run.steps", "override='run.steps' is refused"),
        ("data.train.9.repeat=2", "nothing is at '9'"),
        ("objective=pretrain", "did you mean 'pretraining'"),
        ("schedule.kind=cosinus", "did you mean 'cosine'"),
        ("run.precision=bf8", "run.precision='bf8' is refused"),
        ("data.train.0.nome=x", "'data.train.0.nome' is no key of a recipe; did you mean 'name'"),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9] is refused"),
    ],
)
def test_refusals_name_the_key_and_the_nearest(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"refused|no key|nothing") as caught:
        Recipe.load("demo_pretrain", [override])
    assert message in str(caught.value)


def test_an_unknown_recipe_or_knob_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'demo_pretrain'"):
        Recipe.load("demo_pretrian")
    with pytest.raises(ValueError, match="did you mean 'hidden_size'"):
        Recipe.load("demo_pretrain", ["model.config.hiden_size=3"]).model_config()


def test_operations_are_those_that_torch_counts() -> None:
    config = tiny_config(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, attn_implementation="eager"
    )
    model = Wav2Vec2ConformerForPreTraining(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 64_000), mask_time_indices=torch.ones(1, 199, dtype=torch.bool))
    forward = counter.get_total_flops()  # torch overcounts the backward of depthwise convolutions
    assert training_flops(config, 4.0) == pytest.approx(3 * forward, rel=0.03)


def test_cost_and_its_words() -> None:
    sizes = ["data.batch_seconds=32", "data.batch_rows=16", "data.crop_seconds=2"]
    recipe = Recipe.load("demo_pretrain", ["run.steps=1000", "run.accumulate=3", *sizes])
    config = recipe.model_config()
    cost = estimate_cost(recipe, config, 2_000_000, data_seconds=9600.0, processes=2, speed=1e10)
    assert cost.batch_seconds == 16 * 2 * 3 * 2
    assert cost.hours_heard == pytest.approx(1000 * 192 / 3600)
    assert cost.epochs == pytest.approx(1000 * 192 / 9600)
    assert cost.hours == pytest.approx(cost.operations / 2 / 1e10 / 3600)
    text = describe_cost(recipe, cost, 2)
    assert "192 s of audio per update" in text
    assert "3 micro-batch(es) x 2 process(es)" in text
    unknown = describe_cost(recipe, estimate_cost(recipe, config, 1))
    assert "nan" not in unknown
    large = Recipe.load("librivox_large")
    words = describe_cost(large, estimate_cost(large, Wav2Vec2ConformerConfig.large(), 600_000_000))
    assert "often do not learn" in words  # one process alone: 600 s per update
    assert matmul_speed(64, 0.01) > 1e6
