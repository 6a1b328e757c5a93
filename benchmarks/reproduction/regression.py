"""Regularisation selection: logistic regression with one penalty a feature."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse import csr_array
from scipy.special import expit
from torch import Tensor

from benchmarks.reproduction.loading import load_classification
from benchmarks.reproduction.task import EVERYTHING, Block, Task, minimise, of_dtype

__all__ = ["Regularisation"]

BOUND = 15.0  # of |λ| in the search for the minimum: e⁻¹⁵ is no penalty, e¹⁵ no feature


class Regularisation(Task):
    """``f = mean log(1 + exp(−y xᵀw)) + ½ Σⱼ exp(λⱼ) wⱼ²`` on the training part; F on the test part, unpenalised.

    Starts are random as benchopt draws them: w normal, λ the logarithm of uniform numbers.

    Args:
        name: Of the data set.
        train: Features and labels of -1 and 1.
        test: Likewise.
        seed: Of the start, and of the order of the rows.
    """

    def __init__(self, name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.name = name
        # the loss depends on y·x alone
        self._inner, self._outer = (
            {x.dtype: (y[:, None] * x)[torch.randperm(len(x), generator=generator)].contiguous()}
            for x, y in (train, test)
        )
        # for evaluation only: a9a has 14 features of 123 in a row
        self._sparse = csr_array(next(iter(self._inner.values())).double().numpy())
        self.num_inner, self.num_outer = len(train[0]), len(test[0])
        size = train[0].shape[1]
        self.inner_start = torch.randn(size, generator=generator)
        self.outer_start = torch.rand(size, generator=generator).log()
        x = train[0].double()
        largest = float(torch.linalg.eigvalsh(x.T @ x / len(x))[-1])
        self.smoothness = largest / 4 + float(self.outer_start.exp().max())

    @classmethod
    def load(cls, folder: Path | None, name: str, seed: int) -> Regularisation:
        """Reads the data."""
        return cls(name, *load_classification(folder, name), seed)

    def inner_loss(self, w: Tensor, lam: Tensor, block: Block = EVERYTHING) -> Tensor:
        fit = -F.logsigmoid(of_dtype(self._inner, w.dtype)[block] @ w).mean()
        return fit + 0.5 * (lam.exp() * w).dot(w)

    def outer_loss(self, w: Tensor, lam: Tensor, block: Block = EVERYTHING) -> Tensor:
        return -F.logsigmoid(of_dtype(self._outer, w.dtype)[block] @ w).mean()

    def solve(self, lam: Tensor, near: Tensor) -> Tensor:
        """Newton's method, from zero where it fails from ``near``: far out all examples are saturated."""
        penalty = lam.double().clamp(-40, 40).exp().numpy()  # beyond, only the range of exp matters
        start = near.detach().double().numpy()
        decrement = math.inf
        for begin in (start, np.zeros_like(start)):
            w, decrement = self._newton(begin, penalty)
            if decrement <= 1e-8:  # f is at most half of that too large; rounding stops where features separate classes
                return torch.from_numpy(w)
        raise RuntimeError(f"{self.name}: the inner problem is not solved, Newton decrement {decrement:.1e}")

    def _newton(self, w: np.ndarray, penalty: np.ndarray) -> tuple[np.ndarray, float]:
        """Steps with the Hessian kept while they contract, until the decrement ``gᵀH⁻¹g`` is 1e-20; returns it."""
        factor, decrement = None, math.inf
        if not np.abs(w).max() < 50:  # a run that broke
            return w, math.inf
        for _ in range(200):
            grad = self._slope(w) + penalty * w
            if factor is None:
                factor = self._factor(w, penalty)
            step = cho_solve(factor, grad)
            before, decrement = decrement, float(grad @ step)
            if decrement <= 1e-20:
                return w - step, decrement
            if decrement > 0.1 * before:
                factor = None
            w = self._descend(w, penalty, step)
        return w, decrement

    def lowest(self, starts: list[Tensor]) -> float:
        """The lowest value of L-BFGS descents on h from each start, with ``|λ|`` held below a bound.

        h is not convex: where ``exp(λⱼ)`` is large, ``wⱼ`` and the derivative in ``λⱼ`` vanish. A start at -6, almost
        without penalties, is added.
        """
        near = self.inner_start

        def function(raw: Tensor) -> tuple[float, Tensor]:
            nonlocal near
            lam = BOUND * torch.tanh(raw / BOUND)  # a smooth map onto the box
            near = self.solve(lam, near)
            leaf = near.clone().requires_grad_(True)
            value = self.outer_loss(leaf, lam)
            (v,) = torch.autograd.grad(value, leaf)
            q = torch.from_numpy(cho_solve(self._factor(near.numpy(), lam.exp().numpy()), v.numpy()))
            return value.item(), -lam.exp() * near * q * (1 - (lam / BOUND) ** 2)

        points = [*(lam.double() for lam in starts), torch.full_like(self.outer_start, -6.0).double()]
        raws = [BOUND * torch.atanh((lam / BOUND).clamp(-0.99, 0.99)) for lam in points]
        return min(minimise(function, raw, iterations=150, gtol=1e-8).value for raw in raws)

    def _slope(self, w: np.ndarray) -> np.ndarray:
        """Returns the gradient of the fit."""
        return -(self._sparse.T @ expit(-(self._sparse @ w))) / self.num_inner

    def _hessian(self, w: np.ndarray, penalty: np.ndarray, dtype: type = np.float32) -> np.ndarray:
        p = expit(self._sparse @ w)
        x = next(iter(self._inner.values())).numpy().astype(dtype, copy=False)
        return (x.T @ ((p * (1 - p)).astype(x.dtype)[:, None] * x)).astype(np.float64) / len(x) + np.diag(penalty)

    def _factor(self, w: np.ndarray, penalty: np.ndarray) -> tuple[np.ndarray, bool]:
        """Returns a Cholesky factor of the Hessian: of float64 where that of float32 rounds to an indefinite one.

        Groups of a9a's features add up to one: without penalties the Hessian is singular, and a multiple of the
        identity at rounding level then stands for what is lost (features are at most 1). Along such directions f,
        and h, are flat.
        """
        for dtype, shift in ((np.float32, 0.0), (np.float64, 1e-12), (np.float64, 1e-9)):
            matrix = self._hessian(w, penalty, dtype)
            try:
                return cho_factor(matrix + shift * np.eye(len(w)))
            except np.linalg.LinAlgError:
                continue
        raise RuntimeError(f"{self.name}: the inner Hessian is not positive definite")

    def _descend(self, w: np.ndarray, penalty: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Halves a step until it lowers f."""

        def value(point: np.ndarray) -> float:
            return float(np.logaddexp(0, -(self._sparse @ point)).mean() + 0.5 * (penalty * point) @ point)

        start = value(w)
        for halvings in range(30):
            candidate = w - 0.5**halvings * step
            if value(candidate) <= start + 1e-13 * abs(start):
                return candidate
        return w
