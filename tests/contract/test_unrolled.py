from __future__ import annotations

import dataclasses
import math
import re
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bilevel import Estimator, Hypergradient, Status, Unrolled, argmin, hypergradient
from bilevel.errors import ConfigError, NonFiniteError
from bilevel.functional import FunctionObjective, PassCount, leaves
from bilevel.hypergrad import InnerProblem
from bilevel.randomness import Replay
from tests.bilevel.strategies import make_quadratic, quadratics, samples
from tests.contract.contract import (
    DOUBLE,
    STRUCTURES,
    EstimatorContract,
    Field,
    Sample,
    flat,
    forall,
    operator_norm,
    solve,
)

FORMS: dict[str, dict[str, Any]] = {
    "replay": {},
    "graph": {"memory": "graph"},
    "last graphs": {"memory": "graph", "graphs": 2},
    "forward": {"mode": "forward"},
}
OPTIMIZERS = ["sgd", "momentum", "nesterov", "rmsprop", "adam", "adamw"]


class TestUnrolled(EstimatorContract):
    default = Unrolled(steps=40, learning_rate=1.0)
    bfloat16_error = None  # forty rounded steps

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        largest = float(sample.eigenvalues[-1])
        return st.builds(
            lambda form, steps, share: Unrolled(steps, share / largest, **FORMS[form]),
            st.sampled_from(list(FORMS)),
            st.integers(1, 20),
            st.floats(0.05, 1.95),
        )

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        # From the solution the iterates stay there, and (I − ηH)ᴷ H⁻¹ v is what the derivative of K steps leaves out.
        assert isinstance(estimator, Unrolled)
        assert estimator.steps is not None
        assert estimator.learning_rate is not None
        rate = float((1 - estimator.learning_rate * sample.eigenvalues).abs().max())
        tail = rate**estimator.steps / float(sample.eigenvalues[0])
        return operator_norm(sample.mixed) * float(sample.cotangent.norm()) * tail

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert isinstance(estimator, Unrolled)
        steps = result.info.iterations
        assert steps == estimator.steps
        if estimator.mode == "forward":
            assert result.info.products == steps * result.grad.numel()
            return steps, 2 * steps + result.info.products
        assert result.info.products == steps
        kept = min(steps, estimator.graphs or steps) if estimator.memory == "graph" else 0
        return 2 * steps - kept, 3 * steps - kept


@pytest.mark.parametrize("form", ["graph", "last graphs", "forward"])
@pytest.mark.parametrize("inner_structure", STRUCTURES)
@pytest.mark.parametrize("outer_structure", ["tensor", "nested", "not contiguous", "empty tensor among others"])
def test_every_form_takes_every_structure(inner_structure: str, outer_structure: str, form: str) -> None:
    sample = make_quadratic(6, 6, 3.0, 1.0, 1)
    inner_loss, outer_loss = sample.losses()
    results = [
        hypergradient(
            lambda w, lam: inner_loss(flat(w), flat(lam)),
            lambda w, lam: outer_loss(flat(w), flat(lam)),
            STRUCTURES[inner_structure](sample.inner + 1.0),
            STRUCTURES[outer_structure](sample.outer.clone()),
            Unrolled(3, 0.5, **fields),
        )
        for fields in (FORMS["replay"], FORMS[form])
    ]
    torch.testing.assert_close(flat(results[1].grad), flat(results[0].grad), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["graph", "last graphs", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_keeps_the_dtype(dtype: torch.dtype, form: str) -> None:
    sample = make_quadratic(4, 3, 3.0, 1.0, 2)
    inner, outer = (part.to(dtype) for part in (sample.inner + 1.0, sample.outer))
    one, other = (
        hypergradient(*sample.losses(dtype), inner, outer, Unrolled(4, 0.5, **fields)).grad
        for fields in (FORMS["replay"], FORMS[form])
    )
    assert one.dtype == other.dtype
    size = float(one.float().norm())
    torch.testing.assert_close(other, one, rtol=0, atol=20 * torch.finfo(dtype).eps * size)


def descend(sample: Sample, start: Tensor, steps: int, rate: float, lam: Tensor) -> Tensor:
    """Gradient steps that autograd sees through."""
    inner_loss, _ = sample.losses()
    w = start.clone().requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(inner_loss(w, lam), w, create_graph=True)
        w = w - rate * gradient
    return w


@forall(40, sample=samples(), steps=st.integers(1, 15), share=st.floats(0.05, 1.95), number=st.integers(0, 2**31))
def test_equals_autograd_through_the_loop(sample: Sample, steps: int, share: float, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    rate = share / float(sample.eigenvalues[-1])
    start = sample.inner + torch.randn(len(sample.inner), generator=generator, dtype=DOUBLE)
    lam = sample.outer.clone().requires_grad_()
    inner_loss, outer_loss = sample.losses()
    end = descend(sample, start, steps, rate, lam)
    (expected,) = torch.autograd.grad(outer_loss(end, lam), lam)
    result = hypergradient(inner_loss, outer_loss, start, sample.outer, Unrolled(steps=steps, learning_rate=rate))
    torch.testing.assert_close(result.inner, end.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.grad, expected, rtol=1e-9, atol=1e-11 * (1 + float(expected.norm())))


@forall(40, sample=quadratics(), steps=st.integers(1, 30), share=st.floats(0.05, 1.95), number=st.integers(0, 2**31))
def test_equals_the_closed_form_sum(sample: Sample, steps: int, share: float, number: int) -> None:
    # w_K = (I − ηH)ᴷ w₀ + η Σ_{k<K} (I − ηH)ᵏ (Cλ + b)
    generator = torch.Generator().manual_seed(number)
    rate = share / float(sample.eigenvalues[-1])
    start = torch.randn(len(sample.inner), generator=generator, dtype=DOUBLE)
    identity = torch.eye(len(start), dtype=DOUBLE)
    M = identity - rate * sample.hessian
    total = sum((torch.linalg.matrix_power(M, k) for k in range(steps)), torch.zeros_like(M)) * rate
    end = torch.linalg.matrix_power(M, steps) @ start + total @ (sample.data["C"] @ sample.outer + sample.data["b"])
    v = sample.data["A"].T @ (sample.data["A"] @ end - sample.data["t"])
    expected = sample.direct - sample.mixed.T @ (total @ v)
    result = hypergradient(*sample.losses(), start, sample.outer, Unrolled(steps=steps, learning_rate=rate))
    torch.testing.assert_close(result.grad, expected, rtol=1e-9, atol=1e-9 * (1 + float(expected.norm())))


@forall(15, sample=samples(max_condition=10.0), number=st.integers(0, 2**31))
def test_tends_to_the_implicit_derivative_at_the_contraction_rate(sample: Sample, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    smallest, largest = float(sample.eigenvalues[0]), float(sample.eigenvalues[-1])
    if largest > 50 * smallest:
        return  # too many steps for a test
    start = sample.inner + 0.1 * torch.randn(len(sample.inner), generator=generator, dtype=DOUBLE)
    rate, contraction = 2 / (smallest + largest), (largest - smallest) / (largest + smallest)
    exact = sample.hypergradient()
    size = 1 + float(exact.norm()) + sample.scale()
    for steps in (5, 20, 50):
        result = hypergradient(*sample.losses(), start, sample.outer, Unrolled(steps=steps, learning_rate=rate))
        # The factor K comes from the drift of the iterates, which changes the mixed derivative of the ridge problems.
        error = float((result.grad - exact).norm()) / size
        assert error <= 50 * (1 + steps) * contraction**steps * (1 + largest / smallest) + 1e-10


def test_an_independent_optimiser_makes_the_same_steps() -> None:
    start = torch.tensor([1.0, -2.0], dtype=DOUBLE)
    lam = torch.tensor([0.5, 1.5], dtype=DOUBLE)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return ((w - lam) ** 4).sum() / 4 + (w * lam).sin().sum()

    w = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([w], lr=0.05)
    for _ in range(7):
        optimizer.zero_grad()
        inner(w, lam).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    result = hypergradient(inner, lambda w, lam: w.sum(), start, lam, Unrolled(steps=7, learning_rate=0.05))
    torch.testing.assert_close(result.inner, w.detach(), rtol=1e-14, atol=0)


def test_steps_that_diverge_name_the_learning_rate() -> None:
    # The overflow was blamed on the outer loss.
    with pytest.raises(NonFiniteError, match=r"500 gradient steps .*inner problem.*lower learning_rate.*\(3\)"):
        hypergradient(
            lambda w, lam: ((w - lam) ** 2).sum() * 10,
            lambda w, lam: w.sum(),
            torch.ones(2),
            torch.zeros(2),
            Unrolled(steps=500, learning_rate=3.0),
        )


def test_needs_its_fields_as_a_function() -> None:
    for estimator in (Unrolled(), Unrolled(steps=3), Unrolled(learning_rate=0.1)):
        with pytest.raises(
            ConfigError, match=r"needs steps and learning_rate.*Unrolled\(steps=10, learning_rate=0\.1\)"
        ):
            hypergradient(
                lambda w, lam: ((w - lam) ** 2).sum(), lambda w, lam: w.sum(), torch.ones(2), torch.ones(2), estimator
            )


def test_status_says_that_nothing_was_solved() -> None:
    result = hypergradient(
        lambda w, lam: ((w - lam) ** 2).sum(),
        lambda w, lam: w.sum(),
        torch.ones(2),
        torch.ones(2),
        Unrolled(steps=2, learning_rate=0.1),
    )
    assert result.info.status is Status.NOT_APPLICABLE
    assert torch.tensor(result.info.residual).isnan()


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("steps", 0, "an integer of at least 1, not 0"),
        ("learning_rate", 0.0, "a finite number above 0, not 0.0"),
        ("learning_rate", -0.1, "a finite number above 0, not -0.1"),
        ("graphs", 0, "an integer of at least 1, not 0"),
    ],
)
def test_fields_are_validated(field: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"Unrolled.{field} must be {expected}")):
        Unrolled(**{field: value})  # type: ignore[arg-type]


class Network:
    """A small convolutional network with dropout and checkpointing, as functions of its parameters."""

    def __init__(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=DOUBLE) / 3

        self.x = normal(6, 1, 4, 4) * 3
        self.y = torch.randint(3, (6,), generator=generator)
        self.inner = {"conv": normal(4, 1, 3, 3), "body": normal(16, 16), "head": normal(3, 16), "unused": normal(2)}
        self.outer = {"weights": normal(6), "decay": normal() - 2, "unused": normal(1)}

    def logits(self, w: Any) -> Any:
        hidden = F.conv2d(self.x, w["conv"]).flatten(1).tanh()
        hidden = checkpoint(
            lambda h: F.dropout(F.layer_norm(h @ w["body"], (16,)).sigmoid()), hidden, use_reentrant=False
        )
        return hidden @ w["head"].T

    def inner_loss(self, w: Any, lam: Any) -> Any:
        fit = (lam["weights"].sigmoid() * F.cross_entropy(self.logits(w), self.y, reduction="none")).mean()
        return fit + lam["decay"].exp() * (w["conv"].square().sum() + w["head"].square().sum())

    def outer_loss(self, w: Any, lam: Any) -> Any:
        hidden = F.conv2d(self.x, w["conv"]).flatten(1).tanh() @ w["body"]
        return F.cross_entropy(hidden @ w["head"].T, self.y) + 0.01 * lam["decay"].square()


def unroll(network: Network, form: dict[str, Any], optimizer: str, steps: int, rate: float) -> Hypergradient:
    torch.manual_seed(1)
    estimator = Unrolled(steps, rate, optimizer=optimizer, **form)
    return hypergradient(network.inner_loss, network.outer_loss, network.inner, network.outer, estimator)


@forall(12, number=st.integers(0, 2**31), steps=st.integers(1, 6), optimizer=st.sampled_from(OPTIMIZERS))
def test_replay_equals_graph_bit_for_bit_and_forward_mode_to_rounding(number: int, steps: int, optimizer: str) -> None:
    network = Network(number)
    rate = 0.3 if optimizer in ("sgd", "momentum", "nesterov") else 0.01
    results = {name: unroll(network, form, optimizer, steps, rate) for name, form in FORMS.items()}
    replay = results.pop("replay")
    for name, other in results.items():
        for key, expected in replay.grad.items():
            if name != "forward":
                assert torch.equal(other.grad[key], expected)
            # Adam's update from zero memory has derivatives up to 1/ε: entries that cancel keep their rounding
            scale = 1 + float(expected.abs().max())
            torch.testing.assert_close(other.grad[key], expected, rtol=1e-8, atol=1e-10 * scale)
        assert all(torch.equal(other.inner[key], replay.inner[key]) for key in network.inner)
    assert float(replay.grad["decay"].abs()) > 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_named_optimisers_are_differentiated_as_torchs_own(optimizer: str, form: str) -> None:
    """Against central differences of a loop with the torch optimiser of that name."""
    sample = make_quadratic(4, 2, 4.0, 1.0, 3)
    inner_loss, outer_loss = sample.losses()
    start = sample.inner + torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=DOUBLE)
    kinds: dict[str, Any] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
        "adam": lambda p: torch.optim.Adam(p, lr=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    }

    def end(lam: Tensor) -> Tensor:
        w = start.clone().requires_grad_()
        made = kinds[optimizer]([w])
        for _ in range(5):
            made.zero_grad()
            inner_loss(w, lam).backward()  # type: ignore[no-untyped-call]
            made.step()
        return w.detach()

    expected = sample.direct.clone()
    for place in range(2):
        move = torch.zeros(2, dtype=DOUBLE)
        move[place] = 1e-5
        ahead, behind = (outer_loss(end(sample.outer + sign * move), sample.outer) for sign in (1, -1))
        expected[place] += (ahead - behind) / 2e-5
    estimator = Unrolled(5, 0.1, optimizer=optimizer, **FORMS[form])
    result = hypergradient(inner_loss, outer_loss, start, sample.outer, estimator)
    torch.testing.assert_close(result.inner, end(sample.outer), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(result.grad, expected, rtol=1e-5, atol=1e-6)


@forall(30, sample=samples(max_condition=100.0), steps=st.integers(1, 40), nesterov=st.booleans())
def test_momentum_tends_to_the_implicit_derivative(sample: Sample, steps: int, nesterov: bool) -> None:
    """What the derivative of K steps from the solution leaves out is ``[I 0] Tᴷ [I; 0] dw*/dλ`` exactly.

    T is the step's own matrix, on errors e and buffers b: ``b' = μb + He, e' = e − ηb'`` (``e − η(He + μb')`` with
    Nesterov). In the Hessian's eigenvectors it falls into 2×2 blocks, so that its powers have the norms of theirs; with
    ``√μ ≥ |1 − √(ηh)|`` they shrink as ``μ^(K/2)``: momentum converges where plain steps of this length need longer.
    """
    rate, momentum = 0.5 / float(sample.eigenvalues[-1]), 0.9
    worst = 0.0
    for h in sample.eigenvalues.tolist():
        step = torch.tensor([[1 - rate * h, -rate * momentum], [h, momentum]], dtype=DOUBLE)
        if nesterov:
            step[0] = torch.tensor([1 - rate * h * (1 + momentum), -rate * momentum**2], dtype=DOUBLE)
        worst = max(worst, abs(float(torch.linalg.matrix_power(step, steps)[0, 0])) / h)
    name = "nesterov" if nesterov else "momentum"
    result = solve(sample, Unrolled(steps, rate, optimizer=name))
    bound = operator_norm(sample.mixed) * float(sample.cotangent.norm()) * worst
    error = float((result.grad - sample.hypergradient()).norm())
    assert error <= 1.000001 * bound + (1 + steps) * sample.rounding()
    if float(sample.eigenvalues[0]) >= (1 - math.sqrt(momentum)) ** 2 / rate and not nesterov:
        assert worst <= 3 * (1 + steps) * momentum ** (steps / 2) / float(sample.eigenvalues[0])


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam", "adamw"])
@pytest.mark.parametrize("form", FORMS)
def test_parameters_whose_gradient_has_always_been_zero_spoil_nothing(optimizer: str, form: str) -> None:
    """The root of a second moment has no derivative at zero; a dead unit gave NaN for everything."""
    w = {"live": torch.tensor([1.0, 2.0], dtype=DOUBLE), "dead": torch.zeros(3, dtype=DOUBLE)}
    lam = torch.tensor([0.5, 0.3], dtype=DOUBLE)

    def inner(w: Any, lam: Tensor) -> Any:
        return (w["live"] - lam).square().sum() + (w["dead"] ** 2 * lam[0]).sum() + 0.0 * w["dead"].sum()

    def outer(w: Any, lam: Tensor) -> Any:
        return w["live"].square().sum() + w["dead"].sum()

    estimator = Unrolled(4, 0.05, optimizer=optimizer, **FORMS[form])
    found = hypergradient(inner, outer, w, lam, estimator)
    alone = hypergradient(inner, lambda w, lam: w["live"].square().sum(), w, lam, estimator)
    assert bool(torch.isfinite(found.grad).all())
    torch.testing.assert_close(found.grad, alone.grad)
    assert float(found.grad.norm()) > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_argmin_takes_every_form(form: str) -> None:
    @argmin(
        lambda w, lam: ((w - lam) ** 4).sum() / 4 + ((w - 1) ** 2 * lam.exp()).sum() / 2,
        method=Unrolled(steps=200, learning_rate=0.1, **FORMS[form]),
    )
    def fit(lam: Tensor) -> Tensor:
        return torch.ones_like(lam)

    lam = torch.tensor([0.3, -0.2], dtype=DOUBLE, requires_grad=True)
    found = fit(lam)
    w = found.detach()
    slope = 3 * (w - lam.detach()) ** 2
    expected = (slope - (w - 1) * lam.detach().exp()) / (slope + lam.detach().exp())
    for _ in range(2):  # a retained graph may be used again
        (grad,) = torch.autograd.grad(found.sum(), lam, retain_graph=True)
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-10)


def held_activations(form: dict[str, Any], steps: int) -> int:
    """How many activations are alive where the outer loss is evaluated."""
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        hidden = w * lam
        alive.append(weakref.ref(hidden))
        return hidden.sin().sum() + w.square().sum()

    def outer(w: Tensor, lam: Tensor) -> Tensor:
        counts.append(sum(reference() is not None for reference in alive))
        return w.sum()

    w = torch.ones(3, dtype=DOUBLE)
    hypergradient(inner, outer, w, w.clone(), Unrolled(steps, 0.1, **form))
    return counts[0]


def test_only_graphs_hold_activations() -> None:
    for steps in (2, 7):
        assert {name: held_activations(form, steps) for name, form in FORMS.items()} == {
            "replay": 0,
            "graph": steps,
            "last graphs": 2,
            "forward": 0,
        }


def test_forward_mode_refuses_what_it_cannot_hold() -> None:
    w, lam = torch.zeros(20_000), torch.zeros(6_000)
    with pytest.raises(ConfigError, match=r"6000 outer times 20000 inner variables are more than 100000000.*'reverse'"):
        hypergradient(
            lambda w, lam: w.square().sum() + lam.sum(),
            lambda w, lam: w.sum(),
            w,
            lam,
            Unrolled(steps=1, learning_rate=0.1, mode="forward"),
        )


def test_forward_mode_is_right_where_the_gradient_is_no_gradient() -> None:
    """A field with a non-symmetric Jacobian: forward mode must not take its transpose."""
    generator = torch.Generator().manual_seed(2)
    N = torch.eye(3, dtype=DOUBLE) + torch.randn(3, 3, generator=generator, dtype=DOUBLE) / 3
    w, lam = torch.ones(3, dtype=DOUBLE), torch.randn(3, generator=generator, dtype=DOUBLE)
    results = [
        hypergradient(
            lambda w, lam: Field.apply(w, N) - w @ lam,  # type: ignore[no-untyped-call]
            lambda w, lam: (w * torch.arange(3)).sum(),
            w,
            lam,
            Unrolled(steps=5, learning_rate=0.3, **form),
        ).grad
        for form in FORMS.values()
    ]
    power, total = torch.eye(3, dtype=DOUBLE), torch.zeros(3, 3, dtype=DOUBLE)
    for _ in range(5):
        total, power = total + 0.3 * power, power @ (torch.eye(3, dtype=DOUBLE) - 0.3 * N)
    for found in results:
        torch.testing.assert_close(found, total.T @ torch.arange(3, dtype=DOUBLE))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"memory": "graphs"}, "graph"),
        ({"mode": "backward"}, "reverse"),
        ({"optimizer": "sdg"}, "sgd"),
        ({"mode": "forward", "memory": "graph"}, "keeps no graphs: leave memory out"),
        ({"graphs": 3}, r"Unrolled\.graphs belongs to memory='graph'"),
    ],
)
def test_choices_are_validated(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Unrolled(steps=1, learning_rate=0.1, **fields)


@forall(
    30,
    sample=quadratics(max_condition=100.0),
    steps=st.integers(1, 12),
    keep=st.integers(1, 12),
    share=st.floats(0.05, 1.0),
)
def test_truncation_leaves_out_a_geometric_tail(sample: Sample, steps: int, keep: int, share: float) -> None:
    """The last K of T recorded steps: the rest is ``Σ_{K ≤ k < T} ηCᵀ(I − ηH)ᵏ v``, of norm below ``‖C‖ ‖v‖ ρᴷ / μ``.

    With ``η ≤ 2 / (μ + L)`` the rate ρ is ``1 − ημ`` (Shaban et al. 2019, proposition 3.1).
    """
    smallest, largest = float(sample.eigenvalues[0]), float(sample.eigenvalues[-1])
    rate = share * 2 / (smallest + largest)
    inner_loss, _ = sample.losses()
    objective = FunctionObjective(
        lambda w, lam: inner_loss(w[0], lam[0]), "the inner problem", Replay(("cpu",)), PassCount()
    )
    problem = InnerProblem(objective, leaves((sample.inner + 1.0,)), leaves((sample.outer,)))
    made = Unrolled(steps, rate).made(problem)
    recorded = dataclasses.replace(problem, inner=made.point, trajectory=made.steps)
    v = (sample.cotangent,)
    for fields in FORMS.values():
        full = Unrolled(**fields).respond(recorded).pullback(v, {})
        short = Unrolled(keep, **fields).respond(recorded).pullback(v, {})
        assert short.info.iterations == min(keep, steps)
        assert ("the inner problem made no more" in short.info.message) == (keep > steps)
        bound = operator_norm(sample.mixed) * float(v[0].norm()) * (1 - rate * smallest) ** keep / smallest
        assert float((full.value[0] - short.value[0]).norm()) <= bound * (keep < steps) + 10 * sample.rounding()
