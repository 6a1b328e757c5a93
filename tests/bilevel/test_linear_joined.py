"""Solvers that hold vectors of several small tensors as one tensor find what they find in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel.linear import Solution, conjugate_gradient, neumann
from bilevel.linear import joined as module
from bilevel.linear.joined import Joined
from bilevel.result import Status

Tensors = tuple[Tensor, ...]
SHAPES = ((3, 2), (), (4,), (1, 2, 2))
SOLVERS: dict[Callable[..., Solution], dict[str, Any]] = {
    conjugate_gradient: {"max_iterations": 6, "rtol": 1e-12},
    neumann: {"terms": 40, "step_size": 0.3, "symmetric": True},
}


def vector(seed: int, dtype: torch.dtype = torch.float64) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    # transposed: a vector's parts need not be contiguous
    parts = [torch.randn(shape[::-1], generator=generator, dtype=dtype) for shape in SHAPES]
    return tuple(part.permute(tuple(reversed(range(part.dim())))) for part in parts)


def product(q: Tensors) -> Tensors:
    """``(D + uuᵀ) q`` with parts that are one another's neighbours: the eigenvalues lie between 1 and 3.5."""
    u = vector(5)
    inner = sum(((a * b).sum() for a, b in zip(u, q, strict=True)), start=torch.zeros((), dtype=torch.float64))
    size = sum(float((a * a).sum()) for a in u)
    return tuple((1 + place / 2) * a + b * inner / size for place, (a, b) in enumerate(zip(q, u, strict=True)))


def halved(q: Tensors) -> Tensors:
    return tuple(part / (1 + place / 2) for place, part in enumerate(q))


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.__name__)
@pytest.mark.parametrize("preconditioner", [None, halved])
@pytest.mark.parametrize("seed", [None, 3])
def test_joined_vectors_lead_to_the_same_solution(
    solver: Any, preconditioner: Any, seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def solved() -> tuple[Solution, list[Tensors]]:
        seen: list[Tensors] = []

        def operator(q: Tensors) -> Tensors:
            seen.append(q)
            return product(q)

        start = None if seed is None else vector(seed)
        found = solver(operator, vector(1), start=start, preconditioner=preconditioner, **SOLVERS[solver])
        # A product that was taken elsewhere is known by the very tuple.
        assert start is None or seen[0] is start
        return found, seen

    joined, seen = solved()
    monkeypatch.setattr(module, "LARGEST", 1)
    apart, seen_apart = solved()
    assert (joined.status, joined.iterations, len(seen)) == (apart.status, apart.iterations, len(seen_apart))
    assert not joined.status.failed
    assert all(part.shape == shape for q in seen for part, shape in zip(q, SHAPES, strict=True))
    for a, b in zip(joined.q, apart.q, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_solver_sees_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def solver(operator: Any, v: Tensors, **settings: Any) -> Solution:
        seen.append(len(v))
        return Solution(operator(v), Status.CONVERGED, 1)

    v = vector(1)
    how = Joined.of(v)
    assert how is not None
    found = how.solved(solver, product, v, None, None)
    assert seen == [1]
    for a, b in zip(found.q, product(v), strict=True):
        torch.testing.assert_close(a, b)


def test_a_torch_that_lacks_the_calls_joins_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    v = vector(1)
    how = Joined.of(v)
    assert how is not None
    (at_once,), parts = how.join(v), how.split(how.join(v))
    monkeypatch.setattr(module, "_flatten", module._joined)
    monkeypatch.setattr(module, "_unflatten", module._parted)
    (apart,) = how.join(v)
    assert torch.equal(at_once, apart)
    for a, b, c in zip(parts, how.split((apart,)), v, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_vectors_that_are_better_left_apart_are() -> None:
    v = vector(1)
    assert Joined.of(v) is not None
    assert Joined.of(v[:1]) is None
    assert Joined.of((v[0], v[2].float())) is None
    assert Joined.of((v[0], v[2].to_sparse())) is None
    assert Joined.of((v[0], v[2].new_empty(0, 4))) is None
    assert Joined.of((v[0], torch.nn.Parameter(v[2]))) is None
    assert Joined.of((v[0], torch.zeros(module.LARGEST, dtype=torch.float64))) is None
