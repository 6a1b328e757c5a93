"""Ridge regression with learned regularisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from bilevel.problems.analytic.base import Analytic, check_shapes, normals
from bilevel.validation import check_integer, check_number

__all__ = ["Ridge"]


@dataclass(frozen=True)
class Ridge(Analytic):
    """Ridge regression with learned regularisation: λ holds its logarithms, one for all coefficients or one for each.

        f(w, λ) = ‖Xw − y‖² / 2n + ½ Σᵢ exp(λᵢ) wᵢ²,        F(w, λ) = ‖Uw − z‖² / 2m

    Attributes:
        X: Training inputs, (n, features).
        y: Training targets, (n).
        U: Validation inputs, (m, features).
        z: Validation targets, (m).
        per_feature: Whether λ has an element for each coefficient, or one.

    Raises:
        ParameterError: Shapes that do not go together.
    """

    X: Tensor
    y: Tensor
    U: Tensor
    z: Tensor
    per_feature: bool = False

    def __post_init__(self) -> None:
        """Validates the shapes."""
        features = self.X.shape[-1]
        check_shapes(self, {"X": (len(self.y), features), "U": (len(self.z), features)})

    @classmethod
    def random(
        cls,
        features: int = 10,
        rows: int = 20,
        *,
        per_feature: bool = False,
        noise: float = 1.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> Ridge:
        """Draws inputs, coefficients of which every other one is zero, and noisy targets.

        Args:
            features: Coefficients.
            rows: Training examples, and validation examples.
            per_feature: See :class:`Ridge`.
            noise: Standard deviation of the targets' noise.
            seed: Of the draw, which is the same for every dtype.
            dtype: Of the tensors.

        Raises:
            ConfigError: A size below 1, or negative noise.
        """
        check_integer("Ridge", "features", features, minimum=1)
        check_integer("Ridge", "rows", rows, minimum=1)
        check_number("Ridge", "noise", noise, minimum=0.0)
        normal = normals(seed)
        truth = normal(features)
        truth[1::2] = 0.0
        X, U = normal(rows, features), normal(rows, features)
        y, z = (part @ truth + noise * normal(rows) for part in (X, U))
        return cls(X, y, U, z, per_feature).to(dtype)

    @property
    def start(self) -> Tensor:
        """``log 0.1``."""
        count = self.X.shape[1] if self.per_feature else 1
        return torch.full((count,), 0.1, dtype=self.X.dtype, device=self.X.device).log()

    def inner_loss(self, w: Tensor, lam: Tensor) -> Tensor:
        """See :meth:`Analytic.inner_loss`."""
        return (self.X @ w - self.y).square().mean() / 2 + (lam.exp() * w.square()).sum() / 2

    def outer_loss(self, w: Tensor, lam: Tensor) -> Tensor:
        """See :meth:`Analytic.outer_loss`."""
        return (self.U @ w - self.z).square().mean() / 2

    def step_size(self, lam: Tensor) -> float:
        """Returns ``1 / (L + 1)`` for the largest eigenvalue L of ``XᵀX/n``: stable up to a decay of ``L + 2``.

        The best size would be too large as soon as an outer step raises the decay.
        """
        return 1 / (float(torch.linalg.eigvalsh(self.X.T @ self.X)[-1]) / len(self.X) + 1)

    def solution(self, lam: Tensor) -> Tensor:
        """See :meth:`Analytic.solution`."""
        found: Tensor = torch.linalg.solve(self.hessian(lam), self.X.T @ self.y / len(self.y))
        return found

    def hessian(self, lam: Tensor) -> Tensor:
        """See :meth:`Analytic.hessian`."""
        return self.X.T @ self.X / len(self.X) + torch.diag(lam.exp().expand(self.X.shape[1]))

    def mixed(self, lam: Tensor) -> Tensor:
        """See :meth:`Analytic.mixed`."""
        slopes = lam.exp() * self.solution(lam)
        return torch.diag(slopes) if self.per_feature else slopes[:, None]

    def cotangent(self, lam: Tensor) -> Tensor:
        """See :meth:`Analytic.cotangent`."""
        found: Tensor = self.U.T @ (self.U @ self.solution(lam) - self.z) / len(self.z)
        return found

    def direct(self, lam: Tensor) -> Tensor:
        """Zero: F reads w alone."""
        return torch.zeros_like(lam)

    def optimum(self) -> Tensor:
        """Returns a minimiser by L-BFGS on the closed form, from :attr:`start`.

        There is no formula, and it may be a local one; where a coefficient is better left out, its λ goes to infinity
        and stops where that no longer matters.
        """
        lam = self.start.requires_grad_()
        optimizer = torch.optim.LBFGS(
            [lam], max_iter=500, tolerance_grad=1e-10, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )

        def closure() -> float:
            value = self.value(lam)
            (lam.grad,) = torch.autograd.grad(value, [lam])
            return float(value.detach())

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return lam.detach()

    def outer_optimizer(self, parameters: Any) -> Optimizer:
        """Adam with steps of 0.1."""
        return Adam(parameters, lr=0.1)
