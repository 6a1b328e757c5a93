"""The identity for the inverse Hessian, with the exact mixed product."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from bilevel.hypergrad.base import Estimator, InnerProblem, Response
from bilevel.hypergrad.mixed_product import CENTERS, IdentityResponse
from bilevel.validation import check_choice

__all__ = ["Identity"]


@dataclass(frozen=True)
class Identity(Estimator):
    """``H⁻¹ ≈ I``: ``vᵀ dw*/dλ ≈ −vᵀ ∂²f/∂w∂λ``, by one exact mixed product.

    The quantity that :class:`~bilevel.FiniteDifference` approximates, without its ε. Source: Luketina et al., ICML
    2016 (arXiv 1511.06727), T1–T2 with the step size left to the outer learning rate.

    Attributes:
        center: Where ``∂²f/∂w∂λ`` is taken. ``"new"``: at the present inner parameters. ``"old"``, in an engine: at
            those from which the last inner step was made, on its batch and with its random numbers, and on the graph of
            the step's own gradient, which is kept for it. v is taken at the new parameters either way, so that
            ``"old"`` is off by the step's length times ``∂³f/∂w²∂λ``; it is the direction in which this very step
            depends on λ (:class:`~bilevel.OneStep` without the learning rate). The graph is freed with the outer
            update; ``Engine.hypergradient()`` after it evaluates the old point again.

    Raises:
        ConfigError: ``center="old"`` as a function or before the first step, where no step is known.

    Cost: 1 forward and 1 backward pass with graph, 1 product. With ``center="old"`` in an engine 1 product, while the
    graph of the inner gradient, a few times as large as that of the loss, is held through the outer loss's passes.
    """

    center: str = field(default="new", kw_only=True)

    name: ClassVar[str] = "identity"
    summary: ClassVar[str] = "identity for the inverse Hessian, exact mixed product"
    cost: ClassVar[str] = "1 forward, 1 backward with graph, 1 product; center='old': 1 product"
    needs: ClassVar[str] = "double backward"
    storage: ClassVar[str] = "the gradient's graph; center='old': through the outer loss's passes too"
    purpose: ClassVar[str] = "large models trained a step or a few per outer step; a direction, not a length"
    needs_update: ClassVar[bool] = False
    needs_finite_cotangent: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validates the field."""
        check_choice("Identity", "center", self.center, CENTERS)
        # What a configuration needs depends on its fields; the class says what its default needs.
        object.__setattr__(self, "needs_trajectory", self.keeps_graph)

    @property
    def recorded_steps(self) -> int | None:
        """The last one, for the old point."""
        return 1 if self.center == "old" else None

    @property
    def keeps_graph(self) -> bool:
        """For the product at the old point."""
        return self.center == "old"

    def respond(self, problem: InnerProblem) -> Response:
        """See :meth:`Estimator.respond`. Nothing is computed until the pullback."""
        return IdentityResponse(self, problem, self.center)
