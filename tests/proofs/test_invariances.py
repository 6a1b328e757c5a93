"""What must not change an answer, asked of every registered method; what may is stated by its setting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import argmin, hypergradient
from bilevel.errors import ParameterError
from bilevel.hypergrad import available_methods
from tests.bilevel.strategies import DOUBLE, Sample, forall, logarithmic, make_quadratic, quadratics, spectrum_matrix
from tests.proofs.families import Logistic, make_logistic
from tests.proofs.settings import METHODS_WITHOUT_FUNCTION, SETTINGS, Setting, run

# Eigenvalues in [0.2, 1] and [0.3, 3] or so: every step size of the settings is stable.
samples = st.one_of(
    quadratics(max_dimension=6, max_condition=5.0, scale=False),
    st.builds(
        make_logistic,
        groups=st.lists(st.integers(1, 2), min_size=1, max_size=3).map(tuple),
        rows=st.integers(3, 10),
        decay=st.just(0.5),
        number=st.integers(0, 2**31 - 1),
    ),
)
seeds = st.integers(0, 2**31 - 1)


def orthogonal(size: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=DOUBLE))[0]


def same(setting: Setting, sample: Sample, found: Tensor, expected: Tensor) -> None:
    size = sample.scale() + float(sample.direct.norm()) + float(expected.norm())
    assert float((found - expected).norm()) <= setting.tolerance * size, f"{setting}: {found} is not {expected}"


def test_every_registered_method_is_here() -> None:
    known = {setting.method for setting in SETTINGS} | METHODS_WITHOUT_FUNCTION
    ours = {name for name, cls in available_methods().items() if cls.__module__.startswith("bilevel.hypergrad.")}
    assert ours <= known, f"give them a Setting in tests/proofs/settings.py: {sorted(ours - known)}"


@forall(3, sample=samples, c=logarithmic(1e-2, 1e2))
def test_scaling_the_inner_loss(sample: Sample, c: float) -> None:
    # c f has the solution of f. H and B are both c times as large: −BᵀH⁻¹v stays, −Bᵀv does not.
    inner, outer = sample.losses()
    for setting in SETTINGS:
        plain, _ = run(setting, inner, outer, sample.inner, sample.outer)
        scaled, _ = run(setting, lambda w, lam: c * inner(w, lam), outer, sample.inner, sample.outer, c)
        same(setting, sample, scaled / c**setting.power, plain)


@forall(3, sample=samples, number=seeds)
def test_rotating_the_inner_variables(sample: Sample, number: int) -> None:
    inner, outer = sample.losses()
    Q = orthogonal(len(sample.inner), number)
    for setting in SETTINGS:
        if setting.orthogonal:
            _, plain = run(setting, inner, outer, sample.inner, sample.outer)
            _, turned = run(
                setting,
                lambda u, lam: inner(Q @ u, lam),
                lambda u, lam: outer(Q @ u, lam),
                Q.T @ sample.inner,
                sample.outer,
            )
            same(setting, sample, turned, plain)


@forall(3, sample=samples, number=seeds)
def test_changing_the_inner_variables(sample: Sample, number: int) -> None:
    # The solution as a point does not depend on coordinates. Gradients do: only what solves is invariant.
    inner, outer = sample.losses()
    generator = torch.Generator().manual_seed(number)
    size = len(sample.inner)
    T = orthogonal(size, number) @ spectrum_matrix(torch.linspace(0.6, 1.5, size, dtype=DOUBLE), generator)
    for setting in SETTINGS:
        if setting.solves:
            _, changed = run(
                setting,
                lambda u, lam: inner(T @ u, lam),
                lambda u, lam: outer(T @ u, lam),
                torch.linalg.solve(T, sample.inner),
                sample.outer,
            )
            same(setting, sample, changed, sample.hypergradient())


def test_the_identity_is_not_invariant_under_a_change_of_units() -> None:
    # What the test above would say of a method that does not solve: w = 2u makes its implicit part four times as large.
    sample = make_quadratic(4, 3, 5.0, 1.0, 1)
    inner, outer = sample.losses()
    plain = hypergradient(inner, outer, sample.inner, sample.outer, "identity")
    twice = hypergradient(
        lambda u, lam: inner(2 * u, lam), lambda u, lam: outer(2 * u, lam), sample.inner / 2, sample.outer, "identity"
    )
    torch.testing.assert_close(twice.grad - twice.direct, 4 * (plain.grad - plain.direct))


@forall(3, sample=samples, number=seeds, data=st.data())
def test_permuting_and_splitting_parameters(sample: Sample, number: int, data: st.DataObject) -> None:
    inner, outer = sample.losses()
    generator = torch.Generator().manual_seed(number)
    order = torch.randperm(len(sample.inner), generator=generator)
    outer_order = torch.randperm(len(sample.outer), generator=generator)
    cut, outer_cut = (data.draw(st.integers(0, len(x))) for x in (sample.inner, sample.outer))
    for setting in SETTINGS:
        _, plain = run(setting, inner, outer, sample.inner, sample.outer)
        _, split = run(
            setting,
            lambda w, lam: inner(torch.cat(w), torch.cat(lam)),
            lambda w, lam: outer(torch.cat(w), torch.cat(lam)),
            [sample.inner[:cut], sample.inner[cut:]],
            [sample.outer[:outer_cut], sample.outer[outer_cut:]],
        )
        same(setting, sample, split, plain)
        if setting.permutes:
            back, outer_back = order.argsort(), outer_order.argsort()
            _, permuted = run(
                setting,
                lambda w, lam, a=back, b=outer_back: inner(w[a], lam[b]),
                lambda w, lam, a=back, b=outer_back: outer(w[a], lam[b]),
                sample.inner[order],
                sample.outer[outer_order],
            )
            same(setting, sample, permuted[outer_back], plain)


@forall(3, sample=quadratics(max_dimension=6, max_condition=5.0, scale=False), number=seeds, a=st.floats(-2, 2))
def test_linearity_in_the_outer_loss(sample: Sample, number: int, a: float) -> None:
    inner, first = sample.losses()
    generator = torch.Generator().manual_seed(number)
    direction = torch.randn(len(sample.inner), generator=generator, dtype=DOUBLE)

    def second(w: Tensor, lam: Tensor) -> Tensor:
        return (w @ direction).sin() + lam.sum().cos()

    for setting in SETTINGS:
        if setting.linear:
            one, other, both = (
                run(setting, inner, loss, sample.inner, sample.outer)[1]
                for loss in (first, second, lambda w, lam: a * first(w, lam) - 3 * second(w, lam))
            )
            same(setting, sample, both, a * one - 3 * other)


@forall(2, size=st.integers(1, 4), outer_size=st.integers(1, 3), number=seeds)
def test_vmapping_over_a_batch_of_problems(size: int, outer_size: int, number: int) -> None:
    # A sum of losses of separate variables: its Hessian is block-diagonal, and the answer that of each problem.
    batch = [make_quadratic(size, outer_size, 4.0, 1.0, (number + place) % 2**31) for place in range(3)]
    data = {key: torch.stack([sample.data[key] for sample in batch]) for key in batch[0].data}

    def losses(data: dict[str, Tensor], w: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        inner, outer = Sample("quadratic", data, lam, w).losses()
        return inner(w, lam), outer(w, lam)

    w, lam = (torch.stack([getattr(sample, name) for sample in batch]) for name in ("inner", "outer"))
    for setting in SETTINGS:
        if setting.blocks:
            _, together = run(
                setting,
                lambda w, lam: torch.func.vmap(losses)(data, w, lam)[0].sum(),
                lambda w, lam: torch.func.vmap(losses)(data, w, lam)[1].sum(),
                w,
                lam,
            )
            for sample, found in zip(batch, together, strict=True):
                _, alone = run(setting, *sample.losses(), sample.inner, sample.outer)
                same(setting, sample, found, alone)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.jacrev], ids=["vmap", "jacrev"])
def test_being_transformed_is_refused_with_the_way_out(transform: Any) -> None:
    for setting in SETTINGS:
        with pytest.raises(ParameterError, match=r"inside torch\.func.*sum.*torch\.func\.vmap\(loss\)"):
            transform(lambda lam, s=setting: run(s, _loss, _loss, torch.ones(3), lam)[1])(torch.ones(3, 3))
    fit = argmin(_loss)(lambda lam: lam.clone())
    with pytest.raises(ParameterError, match=r"inside torch\.func"):
        transform(fit)(torch.ones(3, 3))


def _loss(w: Tensor, lam: Tensor) -> Tensor:
    return (w - lam).square().sum()


@forall(4, number=seeds)
def test_decorated_solvers_see_batches_as_a_sum(number: int) -> None:
    # The way out that the message above names, for argmin.
    batch = [make_logistic((2, 1), 6, 0.5, (number + place) % 2**31) for place in range(3)]
    data = {key: torch.stack([sample.data[key] for sample in batch]) for key in batch[0].data}

    def loss(data: dict[str, Tensor], w: Tensor, lam: Tensor) -> Tensor:
        return Logistic("logistic", data, lam, w).losses()[0](w, lam)

    def solve_all(lam: Tensor) -> Tensor:
        return torch.stack([sample.solution(row) for sample, row in zip(batch, lam, strict=True)])

    fit = argmin(lambda w, lam: torch.func.vmap(loss)(data, w, lam).sum(), method="exact")(solve_all)
    lam = torch.stack([sample.outer for sample in batch]).requires_grad_()
    target = torch.arange(9, dtype=DOUBLE).reshape(3, 3)
    (found,) = torch.autograd.grad((fit(lam) * target).sum(), lam)
    for place, sample in enumerate(batch):
        row = sample.outer.clone().requires_grad_()
        (expected,) = torch.autograd.grad(sample.solution(row) @ target[place], row)
        torch.testing.assert_close(found[place], expected, rtol=1e-8, atol=1e-10)
