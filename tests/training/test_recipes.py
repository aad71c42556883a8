"""Recipes: schedules, files with overrides, and refusals."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from w2vc.training.recipes import (
    PretrainingConfig,
    Recipe,
    ScheduleConfig,
    gumbel_temperature,
    learning_rate,
    recipe_folder,
)


def test_polynomial_climbs_to_one_and_falls_to_its_end() -> None:
    plan = ScheduleConfig(kind="polynomial", warmup=0.1, end=0.2)
    rates = [learning_rate(step, 100, plan) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.6)  # half way down, from 1 to 0.2
    assert learning_rate(100, 100, plan) == pytest.approx(0.2)
    squared = ScheduleConfig(kind="polynomial", warmup=0.0, power=2.0)
    assert learning_rate(50, 100, squared) == pytest.approx(0.25)


def test_tri_stage_is_fairseqs() -> None:
    plan = ScheduleConfig(kind="tri_stage", warmup=0.1, hold=0.4, decay=0.5, start=0.01, end=0.05)
    assert learning_rate(0, 1000, plan) == pytest.approx(0.01)
    assert learning_rate(50, 1000, plan) == pytest.approx(0.01 + 0.99 / 2)
    assert {learning_rate(step, 1000, plan) for step in (100, 300, 499)} == {1.0}
    for step in (600, 750, 1000):  # its decay factor is -ln(end) / steps
        assert learning_rate(step, 1000, plan) == pytest.approx(math.exp(math.log(0.05) * (step - 500) / 500))


def test_cosine_and_constant() -> None:
    plan = ScheduleConfig(kind="cosine", warmup=0.0, end=0.1)
    assert [learning_rate(s, 4, plan) for s in (0, 2, 4)] == pytest.approx([1.0, 0.55, 0.1])
    assert learning_rate(9, 10, ScheduleConfig(kind="constant", warmup=0.5)) == 1.0


def test_schedules_are_stretched_not_cut() -> None:
    for kind in ("polynomial", "cosine", "tri_stage"):
        plan = ScheduleConfig(kind=kind, warmup=0.2)
        for share in (0.3, 0.5, 0.9):
            short, long = (learning_rate(round(share * n), n, plan) for n in (100, 1000))
            assert short == pytest.approx(long)


def test_temperature_falls_to_its_floor() -> None:
    plan = PretrainingConfig(temperature_start=2.0, temperature_end=0.5, temperature_decay=0.9)
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
        seconds = recipe.data.batch_seconds * recipe.run.accumulate * processes
        assert seconds == pytest.approx(samples / 16000)
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
    plain = {"data": {"train": [{"name": "builtin"}]}}
    assert Recipe.from_dict(plain, ["data.train.0.repeat=3"]).data.train[0].repeat == 3
    assert plain == {"data": {"train": [{"name": "builtin"}]}}


def test_values_are_of_their_types() -> None:
    recipe = Recipe.from_dict(
        {"optimizer": {"lr": 1, "betas": [0.9, 0.99]}, "data": {"valid": [], "noise_db": [10, 30]}}
    )
    assert (recipe.optimizer.lr, recipe.optimizer.betas, recipe.data.noise_db) == (
        1.0,
        (0.9, 0.99),
        (10.0, 30.0),
    )
    assert isinstance(recipe.optimizer.lr, float)
    assert recipe.data.valid == []
    nested = {"conv_dim": [64, 64], "layerdrop": 0.0, "problem_type": None}
    assert Recipe.from_dict({"model": {"config": nested}}).model.config == nested


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.stebs=3", "run.stebs: Key 'stebs' not in 'RunConfig'. Did you mean: 'steps'"),
        ("optimiser.lr=1", "optimiser: Key 'optimiser' not in 'Recipe'. Did you mean: 'optimizer'"),
        ("run.steps=three", "run.steps: Value 'three' of type 'str' could not be converted to Integer"),
        ("run.steps=1.5", "run.steps: Value '1.5'"),
        ("run.steps=0", "run.steps=0 must be at least 1"),
        ("run.steps", "override 'run.steps'"),
        ("run.steps=[1", "run.steps: "),
        ("run=5", "run: Invalid type assigned: int"),
        ("optimizer.lr=null", "optimizer.lr: field 'optimizer.lr' is not Optional"),
        ("data.train.9.repeat=2", "data.train[9]: "),
        ("objective=pretrain", "did you mean 'pretraining'"),
        ("schedule.kind=cosinus", "did you mean 'cosine'"),
        ("run.precision=bf8", "run.precision='bf8' must be one of no, bf16, fp16"),
        ("run.precision=no", "run.precision='False' must be one of"),
        ("model.size=huge", "model.size='huge' must be one of base, large, tiny"),
        ("data.train.0.nome=x", "data.train[0].nome: Key 'nome' not in 'SourceConfig'. Did you mean: 'name'"),
        ("optimizer.betas=[0.9]", "optimizer.betas: "),
    ],
)
def test_refusals_name_the_key_and_the_nearest(override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Recipe.load("demo_pretrain", [override])
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["- 1", "steps", "run: {stebs: 3}", "a: [", "model: [1]"])
def test_a_file_that_is_no_recipe_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=": "):
        Recipe.load(tmp_path / "run.yaml")


def test_the_library_needs_no_omegaconf_to_be_imported() -> None:
    program = "import sys, w2vc, w2vc.training.recipes; assert 'omegaconf' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_unknown_recipe_or_knob_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'demo_pretrain'"):
        Recipe.load("demo_pretrian")
    with pytest.raises(ValueError, match="did you mean 'hidden_size'"):
        Recipe.load("demo_pretrain", ["model.config.hiden_size=3"]).model_config()
