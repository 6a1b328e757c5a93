"""What only this library has, for the axes of :mod:`benchmarks.growth.axes`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.peers.reference import flat, grad
from benchmarks.peers.side import Method, Reference, Side, Task
from benchmarks.peers.sides.bilevel.few_shot import Library as WithTasks
from benchmarks.peers.sides.bilevel.implicit import Library as Functional
from benchmarks.peers.sides.bilevel.unrolled import Library as WithNetwork
from benchmarks.peers.workloads import unrolled
from benchmarks.peers.workloads.few_shot import FewShot
from benchmarks.peers.workloads.unrolled import Unrolling
from bilevel import Exact, Identity, Unrolled


def exact(task: Task) -> Side:
    """The dense Hessian."""
    return Functional(task, Exact())


def forward(case: Unrolling, steps: int) -> Side:
    """Forward mode through the steps."""
    return WithNetwork(case, steps, Unrolled(mode="forward"))


def implicit(case: Unrolling, steps: int) -> Side:
    """As many steps, and H⁻¹ ≈ I at their end."""
    return WithNetwork(case, steps, Identity())


def one_by_one(problem: FewShot) -> Side:
    """Few-shot tasks evaluated one after another."""
    return WithTasks(problem, vectorized=False)


def implicit_reference(arrays: Mapping[str, Any], steps: int) -> Reference:
    """Returns what :func:`implicit` gives, in float64."""
    method = Method("unrolled", options={"network": "conv", "steps": steps, "least_memory": False})
    case = unrolled.task(dict(arrays), "small", dtype="float64").case(method)
    w, decay = unrolled.unrolled(case, steps)
    w = [p.detach().requires_grad_() for p in w]
    v = grad(case.outer_loss(case.with_parameters(w)), w)
    gradient = grad(case.inner_loss(case.with_parameters(w), w, decay), w, create_graph=True)
    found: np.ndarray = -flat(torch.autograd.grad(gradient, [decay], v)).numpy()
    return Reference(found)
