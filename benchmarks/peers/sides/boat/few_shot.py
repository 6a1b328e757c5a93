"""(d) by BOAT: naive gradient descent (``NGD``) with differentiation of the start (``IAD``), which runs on higher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import boat_torch as boat
import torch
from torch import Tensor, nn

from benchmarks.peers.side import KeepingSGD, Method, NotOffered, Side
from benchmarks.peers.sides.boat.unrolled import SETTINGS
from benchmarks.peers.workloads.few_shot import FewShot, Tasks


def inner_loss(feed: dict[str, Any], upper: nn.Module, lower: nn.Module, **more: Any) -> Tensor:
    problem: FewShot = feed["problem"]
    return problem.support_loss(lower, feed["number"])


def outer_loss(feed: dict[str, Any], upper: nn.Module, lower: nn.Module, **more: Any) -> Tensor:
    problem: FewShot = feed["problem"]
    return problem.query_loss(lower, feed["number"]) / problem.count


class Library(Side):
    note = "evaluates both losses of one task once more a step, for its log"

    def __init__(self, problem: FewShot) -> None:
        network = problem.copy()
        self.feeds = [{"problem": problem, "number": number} for number in range(problem.count)]
        self.outer = KeepingSGD(network.parameters(), lr=problem.outer_rate)
        settings = {
            **SETTINGS,
            "na_op": ["IAD"],
            "accumulate_grad": True,
            "copy_last_param": False,
            "lower_level_model": network,
            "upper_level_model": network,
            "lower_level_var": list(network.parameters()),
            "upper_level_var": list(network.parameters()),
            "lower_level_opt": torch.optim.SGD(network.parameters(), lr=problem.rate),
            "upper_level_opt": self.outer,
            "lower_iters": problem.steps,
            "device": str(problem.batch[0].device),
        }
        names = {"lower_level_loss": "inner_loss", "upper_level_loss": "outer_loss"}
        losses = {level: {"function": f"{__name__}.{name}", "params": {}} for level, name in names.items()}
        self.problem = boat.Problem(settings, losses)
        self.problem.build_ll_solver()
        self.problem.build_ul_solver()
        self.count = 0

    def step(self) -> None:
        self.problem.run_iter(self.feeds, self.feeds, self.count)
        self.problem._log_results.clear()
        self.count += 1

    def hypergradient(self) -> Sequence[Tensor]:
        return self.outer.kept


def build(tasks: Tasks, method: Method) -> Library:
    if method.options["implicit"]:
        raise NotOffered("its conjugate gradients ask for a problem above that is not the start")
    return Library(tasks.case(method))
