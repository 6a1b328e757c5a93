"""Whether an inner problem can serve the method by which it is to be differentiated."""

from __future__ import annotations

import warnings

from bilevel.errors import BilevelWarning, ConfigError
from bilevel.hypergrad import SAMA, Estimator
from bilevel.hypergrad.inner_updates import InnerUpdates
from bilevel.optim import update_of
from bilevel.problems.base import Problem

__all__ = ["check_method"]


def check_method(problem: Problem, estimator: Estimator, precision: str) -> None:
    """Raises unless an inner problem can serve a method that differentiates its updates.

    Raises:
        ConfigError: No optimizer, one whose update is not known, clipped gradients, graphs of passes in low precision,
            or a field that speaks of the method as a function.
    """
    if not estimator.needs_trajectory:
        return
    if problem.optimizer is None:
        raise ConfigError(
            f"method {estimator.name!r} consumes the updates of problem {problem.name!r}, which has no optimizer"
        )
    update_of(problem.optimizer, problem.parameters)
    if problem.max_grad_norm is not None:
        raise ConfigError(
            f"method {estimator.name!r} cannot differentiate through max_grad_norm of problem {problem.name!r}: drop "
            "one of them"
        )
    if estimator.keeps_graph and precision != "float32":
        raise ConfigError(
            f"method {estimator} keeps the graphs of training passes, which precision={precision!r} takes in "
            "that precision, and products are to be taken in float32 or better: use memory='replay'"
        )
    if not isinstance(estimator, (InnerUpdates, SAMA)):
        return
    kind = type(estimator).__name__
    if estimator.optimizer not in ("sgd", None):
        raise ConfigError(
            f"{kind}.optimizer is for gradient steps as a function; in an engine the updates of problem "
            f"{problem.name!r} are made by its own optimizer, {type(problem.optimizer).__name__}: leave "
            f"optimizer={estimator.optimizer!r} out"
        )
    if estimator.learning_rate is not None:
        warnings.warn(
            f"{kind}.learning_rate is not used in an engine: the optimizer of problem {problem.name!r} made the "
            "updates",
            BilevelWarning,
            stacklevel=2,
        )
