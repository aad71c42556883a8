"""Small runs for the tests of training, in this process, in one that can be killed, and in two that train together."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import Tensor, nn

import w2vc.model.quantizer
from w2vc.data.batches import data_loader
from w2vc.data.corpus import Speech, load_speech
from w2vc.training.distributed import Run, continue_run, evaluate, make_run, train, train_step
from w2vc.training.monitoring import whole_tensor
from w2vc.training.objectives import build
from w2vc.training.recipes import Recipe, gather_speech
from w2vc.training.trainer import Batches

CALM = {  # nothing random inside the model, so that cuts of a batch can be compared
    "hidden_dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0, "conformer_conv_dropout": 0.0,
    "feat_proj_dropout": 0.0, "feat_quantizer_dropout": 0.0, "final_dropout": 0.0, "layerdrop": 0.0,
    "mask_time_length": 4,
}  # fmt: skip


def make_recipe(objective: str = "pretraining", *overrides: str, **knobs: Any) -> Recipe:
    """A run of a tiny model on the built-in speech."""
    plain: dict[str, Any] = {
        "objective": objective,
        "model": {"size": "tiny", "config": {**CALM, "num_negatives": 5, **knobs}},
        "data": {
            "train": [{"name": "builtin", "split": "dev", "kinds": ["keyword"]}],
            "valid": [{"name": "builtin", "split": "test", "kinds": ["keyword"], "hours": 0.003}],
            "batch_seconds": 8.0, "batch_rows": 4,
        },
        "pretraining": {"mask_length": 4, "mask_prob": 0.5},
        "optimizer": {"lr": 1e-3},
        "run": {"steps": 6, "log_every": 1, "evaluate_every": 3, "save_every": 2, "cpu": True},
    }  # fmt: skip
    if objective == "pretraining":
        plain["data"]["crop_seconds"] = 1.0
    return Recipe.from_dict(plain, overrides)


def fixed_noise(logits: Tensor, temperature: float) -> Tensor:
    """Stands for the Gumbel softmax: no noise."""
    return (logits / temperature).softmax(-1)


def gradients_of_a_step(state: Run) -> dict[str, Tensor]:
    """What the optimiser gets to see in one step, with batch norm in eval."""
    for module in state.model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.train = lambda mode, module=module: nn.Module.train(module, False)
    seen: dict[str, Tensor] = {}
    state.optimizer.step = lambda: seen.update(
        {n: whole_tensor(p.grad).clone() for n, p in state.model.named_parameters() if p.grad is not None}
    )
    train_step(state)
    return seen


def state_for(
    plan: Recipe, speech: Speech, folder: Path, valid: Speech | None = None, *, double: bool = True
) -> Run:
    """A run on speech of our choice; in double precision, rounding stays far below what is asserted."""
    objective, model = build(plan, speech)
    return make_run(plan, folder, objective, model.double() if double else model, speech, valid)


def cut_gradients(objective: str, cut: tuple[str, ...], folder: Path, **knobs: Any) -> dict[str, Tensor]:
    """The gradient of one update over the same four utterances, cut in some way."""
    crop = ("data.crop_seconds=1.5",) if objective == "pretraining" else ()
    label = ("data.label=phones",) if objective == "frame" else ("data.label=speaker",)
    plan = make_recipe(
        objective, "data.batch_seconds=40", *crop, *label, *cut, diversity_loss_weight=0.0, **knobs
    )
    plan.model.config |= {} if objective == "ctc" else {"apply_spec_augment": False}
    return gradients_of_a_step(
        state_for(plan, load_speech("builtin", "dev").filter(kind="digits")[:4], folder)
    )


def largest_gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of two sets of gradients over the largest gradient."""
    assert one.keys() == other.keys()
    assert one
    largest = max(float(g.abs().max()) for g in other.values())
    return max(float((one[n] - other[n]).abs().max()) for n in one) / largest


def in_child(task: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Start a task in a copy of this process, which can be killed."""
    child = multiprocessing.get_context("fork").Process(target=task, args=arguments, kwargs=options)
    child.start()
    return child


def together(
    child: Callable[[Path, int], None], folder: Path, *, seconds: float = 300, **settings: str
) -> None:
    """Run `child` in two processes that train together over gloo, with the variables that launchers set.

    Args:
        child: Given the folder and its number.
        folder: Where they leave what they find.
        seconds: Who is not done by then hangs, and fails.
        settings: More variables.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = [in_child(one_of_two, child, folder, rank, place | settings) for rank in range(2)]
    try:
        for one in children:
            one.join(timeout=seconds)
    finally:
        for one in children:
            one.kill()
    assert [one.exitcode for one in children] == [0, 0]


def one_of_two(child: Callable[[Path, int], None], folder: Path, rank: int, place: dict[str, str]) -> None:
    """Take a place in the group, and begin."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **place}
    PartialState._reset_state()  # what this process was before it was copied
    child(folder, rank)


def gradients_of_quarters(folder: Path) -> dict[str, Any]:
    """By objective, the gradient of a batch that two processes cut in four."""
    cut = ("data.batch_rows=1", "run.accumulate=2")
    return {name: cut_gradients(name, cut, folder / name) for name in ("pretraining", "ctc")}


def agree_with_the_whole(
    objective: str, of_two: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Assert that both of two processes have the gradient of one that takes the batch at once."""
    monkeypatch.setattr(w2vc.model.quantizer, "gumbel_relaxed", fixed_noise)
    one = cut_gradients(objective, ("data.batch_rows=4", "run.accumulate=1"), folder)
    for found in of_two:
        assert largest_gap(found[objective], one) <= 1e-6


def child_of_two(folder: Path, rank: int) -> None:
    """One of two processes: the gradient of a batch cut in four, and runs with LayerDrop and a base model frozen at first."""
    noisy = w2vc.model.quantizer.gumbel_relaxed
    w2vc.model.quantizer.gumbel_relaxed = fixed_noise
    found = gradients_of_quarters(folder)
    w2vc.model.quantizer.gumbel_relaxed = noisy
    for objective in ("pretraining", "ctc"):
        freeze = "model.frozen_steps=2" if objective == "ctc" else "model.features_gradient=0"
        plan = make_recipe(
            objective, freeze, "run.accumulate=2", "run.steps=4", layerdrop=0.5, hidden_dropout=0.1
        )
        whole = train(plan, folder / f"{objective}-whole", progress=False).model
        while not (
            piece := train(plan, folder / f"{objective}-pieces", max_minutes=0, progress=False)
        ).finished:
            pass
        found[f"{objective}-whole"], found[f"{objective}-pieces"] = (
            whole.state_dict(),
            piece.model.state_dict(),
        )
    torch.save(found, folder / f"found-{rank}.pt")


IN_PIECES = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def poison(state: Run, bad: str) -> None:
    """Let the loss of every batch with the utterance `bad` be no number."""
    forward = state.objective.forward

    def poisoned(model: Any, batch: Any) -> Any:
        loss, result = forward(model, batch)
        return loss * math.nan if bad in batch["ids"] else loss, result

    state.objective.forward = poisoned


def few_steps(objective: str, folder: Path, *cut: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights after three steps, in double precision, and the figures of an evaluation before them."""
    plan = make_recipe(
        objective, "run.steps=3", "run.evaluate_every=9", "optimizer.clip=1", "data.label=speaker", *cut,
        layerdrop=0.0, diversity_loss_weight=0.0, apply_spec_augment=False,
    )  # fmt: skip
    speech = gather_speech(plan.data.train)[:8]
    state = state_for(plan, speech, folder, speech[:3])
    if state.processes.count == 1:  # the batches of two processes in turn
        state.batches = Batches(data_loader(
            speech, state.objective.collator(True), max_seconds=plan.data.batch_seconds, max_rows=plan.data.batch_rows,
            seed=plan.run.seed, processes=2, rank=None,
        ))  # fmt: skip
    figures = evaluate(state)
    weights = {name: p.detach() for name, p in continue_run(state).model.named_parameters()}
    return weights, figures


def child_in_pieces(folder: Path, rank: int) -> None:
    """One of two processes that hold a piece of the model each."""
    noisy = w2vc.model.quantizer.gumbel_relaxed
    w2vc.model.quantizer.gumbel_relaxed = fixed_noise
    found = gradients_of_quarters(folder)
    for objective in ("pretraining", "ctc", "xvector"):
        found[f"{objective}-steps"] = few_steps(objective, folder / f"{objective}-steps", "data.batch_rows=2")
    w2vc.model.quantizer.gumbel_relaxed = noisy
    for objective, more in (
        ("pretraining", ("model.features_gradient=0", "model.checkpointing=true")),
        ("ctc", ("model.frozen_steps=2", "run.ema=0.5", "run.evaluate_every=4")),
    ):
        settings = (*more, "run.accumulate=2", "run.steps=4", "optimizer.clip=1")
        plan = make_recipe(objective, *settings, hidden_dropout=0.1)
        whole = train(plan, folder / f"{objective}-whole", progress=False).model
        pieces = folder / f"{objective}-pieces"
        while not (piece := train(plan, pieces, max_minutes=0, progress=False)).finished:
            pass
        found[f"{objective}-whole"], found[f"{objective}-pieces"] = (
            whole.state_dict(),
            piece.model.state_dict(),
        )
    half = make_recipe("pretraining", "run.precision=bf16", "run.steps=3", "model.features_gradient=0.1")
    train(half, folder / "half-pieces", progress=False)
    train(plan, folder / "other", max_minutes=0, progress=False)
    del os.environ["ACCELERATE_USE_FSDP"]  # the same run goes on, with the whole model in both processes
    train(plan, folder / "other", progress=False)
    train(half, folder / "half-whole", progress=False)
    torch.save(found, folder / f"found-{rank}.pt")


class Short:
    """The batches of a loader, but for the last ones."""

    def __init__(self, loader: Any, batches: int) -> None:
        self.loader, self.batches, self.batch_sampler = loader, batches, loader.batch_sampler

    def __iter__(self) -> Any:
        return itertools.islice(self.loader, self.batches)


def poisoned_child(folder: Path, rank: int) -> None:
    """One of two processes, one of which gets a bad clip now and then, and less to validate on."""
    plan = make_recipe("ctc", "run.steps=8", "data.batch_rows=1", mask_time_prob=0.0)
    speech = gather_speech(plan.data.train)[:6]
    state = state_for(plan, speech, folder / "run", speech[:4], double=False)
    poison(state, speech[3].id)
    assert len(state.valid) == 2
    state.valid = Short(state.valid, 2 - rank)
    continue_run(state)
    torch.save(state.skipped, folder / f"skipped-{rank}.pt")
