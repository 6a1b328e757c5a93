"""An estimator that is not ours inherits the contract: what someone who adds one has to write."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from hypothesis import strategies as st

from bilevel import Estimator, Hypergradient, Status
from bilevel.hypergrad import Implicit, State, System
from bilevel.linear import Solution
from bilevel.vector import axpy, dot, zeros_like
from tests.contract.contract import EstimatorContract, Sample, operator_norm


@dataclass(frozen=True)
class SteepestDescent(Implicit):
    """Steepest descent with exact line search: the H-norm of the error falls by (κ − 1)/(κ + 1) in each iteration."""

    iterations: int = 10

    name: ClassVar[str] = "steepest_descent"
    summary: ClassVar[str] = "steepest descent on the inner Hessian"
    cost: ClassVar[str] = "1 forward, 1 backward with graph, iterations + 1 products"
    needs: ClassVar[str] = "double backward; a positive definite Hessian"

    def solve(self, system: System) -> tuple[Solution, State]:
        q, residual = zeros_like(system.v), system.v
        for _ in range(self.iterations):
            image = system.operator(residual)
            curvature = dot(residual, image)
            step = torch.where(curvature > 0, dot(residual, residual) / curvature, 0.0)
            q, residual = axpy(step, residual, q), axpy(-step, image, residual)
        return Solution(q, Status.STOPPED_AT_CAP, self.iterations), {}


class TestSteepestDescent(EstimatorContract):
    default = SteepestDescent(iterations=60)

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        return st.builds(SteepestDescent, iterations=st.integers(0, 20))

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        smallest, largest = float(sample.eigenvalues[0]), float(sample.eigenvalues[-1])
        rate = ((largest - smallest) / (largest + smallest)) ** result.info.iterations
        energy = math.sqrt(float(sample.cotangent @ torch.linalg.solve(sample.hessian, sample.cotangent)))
        return operator_norm(sample.mixed) * rate * energy / math.sqrt(smallest)

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        return 1, 2 + result.info.iterations

    def test_is_its_own_configuration(self) -> None:
        shared = {
            "curvature": "hessian",
            "products": "autodiff",
            "difference_step": "auto",
            "certificate": None,
            "compile": False,
        }
        assert self.default.describe() == {"method": "steepest_descent", "iterations": 60, **shared}
        assert self.default == SteepestDescent(60)
