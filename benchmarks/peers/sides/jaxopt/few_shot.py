"""(d) in jax: MAML by ``jax.grad`` through the steps, implicit MAML by JAXopt's ``custom_root`` around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxopt import implicit_diff

from benchmarks.peers.side import Method
from benchmarks.peers.sides.jaxopt.compiled import Compiled, inputs, moved
from benchmarks.peers.sides.jaxopt.implicit import cross_entropy, linear_solver
from benchmarks.peers.sides.jaxopt.networks import few_shot_net, sinusoid_net
from benchmarks.peers.workloads.few_shot import FewShot, Tasks

Loss = Callable[[Any, Any, Any], Any]


def build(tasks: Tasks, method: Method) -> Compiled:
    problem, sinusoid = tasks.case(method), method.options["network"] == "sinusoid"
    names = [name for name, _ in problem.network.named_parameters()]

    def loss(w: Sequence[Any], x: Any, y: Any) -> Any:
        named = dict(zip(names, w, strict=True))
        if sinusoid:
            return jnp.mean((sinusoid_net(named, x) - y) ** 2)
        return cross_entropy(few_shot_net(named, x), y).mean()

    solution = implicit(problem, loss) if problem.proximal else unrolled(problem, loss)

    def single(start: Any, task: Any) -> Any:
        def objective(start: Any) -> Any:
            return loss(solution(start, *task[:2]), *task[2:])

        return jax.grad(objective)(start)

    def step(_: Any, start: Any, data: Any) -> Any:
        each = jax.vmap(single, (None, 0))(start, data) if sinusoid else jax.lax.map(lambda t: single(start, t), data)
        found = [part.mean(0) for part in each]
        return [], moved(start, problem.outer_rate, found), found

    side = Compiled(step, [], list(problem.network.parameters()), [inputs(part) for part in problem.batch])
    side.note = f"tasks {'together by jax.vmap' if sinusoid else 'in turn by jax.lax.map'}; {side.note}"
    return side


def unrolled(problem: FewShot, loss: Loss) -> Callable[..., Any]:
    """Returns the steps of a task from λ."""

    def steps(start: Any, x: Any, y: Any) -> Any:
        w = start
        for _ in range(problem.steps):
            w = moved(w, problem.rate, jax.grad(loss)(w, x, y))
        return w

    return steps


def implicit(problem: FewShot, loss: Loss) -> Callable[..., Any]:
    """Returns the solution of a task near λ, as far as the steps go."""

    def proximal(w: Any, start: Any, x: Any, y: Any) -> Any:
        away = sum(jnp.sum((a - b) ** 2) for a, b in zip(w, start, strict=True))
        return loss(w, x, y) + problem.proximal / 2 * away

    gradient = jax.grad(proximal)
    cg = linear_solver(Method("conjugate_gradient", problem.products))

    @implicit_diff.custom_root(gradient, solve=cg)
    def solver(w: Any, start: Any, x: Any, y: Any) -> Any:
        for _ in range(problem.steps):
            w = moved(w, problem.rate, gradient(w, start, x, y))
        return w

    return lambda start, x, y: solver(start, start, x, y)
