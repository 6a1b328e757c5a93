"""Implicit methods by JAXopt's ``custom_root``; a workload's side supplies the losses in jax."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxopt import implicit_diff, linear_solve

from benchmarks.peers.side import Method, NotOffered, Task
from benchmarks.peers.sides.jaxopt.compiled import Compiled, moved

Loss = Callable[[Any, Any, Any], Any]


class Library(Compiled):
    """``inner_loss(w, lam, data)`` and ``outer_loss(w, lam, data)`` with lists of arrays and a dictionary."""

    def __init__(self, task: Task, method: Method, inner_loss: Loss, outer_loss: Loss, names: Sequence[str]) -> None:
        gradient = jax.grad(inner_loss)

        def solver(start: Any, lam: Any, data: Any) -> Any:
            w = start
            for _ in range(task.steps):
                w = moved(w, task.rate, gradient(w, lam, data))
            return w

        solution = implicit_diff.custom_root(gradient, solve=linear_solver(method))(solver)

        def outer_step(w: Any, lam: Any, data: Any) -> Any:
            def objective(lam: Any) -> Any:
                new = solution(w, lam, data)
                return outer_loss(new, lam, data), new

            found, new = jax.grad(objective, has_aux=True)(lam)
            return new, moved(lam, task.outer_rate, found), found

        given, kind = task.extra["arrays"], task.inner[0].numpy().dtype
        floating = {name: np.issubdtype(given[name].dtype, np.floating) for name in names}
        data = {name: jnp.asarray(given[name], dtype=kind if floating[name] else None) for name in names}
        super().__init__(outer_step, task.inner, task.outer, data)

    def place(self, inner: Sequence[np.ndarray], outer: Sequence[np.ndarray]) -> None:
        self.w = [jnp.asarray(x, dtype=part.dtype) for x, part in zip(inner, self.w, strict=True)]
        self.lam = [jnp.asarray(x, dtype=part.dtype) for x, part in zip(outer, self.lam, strict=True)]
        self.wait()


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
