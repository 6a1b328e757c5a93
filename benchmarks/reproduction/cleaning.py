"""Data cleaning: which training labels can be trusted, learnt from clean validation data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.reproduction.loading import load_digits
from benchmarks.reproduction.task import EVERYTHING, Block, Task, minimise, of_dtype
from bilevel import ConjugateGradient, hypergradient

__all__ = ["Cleaning"]

CLASSES = 10


class Cleaning(Task):
    """``f = mean σ(λᵢ) ℓ(W xᵢ, yᵢ) + 0.2 ‖W‖²`` on corrupted data, ``F = mean ℓ`` on clean data; ℓ the cross-entropy.

    As in benchopt: pixels are standardised with the training part's statistics, the label of a training example is
    replaced, with probability ``ratio``, by one drawn from all ten (a tenth of which is the right one); W starts at 0
    and λ at −2.

    Args:
        images: Rows of pixels; training, validation and test part are drawn from them.
        digits: Their labels.
        ratio: Share of training labels that are drawn again.
        seed: Of the split and the corruption.
        num_train: Size of the training part.
        num_valid: Size of the validation part; all others are for test.
    """

    penalty = 0.2

    def __init__(
        self, images: Tensor, digits: Tensor, ratio: float, seed: int, num_train: int = 3000, num_valid: int = 2000
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator)
        x, y = images[order], digits[order]
        mean, spread = x[:num_train].mean(0), x[:num_train].std(0, unbiased=False)
        x = (x - mean) / torch.where(spread > 0, spread, torch.ones(()))
        stop = num_train + num_valid
        drawn = torch.rand(num_train, generator=generator) < ratio
        noise = torch.randint(CLASSES, (num_train,), generator=generator)
        self.name = f"cleaning {ratio:.0%}"
        self.labels = torch.where(drawn, noise, y[:num_train])
        self.wrong = self.labels != y[:num_train]
        self._train = {x.dtype: x[:num_train].contiguous()}
        self._valid, self._valid_labels = {x.dtype: x[num_train:stop].contiguous()}, y[num_train:stop]
        self._test, self._test_labels = x[stop:], y[stop:]
        self.num_inner, self.num_outer = num_train, num_valid
        self.inner_start = torch.zeros(CLASSES, x.shape[1])
        self.outer_start = torch.full((num_train,), -2.0)
        train = self._train[x.dtype].double()
        # the Hessian of ℓ in the logits is at most ½ I, and σ(λ) at most 1
        largest = float(torch.linalg.eigvalsh(train.T @ train / num_train)[-1])
        self.smoothness = largest / 2 * float(torch.sigmoid(self.outer_start[0])) + 2 * self.penalty

    @classmethod
    def load(cls, folder: Path | None, ratio: float, seed: int) -> Cleaning:
        """Reads the data."""
        return cls(*load_digits(folder), ratio, seed)

    def inner_loss(self, w: Tensor, lam: Tensor, block: Block = EVERYTHING) -> Tensor:
        x, y = of_dtype(self._train, w.dtype)[block], self.labels[block]
        losses = F.cross_entropy(F.linear(x, w), y, reduction="none")
        return torch.sigmoid(lam[block]).dot(losses) / len(y) + self.penalty * w.square().sum()

    def outer_loss(self, w: Tensor, lam: Tensor, block: Block = EVERYTHING) -> Tensor:
        return F.cross_entropy(F.linear(of_dtype(self._valid, w.dtype)[block], w), self._valid_labels[block])

    def solve(self, lam: Tensor, near: Tensor) -> Tensor:
        """L-BFGS; f is at least 0.4-strongly convex, so ``‖W − W*‖`` is at most 2.5 times the gradient's norm."""

        def function(w: Tensor) -> tuple[float, Tensor]:
            w = w.clone().requires_grad_(True)
            value = self.inner_loss(w, lam.double())
            return value.item(), torch.autograd.grad(value, w)[0]

        return minimise(function, near, iterations=500, gtol=1e-6).point

    def lowest(self, starts: list[Tensor]) -> float:
        """The lowest value of L-BFGS descents on h, 25 iterations from each start: h is not convex."""
        near = self.inner_start

        def function(lam: Tensor) -> tuple[float, Tensor]:
            nonlocal near
            near = self.solve(lam, near)
            method = ConjugateGradient(max_iterations=200, rtol=1e-4)
            result = hypergradient(self.inner_loss, self.outer_loss, near, lam, method)
            return result.value, result.grad

        return min(minimise(function, lam, iterations=25, gtol=0.0).value for lam in starts)

    def metrics(self, w: Tensor) -> Mapping[str, float]:
        found = F.linear(self._test, w.to(self._test)).argmax(1)
        return {"test error": float((found != self._test_labels).float().mean())}
