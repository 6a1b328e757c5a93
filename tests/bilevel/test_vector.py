from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import vector
from tests.bilevel.strategies import DOUBLE, forall


def vectors(number: int, shapes: list[tuple[int, ...]], count: int = 2) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(number)
    return [tuple(torch.randn(shape, generator=generator, dtype=DOUBLE) for shape in shapes) for _ in range(count)]


def flat(x: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in x])


shapes = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=4)


@forall(100, number=st.integers(0, 2**31), shapes=shapes, alpha=st.floats(-10, 10))
def test_arithmetic_is_that_of_the_flat_vector(number: int, shapes: list[tuple[int, ...]], alpha: float) -> None:
    x, y = vectors(number, shapes)
    close = torch.testing.assert_close
    close(float(vector.dot(x, y)), float(flat(x) @ flat(y)))
    close(float(vector.norm(x)), float(flat(x).norm()))
    close(vector.length(x), float(flat(x).norm()))
    close(flat(vector.axpy(alpha, x, y)), alpha * flat(x) + flat(y))
    close(flat(vector.axpy(torch.tensor(alpha), x, y)), torch.tensor(alpha).double() * flat(x) + flat(y))
    total = vector.scale(1.0, y)
    vector.axpy_(alpha, x, total)
    close(flat(total), alpha * flat(x) + flat(y))
    close(flat(vector.add(x, y)), flat(x) + flat(y))
    close(flat(vector.subtract(x, y)), flat(x) - flat(y))
    close(flat(vector.scale(alpha, x)), alpha * flat(x))
    close(flat(vector.negative(x)), -flat(x))
    assert not flat(vector.zeros_like(x)).any()
    assert [part.shape for part in vector.zeros_like(x)] == [part.shape for part in x]


def test_the_empty_vector() -> None:
    assert float(vector.dot((), ())) == float(vector.norm(())) == vector.length(()) == 0.0
    assert vector.is_finite(())
    assert vector.axpy(1.0, (), ()) == vector.scale(2.0, ()) == vector.negative(()) == ()


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
def test_norms_of_float32_vectors_neither_overflow_nor_underflow(size: float) -> None:
    # Squares of the entries do: the norm was infinite, or zero.
    for x in (torch.full((4,), size),), tuple(torch.full((4,), size).split(1)):
        assert float(vector.norm(x)) == vector.length(x) == pytest.approx(2 * size, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alpha", [7e4, -1e39, float("inf"), float("nan")])
def test_factors_beyond_a_dtype_give_what_is_not_finite_and_no_exception(dtype: torch.dtype, alpha: float) -> None:
    # torch.add raises: a diverging solver ended in an exception instead of a status.
    x, y = torch.tensor([1.0, 100.0], dtype=dtype), torch.zeros(2, dtype=dtype)
    torch.testing.assert_close(vector.axpy(alpha, (x,), (y,))[0], alpha * x, equal_nan=True)
    vector.axpy_(alpha, (x,), (y,))
    torch.testing.assert_close(y, alpha * x, equal_nan=True)


def test_splitting_a_float32_vector_changes_rounding_only() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    for function in (vector.norm, lambda v: vector.dot(v, v)):
        whole, split = float(function((x,))), float(function(x.split(7)))
        assert whole == pytest.approx(split, rel=1e-5)
        assert function((x,)).dtype == DOUBLE


def test_vectors_of_different_lengths_are_refused() -> None:
    x, y = torch.ones(2), torch.ones(2)
    for call in (
        lambda: vector.dot((x, y), (x,)),
        lambda: vector.axpy(1.0, (x,), (x, y)),
        lambda: vector.add((), (x,)),
    ):
        with pytest.raises(ValueError, match="zip|to be added"):
            call()


def test_promotion_keeps_at_least_float32() -> None:
    parts = tuple(torch.ones(1, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, DOUBLE))
    assert [part.dtype for part in vector.promote(parts)] == [torch.float32, torch.float32, torch.float32, DOUBLE]
    assert vector.promote(parts)[2] is parts[2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finiteness_looks_at_every_entry(bad: float) -> None:
    good = torch.ones(3, 2)
    assert vector.is_finite((good, torch.ones(())))
    spoilt = torch.ones(3, 2)
    spoilt[2, 1] = bad
    assert not vector.is_finite((good, spoilt))
    assert not vector.is_finite((spoilt, torch.ones(3, dtype=torch.bfloat16)))
    # sums that overflow, or cancel, say nothing about the entries
    assert vector.is_finite((torch.full((4,), 1e308, dtype=DOUBLE),))
    assert not vector.is_finite((torch.tensor([float("inf"), -float("inf")]),))
