"""Preconditioners of the adjoint system, as fields of the methods that can use one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bilevel.errors import ConfigError
from bilevel.hypergrad.base import State
from bilevel.hypergrad.implicit import Iterative, System, Variables, another_problem
from bilevel.linear import NystromApproximation, Preconditioner, damped, machine_epsilon, nystrom
from bilevel.result import Status
from bilevel.validation import check_choice, check_integer
from bilevel.vector import Tensors

__all__ = ["Factors", "Preconditioned"]

DEFAULT_RANK = 10
VECTORS, EIGENVALUES = "preconditioner_vectors", "preconditioner_eigenvalues"
ACTIVE = "preconditioner_active"
"""Which inner variables reached the loss when the preconditioner was made."""


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
        preconditioner_every: Calls that ``"nystrom"`` serves before it is made anew; the state keeps ``rank`` vectors
            in between. An approximation of an earlier H costs no product, and some iterations. It is made anew before
            that where an inner variable reaches the loss which did not when it was made.
    """

    preconditioner: str = field(default="none", kw_only=True)
    preconditioner_rank: int = field(default=DEFAULT_RANK, kw_only=True)
    preconditioner_every: int = field(default=1, kw_only=True)

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

        check_integer(owner, "preconditioner_every", self.preconditioner_every, minimum=1)
        if self.preconditioner_every != 1 and self.preconditioner != "nystrom":
            raise ConfigError(
                f"{owner}.preconditioner_every belongs to preconditioner='nystrom', not {self.preconditioner!r}"
            )

    @property
    def needs_state(self) -> bool:
        """A warm start does, and a preconditioner that serves several calls."""
        return super().needs_state or self.preconditioner_every > 1

    @property
    def needs_diagonal(self) -> bool:
        """For ``preconditioner="optimizer"``."""
        return self.preconditioner == "optimizer"

    def factors(self, system: System) -> tuple[Factors | None, State]:
        """Returns the preconditioner for a system, or None without one, and what the state keeps of it.

        Raises:
            ConfigError: ``"optimizer"``, and the inner problem's optimiser keeps no second moments.
        """
        if self.preconditioner == "none":
            return None, {}
        if self.preconditioner == "optimizer":
            return _diagonal(self._second_moments(system), self.regularisation()), {}
        damping = self.regularisation()
        approximation, served = self._kept(system)
        if approximation is None:
            rank, epsilon, served = self.preconditioner_rank, system.epsilon, 0
            approximation = nystrom(damped(system.operator, -damping), system.v, rank=rank, epsilon=epsilon)
        state: State = {}
        if served + 1 < self.preconditioner_every and not approximation.status.failed:
            age = torch.tensor(served + 1, dtype=torch.int64)
            kept = _kept_parts(system.state) if served else _spread(approximation, system.variables)
            state = {**kept, EIGENVALUES: (approximation.eigenvalues, age)}
        factors = Factors(approximation.preconditioner(damping), approximation.preconditioner(damping, power=0.5))
        return factors, state

    def _kept(self, system: System) -> tuple[NystromApproximation | None, int]:
        """Returns the approximation that the state keeps, if it does, and how many calls it has served."""
        if self.preconditioner_every == 1 or VECTORS not in system.state:
            return None, 0
        eigenvalues, age = system.state[EIGENVALUES]
        vectors, variables = system.state[VECTORS], system.variables
        sizes = [part.numel() for part in variables.like]
        if [len(part) for part in vectors] != sizes:
            raise another_problem(
                self,
                f"its preconditioner has {[len(part) for part in vectors]} rows, the inner variables {sizes} entries",
            )
        known = system.state[ACTIVE][0].tolist() if ACTIVE in system.state else [True] * len(sizes)
        if any(now and not then for now, then in zip(variables.active, known, strict=True)):
            return None, 0  # of that variable's curvature it says nothing
        vectors = tuple(
            part.to(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
            for part, like in zip(variables.select(vectors), system.v, strict=True)
        )
        eigenvalues = eigenvalues.to(device=vectors[0].device, dtype=torch.float64)
        dimension = sum(part.numel() for part in system.v)
        return NystromApproximation(vectors, eigenvalues, dimension, Status.CONVERGED, 0), int(age)

    def _second_moments(self, system: System) -> Tensors:
        if system.diagonal is None:
            raise ConfigError(
                f"{type(self).__name__}(preconditioner='optimizer') takes the second moments that the inner problem's "
                "optimiser keeps, and there are none here: as a function there is no optimiser, and of torch's "
                "Adam, AdamW and RMSprop keep them, from their first step on. Use 'nystrom' or 'none'."
            )
        return system.diagonal


def _kept_parts(state: State) -> State:
    return {key: state[key] for key in (VECTORS, ACTIVE) if key in state}


def _spread(approximation: NystromApproximation, variables: Variables) -> State:
    """Returns the vectors over all inner variables, with rows of zeros for those that do not reach the loss."""
    rank, dtype = len(approximation.eigenvalues), approximation.vectors[0].dtype
    vectors = variables.spread(
        approximation.vectors, lambda _, like: torch.zeros(like.numel(), rank, dtype=dtype, device=like.device)
    )
    return {VECTORS: vectors, ACTIVE: (torch.tensor(variables.active),)}


def _diagonal(diagonal: Tensors, damping: float) -> Factors:
    """Returns the factors of a diagonal P, whose entries are kept above the round-off of the largest one."""
    largest = max(float(part.max()) for part in diagonal if part.numel())
    floor = machine_epsilon(diagonal) * largest if largest > 0.0 else 1.0
    shifted = [part.clamp_min(floor) + damping for part in diagonal]

    def scaled(power: float) -> Preconditioner:
        gains = [part.pow(-power) for part in shifted]
        return lambda v: tuple(torch.mul(gain, part) for gain, part in zip(gains, v, strict=True))

    return Factors(scaled(1.0), scaled(0.5))
