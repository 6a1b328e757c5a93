from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from bilevel import (
    ConjugateGradient,
    Exact,
    FiniteDifference,
    Hypergradient,
    Identity,
    Neumann,
    SolveInfo,
    Status,
    Unrolled,
    hypergradient,
)
from bilevel.errors import BilevelError, ConfigError, UnknownNameError
from bilevel.functional import FunctionObjective, PassCount, leaves
from bilevel.hypergrad import Estimator, InnerProblem, InnerStep, Response, as_estimator, available_methods
from bilevel.optim import update_of
from bilevel.randomness import Replay
from tests.bilevel.strategies import DOUBLE, Sample, forall, make_quadratic, quadratics, samples

METHODS = ["finite_difference", "identity", "neumann", "conjugate_gradient", "exact"]


def inner(w: Tensor, lam: Tensor) -> Tensor:
    return (w - lam).square().sum() / 2


def outer(w: Tensor, lam: Tensor) -> Tensor:
    return w.square().sum() / 2 + (w * lam).sum()


@forall(100, sample=samples())
def test_samples_know_their_own_hypergradient(sample: Sample) -> None:
    # The closed forms that every other test relies on, against autograd through the solution.
    lam = sample.outer.clone().requires_grad_()
    inner_loss, outer_loss = sample.losses()
    (expected,) = torch.autograd.grad(outer_loss(sample.solution(lam), lam), lam)
    assert float((sample.hypergradient() - expected).norm()) <= sample.rounding()
    w = sample.inner.clone().requires_grad_()
    g = torch.autograd.grad(inner_loss(w, lam), w, create_graph=True)[0]
    H = torch.stack([torch.autograd.grad(entry, w, retain_graph=True)[0] for entry in g])
    torch.testing.assert_close(H, sample.hessian)
    scale = float(sample.eigenvalues[-1]) * (1 + float(w.detach().norm()))
    assert float(g.detach().norm()) <= 1e-7 * scale  # at the solution


@pytest.mark.parametrize("method", METHODS)
def test_result_describes_itself(method: str) -> None:
    lam = torch.tensor([1.0, 2.0])
    result = hypergradient(inner, outer, lam.clone(), lam, method)
    assert isinstance(result, Hypergradient)
    assert isinstance(result.info, SolveInfo)
    assert result.info.method == method
    assert result.value == pytest.approx(float(outer(lam, lam)))
    torch.testing.assert_close(result.direct, lam)
    torch.testing.assert_close(result.grad, 3 * lam, rtol=1e-3, atol=1e-3)
    assert torch.equal(result.inner, lam)
    assert method in result.info.explain()


def test_default_method_is_neumann() -> None:
    lam = torch.ones(2)
    assert hypergradient(inner, outer, lam.clone(), lam).info.method == "neumann"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("cg", ConjugateGradient()),
        ("fd", FiniteDifference()),
        ("darts", FiniteDifference()),
        ("exact", Exact()),
        ({"method": "neumann", "terms": 3, "step_size": 0.1}, Neumann(terms=3, step_size=0.1)),
        ({"method": "cg", "damping": 0.5}, ConjugateGradient(damping=0.5)),
        (Identity(), Identity()),
        ({"method": "unrolled", "steps": 2, "learning_rate": 0.1}, Unrolled(steps=2, learning_rate=0.1)),
    ],
)
def test_methods_are_named_in_several_ways(given: Any, expected: Estimator) -> None:
    assert as_estimator(given) == expected


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (
            "neuman",
            UnknownNameError,
            "unknown method 'neuman': did you mean 'neumann'? Choices: 'amigo', 'auto', 'betty:cg', 'betty:darts',",
        ),
        ("zzz", UnknownNameError, "unknown method 'zzz'. Choices:"),
        ({"method": "exakt"}, UnknownNameError, "did you mean 'exact'?"),
        (
            {"method": "neumann", "term": 3},
            UnknownNameError,
            "'term': did you mean 'terms'? Choices: 'certificate', 'compile', 'curvature', 'damping'",
        ),
        ({"method": "identity", "terms": 3}, UnknownNameError, "Choices: 'center'"),
        ({"terms": 3}, ConfigError, "needs the key 'method', one of finite_difference"),
        ({"method": "neumann", "terms": -3}, ConfigError, "Neumann.terms must be an integer of at least 0"),
        (Neumann, ConfigError, "method must be an instance: write Neumann(), not Neumann"),
        (3, ConfigError, "not int"),
        (None, ConfigError, "not NoneType"),
    ],
)
def test_methods_that_do_not_exist_are_refused(method: Any, error: type[BilevelError], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as caught:
        hypergradient(inner, outer, torch.ones(1), torch.ones(1), method)
    assert isinstance(caught.value, (BilevelError, ValueError))


@dataclasses.dataclass(frozen=True)
class Registered(Estimator):
    name: ClassVar[str] = "registered"
    summary: ClassVar[str] = "a test's"
    cost: ClassVar[str] = "none"
    needs: ClassVar[str] = "nothing"

    def respond(self, problem: InnerProblem) -> Response:
        return Identity().respond(problem)


@contextlib.contextmanager
def installed(name: str, target: object) -> Iterator[None]:
    point = EntryPoint(name, "somewhere:something", "bilevel.methods")
    with (
        mock.patch("bilevel.hypergrad.registry.entry_points", return_value=[point]),
        mock.patch.object(EntryPoint, "load", return_value=target),
    ):
        yield


def test_installed_packages_register_methods() -> None:
    with installed("registered", Registered):
        assert available_methods()["registered"] is Registered
        lam = torch.ones(2)
        assert torch.equal(hypergradient(inner, outer, lam.clone(), lam, "registered").grad, 3 * lam)
    with installed("neumann", Registered), pytest.raises(ConfigError, match="'neumann', which exists already"):
        available_methods()
    with installed("bad", inner), pytest.raises(ConfigError, match="is no Estimator subclass"):
        available_methods()


def test_parameters_of_modules() -> None:
    torch.manual_seed(0)
    model, weights = nn.Linear(3, 1), nn.Parameter(torch.zeros(10))
    x, y = torch.randn(10, 3), torch.randn(10, 1)

    def fit(w: Any, lam: Any) -> Tensor:
        out = torch.func.functional_call(model, w, (x,))
        decay = sum((part.square().sum() for part in w.values()), torch.zeros(()))
        return (lam["weights"].sigmoid() * (out - y).square().squeeze(1)).mean() + 0.1 * decay

    def validate(w: Any, lam: Any) -> Tensor:
        return F.mse_loss(torch.func.functional_call(model, w, (x[:3],)), y[:3])

    result = hypergradient(fit, validate, dict(model.named_parameters()), {"weights": weights}, "cg")
    assert set(result.grad) == {"weights"}
    assert result.grad["weights"].shape == (10,)
    assert list(result.inner) == ["weight", "bias"]
    assert all(parameter.grad is None for parameter in (*model.parameters(), weights))


def test_state_passes_through_methods_that_keep_none() -> None:
    lam = torch.ones(2)
    for method in METHODS:
        result = hypergradient(inner, outer, lam.clone(), lam, method, state={})
        assert set(result.state) <= {"largest_eigenvalue"}


@forall(60, sample=quadratics(max_condition=1e4), number=st.integers(0, 2**31))
def test_methods_agree_where_they_converge(sample: Sample, number: int) -> None:
    results = [
        hypergradient(*sample.losses(), sample.inner, sample.outer, method).grad
        for method in (Exact(), ConjugateGradient(max_iterations=200, rtol=1e-12))
    ]
    assert float((results[0] - results[1]).norm()) <= 1e4 * sample.rounding() + 1e-9 * sample.scale()


def test_dropout_gives_finite_differences_and_the_identity_the_same_masks() -> None:
    # New masks in each pass make differences 4 to 26 times wrong in a peer.
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 6, generator=generator, dtype=DOUBLE)
    y = torch.randint(0, 3, (40,), generator=generator)
    w, lam = torch.randn(6, 3, generator=generator, dtype=DOUBLE), torch.zeros(40, dtype=DOUBLE)

    def training(w: Tensor, lam: Tensor) -> Tensor:
        losses = F.cross_entropy(F.dropout(X, 0.5) @ F.dropout(w, 0.5), y, reduction="none")
        return (lam.exp() * losses).mean()

    def validation(w: Tensor, lam: Tensor) -> Tensor:
        return F.cross_entropy(F.dropout(X, 0.5) @ w, y)

    results = []
    for method in (Identity(), FiniteDifference(epsilon=1e-4), FiniteDifference()):
        torch.manual_seed(17)
        results.append(hypergradient(training, validation, w, lam, method))
    for result in results[1:]:
        torch.testing.assert_close(result.grad, results[0].grad, rtol=1e-6, atol=1e-9)
        assert result.value == results[0].value


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_recorded_updates_of_an_optimiser_are_unrolled(kind: Any) -> None:
    sample = make_quadratic(4, 3, 10.0, 1.0, 0)
    inner_loss, outer_loss = sample.losses()
    settings = {"lr": 0.05, "weight_decay": 0.01, **({"momentum": 0.9} if kind is torch.optim.SGD else {})}
    start = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)

    objective = FunctionObjective(
        lambda w, lam: inner_loss(w[0], lam[0]), "the inner problem", Replay(("cpu",)), PassCount()
    )
    w = start.clone().requires_grad_()
    optimizer = kind([w], **settings)
    trajectory = []
    for _ in range(6):
        update, memory = update_of(optimizer, [w])
        trajectory.append(InnerStep(objective, (w.detach().clone(),), memory, update))
        optimizer.zero_grad()
        inner_loss(w, sample.outer).backward()
        optimizer.step()

    # The same loop as one graph, by the updates whose equality with torch's is tested elsewhere.
    lam = sample.outer.clone().requires_grad_()
    point, memory = (start,), trajectory[0].memory
    for step in trajectory:
        at = point[0] if point[0].requires_grad else point[0].requires_grad_()
        (grad,) = torch.autograd.grad(inner_loss(at, lam), at, create_graph=True)
        point, memory = step.update((at,), (grad,), memory)
    torch.testing.assert_close(point[0].detach(), w.detach())
    (expected,) = torch.autograd.grad(outer_loss(point[0], sample.outer), lam)

    end = w.detach().clone().requires_grad_()
    (cotangent,) = torch.autograd.grad(outer_loss(end, sample.outer), end)
    problem = InnerProblem(objective, leaves((w,)), leaves((sample.outer,)), trajectory)
    pulled = Unrolled().respond(problem).pullback((cotangent,), {})
    torch.testing.assert_close(pulled.value[0], expected, rtol=1e-9, atol=1e-12)
    assert pulled.info.iterations == 6
    # Truncated: only the last steps; asking for more than there are is said.
    assert Unrolled(steps=2).respond(problem).pullback((cotangent,), {}).info.iterations == 2
    short = Unrolled(steps=9).respond(problem).pullback((cotangent,), {}).info
    assert "6 of 9 steps" in short.message


def test_statuses_that_failed_carry_a_remedy() -> None:
    for status in Status:
        info = SolveInfo(status, method="m")
        assert status.failed == (status not in (Status.CONVERGED, Status.STOPPED_AT_CAP, Status.NOT_APPLICABLE))
        assert not status.failed or status.remedy
        assert status.remedy in info.explain()


def test_nothing_is_read_from_the_default_dtype() -> None:
    lam = torch.ones(3)
    expected = hypergradient(inner, outer, lam.clone(), lam, "neumann").grad
    torch.set_default_dtype(DOUBLE)
    try:
        result = hypergradient(inner, outer, lam.clone(), lam, "neumann")
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.grad.dtype == torch.float32
    torch.testing.assert_close(result.grad, expected)


@pytest.mark.parametrize(
    "method", ["finite_difference", "identity", {"method": "unrolled", "steps": 2, "learning_rate": 0.1}]
)
def test_autocast_of_the_caller_reaches_no_pass(method: object) -> None:
    torch.manual_seed(0)
    x, w, lam = torch.randn(16, 8), torch.randn(8, 4), torch.randn(8)

    def inner(w: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        return ((x @ (lam.exp().unsqueeze(1) * w)).tanh() @ torch.ones(4, 3)).square().mean()

    outer = lambda w, lam: (x @ w).square().mean()  # noqa: E731
    expected = hypergradient(inner, outer, w, lam, method).grad
    with torch.autocast("cpu", torch.bfloat16):
        found = hypergradient(inner, outer, w, lam, method).grad
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
