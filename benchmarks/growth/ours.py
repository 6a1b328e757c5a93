"""What only this library has, for the axes of :mod:`benchmarks.growth.axes`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers.reference import flat, grad
from benchmarks.peers.side import KeepingSGD, Method, Reference, Side, Task
from benchmarks.peers.sides.bilevel.implicit import Library as Functional
from benchmarks.peers.sides.bilevel.unrolled import Decay, Network
from benchmarks.peers.workloads import unrolled
from benchmarks.peers.workloads.few_shot import FewShot
from benchmarks.peers.workloads.unrolled import Unrolling
from bilevel import Engine, EngineConfig, Estimator, Exact, Identity, Unrolled
from bilevel.problems import Adaptation, MetaLearner, TaskBatch


class WithNetwork(Side):
    """The problem with a network, by any method."""

    def __init__(self, case: Unrolling, steps: int, method: Estimator) -> None:
        outer = Decay(nn.ParameterList([case.decay.clone()]), optimizer=lambda p: KeepingSGD(p, lr=case.outer_rate))
        inner = Network(case.copy(), optimizer=lambda p: torch.optim.SGD(p, lr=case.rate), steps=steps)
        outer.case = inner.case = case  # type: ignore[attr-defined]
        self.engine = Engine([outer, inner], EngineConfig(progress=False), hypergradient=method)

    def step(self) -> None:
        self.engine.step()

    def hypergradient(self) -> Sequence[Tensor]:
        return kept(self.engine.problems["decay"].optimizer)


class OneByOne(Side):
    """Few-shot tasks evaluated one after another."""

    def __init__(self, problem: FewShot) -> None:
        network = problem.copy()
        self.meta = MetaLearner(network, optimizer=lambda p: KeepingSGD(p, lr=problem.outer_rate))
        inner = Adaptation(
            network,
            [TaskBatch(*problem.batch)],
            optimizer=lambda p: torch.optim.SGD(p, lr=problem.rate),
            steps=problem.steps,
            criterion=problem.criterion,
            vectorized=False,
        )
        method = Unrolled(memory="graph")
        self.engine = Engine([self.meta, inner], EngineConfig(progress=False), hypergradient=method)

    def step(self) -> None:
        self.engine.step()

    def hypergradient(self) -> Sequence[Tensor]:
        return kept(self.meta.optimizer)


def kept(optimizer: Any) -> Sequence[Tensor]:
    assert isinstance(optimizer, KeepingSGD)
    return optimizer.kept


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
    return OneByOne(problem)


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
