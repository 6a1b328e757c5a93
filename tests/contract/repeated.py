"""Methods that go on from their last call, as the contract sees them: called again and again at one point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel import Estimator
from bilevel.functional import FunctionObjective, PassCount, leaves
from bilevel.hypergrad import InnerProblem, Pullback, Response, State
from bilevel.hypergrad.stochastic import Stochastic
from bilevel.randomness import Replay
from tests.bilevel.strategies import DOUBLE, Sample, spectrum_matrix


@dataclass(frozen=True)
class Repeated(Estimator):
    """The last of several calls, each with the state of the one before."""

    method: Stochastic
    calls: int

    name: ClassVar[str] = "repeated"
    summary: ClassVar[str] = "a method's last call of several"
    cost: ClassVar[str] = "calls times the method's"
    needs: ClassVar[str] = "what the method needs"

    def respond(self, problem: InnerProblem) -> Response:
        return _Response(self, self.method.respond(problem))


@dataclass(frozen=True)
class _Response(Response):
    estimator: Repeated
    response: Response

    @property
    def point(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.response.point

    def pullback(self, cotangent: tuple[Tensor, ...], state: State) -> Pullback:
        for _ in range(self.estimator.calls):
            pulled = self.response.pullback(cotangent, state)
            state = pulled.state
        return pulled


@dataclass(frozen=True)
class FiniteSum:
    """Quadratic inner losses ``wᵀHⱼw/2 − wᵀCⱼλ``, one a batch, with everything known."""

    hessians: Sequence[Tensor]
    mixed: Sequence[Tensor]
    passes: PassCount

    def objective(self, place: int) -> FunctionObjective:
        """The loss on one batch."""
        H, C = self.hessians[place], self.mixed[place]

        def loss(w: tuple[Tensor, ...], lam: tuple[Tensor, ...]) -> Tensor:
            return w[0] @ (H @ w[0]) / 2 - w[0] @ (C @ lam[0])

        return FunctionObjective(loss, "the inner problem", Replay(("cpu",)), self.passes)

    def problem(self, places: Sequence[int], w: Tensor | None = None, lam: Tensor | None = None) -> InnerProblem:
        """An inner problem whose separate batches are these."""
        samples = [self.objective(place) for place in places]
        size, outer = self.mixed[0].shape
        w = torch.ones(size, dtype=DOUBLE) if w is None else w
        lam = torch.ones(outer, dtype=DOUBLE) if lam is None else lam
        return InnerProblem(samples[0], leaves((w,)), leaves((lam,)), samples=samples)

    def mean(self) -> tuple[Tensor, Tensor]:
        """The Hessian and the mixed derivative over all batches."""
        return torch.stack(list(self.hessians)).mean(0), torch.stack(list(self.mixed)).mean(0)


def finite_sum(batches: int, size: int, outer: int, number: int, largest: float = 1.0) -> FiniteSum:
    """Random batches whose Hessians have eigenvalues between a fifth of the largest and the largest."""
    generator = torch.Generator().manual_seed(number)

    def spectrum() -> Tensor:
        return largest * (0.2 + 0.8 * torch.rand(size, generator=generator, dtype=DOUBLE))

    hessians = [spectrum_matrix(spectrum(), generator) for _ in range(batches)]
    mixed = [torch.randn(size, outer, generator=generator, dtype=DOUBLE) for _ in range(batches)]
    return FiniteSum(hessians, mixed, PassCount())


def vector(size: int, number: int) -> Tensor:
    """Standard normal entries."""
    return torch.randn(size, generator=torch.Generator().manual_seed(number), dtype=DOUBLE)


def truncated_series(H: Tensor, step: float, summands: int) -> Tensor:
    """``ρ Σₖ₌₀ⁿ⁻¹ (I − ρH)ᵏ`` for n summands."""
    identity = torch.eye(len(H), dtype=DOUBLE)
    total, power = torch.zeros_like(H), identity
    for _ in range(summands):
        total, power = total + power, power @ (identity - step * H)
    return step * total


def average(runs: Sequence[Pullback]) -> Tensor:
    """The mean of the first outer part over runs."""
    return torch.stack([run.value[0] for run in runs]).mean(0)


def contraction(sample: Sample, step: float, damping: float) -> float:
    """``max |1 − ρ(λᵢ + δ)|``."""
    return float((1 - step * (sample.eigenvalues + damping)).abs().max())
