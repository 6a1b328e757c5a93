"""What analytic problems share."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from bilevel.errors import ParameterError
from bilevel.problems.base import Problem

__all__ = ["Analytic", "Data", "Variable", "check_positive", "check_shapes", "normals", "with_spectrum"]

MakeOptimizer = Callable[[Any], Optimizer]
Family = TypeVar("Family", bound="Data")


class Variable(Problem):
    """A problem whose parameters are one tensor, ``module.value``, and whose loss is a function of several problems'.

    Args:
        value: Where it starts.
        function: The loss, of the values in the order of ``reads``.
        reads: Names of the problems whose values it takes.
        settings: Those of :class:`~bilevel.Problem`.
    """

    def __init__(self, value: Tensor, function: Callable[..., Tensor], reads: Sequence[str], **settings: Any) -> None:
        super().__init__(nn.ParameterDict({"value": value.detach().clone()}), **settings)
        self.function, self.reads = function, tuple(reads)

    def loss(self, batch: Any) -> Tensor:
        """Returns the function at the present values."""
        return self.function(*(getattr(self, name).module["value"] for name in self.reads))


@dataclass(frozen=True)
class Data:
    """Tensors that define a problem, as fields of a dataclass."""

    def to(self: Family, target: torch.dtype | torch.device | str) -> Family:
        """Returns the problem with its tensors in another dtype, or on another device."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(target)
            return tuple(moved(part) for part in value) if isinstance(value, tuple) else value

        fields = {field.name: moved(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **fields)


class Analytic(Data, ABC):
    """An inner problem ``w*(λ) = argmin f(w, λ)``, strongly convex in w, below ``F(w*(λ), λ)``: two vectors w and λ."""

    @abstractmethod
    def inner_loss(self, w: Tensor, lam: Tensor) -> Tensor:
        """Returns f."""

    @abstractmethod
    def outer_loss(self, w: Tensor, lam: Tensor) -> Tensor:
        """Returns F."""

    @abstractmethod
    def solution(self, lam: Tensor) -> Tensor:
        """Returns ``w*(λ)``, which autograd can differentiate."""

    @abstractmethod
    def hessian(self, lam: Tensor) -> Tensor:
        """Returns ``H = ∂²f/∂w²``, which is the same at every w."""

    @abstractmethod
    def mixed(self, lam: Tensor) -> Tensor:
        """Returns ``∂²f/∂w∂λ`` at ``w*(λ)``, of shape (inner, outer)."""

    @abstractmethod
    def cotangent(self, lam: Tensor) -> Tensor:
        """Returns ``v = ∂F/∂w`` at ``w*(λ)``."""

    @abstractmethod
    def direct(self, lam: Tensor) -> Tensor:
        """Returns ``∂F/∂λ`` at fixed w."""

    @abstractmethod
    def optimum(self) -> Tensor:
        """Returns the λ that minimises ``F(w*(λ), λ)``."""

    @abstractmethod
    def outer_optimizer(self, parameters: Any) -> Optimizer:
        """Makes the optimiser that the outer problem has by default."""

    def step_size(self, lam: Tensor) -> float:
        """Returns the best size of gradient steps on f: ``2 / (μ + L)`` for the Hessian's extreme eigenvalues."""
        eigenvalues = torch.linalg.eigvalsh(self.hessian(lam))
        return 2 / float(eigenvalues[0] + eigenvalues[-1])

    @property
    @abstractmethod
    def start(self) -> Tensor:
        """The λ that problems start from by default."""

    def value(self, lam: Tensor) -> Tensor:
        """Returns ``F(w*(λ), λ)``."""
        return self.outer_loss(self.solution(lam), lam)

    def hypergradient(self, lam: Tensor, inverse: Tensor | None = None) -> Tensor:
        """Returns ``dF/dλ = ∂F/∂λ − (∂²f/∂w∂λ)ᵀ H⁻¹ ∂F/∂w`` at ``w*(λ)``.

        Args:
            lam: λ.
            inverse: What a method takes for ``H⁻¹``, to know what *it* should return: the identity, say.
        """
        v = self.cotangent(lam)
        q = torch.linalg.solve(self.hessian(lam), v) if inverse is None else inverse @ v
        return self.direct(lam) - self.mixed(lam).T @ q

    def problems(
        self,
        lam: Tensor | None = None,
        w: Tensor | None = None,
        *,
        inner_optimizer: MakeOptimizer | None = None,
        outer_optimizer: MakeOptimizer | None = None,
        **settings: Any,
    ) -> list[Problem]:
        """Returns the problems ``outer`` and ``inner``, for an engine.

        Args:
            lam: λ to start from.
            w: w to start from; the solution by default, where implicit methods are exact but for their own error.
            inner_optimizer: Makes the inner optimiser; gradient steps of :meth:`step_size` by default.
            outer_optimizer: Makes the outer optimiser; :meth:`outer_optimizer` by default.
            settings: Further ones of the inner :class:`~bilevel.Problem`: steps, hypergradient, ….
        """
        lam = self.start if lam is None else lam
        rate = self.step_size(lam)
        names = ("inner", "outer")
        outer = Variable(lam, self.outer_loss, names, name="outer", optimizer=outer_optimizer or self.outer_optimizer)
        inner = Variable(
            self.solution(lam) if w is None else w,
            self.inner_loss,
            names,
            name="inner",
            optimizer=inner_optimizer or (lambda parameters: SGD(parameters, lr=rate)),
            **settings,
        )
        return [outer, inner]


def with_spectrum(eigenvalues: Tensor, directions: Tensor) -> Tensor:
    """Returns a symmetric matrix with these eigenvalues, whose eigenvectors are those of a QR factorisation.

    Args:
        eigenvalues: (n).
        directions: A matrix (n, n) of full rank; a Gaussian one for eigenvectors of every orientation alike.
    """
    Q, R = torch.linalg.qr(directions)
    Q = Q * R.diagonal().sign()
    H: Tensor = (Q * eigenvalues) @ Q.T
    return (H + H.T) / 2


def normals(seed: int) -> Callable[..., Tensor]:
    """Returns what draws Gaussian tensors of a shape, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def check_shapes(problem: Analytic, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises :class:`~bilevel.errors.ParameterError` where a field has another shape."""
    for name, shape in wanted.items():
        found = tuple(getattr(problem, name).shape)
        if found != shape:
            raise ParameterError(
                f"{type(problem).__name__}.{name} must have shape {shape} beside the others, not {found}"
            )


def check_positive(label: str, H: Tensor) -> None:
    """Raises :class:`~bilevel.errors.ParameterError` unless a matrix is symmetric positive definite."""
    symmetric = H.dim() == 2 and H.shape[0] == H.shape[1] and torch.allclose(H, H.T, rtol=1e-4, atol=1e-6)
    if not symmetric or int(torch.linalg.cholesky_ex(H)[1]) != 0:
        raise ParameterError(f"{label} must be symmetric positive definite: the inner problem has no unique solution")
