"""Random bilevel problems with known solutions, and how properties are run over them."""

from __future__ import annotations

import math
import os
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

DOUBLE = torch.float64
EPSILON = torch.finfo(DOUBLE).eps

# The slow variants run ten times as many examples; continuous integration has time for three times as many.
LONG = 3 if os.environ.get("HYPOTHESIS_PROFILE") == "ci-slow" else 10

EXAMPLES: Counter[str] = Counter()
"""Generated examples by test, for the summary."""


def forall(fast: int, **strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test on ``fast`` generated examples, and on :data:`LONG` times as many in its slow variant.

    A strategy may be a function of the test's instance (``self``). The decorated test may also be a plain function.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        in_class = "self" in test.__code__.co_varnames[: test.__code__.co_argcount]

        def run(instance: Any, factor: int) -> None:
            label = f"{type(instance).__name__}.{test.__name__}" if in_class else test.__name__
            drawn = {key: s if isinstance(s, st.SearchStrategy) else s(instance) for key, s in strategies.items()}

            def one(**values: Any) -> None:
                EXAMPLES[label] += 1
                test(*([instance] if in_class else []), **values)

            checks = settings(
                max_examples=fast * factor,
                deadline=None,
                database=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            )
            seed(zlib.crc32(label.encode()))(checks(given(**drawn)(one)))()

        def method(self: Any, factor: int) -> None:
            run(self, factor)

        def function(factor: int) -> None:
            run(None, factor)

        runner = method if in_class else function
        runner.__name__, runner.__doc__ = test.__name__, test.__doc__
        slow = pytest.param(LONG, marks=pytest.mark.slow, id="long")
        return pytest.mark.parametrize("factor", [pytest.param(1, id="fast"), slow])(runner)

    return decorate


@dataclass(frozen=True)
class Sample:
    """A strongly convex inner problem at its solution, with everything that theory speaks of in closed form (float64).

    Attributes:
        kind: ``"quadratic"`` or ``"ridge"``.
        data: The tensors that the losses close over.
        outer: λ.
        inner: w*(λ).
    """

    kind: str
    data: dict[str, Tensor]
    outer: Tensor
    inner: Tensor

    def losses(self, dtype: torch.dtype = DOUBLE) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """Returns the inner and the outer loss on flat vectors of a dtype."""
        d = {key: value.to(dtype) for key, value in self.data.items()}

        def quadratic(w: Tensor, lam: Tensor) -> Tensor:
            return 0.5 * w @ (d["H"] @ w) - w @ (d["C"] @ lam + d["b"])

        def ridge(w: Tensor, lam: Tensor) -> Tensor:
            fit = (d["X"] @ w - d["y"]).square().sum() / (2 * len(d["y"]))
            return fit + ((d["S"] @ lam).exp() * w.square()).sum() / 2

        def outer(w: Tensor, lam: Tensor) -> Tensor:
            return (d["A"] @ w - d["t"]).square().sum() / 2 + (d["D"] @ lam).square().sum() / 2

        return (quadratic if self.kind == "quadratic" else ridge), outer

    @property
    def hessian(self) -> Tensor:
        """``∂²f/∂w²``."""
        if self.kind == "quadratic":
            return self.data["H"]
        X = self.data["X"]
        return X.T @ X / len(X) + torch.diag((self.data["S"] @ self.outer).exp())

    @property
    def mixed(self) -> Tensor:
        """``∂²f/∂w∂λ``, of shape (inner, outer)."""
        if self.kind == "quadratic":
            return -self.data["C"]
        return ((self.data["S"] @ self.outer).exp() * self.inner)[:, None] * self.data["S"]

    @property
    def cotangent(self) -> Tensor:
        """``∂F/∂w``."""
        return self.data["A"].T @ (self.data["A"] @ self.inner - self.data["t"])

    @property
    def direct(self) -> Tensor:
        """``∂F/∂λ`` at fixed w."""
        return self.data["D"].T @ (self.data["D"] @ self.outer)

    @property
    def eigenvalues(self) -> Tensor:
        """Of the Hessian, ascending."""
        return torch.linalg.eigvalsh(self.hessian)

    def solution(self, lam: Tensor) -> Tensor:
        """w*(λ), differentiable by autograd."""
        if self.kind == "quadratic":
            return torch.linalg.solve(self.data["H"], self.data["C"] @ lam + self.data["b"])
        X, y = self.data["X"], self.data["y"]
        return torch.linalg.solve(X.T @ X / len(X) + torch.diag((self.data["S"] @ lam).exp()), X.T @ y / len(X))

    def hypergradient(self, inverse: Tensor | None = None, damping: float = 0.0) -> Tensor:
        """``∂F/∂λ − (∂²f/∂w∂λ)ᵀ P ∂F/∂w`` with P the inverse of the damped Hessian, or what is given for it."""
        P = (
            torch.linalg.inv(self.hessian + damping * torch.eye(len(self.inner), dtype=DOUBLE))
            if inverse is None
            else inverse
        )
        return self.direct - self.mixed.T @ (P @ self.cotangent)

    def scale(self, damping: float = 0.0) -> float:
        """``‖∂²f/∂w∂λ‖ ‖∂F/∂w‖ / μ``: what an error of the inverse, relative to 1/μ, does to the hypergradient."""
        size = float(torch.linalg.matrix_norm(self.mixed, 2)) * float(self.cotangent.norm())
        return size / (float(self.eigenvalues[0]) + damping)

    def rounding(self, damping: float = 0.0) -> float:
        """A bound of what rounding does to a stable solve: ``c n u κ`` of :meth:`scale`, and of the direct part."""
        largest, smallest = float(self.eigenvalues[-1]) + damping, float(self.eigenvalues[0]) + damping
        solve = 100 * len(self.inner) * EPSILON * largest / smallest * self.scale(damping)
        return solve + 100 * EPSILON * (1 + float(self.direct.norm())) + 1e-300


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    Q, R = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=DOUBLE))
    return Q * R.diagonal().sign()


def spectrum_matrix(eigenvalues: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a symmetric matrix with these eigenvalues and random eigenvectors."""
    Q = _orthogonal(len(eigenvalues), generator)
    H = (Q * eigenvalues) @ Q.T
    return 0.5 * (H + H.T)


def make_quadratic(inner: int, outer: int, condition: float, largest: float, number: int) -> Sample:
    """A quadratic inner loss whose Hessian has extreme eigenvalues ``largest / condition`` and ``largest``."""
    generator = torch.Generator().manual_seed(number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    exponents = torch.rand(inner, generator=generator, dtype=DOUBLE)
    exponents[0] = 0.0
    exponents[-1] = 1.0
    H = spectrum_matrix(largest / condition * condition**exponents, generator)
    data = {
        "H": H,
        "C": normal(inner, outer),
        "b": normal(inner),
        "A": normal(inner, inner),
        "t": normal(inner),
        "D": normal(outer, outer),
    }
    sample = Sample("quadratic", data, normal(outer), torch.zeros(inner, dtype=DOUBLE))
    return Sample("quadratic", data, sample.outer, sample.solution(sample.outer))


def make_ridge(inner: int, rows: int, decay: float, shared: bool, number: int) -> Sample:
    """Ridge regression; λ holds the logarithms of the regularisation, one for all coefficients or one each."""
    generator = torch.Generator().manual_seed(number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    outer = 1 if shared else inner
    data = {
        "X": normal(rows, inner),
        "y": normal(rows),
        "S": torch.ones(inner, 1, dtype=DOUBLE) if shared else torch.eye(inner, dtype=DOUBLE),
        "A": normal(rows, inner),
        "t": normal(rows),
        "D": normal(outer, outer),
    }
    lam = math.log(decay) + 0.5 * normal(outer)
    sample = Sample("ridge", data, lam, torch.zeros(inner, dtype=DOUBLE))
    return Sample("ridge", data, lam, sample.solution(lam))


def logarithmic(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers whose logarithm is spread evenly."""
    return st.floats(math.log(low), math.log(high), allow_subnormal=False).map(
        lambda x: min(high, max(low, math.exp(x)))
    )


def quadratics(max_dimension: int = 8, max_condition: float = 1e6, scale: bool = True) -> st.SearchStrategy[Sample]:
    """Quadratic samples of every dimension and conditioning up to a limit; largest eigenvalue 1 unless ``scale``."""
    return st.builds(
        make_quadratic,
        inner=st.integers(1, max_dimension),
        outer=st.integers(1, 4),
        condition=logarithmic(1.0, max_condition),
        largest=logarithmic(1e-2, 1e2) if scale else st.just(1.0),
        number=st.integers(0, 2**31 - 1),
    )


def ridges(max_dimension: int = 8) -> st.SearchStrategy[Sample]:
    """Ridge regressions, also with fewer rows than coefficients, where only regularisation makes them unique."""
    return st.builds(
        make_ridge,
        inner=st.integers(1, max_dimension),
        rows=st.integers(1, 12),
        decay=logarithmic(1e-3, 1e2),
        shared=st.booleans(),
        number=st.integers(0, 2**31 - 1),
    )


def samples(max_dimension: int = 8, max_condition: float = 1e6) -> st.SearchStrategy[Sample]:
    """Either kind."""
    return st.one_of(quadratics(max_dimension, max_condition), ridges(max_dimension))
