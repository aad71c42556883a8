"""Objectives: sums that do not depend on the cut of a batch, what the model is given, and what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import w2vc.model.quantizer
from training_runs import cut_gradients, fixed_noise, largest_gap, make_recipe, state_for
from w2vc.data.corpus import Speech, Utterance
from w2vc.training.objectives import build, keep_usable, outputs_of
from w2vc.training.recipes import gather_speech


@pytest.mark.parametrize("objective", ["pretraining", "ctc", "sequence", "frame"])
def test_cutting_a_batch_changes_nothing(objective: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(w2vc.model.quantizer, "gumbel_relaxed", fixed_noise)
    one = cut_gradients(objective, ("data.batch_rows=4", "run.accumulate=1"), tmp_path / "one")
    four = cut_gradients(objective, ("data.batch_rows=1", "run.accumulate=4"), tmp_path / "four")
    assert largest_gap(four, one) <= 1e-6


@pytest.mark.parametrize("objective", ["pretraining", "ctc"])
def test_the_model_gets_both_masks(objective: str, tmp_path: Path) -> None:
    """An attention mask only where something is padded; the collator's time mask reaches the base model."""
    plan = make_recipe(objective, "data.batch_seconds=40", "data.label=speaker", mask_time_prob=0.5)
    state = state_for(plan, gather_speech(plan.data.train), tmp_path, double=False)
    model, batch = state.model.train(), next(state.batches)
    assert len(set(batch["lengths"])) > 1
    given: list[Any] = []
    model.base_model.encoder.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    state.objective.forward(model, batch)
    masked = batch["mask_time_indices"].bool()
    assert masked.any()
    assert torch.equal((given[0] == model.base_model.masked_spec_embed).all(-1), masked)
    assert torch.equal(state.objective.inputs(batch)["attention_mask"], batch["attention_mask"])
    row = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    row |= {"lengths": [row["input_values"].shape[1]]}
    assert "attention_mask" not in state.objective.inputs(row)


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


def test_outputs_of_parts_are_kept_while_the_model_runs() -> None:
    layer = torch.nn.Linear(2, 3)
    with outputs_of(layer=layer) as seen:
        out = layer(torch.ones(1, 2))
    assert seen["layer"] is out
    layer(torch.zeros(1, 2))  # nobody listens any more
    assert seen["layer"] is out


def test_a_recipe_cannot_turn_the_sum_of_a_ctc_loss_into_a_mean() -> None:
    plan = make_recipe("ctc", ctc_loss_reduction="mean")
    _, model = build(plan, gather_speech(plan.data.train))
    assert model.config.ctc_loss_reduction == "sum"


def test_ctc_leaves_out_what_has_no_text() -> None:
    plan = make_recipe("ctc")
    speech = gather_speech(plan.data.train)
    objective, _ = build(plan, speech)
    silent = Utterance("silent", speech[0].audio)
    dense = Utterance("dense", speech[0].audio[:2000], text="yes no" * 20)
    foreign = Utterance("foreign", speech[0].audio, text="ж")
    left: list[str] = []
    kept = keep_usable(speech[:1] + Speech([silent, dense, foreign]), objective, "train", left)
    assert [u.id for u in kept] == [speech[0].id]
    assert [line.split(":")[0] for line in left] == ["silent", "dense", "foreign"]
    with pytest.raises(ValueError, match=r"data\.valid: none of 1"):
        keep_usable(Speech([silent]), objective, "valid")
