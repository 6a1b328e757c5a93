"""Each cause that hypergradcheck names appears when, and only when, it is planted."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bilevel import ConjugateGradient, Exact, Neumann
from bilevel.check import HypergradientReport, hypergradcheck
from bilevel.check.diagnosis import reduced_precision
from bilevel.errors import HypergradientCheckError
from bilevel.hypergrad import available_methods
from tests.bilevel.strategies import DOUBLE
from tests.contract.contract import Field

REFERENCES = ("exact", "unrolled", "central_difference")
UNSYMMETRIC_METHODS = tuple(name for name in ("exact", "gmres") if name in available_methods())
FIELD_METHODS = tuple({"method": name, "products": "field"} for name in UNSYMMETRIC_METHODS)


@dataclass(frozen=True)
class Case:
    """A pair of losses at a point, and the method that is checked."""

    inner: Callable[..., Any]
    outer: Callable[..., Any]
    w: Any
    lam: Any
    method: Any = "exact"

    def check(self, reference: str = "exact", **keywords: Any) -> HypergradientReport:
        return hypergradcheck(self.inner, self.outer, self.w, self.lam, self.method, reference=reference, **keywords)


GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(20, 3, generator=GENERATOR, dtype=DOUBLE)
Y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
LOG_DECAY = torch.tensor([-1.0, -2.0, 0.0], dtype=DOUBLE)


def ridge(w: Tensor, lam: Tensor) -> Tensor:
    return (X.to(w) @ w - Y.to(w)).square().mean() / 2 + (lam.exp() * w.square()).sum() / 2


def validation(w: Tensor, lam: Tensor) -> Tensor:
    return (X[:5].to(w) @ w - 1).square().mean()


def solution(lam: Tensor) -> Tensor:
    return torch.linalg.solve(X.T @ X / 20 + torch.diag(lam.exp()), X.T @ Y / 20)


def clean() -> Case:
    return Case(ridge, validation, solution(LOG_DECAY), LOG_DECAY)


def unsolved() -> Case:
    return replace(clean(), w=solution(LOG_DECAY) + 0.1)


def draws(number: Callable[[], float], where: str = "inner") -> Case:
    def noisy(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda w, lam: loss(w, lam) * (1 + 1e-2 * number())

    return replace(clean(), **{where: noisy(ridge if where == "inner" else validation)})


def own_generator() -> Case:
    generator = torch.Generator().manual_seed(0)
    return draws(lambda: float(torch.rand((), generator=generator)))


def counter() -> Case:
    calls = []

    def count() -> float:
        calls.append(1)
        return 0.1 * len(calls)

    return draws(count, "outer")


def lasso() -> Case:
    # the second and third coefficients are zero, where |w| has its kink
    return Case(
        lambda w, lam: (w - lam).square().sum() / 2 + 0.5 * w.abs().sum(),
        lambda w, lam: (w - 3).square().sum(),
        torch.tensor([1.5, 0.0, 0.0], dtype=DOUBLE),
        torch.tensor([2.0, 0.2, 0.1], dtype=DOUBLE),
    )


def kinked_outer() -> Case:
    return replace(clean(), outer=lambda w, lam: validation(w, lam) + (w - solution(LOG_DECAY)).abs().sum())


def close_kinks() -> Case:
    bends = torch.linspace(-2, 2, 20_001, dtype=DOUBLE)

    def inner(w: Tensor, lam: Tensor) -> Tensor:  # w²/2 between two kinks, 3w²/4 over many of them
        return (w - lam).square().sum() / 2 + torch.relu(w - bends).mean() * 2 - w.sum()

    lam, low, high = torch.tensor([1.0], dtype=DOUBLE), 0.0, 1.0
    for _ in range(60):
        w = torch.tensor([(low + high) / 2], dtype=DOUBLE, requires_grad=True)
        uphill = float(torch.autograd.grad(inner(w, lam), w)[0]) > 0
        low, high = (low, w.item()) if uphill else (w.item(), high)
    return Case(inner, lambda w, lam: w.square().sum(), w.detach(), lam)


def reweighting(detached: bool = True, method: Any = "conjugate_gradient") -> Case:
    """Meta-Weight-Net's usual code: weights of the examples from their detached losses, by a small network,
    normalised over the batch.
    """
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(30, 4, generator=generator, dtype=DOUBLE)
    targets = torch.randn(30, generator=generator, dtype=DOUBLE)

    def inner(w: Tensor, lam: Any) -> Tensor:
        losses = (inputs @ w - targets).square() / 2
        seen = losses.detach() if detached else losses
        weights = ((seen[:, None] * lam["in"] + lam["bias"]).tanh() @ lam["out"]).sigmoid()
        return (weights * losses).sum() / weights.sum() + 0.1 * w.square().sum()

    def outer(w: Tensor, lam: Any) -> Tensor:
        return (inputs[:10] @ w + targets[:10]).square().mean()

    sizes = {"in": 3, "bias": 3, "out": 3}
    lam = {key: 2 * torch.randn(size, generator=generator, dtype=DOUBLE) for key, size in sizes.items()}
    return Case(inner, outer, descend(inner, torch.zeros(4, dtype=DOUBLE), lam), lam, method)


def descend(inner: Callable[..., Tensor], w: Tensor, lam: Any) -> Tensor:
    for _ in range(300):
        w = w.detach().requires_grad_()
        (grad,) = torch.autograd.grad(inner(w, lam), w)
        w = w - 0.7 * grad
    return w.detach()


def game() -> Case:
    J = torch.tensor([[2.0, 3.0], [-3.0, 2.0]], dtype=DOUBLE)
    v, lam = torch.tensor([1.0, 2.0], dtype=DOUBLE), torch.tensor([1.0, 1.0], dtype=DOUBLE)
    inner = lambda w, lam: Field.apply(w, J) - w @ lam  # noqa: E731
    return Case(inner, lambda w, lam: w @ v, torch.linalg.solve(J, lam), lam)


def hidden_outer_parameter() -> Case:
    return replace(clean(), inner=lambda w, lam: ridge(w, lam.detach() + 0 * lam))


def hidden_in_the_outer_loss() -> Case:
    return replace(clean(), outer=lambda w, lam: validation(w, lam) + (w.detach() * w).sum())


def half() -> Case:
    return Case(ridge, validation, solution(LOG_DECAY).bfloat16(), LOG_DECAY.bfloat16())


def diverging() -> Case:
    return replace(clean(), method=Neumann(terms=60, step_size=10.0))


def two(**parts: Any) -> Case:
    """The clean problem with more parameters: ``"a"`` is λ or w, ``"b"`` is spare."""

    def inner(w: Any, lam: Any) -> Tensor:
        return ridge(w["a"], lam["a"]) + parts.get("inner", lambda w, lam: 0.0)(w, lam)

    def outer(w: Any, lam: Any) -> Tensor:
        return validation(w["a"], lam["a"]) + parts.get("outer", lambda w, lam: 0.0)(w, lam)

    spare = torch.ones(2, dtype=DOUBLE)
    return Case(
        inner,
        outer,
        {"a": solution(LOG_DECAY), **({"b": spare.clone()} if parts.get("spare_inner") else {})},
        {"a": LOG_DECAY, **({"b": spare.clone()} if parts.get("spare_outer") else {})},
    )


SIGNS = {
    "unsolved": r"the inner problem is not solved",
    "noise": r"randomness between passes",
    "kink": r"not smooth: the inner gradient of the inner problem jumps at the given point \(abs in its loss\)",
    "kinked outer": r"not smooth: the outer loss has a kink",
    "close kinks": r"not smooth: differences of the inner gradient .* \(relu in its loss\): kinks lie close",
    "detach": r"a stop-gradient: autograd misses .*its own parameters.*not symmetric.*products='field'",
    "outer parameter detached": r"a stop-gradient: autograd misses .* with the outer ones;.*No method sees",
    "outer detach": r"a stop-gradient in the outer loss",
    "asymmetric": r"Jacobian is not symmetric .*: a custom backward pass.*'gmres', 'exact' and 'neumann'",
    "precision": r"reduced precision: parameters in bfloat16",
    "status": r"the method says so itself: neumann ended as 'diverged': lower step_size",
    "disconnected": r"wrong dependency: the outer parameter 'b' reaches neither",
    "unseen": r"wrong dependency: 'b' changes a loss, but autograd has no path from it",
    "unused": r"the outer loss does not depend on the inner parameter 'b'",
    "ignored": r"the inner loss does not depend on the inner parameter 'b'",
}

# name: (the case, which signs appear, by which reference)
PLANTED: dict[str, tuple[Callable[[], Case], set[str], tuple[str, ...]]] = {
    "nothing": (clean, set(), REFERENCES),
    "an unsolved inner problem": (unsolved, {"unsolved"}, REFERENCES),
    "Python's random": (lambda: draws(random.random), {"noise"}, REFERENCES),
    "numpy.random": (lambda: draws(np.random.rand), {"noise"}, ("exact",)),
    "a torch.Generator of its own": (own_generator, {"noise"}, ("exact",)),
    "a counter in the outer loss": (counter, {"noise"}, ("exact",)),
    "a point on a kink": (lasso, {"kink", "unsolved"}, ("exact",)),
    "an outer loss on a kink": (kinked_outer, {"kinked outer"}, ("exact",)),
    "kinks everywhere": (close_kinks, {"close kinks"}, ("central_difference",)),
    "a detach": (reweighting, {"detach"}, REFERENCES),
    "the same without detach": (lambda: reweighting(detached=False), set(), REFERENCES),
    "an outer parameter detached": (hidden_outer_parameter, {"outer parameter detached"}, ("exact",)),
    "a detach in the outer loss": (hidden_in_the_outer_loss, {"outer detach"}, REFERENCES),
    "a field that is no gradient": (game, {"asymmetric"}, REFERENCES),
    "half precision": (half, {"precision"}, ("exact",)),
    "a diverging solve": (diverging, {"status"}, ("exact",)),
    "a spare outer parameter": (lambda: two(spare_outer=True), {"disconnected"}, REFERENCES),
    "an outer parameter by its value": (
        lambda: two(spare_outer=True, outer=lambda w, lam: float(lam["b"].detach().sum())),
        {"unseen", "outer detach"},
        ("exact",),
    ),
    "an inner parameter that F does not see": (
        lambda: two(spare_inner=True, inner=lambda w, lam: (w["b"] - 1).square().sum()),
        {"unused"},
        REFERENCES,
    ),
    "an inner parameter that f does not see": (
        lambda: two(spare_inner=True, outer=lambda w, lam: w["b"].sum()),
        {"ignored"},
        REFERENCES,
    ),
}


@pytest.mark.parametrize(
    ("name", "reference"), [(name, reference) for name, (_, _, used) in PLANTED.items() for reference in used]
)
def test_what_is_planted_is_named_and_nothing_else(name: str, reference: str) -> None:
    make, signs, _ = PLANTED[name]
    report = make().check(reference)
    found = {sign for sign, pattern in SIGNS.items() if any(re.search(pattern, cause) for cause in report.causes)}
    assert found == signs, report.causes
    if name in ("nothing", "a field that is no gradient"):
        assert report.passed
        assert len(report.causes) == len(signs)


def test_the_source_of_randomness_is_named_and_left_alone() -> None:
    for case, source in (
        (draws(random.random), "drawn from Python's random"),
        (draws(np.random.rand), "drawn from numpy.random"),
        (own_generator(), "a generator of its own"),
        (draws(random.random, "outer"), "the loss of the outer problem .* Python's random"),
    ):
        before = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
        report = case.check()
        assert report.verdict == "UNDECIDED"
        assert any(re.search(source, cause) for cause in report.causes)
        assert (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]) == before


def test_the_level_of_the_noise_is_told() -> None:
    levels = []
    for size in (1e-2, 1e-4):
        generator = torch.Generator().manual_seed(0)
        case = replace(
            clean(), inner=lambda w, lam, s=size, g=generator: ridge(w, lam) * (1 + s * torch.rand((), generator=g))
        )
        (cause,) = [cause for cause in case.check().causes if "randomness" in cause]
        levels.append(float(re.search(r"differ by (\S+)", cause)[1]))  # type: ignore[index]
        assert 0 < levels[-1] <= size
    assert levels[0] > 10 * levels[1]


def test_detached_weights_are_handled_by_the_method_that_the_report_names() -> None:
    # The truth is what solving again gives: how the point where the inner steps end moves.
    (cause,) = [cause for cause in reweighting().check("central_difference").causes if "stop-gradient" in cause]
    assert "Method 'exact' or 'gmres' with products='field'" in cause
    for method in FIELD_METHODS:
        for reference in ("central_difference", "exact"):
            right = reweighting(method=method).check(reference, rtol=1e-4)
            assert right.verdict == "passed", right
    blind = reweighting().check("unrolled")  # it would agree with the method, which misses the same
    assert blind.verdict == "UNDECIDED"
    assert "reverse mode sees what autograd sees" in blind.reference_failure
    for method in ("conjugate_gradient", "exact", {"method": "exact", "products": "finite_difference"}):
        assert reweighting(method=method).check("central_difference").verdict == "FAILED"
        assert reweighting(False, method=method).check("central_difference").passed


def test_an_asymmetric_field_is_right_by_the_methods_that_the_report_names() -> None:
    for method in (*UNSYMMETRIC_METHODS, Neumann(terms=400, step_size=0.1)):
        assert replace(game(), method=method).check("central_difference", rtol=1e-5).passed
    assert not replace(game(), method=ConjugateGradient(max_iterations=50)).check("central_difference").passed


def test_the_asymmetry_is_measured() -> None:
    detached, plain = reweighting().check(), reweighting(detached=False).check()
    assert detached.asymmetry > 1e-4
    assert detached.hidden > 0.01
    assert plain.asymmetry < 1e-8
    assert plain.hidden < 1e-6


def test_smooth_losses_with_kinked_operations_raise_no_alarm() -> None:
    # The network's kinks are far from its data: nothing jumps within the probes' reach.
    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return ridge(torch.relu(w + 100) - 100, lam)

    assert replace(clean(), inner=inner).check().causes == ()


def test_a_kink_next_to_the_point_is_no_stop_gradient() -> None:
    # Once a ReLU network was told of a detach(): its kinks lie within the probe's longer steps, here as close as 1e-6.
    bend = solution(LOG_DECAY) + 1e-6

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return ridge(w, lam) + torch.relu(w - bend).sum()

    report = replace(clean(), inner=inner).check()
    assert report.hidden < 1e-3
    assert not any("a stop-gradient" in cause or "jumps" in cause for cause in report.causes)


def test_a_hidden_derivative_of_a_symmetric_field_is_not_called_asymmetric() -> None:
    # A weight that sees its own example's loss only leaves the field a gradient, of another loss.
    def inner(w: Tensor, lam: Tensor) -> Tensor:
        losses = (X @ w - Y + 1).square() / 4
        return (losses.detach().sigmoid() * losses).mean() + (lam.exp() * w.square()).sum() / 2

    case = Case(inner, validation, descend(inner, torch.zeros(3, dtype=DOUBLE), LOG_DECAY), LOG_DECAY)
    (cause,) = [cause for cause in case.check().causes if "a stop-gradient" in cause]
    assert "not symmetric" not in cause


def test_a_derivative_that_happens_to_be_zero_is_no_missing_dependency() -> None:
    case = two(spare_outer=True, outer=lambda w, lam: (lam["b"] - 1).square().sum())  # b is 1
    assert case.check().causes == ()


def test_reduced_precision_of_a_gpu_is_found() -> None:
    def on(device: str, dtype: torch.dtype) -> Any:
        return SimpleNamespace(device=SimpleNamespace(type=device), dtype=dtype)

    single, nodes = [on("cuda", torch.float32)], frozenset({"Convolution", "Relu"})
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        assert len(reduced_precision(single, nodes)) == 2
        assert [found for found in reduced_precision(single, frozenset({"Mm"})) if "convolutions" in found] == []
        assert reduced_precision([on("cpu", torch.float32)], nodes) == ()
        assert reduced_precision([on("cuda", torch.float64)], nodes) == ()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        assert reduced_precision(single, nodes) == ()
        assert reduced_precision([on("cpu", torch.float16)], nodes) == ("parameters in float16",)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_an_unsolved_problem_is_told_from_a_wrong_method() -> None:
    by_method = replace(unsolved(), method=Exact(damping=1.0))
    for reference in ("unrolled", "central_difference"):
        report = unsolved().check(reference)
        assert report.verdict == "FAILED"
        assert report.local_error < 1e-9
        assert "Where they are, the method is right to" in report.causes[0]
        assert report.inner_distance == pytest.approx(
            float((unsolved().w - clean().w).norm() / unsolved().w.norm()), rel=0.2
        )
        wrong = by_method.check(reference)
        assert "damping 1 changes the system" in " ".join(wrong.causes)
        assert not any("Where they are" in cause for cause in wrong.causes)
    assert unsolved().check("exact").passed


def test_verdicts() -> None:
    report = clean().check()
    for error, uncertainty, verdict in (
        (1e-4, 1e-6, "passed"),
        (1e-2, 1e-6, "FAILED"),
        (1e-2, 1e-1, "UNDECIDED"),
        (1e-4, math.inf, "UNDECIDED"),
        (5.0, 0.1, "FAILED"),
    ):
        passed = error <= 1e-3 and uncertainty <= 1e-3
        made = replace(report, passed=passed, relative_error=error, reference_error=uncertainty)
        assert made.verdict == verdict
        assert verdict in str(made).splitlines()[0]
    assert draws(random.random).check(rtol=10.0).verdict == "UNDECIDED"  # however tolerant
    with pytest.raises(HypergradientCheckError, match="UNDECIDED"):
        draws(random.random).check(raise_on_failure=True)


def test_a_report_is_plain_data() -> None:
    described = json.loads(json.dumps(draws(random.random).check().describe(), allow_nan=False))
    assert described["verdict"] == "UNDECIDED"
    assert described["reference_error"] == "inf"
    assert described["local_error"] is None
    assert described["info"]["status"] == "converged"
    assert described["per_parameter"]["outer"]["norm"] > 0
    assert "randomness" in described["causes"][0]
    assert described["reference_dtype"] == "float64"


def test_reports_fit_a_terminal() -> None:
    for make in (reweighting, unsolved, lasso, own_generator):
        report = make().check()
        assert max(map(len, str(report).splitlines())) <= 100
