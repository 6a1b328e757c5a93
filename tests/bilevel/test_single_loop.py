"""Single-loop methods on finite sums: theorems on quadratics with an exact solution, exact resume, honest counts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from bilevel import Status, hypergradient
from bilevel.errors import ConfigError, LossError, NonFiniteError, ParameterError
from bilevel.hypergrad import amigo, fsla, soba, stocbio, ttsa
from bilevel.hypergrad.stochastic import Stochastic
from bilevel.single_loop import (
    FSLA,
    SABA,
    SOBA,
    SRBA,
    TTSA,
    AmIGO,
    FiniteSum,
    Method,
    State,
    StocBiO,
    single_loop,
)
from bilevel.single_loop.problem import Oracles
from bilevel.single_loop.saba import INNER, OUTER
from tests.bilevel.strategies import DOUBLE, forall

METHODS: dict[str, Callable[..., Method]] = {
    "SOBA": SOBA,
    "SABA": SABA,
    "SRBA": SRBA,
    "FSLA": FSLA,
    "AmIGO": lambda **fields: AmIGO(inner_steps=2, linear_steps=2, **fields),
    "AmIGO with conjugate gradients": lambda **fields: AmIGO(
        inner_steps=1, linear_steps=2, solver="conjugate_gradient", **fields
    ),
    "stocBiO": lambda **fields: StocBiO(inner_steps=2, terms=2, **fields),
    "TTSA": lambda **fields: TTSA(terms=3, **fields),
}


@dataclass(frozen=True)
class Quadratic:
    """``fᵢ = wᵀAᵢw/2 + wᵀ(Bᵢλ + cᵢ)`` and ``Fⱼ = ‖w − tⱼ‖²/2 + ‖λ − eⱼ‖²/2``, with everything known."""

    A: Tensor
    B: Tensor
    c: Tensor
    t: Tensor
    e: Tensor

    def inner_loss(self, w: Tensor, lam: Tensor, indices: Tensor) -> Tensor:
        return w @ (self.A[indices].mean(0) @ w) / 2 + w @ (self.B[indices].mean(0) @ lam + self.c[indices].mean(0))

    def outer_loss(self, w: Tensor, lam: Tensor, indices: Tensor) -> Tensor:
        distances = (w - self.t[indices]).square().sum(1) + (lam - self.e[indices]).square().sum(1)
        return distances.mean() / 2

    @property
    def problem(self) -> FiniteSum:
        return FiniteSum(self.inner_loss, len(self.A), self.outer_loss, len(self.t))

    def solution(self) -> tuple[Tensor, Tensor, Tensor]:
        """w, q and λ at the solution."""
        A = self.A.mean(0)
        slope, offset = -torch.linalg.solve(A, self.B.mean(0)), -torch.linalg.solve(A, self.c.mean(0))
        right = self.e.mean(0) - slope.T @ (offset - self.t.mean(0))
        lam = torch.linalg.solve(slope.T @ slope + torch.eye(slope.shape[1], dtype=DOUBLE), right)
        w = slope @ lam + offset
        return w, torch.linalg.solve(A, w - self.t.mean(0)), lam

    def error(self, state: State) -> float:
        """The distance of (w, q, λ) from the solution."""
        w, q, lam = self.solution()
        parts = (state.inner - w, state.memory["solution"][0] - q, state.outer - lam)
        return float(torch.cat([part.flatten() for part in parts]).norm())

    def directions(self, w: Tensor, q: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean directions of w, q and λ."""
        A, B = self.A.mean(0), self.B.mean(0)
        return (
            A @ w + B @ lam + self.c.mean(0),
            A @ q - (w - self.t.mean(0)),
            lam - self.e.mean(0) - B.T @ q,
        )


def quadratic(number: int = 0, n: int = 6, m: int = 5, size: int = 3, outer: int = 2) -> Quadratic:
    generator = torch.Generator().manual_seed(number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    A = normal(n, size, size)
    A = 0.5 * A @ A.transpose(1, 2) / size + 0.5 * torch.eye(size, dtype=DOUBLE)
    return Quadratic(A, 0.5 * normal(n, size, outer), normal(n, size), normal(m, size), normal(m, outer))


def zeros(case: Quadratic) -> tuple[Tensor, Tensor]:
    return torch.zeros(case.A.shape[1], dtype=DOUBLE), torch.zeros(case.e.shape[1], dtype=DOUBLE)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(case: Quadratic, method: Method, updates: int, seed: int = 0) -> State:
    state = method.init(case.problem, *zeros(case), generator(seed))
    for _ in range(updates):
        state = method.update(case.problem, state)
    return state


@contextmanager
def drawing(draws: dict[int, list[int]]) -> Iterator[None]:
    """Lets blocks be drawn in a given order, by level."""
    queues = {level: iter(blocks) for level, blocks in draws.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Oracles, "_draw", lambda self, level: next(queues[level]))
        yield


# Convergence


@pytest.mark.parametrize("method", [SABA(inner_step=0.1, outer_step=0.1), SRBA(inner_step=0.1, outer_step=0.1)])
def test_variance_reduction_converges_linearly_with_constant_steps(method: Method) -> None:
    case = quadratic()
    errors: list[float] = []
    single_loop(
        case.problem, *zeros(case), method, 360, record=60, callback=lambda state: errors.append(case.error(state))
    )
    assert errors[0] < 0.1
    assert errors[2] < 1e-2 * errors[0]
    assert errors[4] < 1e-2 * errors[2]  # the same factor again: a straight line on a logarithmic scale
    assert errors[5] < 1e-7


def test_constant_steps_without_variance_reduction_stall_at_a_floor_that_shrinks_with_the_step() -> None:
    case = quadratic()

    def floor(step: float, steps: int) -> float:
        errors: list[float] = []
        method = SOBA(inner_step=step, outer_step=step, inner_decay=0.0, outer_decay=0.0)
        single_loop(
            case.problem,
            *zeros(case),
            method,
            steps,
            record=10,
            callback=lambda state: errors.append(case.error(state)),
        )
        late = errors[len(errors) // 2 :]
        middle, end = late[: len(late) // 2], late[len(late) // 2 :]
        assert sum(end) / len(end) > 0.3 * sum(middle) / len(middle)  # no longer falling
        return sum(late) / len(late)

    large, small = floor(0.1, 300), floor(0.01, 600)
    assert large > 0.1
    assert 1e-3 < small < 0.7 * large


def test_on_full_batches_every_method_reaches_the_solution_or_the_fixed_point_of_its_truncation() -> None:
    case = quadratic()
    w, q, lam = case.solution()
    for name, make in METHODS.items():
        decays = {"inner_decay": 0.0, "outer_decay": 0.0, "inner_batch": None, "outer_batch": None}
        run = single_loop(case.problem, *zeros(case), make(inner_step=0.5, outer_step=0.3, **decays), 70)
        assert run.status is Status.STOPPED_AT_CAP
        if name == "TTSA":
            continue  # random lengths: right on average only
        if name == "stocBiO":
            A, B = case.A.mean(0), case.B.mean(0)
            series = 0.5 * sum(torch.matrix_power(torch.eye(3, dtype=DOUBLE) - 0.5 * A, k) for k in range(3))
            slope, offset = -torch.linalg.solve(A, B), -torch.linalg.solve(A, case.c.mean(0))
            left = torch.eye(2, dtype=DOUBLE) - B.T @ series @ slope
            lam_there = torch.linalg.solve(left, case.e.mean(0) + B.T @ series @ (offset - case.t.mean(0)))
            torch.testing.assert_close(run.outer, lam_there, rtol=1e-6, atol=1e-6)
            continue
        torch.testing.assert_close(run.inner, w, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(run.outer, lam, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(run.state.memory["solution"][0], q, rtol=1e-6, atol=1e-6)


# Directions, by enumeration of all draws


def mean_update(case: Quadratic, method: Method, state: State) -> tuple[Tensor, Tensor, Tensor]:
    """The exact mean of (w, q, λ) after an update, over inner and outer blocks with their probabilities."""

    def blocks(total: int, size: int | None) -> list[float]:
        size = size or total
        return [min(size, total - start) / total for start in range(0, total, size)]

    inner, outer = blocks(len(case.A), method.inner_batch), blocks(len(case.t), method.outer_batch)
    total = [torch.zeros_like(part) for part in (state.inner, state.memory["solution"][0], state.outer)]
    for (i, p), (j, r) in itertools.product(enumerate(inner), enumerate(outer)):
        with drawing({0: [i], 1: [j]}):
            new = method.update(case.problem, state)
        for place, part in enumerate((new.inner, new.memory["solution"][0], new.outer)):
            total[place] = total[place] + p * r * part
    return total[0], total[1], total[2]


@forall(
    12, number=st.integers(0, 2**31), sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)), updates=st.integers(0, 5)
)
def test_soba_and_saba_directions_are_unbiased(number: int, sizes: tuple[int, int], updates: int) -> None:
    # Also where the last block is shorter: it is drawn, and weighted, by its size.
    case = quadratic(number)
    for kind in (SOBA, SABA):
        method = kind(
            inner_step=0.1, linear_step=0.05, outer_step=0.03, inner_decay=0.0, outer_decay=0.0,
            inner_batch=sizes[0], outer_batch=sizes[1],
        )  # fmt: skip
        state = made(case, method, updates, seed=number)
        w, q, lam = state.inner, state.memory["solution"][0], state.outer
        D = case.directions(w, q, lam)
        found = mean_update(case, method, state)
        for part, start, length, direction in zip(found, (w, q, lam), (0.1, 0.05, 0.03), D, strict=True):
            torch.testing.assert_close(part, start - length * direction, rtol=1e-10, atol=1e-11)


@forall(8, number=st.integers(0, 2**31), updates=st.integers(1, 9))
def test_saba_tables_hold_what_was_last_seen_and_their_mean(number: int, updates: int) -> None:
    case = quadratic(number)
    method = SABA(inner_step=0.1, outer_step=0.1, inner_batch=4, outer_batch=2)
    draws = torch.randint(2, (updates,), generator=generator(number)).tolist()
    with drawing({0: draws, 1: draws}):
        states = [method.init(case.problem, *zeros(case), generator())]
        for _ in range(updates):
            states.append(method.update(case.problem, states[-1]))
    memory = states[-1].memory
    for block in range(2):
        # The last point at which the block was drawn, or the first of all.
        seen = max((place for place, drawn in enumerate(draws) if drawn == block), default=0)
        at = states[seen]
        rows = slice(4 * block, 4 * block + 4)
        A, B, c = (part[rows].mean(0) for part in (case.A, case.B, case.c))
        q = at.memory["solution"][0]
        expected = (A @ at.inner + B @ at.outer + c, A @ q, B.T @ q)
        for name, value in zip(INNER, expected, strict=True):
            torch.testing.assert_close(memory[name][0][block], value, rtol=1e-10, atol=1e-11)
    for names, weights in ((INNER, [4 / 6, 2 / 6]), (OUTER, [2 / 5, 2 / 5, 1 / 5])):
        for name in names:
            mean = sum(weight * row for weight, row in zip(weights, memory[name][0], strict=True))
            torch.testing.assert_close(memory[f"mean {name}"][0], mean, rtol=1e-10, atol=1e-11)


@forall(5, number=st.integers(0, 2**31), period=st.integers(1, 3))
def test_srba_is_the_full_gradient_at_the_period_and_recursive_between(number: int, period: int) -> None:
    case = quadratic(number)
    method = SRBA(inner_step=0.1, linear_step=0.05, outer_step=0.03, period=period)
    state = method.init(case.problem, *zeros(case), generator())
    for step in range(2 * period + 2):
        w, q, lam = state.inner, state.memory["solution"][0], state.outer
        D = case.directions(w, q, lam)
        found = mean_update(case, method, state)
        if step % period:
            # E Δₜ = D(uₜ) − D(uₜ₋₁) + Δₜ₋₁
            old = case.directions(*(state.memory[name][0] for name in ("old w", "old q", "old λ")))
            last = [state.memory[f"direction {name}"][0] for name in ("w", "q", "λ")]
            D = tuple(new - before + kept for new, before, kept in zip(D, old, last, strict=True))  # type: ignore[assignment]
        for part, start, length, direction in zip(found, (w, q, lam), (0.1, 0.05, 0.03), D, strict=True):
            torch.testing.assert_close(part, start - length * direction, rtol=1e-10, atol=1e-11)
        state = method.update(case.problem, state)


def test_srba_projects_the_linear_variable() -> None:
    case = quadratic(3)
    free, held = (made(case, SRBA(inner_step=0.3, radius=radius), 12) for radius in (None, 0.05))
    assert float(free.memory["solution"][0].norm()) > 0.05
    assert float(held.memory["solution"][0].norm()) == pytest.approx(0.05)


# One source of truth: on full batches these are the estimators, called in turn with gradient steps


def by_hand(
    case: Quadratic,
    estimator: Stochastic,
    method: Method,
    inner_steps: int,
    updates: int,
    simultaneous: bool,
    state: Any,
) -> tuple[Tensor, Tensor]:
    every, other = torch.arange(len(case.A)), torch.arange(len(case.t))
    w, lam = zeros(case)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return case.inner_loss(w, lam, every)

    def slope(w: Tensor, lam: Tensor) -> Tensor:
        point = w.clone().requires_grad_()
        return torch.autograd.grad(inner(point, lam), point)[0]

    for step in range(updates):
        length, _, outer_length = method.lengths(step)
        moved = w
        for _ in range(inner_steps):
            moved = moved - length * slope(moved, lam)
        result = hypergradient(
            inner,
            lambda w, lam: case.outer_loss(w, lam, other),
            w if simultaneous else moved,
            lam,
            estimator,
            state=state,
        )
        w, lam, state = moved, lam - outer_length * result.grad, result.state
    return w, lam


@forall(10, number=st.integers(0, 2**31), updates=st.integers(1, 4))
def test_full_batches_are_the_estimators_in_turn_with_gradient_steps(number: int, updates: int) -> None:
    case = quadratic(number)
    shared: dict[str, Any] = {"inner_step": 0.2, "outer_step": 0.1, "inner_batch": None, "outer_batch": None}
    shared |= {"inner_decay": 0.0, "outer_decay": 0.0}
    pairs: list[tuple[Method, Stochastic, int]] = [
        (SOBA(**shared), soba.SOBA(step_size=0.2), 1),
        (SABA(**shared), soba.SOBA(step_size=0.2), 1),
        (SRBA(**shared), soba.SOBA(step_size=0.2), 1),
        (FSLA(**shared), fsla.FSLA(step_size=0.2), 1),
        (AmIGO(inner_steps=2, linear_steps=3, **shared), amigo.AmIGO(steps=3, step_size=0.2), 2),
        (StocBiO(inner_steps=3, terms=2, **shared), stocbio.StocBiO(terms=2, step_size=0.2), 3),
        (TTSA(terms=4, **{**shared, "linear_step": 0.2}), ttsa.TTSA(terms=4, step_size=0.2), 1),
    ]
    for method, estimator, inner_steps in pairs:
        state = method.init(case.problem, *zeros(case), generator(number))
        first = dict(state.memory) if isinstance(method, TTSA) else {}
        for _ in range(updates):
            state = method.update(case.problem, state)
        simultaneous = isinstance(estimator, soba.SOBA)
        w, lam = by_hand(case, estimator, method, inner_steps, updates, simultaneous, first)
        torch.testing.assert_close(state.inner, w, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(state.outer, lam, rtol=1e-11, atol=1e-12)


@forall(8, number=st.integers(0, 2**31), momentum=st.floats(0.1, 1.0))
def test_fsla_gives_momentum_to_the_whole_hypergradient(number: int, momentum: float) -> None:
    # dₜ = p(uₜ; ξₜ) + (1 − ηₜ)(dₜ₋₁ − p(uₜ₋₁; ξₜ)), against dense matrices, every batch its own.
    case = quadratic(number)
    method = FSLA(inner_step=0.2, outer_step=0.1, momentum=momentum)
    picks = torch.randint(5, (4, 5), generator=generator(number)).tolist()
    w, lam = zeros(case)
    q, d = torch.zeros_like(w), None
    old: tuple[Tensor, Tensor, Tensor] | None = None
    state = method.init(case.problem, w, lam, generator())
    for step, (a, b, c, j, k) in enumerate(picks):
        with drawing({0: [a, b, c], 1: [j, k]}):
            state = method.update(case.problem, state)
        length, _, outer_length = method.lengths(step)
        w = w - length * (case.A[a] @ w + case.B[a] @ lam + case.c[a])
        before, q = q, q - length * (case.A[b] @ q - (w - case.t[j]))
        p = lam - case.e[k] - case.B[c].T @ q
        if d is None or old is None:
            d = p
        else:
            eta = momentum * (step + 1) ** -0.5
            d = p + (1 - eta) * (d - (old[2] - case.e[k] - case.B[c].T @ before))
        old = (w, q, lam)
        lam = lam - outer_length * d
        torch.testing.assert_close(state.inner, w, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(state.outer, lam, rtol=1e-10, atol=1e-11)


# States


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_state_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    case = quadratic()
    method = METHODS[name](inner_step=0.1, inner_batch=2, outer_batch=2)
    whole = single_loop(case.problem, *zeros(case), method, 9, seed=5).state
    part = single_loop(case.problem, *zeros(case), method, 4, seed=5).state
    torch.save(part.as_dict(), tmp_path / "state")
    loaded = State.from_dict(torch.load(tmp_path / "state", weights_only=True))
    resumed = single_loop(case.problem, *zeros(case), method, 5, state=loaded).state
    assert_equal(resumed, whole)
    assert_equal(made(case, method, 9, seed=5), whole)  # and so do the pure functions


@pytest.mark.parametrize("name", METHODS)
def test_an_update_changes_nothing_of_the_state_before(name: str) -> None:
    case = quadratic()
    method = METHODS[name](inner_step=0.1, inner_batch=2, outer_batch=2)
    state = made(case, method, 3)
    copy = State.from_dict(clone(state.as_dict()))
    random = torch.get_rng_state()
    new = method.update(case.problem, state)
    assert_equal(state, copy)
    assert new.step == 4
    assert torch.equal(torch.get_rng_state(), random)  # the state's generator is the only one
    assert_equal(method.update(case.problem, state, donate=True), new)
    # A run owns neither the state that it is given nor those that a callback has seen.
    given, seen = State.from_dict(clone(copy.as_dict())), []
    run = single_loop(
        case.problem,
        *zeros(case),
        method,
        6,
        state=given,
        record=2,
        callback=lambda state: seen.append((state, State.from_dict(clone(state.as_dict())))),
    )
    assert run.state.step == 9
    assert_equal(given, copy)
    assert len(seen) == 3
    for held, then in seen:
        assert_equal(held, then)


def test_the_first_state_is_a_copy_and_the_generator_is_not_advanced() -> None:
    case = quadratic()
    w, lam = zeros(case)
    seeded = generator(4)
    before = seeded.get_state()
    state = TTSA().init(case.problem, w, lam, seeded)
    w += 1
    lam += 1
    assert torch.equal(state.inner, torch.zeros_like(w))
    assert torch.equal(state.outer, torch.zeros_like(lam))
    assert torch.equal(seeded.get_state(), before)


def clone(node: Any) -> Any:
    if isinstance(node, Tensor):
        return node.clone()
    if isinstance(node, dict):
        return {key: clone(part) for key, part in node.items()}
    return type(node)(clone(part) for part in node) if isinstance(node, (tuple, list)) else node


def assert_equal(first: State, second: State) -> None:
    assert dataclasses.replace(first, inner=0, outer=0, memory={}, generator=0) == dataclasses.replace(  # type: ignore[arg-type]
        second,
        inner=0,
        outer=0,
        memory={},
        generator=0,  # type: ignore[arg-type]
    )
    assert set(first.memory) == set(second.memory)
    for key in first.memory:
        assert all(torch.equal(a, b) for a, b in zip(first.memory[key], second.memory[key], strict=True))
    for name in ("inner", "outer", "generator"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("name", METHODS)
def test_parameters_may_be_held_in_any_structure(name: str) -> None:
    case = quadratic()
    method = METHODS[name](inner_step=0.1, inner_batch=2, outer_batch=2)
    plain = single_loop(case.problem, *zeros(case), method, 5)
    frozen = nn.Parameter(torch.ones(3, dtype=DOUBLE), requires_grad=False)

    def join(w: Any) -> Tensor:
        return torch.cat([w["head"][0].reshape(1), w["rest"]]) * w["scale"]

    problem = FiniteSum(
        lambda w, lam, i: case.inner_loss(join(w), torch.stack(lam), i), 6,
        lambda w, lam, j: case.outer_loss(join(w), torch.stack(lam), j), 5,
    )  # fmt: skip
    w = {"head": (torch.zeros((), dtype=DOUBLE),), "rest": torch.zeros(2, dtype=DOUBLE), "scale": frozen}
    lam = [torch.zeros((), dtype=DOUBLE), torch.zeros((), dtype=DOUBLE)]
    held = single_loop(problem, w, lam, method, 5)
    torch.testing.assert_close(join(held.inner), plain.inner, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.stack(held.outer), plain.outer, rtol=1e-11, atol=1e-12)
    assert held.inner["scale"] is frozen
    assert all(not part.requires_grad for part in held.outer)
    assert torch.equal(w["rest"], torch.zeros(2, dtype=DOUBLE))


# Costs and draws


@pytest.mark.parametrize(
    ("name", "inner", "products", "outer"),
    [
        ("SOBA", 1, 1, 1),
        ("SABA", 1, 1, 1),
        ("SRBA", 2, 2, 2),
        ("FSLA", 4, 3, 3),
        ("AmIGO", 2 + 3, 3, 1),
        ("AmIGO with conjugate gradients", 1 + 2, 4, 1),
        ("stocBiO", 2 + 3, 3, 1),
    ],
)
def test_counts_are_what_the_documentation_says_and_what_was_called(
    name: str, inner: int, products: int, outer: int
) -> None:
    case, seen = quadratic(), {"inner": 0, "outer": 0, "calls": 0}

    def counted(which: str, loss: Any) -> Any:
        def call(w: Tensor, lam: Tensor, indices: Tensor) -> Tensor:
            seen[which] += len(indices)
            seen["calls"] += 1
            return loss(w, lam, indices)

        return call

    problem = FiniteSum(counted("inner", case.inner_loss), 6, counted("outer", case.outer_loss), 5)
    method = METHODS[name](inner_step=0.1, inner_batch=2, outer_batch=1)
    state = method.init(problem, *zeros(case), generator())
    for _ in range(2):
        state = method.update(problem, state)
    before, start = dict(seen), state.counts
    state = method.update(problem, state)
    assert seen["inner"] - before["inner"] == 2 * inner
    assert seen["outer"] - before["outer"] == outer
    assert state.counts.gradients == seen["inner"] + seen["outer"]
    assert state.counts.gradients - start.gradients == 2 * inner + outer
    assert state.counts.products - start.products == 2 * products
    assert state.counts.forward == seen["calls"]
    assert state.counts.forward - start.forward == inner + outer
    assert state.counts.backward - start.backward == inner + outer + products


def test_srba_counts_its_full_evaluations() -> None:
    case = quadratic()
    method = SRBA(inner_step=0.1, period=3)
    state = made(case, method, 4)  # full, recursive, recursive, full
    assert state.counts.gradients == 2 * (6 + 5) + 2 * 4
    assert state.counts.products == 2 * 6 + 2 * 2
    assert made(case, SRBA(inner_step=0.1), 11).counts.gradients == (6 + 5) + 10 * 4  # the default: 6 + 5 batches


def test_blocks_are_drawn_in_proportion_to_their_sizes_and_cover_all_samples() -> None:
    case, seen = quadratic(n=7), torch.zeros(7)

    def inner(w: Tensor, lam: Tensor, indices: Tensor) -> Tensor:
        seen[indices] += 1
        return case.inner_loss(w, lam, indices)

    problem = dataclasses.replace(case.problem, inner_loss=inner)
    single_loop(problem, *zeros(case), SOBA(inner_step=0.01, inner_batch=3), 700, seed=2)
    # Blocks {0,1,2}, {3,4,5}, {6}: 300, 300 and 100 expected; four standard deviations.
    for indices, expected in (([0, 1, 2], 300), ([3, 4, 5], 300), ([6], 100)):
        assert all(
            abs(float(seen[place]) - expected) < 4 * (expected * (1 - expected / 700)) ** 0.5 for place in indices
        )
    assert len({float(seen[place]) for place in (0, 1, 2)}) == 1


def test_lengths_decay_as_published() -> None:
    soba, saba = SOBA(inner_step=0.3, outer_step=0.2), SABA(inner_step=0.3, outer_step=0.2)
    assert soba.lengths(0) == (0.3, 0.3, 0.2)
    assert soba.lengths(31) == pytest.approx((0.3 / 4, 0.3 / 4, 0.2 / 8))
    assert saba.lengths(1000) == (0.3, 0.3, 0.2)
    assert TTSA().lengths(31)[1] == 0.1  # the series has a constant step
    decreasing = TTSA(inner_step=0.3, linear_step=0.4, outer_step=0.2)
    assert decreasing.lengths(31) == pytest.approx((0.3 / 4, 0.4, 0.2 / 8))
    assert FSLA(inner_step=0.3, outer_step=0.2).lengths(15) == pytest.approx((0.075, 0.075, 0.05))
    estimator = FSLA(momentum=0.8).estimator(15)
    assert isinstance(estimator, fsla.FSLA)
    assert estimator.momentum == pytest.approx(0.2)


# Failures


def test_divergence_is_told_and_the_last_finite_state_returned() -> None:
    case = quadratic()
    run = single_loop(
        case.problem, *zeros(case), SOBA(inner_step=50.0, inner_decay=0.0, outer_step=0.1), 2000, record=10
    )
    assert run.status is Status.DIVERGED
    assert torch.isfinite(run.inner).all()
    assert "lower inner_step" in run.message
    assert run.iterates[-1].step == run.state.step < 2000


def test_a_last_iterate_that_is_not_finite_is_not_returned() -> None:
    # No loss is evaluated there any more: the iterate itself is looked at.
    case = quadratic()
    large = dataclasses.replace(case, c=10 * torch.ones_like(case.c))
    run = single_loop(large.problem, *zeros(case), SOBA(inner_step=1e308), 1)
    assert run.status is Status.DIVERGED
    assert torch.equal(run.inner, torch.zeros(3, dtype=DOUBLE))
    assert "after step 0 is not finite (seen at step 1)" in run.message


def test_failed_linear_solves_are_counted() -> None:
    case = quadratic()
    bad = StocBiO(inner_steps=1, inner_step=0.1, terms=8, linear_step=20.0, outer_step=1e-12)
    run = single_loop(case.problem, *zeros(case), bad, 5)
    assert run.state.failures == 5
    assert "5 of 5 updates report a failed solve: lower linear_step" in run.message
    assert single_loop(case.problem, *zeros(case), StocBiO(inner_step=0.1, outer_step=0.01), 5).state.failures == 0


def test_bad_losses_are_refused_at_the_first_step() -> None:
    case = quadratic()
    for bad, error, message in [
        (lambda w, lam, i: (w - lam.sum()) ** 2, LossError, r"inner problem must be a scalar"),
        (lambda w, lam, i: lam.sum(), LossError, r"does not depend on its inner parameters"),
        (lambda w, lam, i: w.sum() * float("nan"), NonFiniteError, r"inner problem is nan"),
    ]:
        problem = dataclasses.replace(case.problem, inner_loss=bad)
        with pytest.raises(error, match=message):
            single_loop(problem, *zeros(case), SOBA(), 3)
    shared = torch.ones(2)
    with pytest.raises(ParameterError, match="inner and an outer parameter at once"):
        single_loop(case.problem, shared, shared, SOBA(), 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SOBA(inner_step=0.0), "SOBA.inner_step must be a finite number above 0"),
        (lambda: SOBA(linear_step=-1.0), "SOBA.linear_step must be"),
        (lambda: SOBA(linear_decay=0.5), "SOBA.linear_decay belongs to linear_step"),
        (lambda: SABA(inner_batch=0), "SABA.inner_batch must be an integer of at least 1"),
        (lambda: SRBA(period=0), "SRBA.period must be an integer of at least 1"),
        (lambda: SRBA(radius=0.0), "SRBA.radius must be a finite number above 0"),
        (lambda: AmIGO(inner_steps=0), "AmIGO.inner_steps must be an integer of at least 1"),
        (lambda: AmIGO(solver="newton"), "AmIGO.solver"),
        (lambda: FSLA(momentum=1.5), "FSLA.momentum must be at most 1"),
        (lambda: FSLA(momentum_decay=-1.0), "FSLA.momentum_decay must be"),
        (lambda: FiniteSum(abs, 0, abs, 1), "FiniteSum.num_inner must be an integer of at least 1"),  # type: ignore[arg-type]
        (lambda: State.from_dict({"step": 1}), "not a state of a single-loop method"),
        (lambda: single_loop(quadratic().problem, *zeros(quadratic()), SOBA(), -1), "steps must be an integer"),
        (lambda: single_loop(quadratic().problem, *zeros(quadratic()), SOBA(), 1, record=0), "record must be"),
    ],
)
def test_bad_input_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_callback_sees_every_recorded_state_and_may_end_the_run() -> None:
    case, steps = quadratic(), []

    def callback(state: State) -> bool:
        steps.append(state.step)
        return state.step >= 6

    run = single_loop(case.problem, *zeros(case), SABA(inner_step=0.1), 20, record=3, callback=callback)
    assert steps == [3, 6]
    assert [iterate.step for iterate in run.iterates] == [0, 3, 6]
    assert run.state.step == 6
