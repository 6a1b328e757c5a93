"""Implicit methods for any task in the functional form, by BOAT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from benchmarks.peers.side import Method, NotOffered, Task
from benchmarks.peers.sides.boat.problem import ProblemSide
from benchmarks.peers.sides.hand.implicit import put

DIFFERENCE = 1e-2  # BOAT's r, over ‖v‖: that of its examples


def inner_loss(feed: Any, upper_model: nn.Module, lower_model: nn.Module, params: Any = None) -> Tensor:
    """The inner loss as BOAT calls it, by its dotted path."""
    return feed["task"].inner_loss(list(lower_model.parameters() if params is None else params), list(upper_model))


def outer_loss(feed: Any, upper_model: nn.Module, lower_model: nn.Module, params: Any = None) -> Tensor:
    """The outer loss."""
    return feed["task"].outer_loss(list(lower_model.parameters() if params is None else params), list(upper_model))


class Library(ProblemSide):
    def __init__(self, task: Task, method: Method) -> None:
        names = {"conjugate_gradient": "CG", "neumann": "NS", "finite_difference": "FD"}
        if method.kind not in names:
            raise NotOffered(f"no operation for {method.kind}")
        if method.kind == "neumann" and method.step_size != task.rate:
            raise NotOffered("its Neumann series has the inner learning rate for α")
        self.lower, self.upper = (
            nn.ParameterList([part.clone() for part in parts]) for parts in (task.inner, task.outer)
        )
        self.start(
            __name__,
            {"task": task},
            self.lower,
            self.upper,
            rates=(task.rate, task.outer_rate),
            steps=task.steps,
            device=task.inner[0].device,
            na_op=[names[method.kind]],
            fo_ol_batch_input=False,
            CG={"k": method.products, "tolerance": 0.0},
            FD={"r": DIFFERENCE},
            GDA={"alpha_init": 0.0, "alpha_decay": 0.5},
        )

    def place(self, inner: Sequence[np.ndarray], outer: Sequence[np.ndarray]) -> None:
        put([*self.lower, *self.upper], [*inner, *outer])


build = Library
