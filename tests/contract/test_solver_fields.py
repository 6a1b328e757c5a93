"""The fields that methods of the adjoint system share: warm start, preconditioner, products by differences."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from bilevel import ConjugateGradient, Engine, Hypergradient, Neumann, Problem, Status, hypergradient
from bilevel.errors import ConfigError, ParameterError
from bilevel.functional import FunctionObjective, PassCount, leaves
from bilevel.hypergrad import Implicit, InnerProblem, Pullback
from bilevel.hypergrad.gmres import GMRES
from bilevel.hypergrad.minres import MINRES
from bilevel.hypergrad.nystrom import Nystrom
from bilevel.randomness import Replay
from tests.bilevel.strategies import DOUBLE, forall, logarithmic, make_quadratic, quadratics
from tests.contract.contract import Sample, operator_norm

KRYLOV = (ConjugateGradient, MINRES, GMRES)
ITERATIVE = (*KRYLOV, Neumann)


def pull(
    sample: Sample, estimator: Any, state: Any = None, diagonal: Tensor | None = None
) -> tuple[Pullback, PassCount]:
    """A pullback at the sample's solution, with the passes that it took."""
    inner_loss, _ = sample.losses()
    passes = PassCount()
    objective = FunctionObjective(
        lambda w, lam: inner_loss(w[0], lam[0]), "the inner problem", Replay(("cpu",)), passes
    )
    problem = InnerProblem(
        objective,
        leaves((sample.inner,)),
        leaves((sample.outer,)),
        diagonal=None if diagonal is None else (diagonal,),
    )
    return estimator.respond(problem).pullback((sample.cotangent,), state or {}), passes


def implicit_part(sample: Sample, damping: float = 0.0) -> Tensor:
    return sample.hypergradient(damping=damping) - sample.direct


def called(sample: Sample, estimator: Any, state: Any) -> Hypergradient:
    return hypergradient(*sample.losses(), sample.inner, sample.outer, estimator, state=state)


def moved(sample: Sample, distance: float) -> Sample:
    """The same problem at other outer parameters, and so another solution and cotangent."""
    outer = sample.outer + distance * torch.ones_like(sample.outer)
    return Sample(sample.kind, sample.data, outer, sample.solution(outer))


# Warm start


@pytest.mark.parametrize("method", KRYLOV)
def test_a_solved_system_costs_one_product_to_recognise(method: Any) -> None:
    sample = make_quadratic(8, 3, 100.0, 1.0, 3)
    estimator = method(warm_start=True)
    first = called(sample, estimator, {})
    again = called(sample, estimator, first.state)
    assert first.info.status is again.info.status is Status.CONVERGED
    assert (again.info.iterations, again.info.products) == (1, 1)  # the answer comes with the look
    torch.testing.assert_close(again.grad, first.grad, rtol=1e-12, atol=1e-12)
    # Without a warm start the state carries no solution, and the work is done again.
    cold = called(sample, method(), called(sample, method(), None).state)
    assert cold.info.iterations == first.info.iterations > 4


def path_of_quadratics(count: int) -> list[Sample]:
    """Outer parameters that move evenly: the solutions of the adjoint systems lie on a line."""
    first = make_quadratic(8, 3, 100.0, 1.0, 3)
    return [moved(first, 0.3 * step) for step in range(count)]


@pytest.mark.parametrize("method", ITERATIVE)
def test_a_linear_warm_start_goes_on_as_the_last_two_solutions_went(method: Any) -> None:
    fields = {"terms": 2000} if method is Neumann else {}
    counts = {}
    for warm in (True, "linear"):
        estimator, state, counts[warm] = method(warm_start=warm, rtol=1e-8, **fields), {}, []
        for sample in path_of_quadratics(4):
            result = called(sample, estimator, state)
            torch.testing.assert_close(result.grad, sample.hypergradient(), rtol=1e-5, atol=1e-6)
            state = result.state
            counts[warm].append(result.info.products)
    assert counts["linear"][:2] == counts[True][:2]  # the second call has one solution to start from
    assert counts["linear"][2:] == [1, 1] < counts[True][2:]


@pytest.mark.parametrize("method", KRYLOV)
def test_a_quadratic_warm_start_is_exact_where_solutions_lie_on_a_parabola(method: Any) -> None:
    # w* and with it v = ∂F/∂w and q are linear in λ here: what bends the path of q is an outer loss that moves.
    bend = torch.linspace(1.0, 2.0, 8, dtype=DOUBLE)
    counts: dict[str, list[int]] = {}
    for warm in ("linear", "quadratic"):
        estimator, state, counts[warm] = method(warm_start=warm, rtol=1e-8), {}, []
        for step, sample in enumerate(path_of_quadratics(5)):
            inner_loss, outer_loss = sample.losses()
            moving = lambda w, lam, outer=outer_loss, step=step: outer(w, lam) + 0.05 * step**2 * (bend * w).sum()  # noqa: E731
            result = hypergradient(inner_loss, moving, sample.inner, sample.outer, estimator, state=state)
            exact = hypergradient(inner_loss, moving, sample.inner, sample.outer, "exact")
            torch.testing.assert_close(result.grad, exact.grad, rtol=1e-5, atol=1e-6)
            state = result.state
            counts[warm].append(result.info.products)
        kept = {"linear": 2, "quadratic": 3}[warm]
        assert sum(key.startswith("solution") for key in state) == kept
    assert counts["quadratic"][:3] == counts["linear"][:3]  # the third call has two solutions to start from
    assert counts["quadratic"][3:] == [1, 1] < counts["linear"][3:]


@pytest.mark.parametrize("method", [ConjugateGradient, Neumann])
def test_a_preconditioner_is_kept_for_as_many_calls_as_it_is_to_serve(method: Any) -> None:
    sample = make_quadratic(8, 3, 100.0, 1.0, 3)
    fields = {"terms": 5, "step_size": 0.5} if method is Neumann else {"rtol": 1e-10}
    estimator = method(preconditioner="nystrom", preconditioner_rank=4, preconditioner_every=3, **fields)
    assert estimator.needs_state
    state, products, grads = {}, [], []
    for _ in range(7):
        result = called(sample, estimator, state)
        state = result.state
        products.append(result.info.products)
        grads.append(result.grad)
    with_rank, without = products[0], products[1]
    assert with_rank - without == 4
    assert products == [with_rank, without, without] * 2 + [with_rank]
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-9, atol=1e-9)


def test_a_kept_preconditioner_of_another_problem_is_refused() -> None:
    estimator = ConjugateGradient(preconditioner="nystrom", preconditioner_rank=2, preconditioner_every=2)
    state = called(make_quadratic(8, 3, 100.0, 1.0, 3), estimator, {}).state
    with pytest.raises(ConfigError, match="belongs to another problem: its preconditioner"):
        called(make_quadratic(6, 3, 100.0, 1.0, 3), estimator, state)


class Experts:
    """Losses of two experts' weights, of which a batch reaches one; a shared weight is reached by all batches."""

    def __init__(self, sizes: tuple[int, int] = (4, 4)) -> None:
        generator = torch.Generator().manual_seed(0)
        self.w = tuple(torch.randn(size, generator=generator, dtype=DOUBLE) for size in (3, *sizes))
        factors = [torch.randn(3 + size, 3 + size, generator=generator, dtype=DOUBLE) for size in sizes]
        self.hessians = [factor @ factor.T + torch.eye(len(factor), dtype=DOUBLE) for factor in factors]

    def called(self, expert: int, estimator: Any, state: Any) -> Hypergradient:
        def inner(w: tuple[Tensor, ...], lam: Tensor) -> Tensor:
            active = torch.cat([w[0], w[1 + expert]]) - lam[: 3 + len(w[1 + expert])]
            return active @ self.hessians[expert] @ active / 2

        def outer(w: tuple[Tensor, ...], lam: Tensor) -> Tensor:
            return torch.cat([w[0], w[1 + expert]]).square().sum()

        return hypergradient(inner, outer, self.w, torch.ones(9, dtype=DOUBLE), estimator, state=state)


@pytest.mark.parametrize("sizes", [(4, 6), (4, 4)])
@pytest.mark.parametrize("method", [ConjugateGradient, MINRES, GMRES])
def test_a_warm_start_follows_the_variables_that_reach_the_loss(method: Any, sizes: tuple[int, int]) -> None:
    experts, estimator = Experts(sizes), method(rtol=1e-8, warm_start=True)
    cold = [experts.called(expert, method(rtol=1e-8), None).grad for expert in (0, 1)]
    state: Any = {}
    for expert in (0, 1, 0, 1):
        found = experts.called(expert, estimator, state)
        torch.testing.assert_close(found.grad, cold[expert], rtol=1e-6, atol=1e-6)
        assert found.info.products > 1  # a start of the shared variables is no solution here
        again = experts.called(expert, estimator, found.state)
        assert again.info.products == 1
        state = again.state
        assert [part.shape for part in state["solution"]] == [part.shape for part in experts.w]
    assert all(float(part.norm()) > 0.0 for part in state["solution"])  # what the other expert had is kept for it


@pytest.mark.parametrize("warm_start", ["linear", "quadratic"])
def test_a_warm_start_from_several_solutions_follows_the_variables_too(warm_start: str) -> None:
    experts, estimator = Experts((4, 6)), ConjugateGradient(rtol=1e-8, warm_start=warm_start)
    state: Any = {}
    for expert in (0, 1, 1, 0, 0, 1):
        found = experts.called(expert, estimator, state)
        expected = experts.called(expert, ConjugateGradient(rtol=1e-8), None)
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-6, atol=1e-6)
        state = found.state


@pytest.mark.parametrize("sizes", [(4, 6), (4, 4)])
def test_a_preconditioner_is_made_anew_for_variables_that_it_does_not_know(sizes: tuple[int, int]) -> None:
    fields = {"preconditioner": "nystrom", "preconditioner_rank": 3, "rtol": 1e-9}
    experts, kept = Experts(sizes), ConjugateGradient(preconditioner_every=3, **fields)
    state: Any = {}
    for expert, made in ((0, True), (0, False), (1, True), (1, False), (0, True)):
        found = experts.called(expert, kept, state)
        state, single = found.state, experts.called(expert, ConjugateGradient(**fields), None)
        assert found.info.products == single.info.products - (0 if made else 3)
        torch.testing.assert_close(found.grad, single.grad, rtol=1e-9, atol=1e-9)


def test_a_preconditioner_of_more_variables_serves_fewer() -> None:
    """A principal submatrix of a positive definite matrix is one."""
    experts = Experts()
    estimator = ConjugateGradient(preconditioner="nystrom", preconditioner_rank=4, preconditioner_every=2, rtol=1e-9)

    def called(both: bool, state: Any) -> Hypergradient:
        def inner(w: tuple[Tensor, ...], lam: Tensor) -> Tensor:
            parts = [torch.cat([w[0], w[1 + expert]]) - lam for expert in ((0, 1) if both else (1,))]
            return sum((part @ experts.hessians[0] @ part / 2 for part in parts), torch.zeros((), dtype=DOUBLE))

        return hypergradient(
            inner, lambda w, lam: w[0].sum(), experts.w, torch.ones(7, dtype=DOUBLE), estimator, state=state
        )

    first = called(True, {})
    second = called(False, first.state)
    assert second.info.status is Status.CONVERGED
    torch.testing.assert_close(second.grad, called(False, {}).grad, rtol=1e-7, atol=1e-7)
    assert second.info.products <= 7 + 2  # iterations and the last product: none for a preconditioner


def test_fields_of_warm_starts_and_kept_preconditioners_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"warm_start must be True, False, 'linear' or 'quadratic', not 'cubic'"):
        ConjugateGradient(warm_start="cubic")
    with pytest.raises(ConfigError, match="preconditioner_every belongs to preconditioner='nystrom'"):
        Neumann(preconditioner_every=2)


@forall(
    60,
    sample=quadratics(max_condition=100.0, scale=False),
    place=st.integers(0, 2),
    distance=logarithmic(1e-6, 1.0),
    iterations=st.integers(1, 6),
)
def test_krylov_methods_reduce_the_error_of_their_start(
    sample: Sample, place: int, distance: float, iterations: int
) -> None:
    # A few iterations a call along a path: the bound of the theorem with the start's error in the place of q* itself.
    method = KRYLOV[place](max_iterations=iterations, rtol=0.0, warm_start=True)
    state: Any = {}
    H, root = sample.hessian, math.sqrt(float(torch.linalg.cond(sample.hessian)))
    rate = min(1.0, 2 * ((root - 1) / (root + 1)) ** iterations)
    for step in range(3):
        there = moved(sample, distance * step)
        exact = torch.linalg.solve(H, there.cotangent)
        before = state["solution"][0] if "solution" in state else torch.zeros_like(exact)
        if float((H @ before - there.cotangent).norm()) > float(there.cotangent.norm()):
            before = torch.zeros_like(exact)  # a start that is worse than zero is dropped
        pulled, _ = pull(there, method, state)
        state = pulled.state
        if "solution" not in state:
            return  # a solve that failed leaves nothing to start from
        error, start = state["solution"][0] - exact, before - exact
        if place == 0:  # in the energy norm; the others reduce the residual
            after, first = (math.sqrt(max(0.0, float(x @ H @ x))) for x in (error, start))
        else:
            after, first = float((H @ error).norm()), float((H @ start).norm())
        assert after <= 1.0001 * rate * first + 1e-9 * float(exact.norm())


@forall(
    60, sample=quadratics(max_condition=100.0, scale=False), terms=st.integers(0, 6), distance=logarithmic(1e-6, 1.0)
)
def test_the_neumann_series_multiplies_the_error_of_its_start(sample: Sample, terms: int, distance: float) -> None:
    estimator = Neumann(terms=terms, step_size=0.9, warm_start=True)
    identity = torch.eye(len(sample.inner), dtype=DOUBLE)
    power = torch.linalg.matrix_power(identity - 0.9 * sample.hessian, terms + 1)
    state: Any = {}
    for step in range(3):
        there = moved(sample, distance * step)
        exact = torch.linalg.solve(sample.hessian, there.cotangent)
        before = state["solution"][0] if "solution" in state else torch.zeros_like(exact)
        if float((sample.hessian @ before - there.cotangent).norm()) > float(there.cotangent.norm()):
            before = torch.zeros_like(exact)
        pulled, _ = pull(there, estimator, state)
        assert pulled.info.products == terms + 1 + (step > 0)
        state = pulled.state
        torch.testing.assert_close(
            state["solution"][0] - exact, power @ (before - exact), rtol=1e-8, atol=1e-10 * float(exact.norm())
        )


def test_a_warm_start_saves_products_along_a_path() -> None:
    sample = make_quadratic(30, 3, 1e3, 1.0, 5)
    for method in KRYLOV:
        totals = {}
        for warm in (False, True):
            estimator, state, totals[warm] = method(max_iterations=200, rtol=1e-6, warm_start=warm), {}, 0
            for step in range(8):
                pulled, _ = pull(moved(sample, 1e-4 * step), estimator, state)
                assert pulled.info.status is Status.CONVERGED
                state, totals[warm] = pulled.state, totals[warm] + pulled.info.products
        assert totals[True] < 0.8 * totals[False]


@pytest.mark.parametrize("method", ITERATIVE)
def test_a_start_that_leads_astray_does_no_harm(method: Any) -> None:
    sample = make_quadratic(6, 3, 10.0, 1.0, 3)
    estimator = method(warm_start=True)
    cold = called(sample, estimator, {})
    for bad in (torch.full_like(sample.inner, 1e6), torch.full_like(sample.inner, math.nan)):
        misled = called(sample, estimator, {**cold.state, "solution": (bad,)})
        assert misled.info.status is cold.info.status
        torch.testing.assert_close(misled.grad, cold.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ITERATIVE)
def test_a_warm_start_without_state_is_refused(method: Any) -> None:
    sample = make_quadratic(4, 3, 10.0, 1.0, 3)
    with pytest.raises(ConfigError, match=r"continues from the state of its last call: pass state=\{\}"):
        hypergradient(*sample.losses(), sample.inner, sample.outer, method(warm_start=True))


@pytest.mark.parametrize("method", KRYLOV)
def test_a_failed_solve_leaves_nothing_to_start_from(method: Any) -> None:
    zero, v = torch.zeros(2, dtype=DOUBLE), torch.ones(2, dtype=DOUBLE)
    H = torch.diag(torch.tensor([1.0, 0.0], dtype=DOUBLE))
    result = hypergradient(
        lambda w, lam: w @ H @ w / 2 - w @ lam,
        lambda w, lam: w @ v,
        zero,
        zero.clone(),
        method(warm_start=True),
        state={},
    )
    assert result.info.status is Status.SINGULAR
    assert "solution" not in result.state


# Preconditioners


def preconditioned(name: str, rank: int) -> list[Implicit]:
    fields: dict[str, Any] = {"preconditioner": name}
    if name == "nystrom":
        fields["preconditioner_rank"] = rank
    return [
        ConjugateGradient(max_iterations=200, rtol=1e-10, **fields),
        Neumann(terms=200, **fields),
    ]


@forall(
    20,
    sample=quadratics(max_condition=4.0),
    number=st.integers(0, 2**31),
    name=st.sampled_from(["optimizer", "nystrom"]),
    rank=st.integers(1, 8),
    damping=st.just(0.0) | logarithmic(1e-3, 1.0),
)
def test_a_preconditioner_changes_the_way_and_not_the_answer(
    sample: Sample, number: int, name: str, rank: int, damping: float
) -> None:
    generator = torch.Generator().manual_seed(number)
    diagonal = 0.6 + torch.rand(len(sample.inner), generator=generator, dtype=DOUBLE)
    for estimator in preconditioned(name, rank):
        estimator = dataclasses.replace(estimator, damping=damping)  # type: ignore[call-arg]
        pulled, passes = pull(sample, estimator, {}, diagonal)
        assert not pulled.info.status.failed
        expected = implicit_part(sample, damping)
        torch.testing.assert_close(pulled.value[0], expected, rtol=1e-6, atol=1e-6 * sample.scale(damping))
        assert (passes.forward, passes.backward) == (1, 1 + pulled.info.products)
        sketch = min(rank, len(sample.inner)) if name == "nystrom" else 0
        if isinstance(estimator, ConjugateGradient):
            assert pulled.info.products == pulled.info.iterations + 1 + sketch
        else:  # Lanczos products for the step size, once
            extra = pulled.info.products - (pulled.info.iterations + 1 + sketch)
            assert 1 <= extra <= 8
            again, _ = pull(sample, estimator, pulled.state, diagonal)
            assert again.info.products == again.info.iterations + 1 + sketch


@forall(
    40, sample=quadratics(max_condition=1e4), iterations=st.integers(1, 10), name=st.sampled_from(["exact", "other"])
)
def test_conjugate_gradients_obey_the_bound_of_the_preconditioned_system(
    sample: Sample, iterations: int, name: str
) -> None:
    # With the Hessian's own diagonal, or any other: κ of D^(−1/2) H D^(−1/2).
    H, v = sample.hessian, sample.cotangent
    diagonal = H.diagonal().clone() if name == "exact" else torch.linspace(0.5, 2.0, len(v), dtype=DOUBLE)
    estimator = ConjugateGradient(max_iterations=iterations, rtol=0.0, preconditioner="optimizer")
    pulled, _ = pull(sample, estimator, {}, diagonal)
    root = math.sqrt(float(torch.linalg.cond(H / diagonal.sqrt() / diagonal.sqrt()[:, None])))
    rate = min(1.0, 2 * ((root - 1) / (root + 1)) ** pulled.info.iterations)
    energy = math.sqrt(float(v @ torch.linalg.solve(H, v)))
    bound = rate * energy / math.sqrt(float(sample.eigenvalues[0])) * operator_norm(sample.mixed)
    assert float((pulled.value[0] - implicit_part(sample)).norm()) <= 1.001 * bound + sample.rounding()


@forall(20, sample=quadratics(max_condition=1e4), damping=logarithmic(1e-3, 1.0))
def test_a_nystrom_preconditioner_of_full_rank_is_the_inverse_of_the_damped_hessian(
    sample: Sample, damping: float
) -> None:
    estimator = ConjugateGradient(preconditioner="nystrom", preconditioner_rank=8, rtol=1e-6, damping=damping)
    pulled, _ = pull(sample, estimator)
    assert pulled.info.status is Status.CONVERGED
    assert pulled.info.iterations == 1


def test_preconditioners_pay_where_they_fit() -> None:
    # Badly scaled variables for the diagonal; a few large eigenvalues for the low rank.
    scales = 10.0 ** torch.linspace(0, 3, 20, dtype=DOUBLE)
    base = make_quadratic(20, 3, 5.0, 1.0, 3)
    H = base.hessian * scales * scales[:, None]
    scaled = Sample("quadratic", {**base.data, "H": H}, base.outer, base.inner)
    options: dict[str, Any] = {"max_iterations": 500, "rtol": 1e-8}
    plain, _ = pull(scaled, ConjugateGradient(**options))
    better, _ = pull(scaled, ConjugateGradient(preconditioner="optimizer", **options), {}, H.diagonal().clone())
    assert better.info.products < plain.info.products / 2
    spectrum = torch.cat([torch.logspace(2, 5, 8, dtype=DOUBLE), torch.linspace(1.0, 2.0, 52, dtype=DOUBLE)])
    Q = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)).Q
    H = (Q * spectrum) @ Q.T
    large = make_quadratic(60, 3, 5.0, 1.0, 3)
    large = Sample("quadratic", {**large.data, "H": (H + H.T) / 2}, large.outer, large.inner)
    plain, _ = pull(large, Neumann(terms=30))
    better, _ = pull(large, Neumann(terms=10, preconditioner="nystrom", preconditioner_rank=12))
    assert better.info.products < plain.info.products
    assert better.info.residual < 0.1 * plain.info.residual


@pytest.mark.parametrize("method", [ConjugateGradient, Neumann])
def test_the_optimisers_diagonal_must_exist(method: Any) -> None:
    sample = make_quadratic(4, 3, 10.0, 1.0, 3)
    with pytest.raises(ConfigError, match=r"'optimizer'\) takes the second moments .* Use 'nystrom' or 'none'"):
        hypergradient(*sample.losses(), sample.inner, sample.outer, method(preconditioner="optimizer"))


def test_a_diagonal_with_zeros_stays_invertible() -> None:
    sample = make_quadratic(5, 3, 10.0, 1.0, 3)
    for diagonal in (torch.zeros(5, dtype=DOUBLE), torch.tensor([0.0, 1.0, 1.0, 2.0, 1e-12], dtype=DOUBLE)):
        for damping in (0.0, 0.1):
            pulled, _ = pull(sample, ConjugateGradient(preconditioner="optimizer", damping=damping), {}, diagonal)
            assert bool(torch.isfinite(pulled.value[0]).all())
            if pulled.info.status is Status.CONVERGED:
                torch.testing.assert_close(pulled.value[0], implicit_part(sample, damping), rtol=1e-4, atol=1e-4)


class Fit(Problem):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.module.weight * x - y).square().mean() + (
            self.outer.module.weight.exp() * self.module.weight**2
        ).sum()


class Choose(Problem):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.inner.module.weight * x - y).square().mean() + 0 * self.module.weight.sum()


class Vector(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=DOUBLE))


def engine(optimizer: Any, method: Any) -> Engine:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-1, 1, 6, dtype=DOUBLE)
    batches = [
        (torch.randn(6, generator=generator, dtype=DOUBLE) * scales, torch.randn(6, generator=generator, dtype=DOUBLE))
        for _ in range(4)
    ]
    inner = Fit(Vector(6), optimizer=optimizer, data=batches, steps=5, hypergradient=method, name="inner")
    outer = Choose(Vector(6), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), data=batches, name="outer")
    return Engine([outer, inner])


@pytest.mark.parametrize("method", [ConjugateGradient, Neumann])
def test_the_optimisers_diagonal_comes_from_the_engine(method: Any) -> None:
    for optimizer in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop):
        grads = []
        for name in ("optimizer", "none"):
            fields: dict[str, Any] = {"preconditioner": name}
            fields |= {"rtol": 1e-10} if method is ConjugateGradient else {"terms": 400}
            built = engine(lambda p, kind=optimizer: kind(p, lr=0.05), method(**fields))
            report = built.step()
            assert not report.solves["inner"].status.failed
            grads.append(report.gradient_norms["outer"])
        assert grads[0] == pytest.approx(grads[1], rel=1e-5)
    with pytest.raises(ConfigError, match="takes the second moments"):
        engine(lambda p: torch.optim.SGD(p, lr=0.05), method(preconditioner="optimizer")).step()


def test_a_warm_start_lives_in_the_engine() -> None:
    built = engine(lambda p: torch.optim.Adam(p, lr=1e-4), ConjugateGradient(warm_start=True, rtol=1e-3))
    reports = [built.step().solves["inner"] for _ in range(3)]
    assert all(report.status is Status.CONVERGED for report in reports)


@pytest.mark.parametrize("method", [ConjugateGradient, Neumann])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"preconditioner": "jacobi"}, "preconditioner"),
        (
            {"preconditioner": "nystrom", "preconditioner_rank": 0},
            "preconditioner_rank must be an integer of at least 1",
        ),
        ({"preconditioner_rank": 5}, "preconditioner_rank belongs to preconditioner='nystrom', not 'none'"),
        (
            {"preconditioner": "optimizer", "preconditioner_rank": 5},
            "preconditioner_rank belongs to preconditioner='nystrom', not 'optimizer'",
        ),
    ],
)
def test_preconditioner_fields_are_validated(method: Any, fields: dict[str, Any], expected: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=re.escape(expected)):
        method(**fields)


# Products by differences


@forall(
    40,
    sample=quadratics(max_condition=50.0, scale=False),
    place=st.integers(0, 4),
    damping=st.just(0.0) | logarithmic(1e-2, 1.0),
)
def test_products_by_differences_are_those_of_autodiff(sample: Sample, place: int, damping: float) -> None:
    # The sample's losses are quadratic in w: a difference has no truncation error, and rounding of u^(2/3).
    build: Any = [
        lambda **f: ConjugateGradient(rtol=1e-7, **f),
        lambda **f: MINRES(rtol=1e-7, **f),
        lambda **f: GMRES(rtol=1e-7, restart=4, max_iterations=200, **f),
        lambda **f: Neumann(terms=12, **f),
        lambda **f: Nystrom(rank=5, **{**f, "damping": 0.1 + f["damping"]}),
    ][place]
    exact, _ = pull(sample, build(damping=damping))
    found, passes = pull(sample, build(damping=damping, products="finite_difference", difference_step=1e-3))
    torch.testing.assert_close(found.value[0], exact.value[0], rtol=1e-4, atol=1e-5 * sample.scale())
    # A vector that vanishes, as those of the Neumann series do in one dimension, takes no pass.
    most = 1 + 2 * found.info.products
    assert passes.forward == passes.backward <= most
    assert len(sample.inner) == 1 or passes.forward == most
    assert not found.info.status.failed or found.info.status is exact.info.status


@pytest.mark.parametrize("method", ["conjugate_gradient", "minres", "gmres", "neumann", "stocbio"])
def test_a_residual_of_half_precisions_rounding_is_no_success(method: str) -> None:
    # A hundred round-offs of bfloat16 are most of the right-hand side: answers 90 % off were called converged.
    D = torch.tensor([1.0, 0.5, 0.1, 0.01], dtype=torch.bfloat16)
    w = torch.ones(4, dtype=torch.bfloat16)
    result = hypergradient(
        lambda w, lam: 0.5 * (D * (w - lam) ** 2).sum(), lambda w, lam: w.sum(), w, w.clone(), method
    )
    assert result.info.status is not Status.CONVERGED or result.info.residual <= 1e-2
    assert float((result.grad.float() - 1).abs().max()) > 0.5  # it is that far off


def test_the_residual_says_that_it_is_the_damped_systems() -> None:
    D = torch.tensor([1.0, 0.01], dtype=DOUBLE)
    w = torch.ones(2, dtype=DOUBLE)
    info = hypergradient(
        lambda w, lam: 0.5 * (D * (w - lam) ** 2).sum(), lambda w, lam: w.sum(), w, w.clone(), "nystrom"
    ).info
    assert "the residual is that of the system damped by 0.01" in info.message


@pytest.mark.parametrize("state", [[1], {"solution": "a"}, {"solution": [torch.ones(2)]}])
def test_a_state_that_is_none_is_refused(state: Any) -> None:
    w = torch.ones(2, dtype=DOUBLE)
    with pytest.raises(ParameterError, match=r"state must be \{\} or the \.state of an earlier result"):
        hypergradient(lambda w, lam: ((w - lam) ** 2).sum(), lambda w, lam: w.sum(), w, w.clone(), "cg", state=state)
