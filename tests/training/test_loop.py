"""The plain loop: one mean over the whole effective batch, steps left out, and resume, on a model of a few weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from w2vc.training.trainer import Loop

SIZES = (5, 2, 3, 7, 2, 4)


class Numbers:
    """Batches of different size, in a circle, as `Batches` gives them."""

    def __init__(self) -> None:
        self.place = 0

    def __next__(self) -> Any:
        g = torch.Generator().manual_seed(self.place)
        n = SIZES[self.place % len(SIZES)]
        self.place += 1
        return {"x": torch.randn(n, 3, generator=g), "bad": False}

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: Any) -> None:
        self.place = state["place"]


def summed(model: nn.Module, batch: Any) -> Tensor:
    loss = model(batch["x"]).square().sum()
    return loss * math.nan if batch["bad"] else loss


def count(batch: Any) -> int:
    return len(batch["x"])


def loop(accumulate: int = 1, **options: Any) -> Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Loop(model, optimizer, Numbers(), summed, count, accumulate, **options)  # type: ignore[arg-type]


def test_micro_batches_have_the_gradient_of_the_whole() -> None:
    gradients = []
    parts = [next(Numbers()) for _ in range(1)] + [{"x": torch.randn(n, 3), "bad": False} for n in (1, 9)]
    for batches in (parts, [{"x": torch.cat([b["x"] for b in parts]), "bad": False}]):
        one = loop()
        one.model.eval()
        mean, shares = one.backward(batches)  # type: ignore[arg-type]
        torch.testing.assert_close(mean, shares.sum())
        gradients.append(torch.cat([p.grad.flatten() for p in one.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    one = loop()
    one.update()
    before = {name: t.clone() for name, t in one.model.state_dict().items()}
    one.loss = lambda model, batch: summed(model, {**batch, "bad": True})
    done = one.update()
    assert not done.finite
    assert (one.step, one.skipped) == (2, 1)
    assert all(torch.equal(t, before[name]) for name, t in one.model.state_dict().items())
    one.loss = summed
    assert one.update().finite


def test_it_goes_on_where_it_stopped() -> None:
    options: dict[str, Any] = {"clip": 0.5, "rate": lambda step: 0.01 / (1 + step)}
    whole = loop(2, **options)
    losses = [whole.update().loss for _ in range(6)]
    first = loop(2, **options)
    assert [first.update().loss for _ in range(3)] == losses[:3]
    state = first.state_dict()
    torch.manual_seed(99)
    second = loop(2, **options)
    second.load_state_dict(state)
    assert [second.update().loss for _ in range(3)] == losses[3:]
    assert all(
        torch.equal(t, whole.model.state_dict()[name]) for name, t in second.model.state_dict().items()
    )


def test_the_gradient_is_clipped_and_the_rate_follows_the_step() -> None:
    one = loop(clip=1e-3, rate=lambda step: [0.5, 0.25][step])
    rates, lengths = [], []
    apply = one.apply

    def watch() -> None:
        lengths.append(
            float(torch.stack([p.grad.norm() for p in one.model.parameters() if p.grad is not None]).norm())
        )
        rates.append(one.optimizer.param_groups[0]["lr"])
        apply()

    one.apply = watch  # type: ignore[method-assign]
    assert all(one.update().length > 1e-3 for _ in range(2))
    assert rates == [0.5, 0.25]
    assert all(length < 1.01e-3 for length in lengths)
