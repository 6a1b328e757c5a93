"""Constrained inner problems: the sets, and the derivative of the constrained solution against differences of it."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bilevel import Engine, EngineConfig, Problem, hypergradcheck
from bilevel.errors import ConfigError, LossError, ParameterError, UnknownNameError
from bilevel.hypergrad import available_methods
from bilevel.problems import Validation
from bilevel.problems.constraints import Ball, Box, Constrained, ConstrainedTraining, Constraint, Simplex
from tests.bilevel.strategies import DOUBLE, forall, make_quadratic

QUIET = EngineConfig(progress=False)

# --- the sets ---------------------------------------------------------------------------------------------------------

SETS = [
    Box(-0.5, 0.25),
    Box(lower=0.0),
    Box(upper=torch.tensor([0.0, 0.5, -1.0, 2.0])),
    Box(torch.tensor([[0.0], [-1.0], [0.3]]), 0.5),
    Simplex(),
    Simplex(2.0, dim=1),
    Simplex(0.1, dim=0),
    Ball(0.7),
    Ball(0.5, dim=1),
    Ball(3.0, dim=(0, 1)),
]


def gaussian(number: int, *shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number), dtype=DOUBLE).to(dtype)


@forall(60, constraint=st.sampled_from(SETS), number=st.integers(0, 10**6), scale=st.sampled_from([0.01, 1.0, 100.0]))
def test_a_projection_leads_to_the_nearest_point_of_the_set(constraint: Constraint, number: int, scale: float) -> None:
    z = scale * gaussian(number, 3, 4)
    near = constraint.project(z)
    assert constraint.distance(near) < 1e-13 * (1 + scale)
    # nearest: the way back makes no acute angle with the way to any other point of the set
    for other in range(5):
        y = constraint.project(gaussian(number + 1 + other, 3, 4))
        assert float(((z - near) * (y - near)).sum()) < 1e-12 * (1 + scale) ** 2
    if isinstance(constraint, Simplex):
        assert bool((near >= 0.0).all())
        assert torch.allclose(near.sum(), torch.tensor({None: 1.0, 1: 6.0, 0: 0.4}[constraint.dim], dtype=DOUBLE))


@pytest.mark.parametrize("constraint", [SETS[0], SETS[2], Ball(0.7), Ball(0.5, dim=1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_points_of_the_set_stay_bit_for_bit_and_keep_their_dtype(constraint: Constraint, dtype: torch.dtype) -> None:
    inside = constraint.project(0.9 * constraint.project(gaussian(0, 3, 4, dtype=dtype)))
    assert constraint.distance(inside) == 0.0
    assert torch.equal(constraint.project(inside), inside)
    assert constraint.project(inside).dtype == dtype


@pytest.mark.parametrize("constraint", SETS, ids=str)
def test_autograd_sees_the_derivative_of_a_projection(constraint: Constraint) -> None:
    z, d = gaussian(1, 3, 4), gaussian(2, 3, 4)
    J = torch.autograd.functional.jacobian(constraint.project, z).reshape(12, 12)
    slope = (constraint.project(z + 1e-6 * d) - constraint.project(z - 1e-6 * d)).reshape(-1) / 2e-6
    assert torch.allclose(J @ d.reshape(-1), slope, atol=1e-8)
    assert torch.allclose(J, J.T)
    eigenvalues = torch.linalg.eigvalsh(J)
    assert float(eigenvalues[0]) > -1e-12
    assert float(eigenvalues[-1]) < 1 + 1e-12  # no projection moves two points apart


def test_a_zero_vector_in_a_ball_has_a_derivative() -> None:
    z = torch.zeros(3, dtype=DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(Ball(1.0).project(z).sum(), z, create_graph=True)
    assert torch.equal(slope, torch.ones(3, dtype=DOUBLE))
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=DOUBLE, requires_grad=True)
    found = torch.autograd.functional.hessian(lambda w: Ball(1.0, dim=1).project(w).sin().sum(), rows)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(1.0, 0.0), r"infeasible: lower is above upper in 1 of 1"),
        (lambda: Box(torch.tensor([0.0, 2.0]), 1.0), r"infeasible.*1 of 2"),
        (lambda: Box(), r"needs a bound"),
        (lambda: Box(float("nan")), r"Box\.lower holds 1 NaN"),
        (lambda: Box("low"), r"Box\.lower must be a number, a tensor or None, not str"),  # type: ignore[arg-type]
        (lambda: Box(torch.zeros(2), torch.ones(3)), r"do not broadcast"),
        (lambda: Simplex(0.0), r"Simplex\.total must be a finite number above 0"),
        (lambda: Box(torch.zeros(2, requires_grad=True)), r"Box\.lower requires gradients.*lower\.detach\(\)"),
        (lambda: Simplex(dim=(0, 1)), r"Simplex\.dim must be a dimension or None, not \(0, 1\)"),  # type: ignore[arg-type]
        (lambda: Ball(1.0, dim=()), r"Ball\.dim must be a dimension, several.*not \(\)"),
        (lambda: Ball(1.0, dim="a"), r"Ball\.dim .*not 'a'"),  # type: ignore[arg-type]
        (lambda: Box(lower=float("inf")), "Box is infeasible: lower is inf in 1 of 1"),
        (lambda: Box(upper=torch.tensor([0.0, -float("inf")])), "Box is infeasible: upper is -inf in 1 of 2"),
        (lambda: Simplex(-1.0), r"Simplex\.total"),
        (lambda: Ball(0.0), r"Ball\.radius must be a finite number above 0"),
        (lambda: Ball(float("inf")), r"Ball\.radius"),
    ],
)
def test_infeasible_sets_are_refused(make: Callable[[], Constraint], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


LARGE_VALUES: list[tuple[Constraint, torch.dtype, list[float], list[float]]] = [
    (Simplex(), torch.float32, [3e8, 0.0, 0.0], [1.0, 0.0, 0.0]),
    (Simplex(), torch.bfloat16, [300.0, 0.0], [1.0, 0.0]),
    (Simplex(), torch.float32, [3e8, 3e8, -3e8], [0.5, 0.5, 0.0]),
    (Simplex(), torch.float16, [0.25] * 4096, [1 / 4096] * 4096),  # more elements than float16 can count
    (Simplex(), torch.bfloat16, [1 / 1024] * 1024, [1 / 1024] * 1024),
    (Ball(1.0), torch.float16, [300.0, 400.0], [0.6, 0.8]),  # squares overflow
    (Ball(1.0), torch.float32, [3e20, -4e20], [0.6, -0.8]),
    (Ball(1.0), DOUBLE, [3e200, 4e200], [0.6, 0.8]),
]


@pytest.mark.parametrize(("constraint", "dtype", "far", "near"), LARGE_VALUES)
def test_large_values_are_projected(
    constraint: Constraint, dtype: torch.dtype, far: list[float], near: list[float]
) -> None:
    values = torch.tensor(far, dtype=dtype)
    torch.testing.assert_close(constraint.project(values), torch.tensor(near, dtype=dtype))


@pytest.mark.parametrize("constraint", [Simplex(), Ball(1.0), Box(-1.0, 1.0)], ids=str)
def test_what_is_not_a_number_is_left_for_the_engine_to_find(constraint: Constraint) -> None:
    assert not bool(constraint.project(torch.tensor([float("nan"), 0.5, 0.25])).isfinite().all())


# --- the derivative ---------------------------------------------------------------------------------------------------
# f(w, λ) = ½ wᵀHw − wᵀ(Cλ + b), whose constrained minimum is found here by trying every face: an independent solution.


def box_solution(H: Tensor, c: Tensor, lower: float, upper: float) -> Tensor:
    n = len(c)
    for face in itertools.product((-1, 0, 1), repeat=n):
        signs = torch.tensor(face)
        w = torch.full_like(c, lower).where(signs < 0, torch.full_like(c, upper))
        free = signs == 0
        if bool(free.any()):
            w[free] = torch.linalg.solve(H[free][:, free], c[free] - H[free][:, ~free] @ w[~free])
        slope = H @ w - c
        inside = bool(((w >= lower) & (w <= upper)).all())
        if inside and bool((slope[signs < 0] >= 0).all()) and bool((slope[signs > 0] <= 0).all()):
            return w
    raise AssertionError("no face satisfies the conditions of optimality")


def simplex_solution(H: Tensor, c: Tensor) -> Tensor:
    n = len(c)
    for support in itertools.product((False, True), repeat=n):
        free = torch.tensor(support)
        k = int(free.sum())
        if not k:
            continue
        ones = torch.ones(k, 1).to(H)
        system = torch.cat([torch.cat([H[free][:, free], ones], 1), torch.cat([ones.T, ones[:1] * 0], 1)])
        found = torch.linalg.solve(system, torch.cat([c[free], ones[0]]))
        w = torch.zeros(n).to(H)
        w[free] = found[:k]
        if bool((w >= 0).all()) and bool(((H @ w - c + found[k])[~free] >= 0).all()):
            return w
    raise AssertionError("no support satisfies the conditions of optimality")


def ball_solution(H: Tensor, c: Tensor, radius: float) -> Tensor:
    eye, low, high = torch.eye(len(c)).to(H), 0.0, float(c.norm()) / radius
    if float(torch.linalg.solve(H, c).norm()) <= radius:
        return torch.linalg.solve(H, c)
    for _ in range(200):  # (H + μI) w = c with ‖w‖ = radius
        middle = (low + high) / 2
        long = float(torch.linalg.solve(H + middle * eye, c).norm()) > radius
        low, high = (middle, high) if long else (low, middle)
    return torch.linalg.solve(H + low * eye, c)


SOLVED: list[tuple[Constraint, Callable[[Tensor, Tensor], Tensor]]] = [
    (Box(-0.4, 0.6), lambda H, c: box_solution(H, c, -0.4, 0.6)),
    (Simplex(), simplex_solution),
    (Ball(0.8), lambda H, c: ball_solution(H, c, 0.8)),
]


class Upper(Problem):
    def __init__(self, lam: Tensor, goal: Tensor, lr: float = 0.0) -> None:
        module = nn.ParameterDict({"lam": lam.clone()})
        super().__init__(module, optimizer=lambda p: torch.optim.SGD(p, lr=lr), name="outer")
        self.goal = goal

    def loss(self, batch: Any) -> Tensor:
        w = self.inner.module["w"]
        return (w - self.goal).square().sum() / 2 + w.sin().sum() + self.module["lam"].square().sum() / 2


class Lower(Constrained):
    def __init__(self, w: Tensor, H: Tensor, C: Tensor, b: Tensor, constraint: Constraint, **settings: Any) -> None:
        rate = 1 / float(torch.linalg.eigvalsh(H)[-1])
        settings = {"optimizer": lambda p: torch.optim.SGD(p, lr=rate), "name": "inner", **settings}
        super().__init__(nn.ParameterDict({"w": w.clone()}), constraints=constraint, **settings)
        self.H, self.C, self.b = H, C, b

    def loss(self, batch: Any) -> Tensor:
        w, lam = self.module["w"], self.outer.module["lam"]
        dtype = w.dtype
        return w @ (self.H.to(dtype) @ w) / 2 - w @ (self.C.to(dtype) @ lam + self.b.to(dtype))


Data = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def data(number: int, size: int = 4, condition: float = 10.0) -> Data:
    sample = make_quadratic(size, 3, condition, 1.0, number)
    return sample.data["H"], 0.3 * sample.data["C"], 0.3 * sample.data["b"], sample.data["t"], sample.outer


def engine(given: Data, constraint: Constraint, method: Any, w: Tensor, **settings: Any) -> Engine:
    H, C, b, goal, lam = given
    return Engine([Upper(lam, goal), Lower(w, H, C, b, constraint, **settings)], QUIET, hypergradient=method)


def truth(given: Data, solve: Callable[[Tensor, Tensor], Tensor], step: float = 1e-5) -> Tensor:
    """Differences of the outer loss at the exact constrained solution."""
    H, C, b, goal, lam = given

    def value(at: Tensor) -> float:
        w = solve(H, C @ at + b)
        return float((w - goal).square().sum() / 2 + w.sin().sum() + at.square().sum() / 2)

    moves = step * torch.eye(len(lam), dtype=DOUBLE)
    return torch.tensor([(value(lam + d) - value(lam - d)) / (2 * step) for d in moves], dtype=DOUBLE)


def is_regular(given: Data, constraint: Constraint, w: Tensor) -> bool:
    """Whether no constraint is met without being pushed against, or nearly so: there the solution has a kink."""
    H, C, b, _, lam = given
    slope = H @ w - C @ lam - b
    margin = 1e-3
    if isinstance(constraint, Ball):
        return abs(float(w.norm()) - constraint.radius) > margin or float(slope.norm()) > margin
    free = constraint.face(w - slope) == 0
    if isinstance(constraint, Simplex):
        price = slope[free].mean()
        return float(w[free].min()) > margin and bool(((slope - price)[~free] > margin).all())
    assert isinstance(constraint, Box)
    distance = torch.minimum(w - constraint.lower, constraint.upper - w)
    return bool((distance[free] > margin).all()) and bool((slope[~free].abs() > margin).all())


LARGE: tuple[Constraint, Callable[[Tensor, Tensor], Tensor]] = Ball(2.0), lambda H, c: ball_solution(H, c, 2.0)

METHODS = [
    "conjugate_gradient",
    "exact",
    "gmres",
    "minres",
    {"method": "neumann", "terms": 400},
    {"method": "conjugate_gradient", "products": "finite_difference", "rtol": 1e-9},
]


@forall(25, which=st.sampled_from(range(4)), number=st.integers(0, 10**6), method=st.sampled_from(METHODS))
def test_implicit_methods_give_the_derivative_of_the_constrained_solution(which: int, number: int, method: Any) -> None:
    constraint, solve = [*SOLVED, LARGE][which]
    given = data(number)
    w = solve(given[0], given[1] @ given[4] + given[2])
    assume(is_regular(given, constraint, w))
    found = engine(given, constraint, method, w)
    found.step()
    assert torch.allclose(found.problems["inner"].module["w"], w, atol=1e-9)  # it is where projected steps stand still
    expected = truth(given, solve)
    grad = found.hypergradient().grad["lam"]
    assert float((grad - expected).norm()) < 1e-6 * (1 + float(expected.norm()))


@pytest.mark.parametrize(("constraint", "solve"), SOLVED, ids=["box", "simplex", "ball"])
@pytest.mark.parametrize("memory", ["replay", "graph"])
def test_unrolling_through_the_projection_ends_at_the_same_derivative(
    constraint: Constraint, solve: Callable[[Tensor, Tensor], Tensor], memory: str
) -> None:
    given = data(3)
    w = solve(given[0], given[1] @ given[4] + given[2])
    found = engine(given, constraint, {"method": "unrolled", "memory": memory}, torch.zeros(4).double(), steps=300)
    found.step()
    assert float(found.problems["inner"].evaluate()["active"]) > 0.0  # or there were nothing to see
    assert torch.allclose(found.problems["inner"].module["w"], w, atol=1e-8)
    assert torch.allclose(found.hypergradient().grad["lam"], truth(given, solve), rtol=1e-5)
    implicit = engine(given, constraint, "exact", w)
    implicit.step()
    assert torch.allclose(found.hypergradient().grad["lam"], implicit.hypergradient().grad["lam"], rtol=1e-6)


@pytest.mark.parametrize(("constraint", "solve"), SOLVED, ids=["box", "simplex", "ball"])
@pytest.mark.parametrize("reference", ["exact", "unrolled", "central_difference"])
def test_a_user_can_check_a_constrained_problem(
    constraint: Constraint, solve: Callable[[Tensor, Tensor], Tensor], reference: str
) -> None:
    given = data(3)
    found = engine(given, constraint, "conjugate_gradient", solve(given[0], given[1] @ given[4] + given[2]))
    found.step()
    report = hypergradcheck(found, reference=reference, rtol=1e-5)
    assert report.passed, report
    assert report.inner_gradient_norm < 1e-8  # the constrained solution is a minimum of what methods see
    unconstrained = engine(given, Ball(1e6), "exact", found.problems["inner"].module["w"].detach())
    unconstrained.step()
    assert not torch.allclose(  # and another derivative than without constraints
        found.hypergradient().grad["lam"], unconstrained.hypergradient().grad["lam"], rtol=1e-2
    )


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
@pytest.mark.parametrize("method", [name for name in available_methods() if not name.startswith("betty")])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_every_method_runs_and_stays_in_the_set(method: str, dtype: torch.dtype) -> None:
    H, C, b, goal, lam = (part.to(dtype) for part in data(5))
    problems = [Upper(lam, goal, lr=0.05), Lower(torch.zeros(4, dtype=dtype), H, C, b, Simplex(), steps=5)]
    if method == "one_step":
        with pytest.raises(ConfigError, match=r"cannot differentiate through project\(\)"):
            Engine(problems, QUIET, hypergradient=method)
        return
    found = Engine(problems, QUIET, hypergradient=method)
    found.run(3)
    assert Simplex().distance(found.problems["inner"].module["w"]) < 1e-6
    assert bool(found.problems["outer"].module["lam"].isfinite().all())
    assert not torch.equal(found.problems["outer"].module["lam"], lam)


def test_at_a_kink_the_answer_is_the_derivative_on_one_side() -> None:
    # w* = clamp(λ, max=1), F = w*: at λ = 1 the bound is met, and not pushed against.
    def derivative(lam: float) -> float:
        one = torch.ones(1, 1, dtype=DOUBLE)
        upper = Upper(torch.tensor([lam], dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE))
        upper.loss = lambda batch: upper.inner.module["w"].sum() + 0 * upper.module["lam"].sum()  # type: ignore
        lower = Lower(torch.tensor([min(lam, 1.0)], dtype=DOUBLE), one, one, 0 * one[0], Box(upper=1.0))
        found = Engine([upper, lower], QUIET, hypergradient="exact")
        found.step()
        return float(found.hypergradient().grad["lam"])

    assert [derivative(lam) for lam in (0.99, 1.01)] == [pytest.approx(1.0), pytest.approx(0.0)]
    assert derivative(1.0) in (0.0, pytest.approx(1.0))


# --- updates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("constraint", "solve"), SOLVED, ids=["box", "simplex", "ball"])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_constraints_are_taken_on_and_let_go_as_the_outer_parameters_move(
    constraint: Constraint, solve: Callable[[Tensor, Tensor], Tensor], momentum: float
) -> None:
    given = data(3)
    H, C, b, _, lam = given
    optimizer = lambda p: torch.optim.SGD(p, lr=0.5, momentum=momentum)  # noqa: E731
    found = engine(given, constraint, "exact", torch.zeros(4).double(), steps=400, optimizer=optimizer)
    inner, faces = found.problems["inner"], []
    for scale in (1.0, -3.0, 0.0, 1.0):  # every solution is found from the one before, whatever held that
        with torch.no_grad():
            found.problems["outer"].module["lam"].copy_(scale * lam)
        found.step()
        assert torch.allclose(inner.module["w"], solve(H, C @ (scale * lam) + b), atol=1e-7)
        faces.append(inner.active()["w"])
    assert torch.equal(faces[0], faces[3])
    if not isinstance(constraint, Ball):
        assert not torch.equal(faces[0], faces[1])


def test_steps_of_adam_end_at_the_constrained_minimum_of_a_box_and_not_of_a_simplex() -> None:
    given = data(3)
    H, C, b, _, lam = given
    adam = lambda p: torch.optim.Adam(p, lr=0.01)  # noqa: E731
    found = engine(given, Box(-0.4, 0.6), "exact", torch.zeros(4).double(), steps=1500, optimizer=adam)
    found.step()
    assert torch.allclose(found.problems["inner"].module["w"], box_solution(H, C @ lam + b, -0.4, 0.6), atol=1e-4)
    w = torch.tensor([0.1, 0.1, 0.1, 0.7], dtype=DOUBLE, requires_grad=True)
    optimizer = adam([w])
    for _ in range(1500):
        w.grad = (H @ w - C @ lam - b).detach()
        optimizer.step()
        with torch.no_grad():
            w.copy_(Simplex().project(w))
    w = w.detach()
    assert float((w - simplex_solution(H, C @ lam + b)).norm()) > 1e-3
    for constraint in (Simplex(), Ball(1.0)):
        with pytest.raises(ConfigError, match=r"projected steps of Adam on .* end elsewhere.*use torch\.optim\.SGD"):
            engine(given, constraint, "exact", torch.zeros(4).double(), optimizer=adam)


def test_the_start_is_projected_also_where_every_block_of_updates_starts_from_it() -> None:
    given = data(3)
    far = torch.tensor([5.0, -5.0, 0.1, 0.2], dtype=DOUBLE)
    found = engine(given, Box(-0.4, 0.6), "exact", far, reset="initial")
    inner, start = found.problems["inner"], torch.tensor([0.6, -0.4, 0.1, 0.2], dtype=DOUBLE)
    assert torch.equal(inner.module["w"], start)
    assert torch.equal(inner.active()["w"], torch.tensor([True, True, False, False]))
    found.step()
    first = inner.module["w"].clone()
    found.step()
    assert torch.equal(inner.module["w"], first)


def test_a_resumed_run_knows_its_faces(tmp_path: Path) -> None:
    given = data(3)

    def make() -> Engine:
        H, C, b, goal, lam = given
        return Engine(
            [Upper(lam, goal, lr=0.1), Lower(torch.zeros(4).double(), H, C, b, Simplex(), steps=3)], QUIET, "exact"
        )

    whole, first, second = make(), make(), make()
    whole.run(6)
    first.run(3)
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    assert torch.equal(second.hypergradient().grad["lam"], first.hypergradient().grad["lam"])
    second.run(3)
    assert torch.equal(second.problems["inner"].module["w"], whole.problems["inner"].module["w"])
    # what a user saves of the model holds nothing else than the model
    assert list(whole.problems["inner"].module.state_dict()) == ["w"]


# --- in company -------------------------------------------------------------------------------------------------------


class Shift(Validation):
    """Learns what is added to the logits that the inner problem is fitted with."""


class Shifted(ConstrainedTraining):
    def loss(self, batch: Any) -> Any:
        inputs, targets = batch
        outputs = self(inputs) + self.shift.module["shift"]
        return {"loss": self.criterion(outputs, targets) + self.decay(), "outputs": outputs}


def classification(method: Any, constraints: Any, model: nn.Module | None = None, **settings: Any) -> Engine:
    torch.manual_seed(0)
    x, y = gaussian(0, 40, 3), torch.arange(40) % 2
    x = x + y[:, None]
    model = model or nn.Linear(3, 2).double()
    shift = Shift(
        nn.ParameterDict({"shift": torch.zeros(2, dtype=DOUBLE)}),
        data=[(x[:20], y[:20])],
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
    )
    settings = {"steps": 400, "weight_decay": 0.1, **settings}
    sgd = lambda p: torch.optim.SGD(p, lr=0.3)  # noqa: E731
    inner = Shifted(model, constraints=constraints, data=[(x[20:], y[20:])], optimizer=sgd, **settings)
    return Engine([shift, inner], QUIET, hypergradient=method)


@pytest.mark.parametrize("constraints", [{"weight": Ball(0.3, dim=1)}, {"*": Box(-0.2, 0.2)}], ids=["ball", "box"])
def test_a_model_of_which_parts_are_constrained(constraints: Any) -> None:
    found = classification("conjugate_gradient", constraints)
    found.step()
    inner = found.problems["shifted"]
    assert inner.evaluate()["active"] > 0.4
    assert {"weight", "bias"} >= set(inner.active()) == ({"weight"} if "weight" in constraints else {"weight", "bias"})
    for reference in ("exact", "central_difference"):
        report = hypergradcheck(found, reference=reference, rtol=1e-4)
        assert report.passed, report


def test_gauss_newton_curvature_has_the_normal_directions_too() -> None:
    # Linear in the parameters, so that both curvatures are one; without the normal part the system would be singular.
    for constraints in ({"*": Box(-0.2, 0.2)}, {"*.weight": Box(-0.2, 0.2)}):
        model = nn.Sequential(nn.Linear(3, 2)).double() if "*.weight" in constraints else None
        answers = []
        for curvature in ("hessian", "gauss_newton"):
            found = classification({"method": "exact", "curvature": curvature}, constraints, model)
            found.step()
            answers.append(found.hypergradient().grad["shift"])
        assert torch.allclose(*answers, rtol=1e-9)
        assert found.problems["shifted"].evaluate()["active"] > 0.4


def test_normal_curvature_changes_no_answer() -> None:
    answers = []
    for curvature in (1e-2, 1.0, 1e3):
        found = classification("exact", {"weight": Ball(0.3, dim=1)}, normal_curvature=curvature)
        found.step()
        answers.append(found.hypergradient().grad["shift"])
    assert torch.allclose(answers[0], answers[1], rtol=1e-9)
    assert torch.allclose(answers[0], answers[2], rtol=1e-9)


def three_levels(method: Any) -> Engine:
    H, C, b, _, lam = data(3)
    small = lambda p: torch.optim.SGD(p, lr=0.02)  # noqa: E731

    class Top(Problem):
        def loss(self, batch: Any) -> Tensor:
            return (self.outer.module["lam"] - 1.0).square().sum() + self.module["top"].square().sum()

    class Between(Problem):
        def loss(self, batch: Any) -> Tensor:
            own, top = self.module["lam"], self.top.module["top"]
            w = self.inner.module["w"]
            return (w - 0.3).square().sum() / 2 + w.sin().sum() + (own - top).square().sum()

    top = Top(nn.ParameterDict({"top": torch.ones(3, dtype=DOUBLE)}), optimizer=small, name="top")
    between = Between(nn.ParameterDict({"lam": lam.clone()}), optimizer=small, name="outer", steps=3)
    lower = Lower(torch.zeros(4).double(), H, C, b, Box(-0.4, 0.6), steps=200)
    return Engine([top, between, lower], QUIET, hypergradient=method)


@pytest.mark.parametrize("method", ["conjugate_gradient", "exact"])
def test_a_constrained_problem_below_a_middle_level(method: str) -> None:
    found = three_levels(method)
    found.step()
    assert 0.0 < found.problems["inner"].evaluate()["active"] < 1.0
    report = hypergradcheck(found, rtol=1e-6)
    assert report.passed, report


def test_a_constrained_problem_over_another_one_follows_updates_or_is_refused() -> None:
    H, C, b, goal, lam = data(3)

    class Over(Lower):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) + (self.module["w"] - self.lowest.module["x"]).square().sum()

    class Lowest(Problem):
        def loss(self, batch: Any) -> Tensor:
            return (self.module["x"] - self.inner.module["w"]).square().sum() + self.module["x"].square().sum()

    def make(method: str) -> Engine:
        lowest = Lowest(
            nn.ParameterDict({"x": torch.zeros(4, dtype=DOUBLE)}),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.25),
            hypergradient="exact",
        )
        over = Over(torch.zeros(4).double(), H, C, b, Box(-0.4, 0.6), steps=2, hypergradient=method)
        return Engine([Upper(lam, goal), over, lowest], QUIET)

    with pytest.raises(ConfigError, match=r"'inner' has a response_loss\(\) of its own and problems below it"):
        make("conjugate_gradient")
    make("unrolled").step()


class Half(Lower):
    """The set, and a clamp of the user's own."""

    def project(self, values: Any) -> Any:
        return tuple(value.clamp(-0.1, 0.1) for value in super().project(values))


def test_a_projection_of_ones_own_is_part_of_updates_as_of_what_is_differentiated() -> None:
    H, C, b, goal, lam = data(3)

    inner = Half(torch.zeros(4).double(), H, C, b, Box(-0.4, 0.6), steps=3)
    found = Engine([Upper(lam, goal), inner], QUIET, "unrolled")
    found.step()
    assert bool((inner.module["w"].detach().abs() == 0.1).all())  # all are held, so that none responds
    assert torch.allclose(found.hypergradient().grad["lam"], lam)


def test_a_projection_of_other_shapes_is_refused() -> None:
    class Mean(Lower):
        def project(self, values: Any) -> Any:
            return tuple(value.mean() for value in super().project(values))

    with pytest.raises(ParameterError, match=r"as it was given, \[\(4,\)\], and returned \[\(\)\]"):
        Mean(torch.zeros(4).double(), *data(3)[:3], Box(-0.4, 0.6))

    class Fewer(Upper):
        def project(self, values: Any) -> Any:
            return values[1:]

    with pytest.raises(ParameterError, match=r"'outer' must return as many tensors.*\[\(3,\)\], and returned \[\]"):
        Fewer(torch.zeros(3), torch.zeros(4)).update([torch.ones(3)], {})


def test_parameters_whose_names_differ_in_a_dot_have_faces_of_their_own() -> None:
    class Two(Constrained):
        def loss(self, batch: Any) -> Tensor:
            return sum((p + 1).square().sum() for p in self.module.parameters())  # type: ignore[return-value]

    module = nn.Module()
    module.a = nn.ParameterDict({"b": torch.zeros(2)})
    module.a_b = nn.Parameter(torch.tensor([0.5, 0.5]))
    inner = Two(module, constraints=Box(0.0), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    with torch.no_grad():
        inner.update([torch.ones(2)] * 2, {})
    active = {name: mask.tolist() for name, mask in inner.active().items()}
    assert active == {"a.b": [True, True], "a_b": [False, False]}


def test_a_copied_problem_is_another_one() -> None:
    given = data(3)
    first = engine(given, Box(-0.4, 0.6), "exact", torch.zeros(4).double())
    for _ in range(3):
        first.step()
    copies = copy.deepcopy([first.problems["outer"], first.problems["inner"]])
    second = Engine(copies, QUIET, "exact")
    assert torch.equal(second.hypergradient().grad["lam"], first.hypergradient().grad["lam"])
    with torch.no_grad():
        copies[1].module["w"].zero_()
    assert float(first.problems["inner"].module["w"].detach().abs().max()) > 0.1


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.layers, x, use_reentrant=False)


def test_activation_checkpointing_is_refused_where_it_would_be_wrong_and_nowhere_else() -> None:
    model = Checkpointed()
    classification("unrolled", Box(-0.2, 0.2), model, steps=1).step()  # evaluates the loss as it is

    def train() -> None:
        model(torch.randn(5, 3, dtype=DOUBLE)).sum().backward()

    train()
    with pytest.raises(LossError, match="activation checkpointing"):
        classification("conjugate_gradient", Box(-0.2, 0.2), model, steps=1).step()
    gc.collect()
    train()  # the problem is gone, and its hooks with it


def test_a_copy_of_the_model_is_checkpointed_as_one_likes() -> None:
    model, x = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=DOUBLE)
    running = classification("conjugate_gradient", Box(-0.2, 0.2), model, steps=1)
    running.step()
    with pytest.raises(LossError, match="activation checkpointing"):
        checkpoint(model, x, use_reentrant=False).sum().backward()
    checkpoint(copy.deepcopy(model), x, use_reentrant=False).sum().backward()


# --- bad input --------------------------------------------------------------------------------------------------------


def refused(constraints: Any, **settings: Any) -> Callable[[], Any]:
    return lambda: classification("exact", constraints, **settings)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (refused({"weigth": Ball(1.0)}), UnknownNameError, r"did you mean 'weight'\? Choices: 'bias', 'weight'"),
        (refused({}), ConfigError, r"must be a Constraint \(Box, Simplex, Ball\), or a mapping"),
        (refused({"weight": 1.0}), ConfigError, r"must be a Constraint"),
        (refused({"weight": Box(0.0), "w*": Ball(1.0)}), ConfigError, r"two constraints for parameter 'weight'"),
        (refused({"bias": Ball(1.0, dim=1)}), ConfigError, r"Ball\(radius=1, dim=1\) does not fit parameter 'bias'"),
        (refused({"weight": Box(torch.zeros(5))}), ConfigError, r"does not fit parameter 'weight' of shape \(2, 3\)"),
        (refused({"bias": Box(torch.zeros(3, 2))}), ConfigError, r"does not fit parameter 'bias'"),
        (refused(Box(0.0), normal_curvature=0.0), ConfigError, r"normal_curvature must be a finite number above 0"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_a_set_of_ones_own() -> None:
    """The half-space ``Σ w ≤ −2``: two methods are all that a set needs."""

    class HalfSpace(Constraint):
        def face(self, values: Tensor) -> Tensor:
            return (values.sum() > -2.0).to(torch.int8)

        def onto(self, values: Tensor, face: Tensor) -> Tensor:
            return torch.where(face != 0, values - (values.sum() + 2.0) / values.numel(), values)

    given = data(3)
    H, C, b, _, lam = given

    def solve(H: Tensor, c: Tensor) -> Tensor:
        free, ones = torch.linalg.solve(H, c), torch.ones_like(c)
        pushed = torch.linalg.solve(H, ones)
        return free - max(0.0, float(free.sum()) + 2.0) / float(pushed.sum()) * pushed

    w = solve(H, C @ lam + b)
    assert float(w.sum()) == pytest.approx(-2.0)
    found = engine(given, HalfSpace(), "conjugate_gradient", w)
    found.step()
    assert torch.allclose(found.hypergradient().grad["lam"], truth(given, solve), rtol=1e-6)


def test_a_problem_without_optimizer_cannot_be_stepped_and_says_so() -> None:
    given = data(3)
    inner = Lower(torch.zeros(4).double(), *given[:3], Box(0.0), optimizer=None)
    with pytest.raises(ConfigError, match="has no optimizer and cannot be stepped"):
        inner.update([torch.zeros(4)], {})
