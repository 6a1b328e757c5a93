"""What ``Config.type`` and the fields that go with it mean here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bilevel.hypergrad import SAMA, ConjugateGradient, Estimator, FiniteDifference, Neumann, as_estimator
from bilevel.interop.betty.configs import Config
from bilevel.interop.betty.kinds import PREFIX

__all__ = ["method_of"]


def method_of(config: Config) -> Estimator:
    """Returns the estimator that a configuration means.

    ``darts`` and ``sama`` take a central difference whose displacement has Betty's length, ``neumann`` has Betty's
    K + 1 summands, and ``cg`` makes the iterations that it is told, unless the residual vanishes earlier.
    """
    kind = config.type
    if isinstance(kind, Estimator):
        return kind
    if isinstance(kind, Mapping):
        return as_estimator(kind)
    if kind.startswith(PREFIX):
        return as_estimator({"method": kind, **_fields(kind.removeprefix(PREFIX), config)})
    if kind == "darts":
        return FiniteDifference(epsilon=config.darts_alpha)
    if kind == "neumann":
        return Neumann(terms=config.neumann_iterations, step_size=config.neumann_alpha, rtol=0.0)
    if kind == "cg":
        return ConjugateGradient(max_iterations=config.cg_iterations, rtol=0.0)
    if kind == "sama":
        return SAMA(epsilon=config.sama_adam_alpha)
    return as_estimator(kind)


def _fields(kind: str, config: Config) -> dict[str, Any]:
    """Returns the fields of Betty's own function."""
    if kind == "darts":
        return {"alpha": config.darts_alpha}
    if kind == "sama":
        return {"alpha": config.sama_adam_alpha}
    if kind == "neumann":
        return {"iterations": config.neumann_iterations, "alpha": config.neumann_alpha}
    return {"iterations": config.cg_iterations, "alpha": config.cg_alpha}
