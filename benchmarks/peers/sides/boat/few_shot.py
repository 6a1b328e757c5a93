"""(d) by BOAT: naive gradient descent (``NGD``) with differentiation of the start (``IAD``), which runs on higher."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from benchmarks.peers.side import Method, NotOffered
from benchmarks.peers.sides.boat.problem import ProblemSide
from benchmarks.peers.workloads.few_shot import FewShot, Tasks


def inner_loss(feed: dict[str, Any], upper: nn.Module, lower: nn.Module, **more: Any) -> Tensor:
    problem: FewShot = feed["problem"]
    return problem.support_loss(lower, feed["number"])


def outer_loss(feed: dict[str, Any], upper: nn.Module, lower: nn.Module, **more: Any) -> Tensor:
    problem: FewShot = feed["problem"]
    return problem.query_loss(lower, feed["number"]) / problem.count


class Library(ProblemSide):
    def __init__(self, problem: FewShot) -> None:
        network = problem.copy()
        self.start(
            __name__,
            [{"problem": problem, "number": number} for number in range(problem.count)],
            network,
            network,
            rates=(problem.rate, problem.outer_rate),
            steps=problem.steps,
            device=problem.batch[0].device,
            na_op=["IAD"],
            accumulate_grad=True,
            copy_last_param=False,
        )


def build(tasks: Tasks, method: Method) -> Library:
    if method.options["implicit"]:
        raise NotOffered("its conjugate gradients ask for a problem above that is not the start")
    return Library(tasks.case(method))
