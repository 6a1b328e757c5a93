"""(a) by JAXopt."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from benchmarks.peers.side import Method, Task
from benchmarks.peers.sides.jaxopt.implicit import Library, cross_entropy


def inner_loss(w: Any, lam: Any, data: Any) -> Any:
    fit = cross_entropy(data["x"] @ w[0].T, data["y"]).mean()
    return fit + jnp.sum(jnp.exp(lam[0]) * jnp.sum(w[0] ** 2, axis=0)) / 2


def outer_loss(w: Any, lam: Any, data: Any) -> Any:
    return cross_entropy(data["x_valid"] @ w[0].T, data["y_valid"]).mean()


def build(task: Task, method: Method) -> Library:
    return Library(task, method, inner_loss, outer_loss, ("x", "y", "x_valid", "y_valid"))
