"""Ways of taking second-order products, each against the dense matrices that autograd gives in float64."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from bilevel import ConjugateGradient, Exact, Neumann, Status, hypergradient
from bilevel.errors import ConfigError, LossError, NonFiniteError
from bilevel.functional import FunctionObjective, PassCount, leaves
from bilevel.products import (
    TOLERATED_ROUNDING,
    DifferenceProducts,
    GaussNewtonGraph,
    GradientGraph,
    Products,
    displacement_error,
)
from bilevel.randomness import Replay
from bilevel.vector import Tensors
from tests.bilevel.strategies import DOUBLE, forall, logarithmic, make_quadratic, samples
from tests.contract.contract import Field, flat

HIDDEN, CLASSES, ROWS = 3, 3, 7


class Network:
    """A two-layer network with a learned penalty, in float64: everything about it that tests ask for."""

    def __init__(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        self.x = torch.randn(ROWS, 2, generator=generator, dtype=DOUBLE)
        self.y = torch.randint(0, CLASSES, (ROWS,), generator=generator)
        self.w = tuple(
            0.5 * torch.randn(*shape, generator=generator, dtype=DOUBLE) for shape in ((2, HIDDEN), (HIDDEN, CLASSES))
        )
        self.lam = (torch.randn(2, generator=generator, dtype=DOUBLE),)
        self.q = tuple(torch.randn(part.shape, generator=generator, dtype=DOUBLE) for part in self.w)

    def logits(self, w: Tensors) -> Tensor:
        return torch.tanh(self.x @ w[0]) @ w[1]

    def head(self, logits: Tensor, w: Tensors, lam: Tensors) -> Tensor:
        """What is convex in (logits, w) jointly."""
        penalty = sum(scale.exp() * part.square().sum() for scale, part in zip(lam[0], w, strict=True))
        return F.cross_entropy(logits, self.y) + penalty

    def loss(self, w: Tensors, lam: Tensors) -> dict[str, Tensor]:
        logits = self.logits(w)
        return {"loss": self.head(logits, w, lam), "outputs": logits}

    def hessian(self) -> Tensor:
        return torch.autograd.functional.hessian(lambda x: self.loss(self.cut(x), self.lam)["loss"], flat(self.w))

    def mixed(self) -> Tensor:
        def slope(lam: Tensor) -> Tensor:
            x = flat(self.w).requires_grad_()
            (grad,) = torch.autograd.grad(self.loss(self.cut(x), (lam,))["loss"], x, create_graph=True)
            return grad

        return torch.autograd.functional.jacobian(slope, self.lam[0])

    def gauss_newton(self) -> Tensor:
        """``[Jᵀ I] ∇²ℓ [J; I]`` from its definition."""
        x = flat(self.w)
        J = torch.autograd.functional.jacobian(lambda x: self.logits(self.cut(x)).reshape(-1), x)
        z = self.logits(self.w).reshape(-1)

        def joint(both: Tensor) -> Tensor:
            logits, rest = both[: len(z)].reshape(ROWS, CLASSES), both[len(z) :]
            return self.head(logits, self.cut(rest), self.lam)

        stacked = torch.cat([J, torch.eye(len(x), dtype=DOUBLE)])
        return stacked.T @ torch.autograd.functional.hessian(joint, torch.cat([z, x])) @ stacked

    def cut(self, x: Tensor) -> Tensors:
        first, second = torch.split(x, [2 * HIDDEN, HIDDEN * CLASSES])
        return first.reshape(2, HIDDEN), second.reshape(HIDDEN, CLASSES)

    def products(self, kind: str, body: Callable[[Products], Any]) -> tuple[Any, PassCount]:
        passes = PassCount()
        objective = FunctionObjective(self.loss, "the network", Replay(("cpu",)), passes)
        w, lam = leaves(self.w), leaves(self.lam)
        if kind == "difference":
            return body(DifferenceProducts(objective, w, lam)), passes
        graph = GaussNewtonGraph if kind == "gauss_newton" else GradientGraph
        return objective.within(w, lam, lambda evaluate: body(graph(objective, evaluate, w, lam))), passes


@forall(30, number=st.integers(0, 2**31))
def test_products_equal_the_dense_matrices(number: int) -> None:
    net = Network(number)
    dense = {"autodiff": net.hessian(), "gauss_newton": net.gauss_newton(), "difference": net.hessian()}
    mixed = net.mixed()
    for kind, matrix in dense.items():
        tolerance = 1e-6 if kind == "difference" else 1e-11

        def both(products: Products) -> tuple[Tensor, Tensor, tuple[Tensors, Tensors]]:
            image = products.hessian(net.q)
            return flat(image), flat(products.gradient).detach(), products.hessian_and_mixed(net.q)

        (image, gradient, (again, cross)), _ = net.products(kind, both)
        size = float((matrix @ flat(net.q)).norm())
        torch.testing.assert_close(image, matrix @ flat(net.q), rtol=tolerance, atol=tolerance * size)
        torch.testing.assert_close(flat(again), image, rtol=1e-12, atol=1e-12 * size)
        torch.testing.assert_close(flat(cross), mixed.T @ flat(net.q), rtol=tolerance, atol=tolerance * size)
        (slope,) = torch.autograd.grad(net.loss(w := leaves(net.w), net.lam)["loss"], w[:1])
        torch.testing.assert_close(gradient[: slope.numel()], slope.reshape(-1))


@forall(30, number=st.integers(0, 2**31))
def test_gauss_newton_is_positive_where_the_hessian_is_not(number: int) -> None:
    net = Network(number)
    # A cotangent of size 1, rounding of the part that is taken away, and no more: the eigenvalues of a sum of squares.
    eigenvalues = torch.linalg.eigvalsh(net.gauss_newton())
    assert float(eigenvalues[0]) > 0
    q, v = net.q, flat(net.q)
    image, _ = net.products("gauss_newton", lambda products: flat(products.hessian(q)))
    assert float(v @ image) >= float(eigenvalues[0]) * float(v @ v) * (1 - 1e-9)


def test_passes_are_as_documented() -> None:
    net = Network(0)
    for kind, setup, product, last in (
        ("autodiff", (1, 1), (0, 1), (0, 1)),
        ("gauss_newton", (1, 3), (0, 1), (0, 2)),
        ("difference", (1, 1), (2, 2), (2, 2)),
    ):
        counts: list[tuple[int, int]] = []

        def body(products: Products, counts: list[tuple[int, int]] = counts) -> None:
            objective = products._objective  # type: ignore[attr-defined]
            for step in (lambda: None, lambda: products.hessian(net.q), lambda: products.hessian_and_mixed(net.q)):
                step()
                counts.append((objective.passes.forward, objective.passes.backward))

        net.products(kind, body)
        steps = [
            tuple(b - a for a, b in zip(first, second, strict=True)) for first, second in pairwise([(0, 0), *counts])
        ]
        assert steps == [setup, product, last], kind


# As a method's setting


@forall(40, number=st.integers(0, 2**31), method=st.sampled_from([Exact, ConjugateGradient]))
def test_a_method_solves_with_the_curvature_it_is_given(number: int, method: type) -> None:
    net = Network(number)
    v = flat(net.q)
    settings = {"max_iterations": 200, "rtol": 1e-12} if method is ConjugateGradient else {}

    def outer(w: Tensors, lam: Any) -> Tensor:
        return sum((part * slope).sum() for part, slope in zip(w, net.q, strict=True))  # type: ignore[return-value]

    result = hypergradient(
        net.loss, outer, net.w, net.lam, method(damping=0.1, curvature="gauss_newton", **settings), state=None
    )
    matrix = net.gauss_newton() + 0.1 * torch.eye(len(v), dtype=DOUBLE)
    expected = -net.mixed().T @ torch.linalg.solve(matrix, v)
    torch.testing.assert_close(result.grad[0], expected, rtol=1e-7, atol=1e-8 * float(v.norm()))
    assert result.info.status is Status.CONVERGED


@forall(25, sample=samples(max_condition=100.0), solver=st.sampled_from(["exact", "conjugate_gradient", "neumann"]))
def test_difference_products_solve_like_autodiff_ones(sample: Any, solver: str) -> None:
    made = {
        "exact": Exact(products="finite_difference"),
        "conjugate_gradient": ConjugateGradient(max_iterations=30, rtol=1e-7, products="finite_difference"),
        "neumann": Neumann(terms=5, step_size=1 / float(sample.eigenvalues[-1]), products="finite_difference"),
    }[solver]
    exact = {
        "exact": Exact(),
        "conjugate_gradient": ConjugateGradient(max_iterations=30, rtol=1e-7),
        "neumann": Neumann(terms=5, step_size=1 / float(sample.eigenvalues[-1])),
    }[solver]
    losses = sample.losses()
    found = hypergradient(*losses, sample.inner, sample.outer, made)
    expected = hypergradient(*losses, sample.inner, sample.outer, exact)
    size = sample.scale() + float(sample.direct.norm())
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4 * size)
    assert not found.info.status.failed


def test_every_solver_works_where_no_double_backward_exists() -> None:
    # Flash and memory-efficient attention have first derivatives only; so has reentrant activation checkpointing.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 8, 4, generator=generator)
    w, lam = 0.3 * torch.randn(4, 4, generator=generator), torch.zeros(4)

    def attention(w: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x @ w, x, x)

    def losses(backend: SDPBackend) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        def inner(w: Tensor, lam: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return attention(w).square().mean() + (lam.exp() * w.square()).sum()

        return inner, lambda w, lam: (w - 1).square().sum()

    fused, plain = losses(SDPBackend.FLASH_ATTENTION), losses(SDPBackend.MATH)
    with pytest.raises(LossError, match=r"cannot be differentiated twice.*products='finite_difference'"):
        hypergradient(*fused, w, lam, "exact")
    for method in ("exact", "conjugate_gradient", "neumann"):
        found = hypergradient(*fused, w, lam, {"method": method, "products": "finite_difference"})
        expected = hypergradient(*plain, w, lam, method)
        torch.testing.assert_close(found.grad, expected.grad, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("products", ["autodiff", "finite_difference"])
def test_activation_checkpointing_works_or_is_refused_with_the_remedy(products: str) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    w, lam = torch.full((4, 4), 0.3, dtype=DOUBLE), torch.zeros(4, dtype=DOUBLE)

    def loss(reentrant: bool) -> Callable[[Tensor, Tensor], Tensor]:
        def inner(w: Tensor, lam: Tensor) -> Tensor:
            hidden = checkpoint(lambda a: torch.tanh(x @ a), w, use_reentrant=reentrant)
            return hidden.square().mean() + (lam.exp() * w.square()).sum()

        return inner

    def outer(w: Tensor, lam: Tensor) -> Tensor:
        return (w - 1).square().sum()

    method = {"method": "cg", "products": products}
    with pytest.raises(LossError, match=r"reentrant activation checkpointing.*use_reentrant=False"):
        hypergradient(loss(True), outer, w, lam, method)
    found = hypergradient(loss(False), outer, w, lam, method)
    expected = hypergradient(
        lambda w, lam: torch.tanh(x @ w).square().mean() + (lam.exp() * w.square()).sum(), outer, w, lam, "cg"
    )
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-6, atol=1e-6)


def test_a_jacobian_that_autograd_does_not_see_is_the_fields() -> None:
    # g(w) = H w + N w − λ where N w stands behind a detach(): autograd's Jacobian is H alone.
    H = torch.diag(torch.tensor([2.0, 3.0], dtype=DOUBLE))
    N = torch.tensor([[0.0, 0.8], [-0.1, 0.0]], dtype=DOUBLE)
    v, zero = torch.tensor([1.0, 2.0], dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return w @ H @ w / 2 + w @ (N @ w.detach()) - w @ lam

    true = torch.linalg.solve((H + N).T, v)
    seen = hypergradient(inner, lambda w, lam: w @ v, zero, zero.clone(), Exact())
    assert float((seen.grad - true).norm() / true.norm()) > 0.1
    for method in (Exact(products="field"), Neumann(terms=60, step_size=0.3, products="field")):
        found = hypergradient(inner, lambda w, lam: w @ v, zero, zero.clone(), method)
        torch.testing.assert_close(found.grad, true, rtol=1e-7, atol=1e-7)
        assert not found.info.status.failed
    # Differences alone take the untransposed product, and say that it is not enough.
    other = hypergradient(inner, lambda w, lam: w @ v, zero, zero.clone(), Exact(products="finite_difference"))
    assert other.info.status is Status.NOT_SYMMETRIC
    # A custom backward pass is seen by autograd too, and its transposed products need no differences.
    custom = hypergradient(
        lambda w, lam: w @ H @ w / 2 + Field.apply(w, N) - w @ lam, lambda w, lam: w @ v, zero, zero.clone(), Exact()
    )
    torch.testing.assert_close(custom.grad, true)


def test_displacements_that_rounding_swallows_are_reported() -> None:
    sample = make_quadratic(4, 3, 3.0, 1.0, 5)
    losses = sample.losses(torch.float32)
    w, lam = sample.inner.float() + 100, sample.outer.float()
    result = hypergradient(*losses, w, lam, Exact(products="finite_difference", difference_step=1e-6))
    assert result.info.status is Status.INACCURATE
    assert "rounding changes the displacements" in result.info.message


DTYPES = (torch.float16, torch.bfloat16, torch.float32, DOUBLE)


@forall(
    200,
    number=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    weight=st.just(0.0) | logarithmic(1e-6, 1e3),
    length=logarithmic(1e-8, 1e2),
    central=st.booleans(),
)
def test_a_displacement_s_error_is_bounded_where_it_is_tolerable_and_exact_elsewhere(
    number: int, dtype: torch.dtype, weight: float, length: float, central: bool
) -> None:
    generator = torch.Generator().manual_seed(number)
    shapes = ((30,), (4, 5))
    w = tuple((weight * torch.randn(shape, generator=generator, dtype=DOUBLE)).to(dtype) for shape in shapes)
    working = torch.promote_types(dtype, torch.float32)
    q = tuple(torch.randn(shape, generator=generator, dtype=DOUBLE).to(working) for shape in shapes)
    factor = length / float(flat(q).norm())
    found = displacement_error(w, q, factor, length, float(flat(w).double().norm()), central=central)
    move = factor * flat(q).double()
    ahead = (flat(w).to(working) + factor * flat(q)).to(dtype).double()
    behind = (flat(w).to(working) - factor * flat(q)).to(dtype).double() if central else flat(w).double()
    both = 2 * move if central else move
    error = float((ahead - behind - both).norm() / both.norm())
    if found <= TOLERATED_ROUNDING:
        assert error <= found * (1 + 1e-3) + 1e-15
    else:
        # Numbers of the dtype near a tie may fall to either side.
        assert found == pytest.approx(error, rel=0.02, abs=0.01)


@pytest.mark.parametrize("method", ["finite_difference", {"method": "cg", "products": "finite_difference"}])
def test_one_displaced_copy_of_the_parameters_stands_at_a_time(method: object) -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        alive.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(w))
        return ((w - lam) ** 4).sum()

    w, lam = torch.tensor([1.0, 2.0], dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)
    hypergradient(inner, lambda w, lam: w.sum(), w, lam, method)  # type: ignore[arg-type]
    assert len(alive) >= 2
    assert not any(alive)


# Bad input


def test_gauss_newton_needs_outputs_that_the_loss_was_computed_from() -> None:
    w, lam = torch.ones(2), torch.ones(2)
    method = ConjugateGradient(curvature="gauss_newton")

    def call(loss: Callable[[Tensor, Tensor], Any]) -> None:
        hypergradient(loss, lambda w, lam: w.sum(), w, lam, method)

    with pytest.raises(
        LossError, match=r"let the loss of the inner problem return \{'loss': loss, 'outputs': logits\}"
    ):
        call(lambda w, lam: (w - lam).square().sum())
    with pytest.raises(LossError, match="was not computed from the 'outputs'"):
        call(lambda w, lam: {"loss": (w - lam).square().sum(), "outputs": w * 1.0})
    with pytest.raises(LossError, match="do not depend on its parameters"):
        call(lambda w, lam: {"loss": (w - lam).square().sum(), "outputs": torch.ones(2)})
    with pytest.raises(LossError, match="must be a tensor or a sequence of tensors"):
        call(lambda w, lam: {"loss": (w - lam).square().sum(), "outputs": [1.0]})
    with pytest.raises(LossError, match="returned a mapping without 'loss'; it has: value"):
        call(lambda w, lam: {"value": (w - lam).square().sum()})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"curvature": "fisher"}, "unknown value of Exact.curvature 'fisher'"),
        ({"products": "differences"}, "unknown value of Exact.products 'differences'"),
        ({"difference_step": 0.0}, "Exact.difference_step must be a finite number above 0"),
        ({"difference_step": 1e-3}, "belongs to products='finite_difference'"),
        ({"products": "finite_difference", "curvature": "gauss_newton"}, "is taken by autodiff"),
        ({"products": "finite_difference", "certificate": {}}, "a certificate needs products='autodiff'"),
        ({"certificate": {"mu": 1.0}}, "unknown field of Exact.certificate: 'mu'"),
        ({"certificate": 1.0}, "must be a Certificate, a mapping of its fields, or None, not 1.0"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Exact(**settings)
    assert expected in str(caught.value)


def test_a_loss_that_is_not_finite_away_from_the_point_gives_no_number_that_looks_fine() -> None:
    # log w is NaN on one side of the displacement.
    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return (w.log() * w - w * lam).sum()

    w = torch.tensor([1e-6, 1.0], dtype=DOUBLE)
    method = Exact(products="finite_difference", difference_step=1e-3)
    result = hypergradient(inner, lambda w, lam: w.sum(), w, torch.zeros(2, dtype=DOUBLE), method)
    assert result.info.status is Status.DIVERGED
    with pytest.raises(NonFiniteError):
        hypergradient(inner, lambda w, lam: w.sum(), -w, torch.zeros(2, dtype=DOUBLE), method)
