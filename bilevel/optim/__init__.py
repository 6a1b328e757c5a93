"""Optimiser updates as differentiable functions: what unrolling needs.

An update maps (parameters, gradients, memory) to (parameters, memory), where memory holds the optimiser's state
tensors. Hyper-parameters are those that the user's optimiser had at that step, for every parameter by its group.
"""

from bilevel.optim.base import Pulled, Rule, Update
from bilevel.optim.curvature import curvature_of
from bilevel.optim.update import (
    OPTIMIZERS,
    clipped,
    default_update,
    learning_rates,
    projected,
    pulled_linear,
    update_of,
)

__all__ = [
    "OPTIMIZERS",
    "Pulled",
    "Rule",
    "Update",
    "clipped",
    "curvature_of",
    "default_update",
    "learning_rates",
    "projected",
    "pulled_linear",
    "update_of",
]
