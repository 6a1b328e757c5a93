"""The identity for the inverse Hessian, with the mixed product by differences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from bilevel.hypergrad.base import Estimator, InnerProblem, Response
from bilevel.hypergrad.mixed_product import CENTERS, IdentityResponse, check_center
from bilevel.validation import check_choice, check_number

__all__ = ["FiniteDifference"]


@dataclass(frozen=True)
class FiniteDifference(Estimator):
    """``H⁻¹ ≈ I``, and ``vᵀ ∂²f/∂w∂λ ≈ (∂f/∂λ(w + hv) − ∂f/∂λ(w − hv)) / 2h`` with ``h = ε / ‖v‖``.

    The error of the difference is ``ε² M / 6`` for a bound M of the third derivative along ``v/‖v‖``, plus rounding
    of order ``u ‖∂f/∂λ‖ / ε`` with the round-off u. Needs first derivatives only, and so works with any attention
    back end. Source: Liu, Simonyan, Yang, ICLR 2019 (DARTS, arXiv 1806.09055), equation 8, with the inner learning
    rate left to the outer one.

    Attributes:
        epsilon: ε, the length of the displacement of the inner parameters (Euclidean norm), or ``"auto"``:
            ``u^(1/3) · sqrt(1 + ‖w‖)`` with the round-off u of the parameters' dtype, which balances both errors
            (``u^(1/2) · sqrt(1 + ‖w‖)`` for forward differences).
        difference: ``"central"``, as above, or ``"forward"``: ``(∂f/∂λ(w + hv) − ∂f/∂λ(w)) / h`` where the second
            came with the inner step's own backward pass; error ``ε M₂ / 2`` for a bound M₂ of the second derivative of
            ``∂f/∂λ`` along ``v/‖v‖``. For ``center="old"``, where that pass was made.
        center: Where w is. ``"new"``: the present inner parameters. ``"old"``, in an engine: those from which the last
            inner step was made, on its batch and with its random numbers; see :class:`~bilevel.Identity`.

    Where rounding to the parameters' dtype changes the displacement by more than a tenth, the status is ``INACCURATE``.

    Raises:
        ConfigError: A field out of range; ``difference="forward"`` with ``center="new"``; ``center="old"`` as a
            function or before the first step, where no step is known.

    Cost: ``"central"`` 2 forward passes and 2 backward passes to the outer parameters only; ``"forward"`` 1 and 1, and
    the step's own backward pass also reaches the outer parameters (2 and 2 where that pass ran under autocast, or where
    an outer parameter has changed since). One more of each, to find out why, where the differences vanish or are not
    finite.
    """

    epsilon: float | str = "auto"
    difference: str = field(default="central", kw_only=True)
    center: str = field(default="new", kw_only=True)

    name: ClassVar[str] = "finite_difference"
    summary: ClassVar[str] = "identity for the inverse Hessian, mixed product by differences (DARTS)"
    cost: ClassVar[str] = "2 forward, 2 backward to the outer parameters only; forward differences: 1 and 1"
    needs: ClassVar[str] = "first derivatives only"
    storage: ClassVar[str] = "the parameters twice"
    purpose: ClassVar[str] = (
        "large models and fused attention, where no second derivative exists; a direction, not a length"
    )
    needs_double_backward: ClassVar[bool] = False
    needs_finite_cotangent: ClassVar[bool] = False
    needs_update: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validates the fields, alone and together."""
        owner = "FiniteDifference"
        check_number(owner, "epsilon", self.epsilon, minimum=0.0, exclusive=True, auto=True)
        check_choice(owner, "difference", self.difference, ("central", "forward"))
        check_choice(owner, "center", self.center, CENTERS)
        check_center(owner, self.center, self.difference)
        # What a configuration needs depends on its fields; the class says what its default needs.
        object.__setattr__(self, "needs_trajectory", self.center == "old")

    @property
    def recorded_steps(self) -> int | None:
        """The last one, for the old point."""
        return 1 if self.center == "old" else None

    @property
    def needs_outer_gradient(self) -> bool:
        """For forward differences."""
        return self.difference == "forward"

    def respond(self, problem: InnerProblem) -> Response:
        """See :meth:`Estimator.respond`. Nothing is computed until the pullback."""
        return IdentityResponse(self, problem, self.center, self.difference, self.epsilon)
