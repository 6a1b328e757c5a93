"""(e) by JAXopt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from benchmarks.peers.side import Method, Task
from benchmarks.peers.sides.jaxopt.implicit import Library, cross_entropy
from benchmarks.peers.sides.jaxopt.networks import transformer
from benchmarks.peers.workloads.adapters import ADAPTERS, DELTA, LAYERS, SCALE


def inner_loss(w: Sequence[Any], lam: Sequence[Any], data: Any) -> Any:
    penalty = sum(jnp.sum((part - data[f"start.{name}"]) ** 2) for name, part in zip(ADAPTERS, w, strict=True))
    return fit(w, lam, data, slice(0, len(data["tokens"]) // 2)) + DELTA / 2 * penalty


def outer_loss(w: Sequence[Any], lam: Sequence[Any], data: Any) -> Any:
    return fit(w, lam, data, slice(len(data["tokens"]) // 2, None))


def fit(w: Sequence[Any], lam: Sequence[Any], data: Any, part: slice) -> Any:
    named = {name.removeprefix("base."): value for name, value in data.items() if name.startswith("base.")}
    for key, a, b, m in zip(LAYERS, w[: len(LAYERS)], w[len(LAYERS) :], lam, strict=True):
        named[key] = dora(named[key], a, b, m)
    tokens = data["tokens"][part]
    return cross_entropy(transformer(named, tokens[:, :-1], jnp.tanh), tokens[:, 1:].reshape(-1)).mean()


def dora(base: Any, a: Any, b: Any, magnitude: Any) -> Any:
    weight = base + SCALE * (b @ a)
    return (magnitude / jnp.linalg.norm(weight, axis=1))[:, None] * weight


def build(task: Task, method: Method) -> Library:
    names = [name for name in task.extra["arrays"] if name == "tokens" or name.startswith(("base.", "start."))]
    return Library(task, method, inner_loss, outer_loss, names)
