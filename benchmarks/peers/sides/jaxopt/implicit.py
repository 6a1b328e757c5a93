"""Implicit methods by JAXopt's ``custom_root``; a workload's side supplies the losses in jax.

The whole outer step is one compiled function. All data are its arguments: what a compiled function closes over is a
constant to XLA, which then computes with it at compile time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxopt import implicit_diff, linear_solve

from benchmarks.peers.side import Method, NotOffered, Side, Task

Loss = Callable[[Any, Any, Any], Any]


class Library(Side):
    """``inner_loss(w, lam, data)`` and ``outer_loss(w, lam, data)`` with lists of arrays and a dictionary."""

    note = "the step is one compiled function; compilation is not timed"

    def __init__(self, task: Task, method: Method, inner_loss: Loss, outer_loss: Loss, names: Sequence[str]) -> None:
        self.data = {name: jnp.asarray(task.extra["arrays"][name]) for name in names}
        self.w = [jnp.asarray(part.numpy()) for part in task.inner]
        self.lam = [jnp.asarray(part.numpy()) for part in task.outer]
        solve = linear_solver(method)
        gradient = jax.grad(inner_loss)

        def solver(start: Any, lam: Any, data: Any) -> Any:
            w = start
            for _ in range(task.steps):
                w = [part - task.rate * step for part, step in zip(w, gradient(w, lam, data), strict=True)]
            return w

        solution = implicit_diff.custom_root(gradient, solve=solve)(solver)

        @jax.jit
        def outer_step(w: Any, lam: Any, data: Any) -> Any:
            def objective(lam: Any) -> Any:
                new = solution(w, lam, data)
                return outer_loss(new, lam, data), new

            found, new = jax.grad(objective, has_aux=True)(lam)
            return new, [part - task.outer_rate * step for part, step in zip(lam, found, strict=True)], found

        self.outer_step = outer_step

    def step(self) -> None:
        self.w, self.lam, self.found = self.outer_step(self.w, self.lam, self.data)

    def place(self, inner: Sequence[np.ndarray], outer: Sequence[np.ndarray]) -> None:
        self.w = [jnp.asarray(x, dtype=part.dtype) for x, part in zip(inner, self.w, strict=True)]
        self.lam = [jnp.asarray(x, dtype=part.dtype) for x, part in zip(outer, self.lam, strict=True)]
        self.wait()

    def planned_bytes(self) -> int:
        found = self.outer_step.lower(self.w, self.lam, self.data).compile().memory_analysis()
        return int(found.temp_size_in_bytes + found.output_size_in_bytes)

    def wait(self) -> None:
        jax.block_until_ready((self.w, self.lam))


def linear_solver(method: Method) -> Callable[..., Any]:
    if method.kind == "identity":
        return lambda matvec, b: b
    if method.kind == "conjugate_gradient":
        return functools.partial(linear_solve.solve_cg, maxiter=method.products, tol=0.0)
    if method.kind == "neumann":

        def series(matvec: Any, b: Any) -> Any:
            def body(_: int, carry: Any) -> Any:
                term, total = carry
                image = matvec(term)
                term = jax.tree.map(lambda t, h: t - method.step_size * h, term, image)
                return term, jax.tree.map(jnp.add, total, term)

            _, total = jax.lax.fori_loop(0, method.products, body, (b, b))
            return jax.tree.map(lambda part: method.step_size * part, total)

        return series
    raise NotOffered(f"no linear solver for {method.kind}")


def cross_entropy(logits: Any, labels: Any) -> Any:
    """Of each row; the label's logit by a mask, which XLA differentiates without a scatter."""
    picked = jnp.sum(jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype) * logits, axis=1)
    return jax.nn.logsumexp(logits, axis=1) - picked
