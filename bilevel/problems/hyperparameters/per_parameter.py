"""Positive numbers for the parameters of a model: one for all, one a tensor, one an input, one an element."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, cast

from torch import Tensor, nn

from bilevel.errors import ParameterError
from bilevel.problems.base import ParameterSelection, select_parameters
from bilevel.problems.hyperparameters.base import Hyperparameter, Value
from bilevel.validation import check_choice, check_number

__all__ = ["PerParameter", "parameter_key"]


class PerParameter(Hyperparameter):
    """Positive numbers ``exp(λ)``: one for a whole model, one a parameter tensor, one an input, or one an element.

    Args:
        model: Whose parameters; it is looked at, not kept.
        per: ``"model"``, ``"tensor"``, ``"input"`` (dimension 1 of a weight: the columns of ``nn.Linear``, the incoming
            channels of a convolution; one for a bias) or ``"element"``.
        initial: What they start from, above 0.
        params: Which of the model's trainable parameters, as in :class:`~bilevel.Problem`; all by default.

    Raises:
        ConfigError: ``initial`` is not above 0: 0 has no logarithm and no gradient would lead away from it.
        UnknownNameError: An unknown ``per``, or a pattern that matches no trainable parameter.
    """

    choices: ClassVar[tuple[str, ...]] = ("model", "tensor", "input", "element")

    def __init__(
        self, model: nn.Module, *, per: str = "model", initial: float = 1e-3, params: ParameterSelection | None = None
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        check_choice(kind, "per", per, self.choices)
        check_number(kind, "initial", initial, minimum=0.0, exclusive=True)
        chosen = select_parameters(kind, model, params)
        self.per = per
        self.shapes = {name: p.shape for name, p in chosen.items()}
        start = math.log(initial)
        self.log = nn.Module()  # a bare one: its parameters may have any name that a model's may
        first = next(iter(chosen.values()))
        if per == "model":
            self.log.register_parameter("all", nn.Parameter(first.new_full((), start)))
        else:
            for name, p in chosen.items():
                self.log.register_parameter(parameter_key(name), nn.Parameter(p.new_full(_shape(p, per), start)))

    def value(self) -> Value:
        """Returns ``exp(λ)``: a scalar, or by the names of the model's parameters."""
        if self.per == "model":
            return self.of("")
        return {name: self.of(name) for name in self.shapes}

    def of(self, name: str) -> Tensor:
        """Returns ``exp(λ)`` for a parameter of the model: a scalar, or in a shape that goes with its."""
        return cast(Tensor, getattr(self.log, "all" if self.per == "model" else parameter_key(name))).exp()

    def chosen(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns those of the inner problem's parameters that are meant.

        Raises:
            ParameterError: One is not there, or has another shape.
        """
        for name, shape in self.shapes.items():
            if name not in weights or weights[name].shape != shape:
                found = f"of shape {tuple(weights[name].shape)}" if name in weights else "missing"
                raise ParameterError(
                    f"{type(self).__name__} was made for a model with a parameter {name!r} of shape {tuple(shape)}, "
                    f"which is {found} in the inner problem's: make it from that model"
                )
        return {name: weights[name] for name in self.shapes}


def parameter_key(name: str) -> str:
    """Returns a name for what belongs to a parameter of that name: torch's own names have no dots."""
    return name.replace(".", "/")


def _shape(parameter: Tensor, per: str) -> tuple[int, ...]:
    if per == "input" and parameter.ndim > 1:
        return (1, parameter.shape[1], *[1] * (parameter.ndim - 2))
    return tuple(parameter.shape) if per == "element" else ()
