"""(c) by BOAT: naive gradient descent (``NGD``) with reverse differentiation (``RAD``), which runs on higher."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from benchmarks.peers.side import Method
from benchmarks.peers.sides.boat.problem import ProblemSide
from benchmarks.peers.workloads.unrolled import Tasks, Unrolling


def inner_loss(feed: dict[str, Unrolling], upper: nn.Module, lower: nn.Module, **more: Any) -> Tensor:
    return feed["case"].inner_loss(lower, list(lower.parameters()), upper[0])  # type: ignore[index]


def outer_loss(feed: dict[str, Unrolling], upper: nn.Module, lower: nn.Module, **more: Any) -> Tensor:
    return feed["case"].outer_loss(lower)


class Library(ProblemSide):
    note = f"keeps the graphs of all steps; {ProblemSide.note}"

    def __init__(self, case: Unrolling, steps: int) -> None:
        model, decay = case.copy(), nn.ParameterList([case.decay.clone()])
        rates = case.rate, case.outer_rate
        feed = {"case": case}
        self.start(__name__, feed, model, decay, rates=rates, steps=steps, device=case.decay.device, na_op=["RAD"])


def build(tasks: Tasks, method: Method) -> Library:
    return Library(tasks.case(method), method.options["steps"])
