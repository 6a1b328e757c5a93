"""(c) by BOAT: naive gradient descent (``NGD``) with reverse differentiation (``RAD``), which runs on higher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import boat_torch as boat
import torch
from torch import Tensor, nn

from benchmarks.peers.side import KeepingSGD, Method, Side
from benchmarks.peers.workloads.unrolled import Tasks, Unrolling

SETTINGS: dict[str, Any] = {
    "fo_op": None,
    "gm_op": ["NGD"],
    "na_op": ["RAD"],
    "accumulate_grad": False,
    "copy_last_param": True,
    "return_grad": False,
    "GDA": {"alpha_init": 0.0, "alpha_decay": 0.0},
    "RGT": {"truncate_iter": 0},
    "loss_log_path": os.devnull,
}


def inner_loss(feed: dict[str, Unrolling], upper: nn.Module, lower: nn.Module, **more: Any) -> Tensor:
    return feed["case"].inner_loss(lower, list(lower.parameters()), upper[0])  # type: ignore[index]


def outer_loss(feed: dict[str, Unrolling], upper: nn.Module, lower: nn.Module, **more: Any) -> Tensor:
    return feed["case"].outer_loss(lower)


class Library(Side):
    note = "keeps the graphs of all steps; evaluates both losses once more a step, for its log"

    def __init__(self, case: Unrolling, steps: int) -> None:
        self.feed = {"case": case}
        model, decay = case.copy(), nn.ParameterList([case.decay.clone()])
        self.outer = KeepingSGD(decay.parameters(), lr=case.outer_rate)
        settings = {
            **SETTINGS,
            "lower_level_model": model,
            "upper_level_model": decay,
            "lower_level_var": list(model.parameters()),
            "upper_level_var": list(decay.parameters()),
            "lower_level_opt": torch.optim.SGD(model.parameters(), lr=case.rate),
            "upper_level_opt": self.outer,
            "lower_iters": steps,
            "device": str(case.decay.device),
        }
        names = {"lower_level_loss": "inner_loss", "upper_level_loss": "outer_loss"}
        losses = {level: {"function": f"{__name__}.{name}", "params": {}} for level, name in names.items()}
        self.problem = boat.Problem(settings, losses)
        self.problem.build_ll_solver()
        self.problem.build_ul_solver()
        self.count = 0

    def step(self) -> None:
        self.problem.run_iter(self.feed, self.feed, self.count)
        self.problem._log_results.clear()
        self.count += 1

    def hypergradient(self) -> Sequence[Tensor]:
        return self.outer.kept


def build(tasks: Tasks, method: Method) -> Library:
    return Library(tasks.case(method), method.options["steps"])
