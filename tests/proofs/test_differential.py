"""Hypergradients beside independent ones: SciPy's solvers on dense matrices, closed forms, and JAXopt where it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from scipy.sparse import linalg

from bilevel import hypergradient
from bilevel.hypergrad import available_methods
from tests.bilevel.strategies import Sample, forall
from tests.proofs.families import convex, networks, stationary_points

# Ours, SciPy's. All to rounding: what is compared is the answer, not the way there.
SOLVERS: dict[str, Callable[..., Any]] = {
    "conjugate_gradient": lambda H, v: linalg.cg(H, v, rtol=1e-13, maxiter=100),
    "minres": lambda H, v: linalg.minres(H, v, rtol=1e-14, maxiter=100),
    "gmres": lambda H, v: linalg.gmres(H, v, rtol=1e-13, maxiter=5, restart=30),
    "bicgstab": lambda H, v: linalg.bicgstab(H, v, rtol=1e-13, maxiter=100),
    "exact": lambda H, v: (np.linalg.solve(H, v), 0),
}
PRESENT = {name: solver for name, solver in SOLVERS.items() if name in available_methods()}
JAXOPT = os.environ.get("BILEVEL_JAXOPT_PYTHON", "")


def compare(sample: Sample, name: str) -> None:
    fields = {} if name == "exact" else {"max_iterations": 400, "rtol": 1e-14}
    ours = hypergradient(*sample.losses(), sample.inner, sample.outer, {"method": name, **fields})
    H, B, v, direct = (x.numpy() for x in (sample.hessian, sample.mixed, sample.cotangent, sample.direct))
    q, _ = PRESENT[name](H, v)
    theirs = direct - B.T @ q
    residual = float(np.linalg.norm(H @ q - v)) / max(float(np.linalg.norm(v)), 1e-300)
    # Each is as far from the exact one as its own residual says.
    slack = 1e2 * sample.rounding() + (ours.info.residual + residual) * sample.scale()
    assert float(np.linalg.norm(ours.grad.numpy() - theirs)) <= slack
    assert ours.info.residual <= 1e-8 or ours.info.status.failed or residual > 1e-8


@forall(50, sample=convex(max_condition=1e4), name=st.sampled_from(sorted(PRESENT)))
def test_solvers_agree_with_scipys_on_minima(sample: Sample, name: str) -> None:
    compare(sample, name)


@forall(
    40, sample=networks() | stationary_points(), name=st.sampled_from(sorted(set(PRESENT) - {"conjugate_gradient"}))
)
def test_indefinite_solvers_agree_with_scipys_at_stationary_points(sample: Sample, name: str) -> None:
    compare(sample, name)


@forall(20, sample=convex(max_condition=1e3) | stationary_points())
def test_the_whole_agrees_with_central_differences_of_the_solved_problem(sample: Sample) -> None:
    # NumPy only: the outer objective with the inner problem solved again at every point.
    _, outer = sample.losses()
    ours = hypergradient(*sample.losses(), sample.inner, sample.outer, "exact").grad.numpy()
    step = 1e-5
    differences = []
    for place in range(len(sample.outer)):
        ends = []
        for sign in (1, -1):
            lam = sample.outer.clone()
            lam[place] += sign * step
            ends.append(float(outer(sample.solution(lam), lam)))
        differences.append((ends[0] - ends[1]) / (2 * step))
    value = abs(float(outer(sample.inner, sample.outer)))
    size = 1 + sample.scale() * (1 + float(sample.hessian.norm()) / float(sample.eigenvalues.abs().min()))
    assert float(np.linalg.norm(ours - np.array(differences))) <= 1e-6 * size + 1e-9 * value


@pytest.mark.slow
@pytest.mark.skipif(
    not JAXOPT,
    reason="set BILEVEL_JAXOPT_PYTHON to the interpreter of an environment with jaxopt: "
    "python -m benchmarks.differential --environment DIR --create makes one",
)
def test_first_and_second_derivatives_agree_with_jaxopts() -> None:
    from benchmarks.differential.__main__ import compare as rows

    for row in rows(Path(JAXOPT), 3):
        condition = 1e6 if "1e6" in row.family else 1e2
        if row.failed < row.problems:
            assert row.our_error < 1e-12 * condition**1.5, row
        # JAXopt's conjugate gradients are no solver for saddle points, and it does not say so.
        if not (row.theirs in ("cg", "bicgstab") and "saddle" in row.family):
            assert row.their_error < 1e-12 * condition**1.5, row
        assert row.failed == 0 or "saddle" in row.family, row


def test_the_arrays_are_what_the_losses_read() -> None:
    # The other side gets arrays only: all of a sample's data, by the names that its losses use.
    from benchmarks.differential.__main__ import problems

    for _, sample in problems(1):
        assert all(isinstance(value, torch.Tensor) for value in sample.data.values())
        g = torch.autograd.functional.jacobian(lambda w, s=sample: s.losses()[0](w, s.outer), sample.inner)
        assert float(g.norm()) < 1e-9
