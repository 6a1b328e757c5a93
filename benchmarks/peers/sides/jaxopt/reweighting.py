"""(b) by JAXopt."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.peers.side import Method, Task
from benchmarks.peers.sides.jaxopt.implicit import Library, cross_entropy
from benchmarks.peers.workloads.reweighting import DECAY


def network(x: Any, parameters: Any) -> Any:
    first, bias, second, last = parameters
    return jnp.tanh(x @ first.T + bias) @ second.T + last


def inner_loss(w: Any, lam: Any, data: Any) -> Any:
    losses = cross_entropy(network(data["x"], w), data["y"])
    weights = jax.nn.sigmoid(network(losses[:, None], lam)[:, 0])
    decay = sum(jnp.sum((part - data[f"start{i}"]) ** 2) for i, part in enumerate(w))
    return jnp.mean(weights * losses) + DECAY / 2 * decay


def outer_loss(w: Any, lam: Any, data: Any) -> Any:
    return cross_entropy(network(data["x_valid"], w), data["y_valid"]).mean()


def build(task: Task, method: Method) -> Library:
    return Library(
        task, method, inner_loss, outer_loss, ("x", "y", "x_valid", "y_valid", *(f"start{i}" for i in range(4)))
    )
