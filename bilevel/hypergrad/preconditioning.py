"""Preconditioners of the adjoint system, as fields of the methods that can use one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bilevel.errors import ConfigError
from bilevel.hypergrad.implicit import Iterative, System
from bilevel.linear import Preconditioner, damped, machine_epsilon, nystrom
from bilevel.validation import check_choice, check_integer
from bilevel.vector import Tensors

__all__ = ["Factors", "Preconditioned"]

DEFAULT_RANK = 10


@dataclass(frozen=True)
class Factors:
    """A symmetric positive definite P that resembles ``H + δI``.

    Attributes:
        inverse: ``v ↦ P⁻¹ v``.
        inverse_root: ``v ↦ P^(−1/2) v``.
    """

    inverse: Preconditioner
    inverse_root: Preconditioner


@dataclass(frozen=True)
class Preconditioned(Iterative):
    """Base of the methods that can use a preconditioner P; it changes their speed, not what they solve.

    Attributes:
        preconditioner: ``"none"``; ``"optimizer"``: the diagonal ``√v̂ + ε + δ`` from the second moments that the inner
            optimiser keeps (Adam, AdamW, RMSprop), which costs nothing; ``"nystrom"``: a randomised low-rank
            approximation of H from ``preconditioner_rank`` products a call (Frangella, Tropp, Udell 2021, arXiv
            2110.02820), which pays where H has few large eigenvalues.
        preconditioner_rank: Products for ``"nystrom"``.
    """

    preconditioner: str = field(default="none", kw_only=True)
    preconditioner_rank: int = field(default=DEFAULT_RANK, kw_only=True)

    def __post_init__(self) -> None:
        """Validates the shared fields."""
        super().__post_init__()
        owner = type(self).__name__
        check_choice(owner, "preconditioner", self.preconditioner, ("none", "optimizer", "nystrom"))
        check_integer(owner, "preconditioner_rank", self.preconditioner_rank, minimum=1)
        if self.preconditioner_rank != DEFAULT_RANK and self.preconditioner != "nystrom":
            raise ConfigError(
                f"{owner}.preconditioner_rank belongs to preconditioner='nystrom', not {self.preconditioner!r}"
            )

    def factors(self, system: System) -> Factors | None:
        """Returns the preconditioner for a system, or None without one.

        Raises:
            ConfigError: ``"optimizer"``, and the inner problem's optimiser keeps no second moments.
        """
        if self.preconditioner == "none":
            return None
        if self.preconditioner == "optimizer":
            return _diagonal(self._second_moments(system), self.regularisation())
        damping = self.regularisation()
        rank, epsilon = self.preconditioner_rank, system.epsilon
        approximation = nystrom(damped(system.operator, -damping), system.v, rank=rank, epsilon=epsilon)
        return Factors(approximation.preconditioner(damping), approximation.preconditioner(damping, power=0.5))

    def _second_moments(self, system: System) -> Tensors:
        if system.diagonal is None:
            raise ConfigError(
                f"{type(self).__name__}(preconditioner='optimizer') takes the second moments that the inner problem's "
                "optimiser keeps, and there are none here: as a function there is no optimiser, and of torch's "
                "Adam, AdamW and RMSprop keep them, from their first step on. Use 'nystrom' or 'none'."
            )
        return system.diagonal


def _diagonal(diagonal: Tensors, damping: float) -> Factors:
    """Returns the factors of a diagonal P, whose entries are kept above the round-off of the largest one."""
    largest = max(float(part.max()) for part in diagonal if part.numel())
    floor = machine_epsilon(diagonal) * largest if largest > 0.0 else 1.0
    shifted = [part.clamp_min(floor) + damping for part in diagonal]

    def scaled(power: float) -> Preconditioner:
        gains = [part.pow(-power) for part in shifted]
        return lambda v: tuple(torch.mul(gain, part) for gain, part in zip(gains, v, strict=True))

    return Factors(scaled(1.0), scaled(0.5))
