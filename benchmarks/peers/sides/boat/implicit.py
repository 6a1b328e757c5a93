"""Implicit methods for any task in the functional form, by BOAT."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

matplotlib.use("Agg")  # BOAT imports pyplot

import boat_torch

from benchmarks.peers.side import KeepingSGD, Method, NotOffered, Side, Task
from benchmarks.peers.sides.hand.implicit import put

DIFFERENCE = 1e-2  # BOAT's r, over ‖v‖: that of its examples


def lower(feed: Any, upper_model: nn.Module, lower_model: nn.Module, params: Any = None) -> Tensor:
    """The inner loss as BOAT calls it, by its dotted path."""
    return feed["task"].inner_loss(list(lower_model.parameters() if params is None else params), list(upper_model))


def upper(feed: Any, upper_model: nn.Module, lower_model: nn.Module, params: Any = None) -> Tensor:
    """The outer loss."""
    return feed["task"].outer_loss(list(lower_model.parameters() if params is None else params), list(upper_model))


class Library(Side):
    def __init__(self, task: Task, method: Method) -> None:
        names = {"conjugate_gradient": "CG", "neumann": "NS", "finite_difference": "FD"}
        if method.kind not in names:
            raise NotOffered(f"no operation for {method.kind}")
        if method.kind == "neumann" and method.step_size != task.rate:
            raise NotOffered("its Neumann series has the inner learning rate for α")
        self.feed = {"task": task}
        self.lower, self.upper = (
            nn.ParameterList([part.clone() for part in parts]) for parts in (task.inner, task.outer)
        )
        self.outer_optimizer = KeepingSGD(self.upper, lr=task.outer_rate)
        self.folder = tempfile.TemporaryDirectory()
        config = {
            "fo_op": None,
            "gm_op": ["NGD"],
            "na_op": [names[method.kind]],
            "lower_level_model": self.lower,
            "upper_level_model": self.upper,
            "lower_level_var": list(self.lower),
            "upper_level_var": list(self.upper),
            "lower_level_opt": torch.optim.SGD(self.lower, lr=task.rate),
            "upper_level_opt": self.outer_optimizer,
            "lower_iters": task.steps,
            "device": str(task.inner[0].device),
            "accumulate_grad": False,
            "return_grad": False,
            "copy_last_param": True,
            "fo_ol_batch_input": False,
            "loss_log_path": os.path.join(self.folder.name, "losses.json"),
            "CG": {"k": method.products, "tolerance": 0.0},
            "FD": {"r": DIFFERENCE},
            "GDA": {"alpha_init": 0.0, "alpha_decay": 0.5},
            "RGT": {"truncate_iter": 0},
        }
        here = __name__
        losses = {
            "lower_level_loss": {"function": f"{here}.lower"},
            "upper_level_loss": {"function": f"{here}.upper"},
        }
        self.problem = boat_torch.Problem(config, losses).build_ll_solver().build_ul_solver()
        self.count = 0
        self.note = "it evaluates both losses once more and rewrites its log file in every step"

    def step(self) -> None:
        self.problem.run_iter(self.feed, self.feed, self.count)
        self.count += 1

    def hypergradient(self) -> Sequence[Tensor]:
        return self.outer_optimizer.kept

    def place(self, inner: Sequence[np.ndarray], outer: Sequence[np.ndarray]) -> None:
        put([*self.lower, *self.upper], [*inner, *outer])


build = Library
