"""(c) by JAXopt's ``GradientDescent``, differentiated through its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxopt import GradientDescent

from benchmarks.peers.side import Method
from benchmarks.peers.sides.jaxopt.compiled import Compiled, inputs, moved
from benchmarks.peers.sides.jaxopt.implicit import cross_entropy
from benchmarks.peers.sides.jaxopt.networks import conv_net, transformer
from benchmarks.peers.workloads.unrolled import Tasks, Unrolling

NETWORKS = {"conv": conv_net, "transformer": transformer}


class Library(Compiled):
    def __init__(self, case: Unrolling, network: str, steps: int, *, least_memory: bool) -> None:
        names = [name for name, _ in case.module.named_parameters()]

        def fit(w: Sequence[Any], data: Any) -> Any:
            x, y = data
            return cross_entropy(NETWORKS[network](dict(zip(names, w, strict=True)), x), y).mean()

        def inner_loss(w: Sequence[Any], decay: Any, data: Any) -> Any:
            penalty = sum(rate * jnp.sum(part**2) for rate, part in zip(jnp.exp(decay), w, strict=True))
            return fit(w, data) + penalty / 2

        solver = GradientDescent(
            inner_loss, stepsize=case.rate, maxiter=steps, tol=0.0, acceleration=False, implicit_diff=False, unroll=True
        )

        @jax.checkpoint
        def again(w: Any, decay: Any, data: Any) -> Any:
            return moved(w, case.rate, jax.grad(inner_loss)(w, decay, data))

        def end(w: Any, decay: Any, data: Any) -> Any:
            if not least_memory:
                return solver.run(w, decay, data).params
            return jax.lax.scan(lambda w, _: (again(w, decay, data), None), w, length=steps)[0]

        def outer_step(w: Any, lam: Any, data: Any) -> Any:
            train, valid = data

            def objective(lam: Any) -> Any:
                new = end(w, lam[0], train)
                return fit(new, valid), new

            found, new = jax.grad(objective, has_aux=True)(lam)
            return new, moved(lam, case.outer_rate, found), found

        halves = [(inputs(x), inputs(y)) for x, y in (case.train, case.valid)]
        super().__init__(outer_step, list(case.module.parameters()), [case.decay], halves)
        how = "a jax.lax.scan of steps under jax.checkpoint" if least_memory else "GradientDescent, unroll=True"
        self.note = f"{how}; {self.note}"


def build(tasks: Tasks, method: Method) -> Library:
    options = method.options
    return Library(tasks.case(method), options["network"], options["steps"], least_memory=options["least_memory"])
