"""What every estimator promises. A new estimator supplies a factory and a bound, and inherits every test."""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref
from abc import ABC, abstractmethod
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from bilevel import Estimator, Hypergradient
from bilevel import hypergradient as call
from bilevel.errors import LossError, NonFiniteError, ParameterError
from bilevel.functional import FunctionObjective, PassCount, leaves
from bilevel.hypergrad import InnerProblem, as_estimator, available_methods
from bilevel.randomness import Replay
from tests.bilevel.strategies import DOUBLE, EPSILON, Sample, forall, make_quadratic, quadratics, samples

Pair = namedtuple("Pair", ["first", "second"])


def hypergradient(inner_loss: Any, outer_loss: Any, inner: Any, outer: Any, method: Estimator) -> Hypergradient:
    """The first call of a method, with an empty state where it goes on from its last call."""
    return call(inner_loss, outer_loss, inner, outer, method, state={} if method.needs_state else None)


def solve(sample: Sample, estimator: Estimator, dtype: torch.dtype = DOUBLE) -> Hypergradient:
    """The estimator's hypergradient of a sample at its solution."""
    return hypergradient(*sample.losses(dtype), sample.inner.to(dtype), sample.outer.to(dtype), estimator)


def flat(structure: Any) -> Tensor:
    """All variables of a structure as one vector; None stands for nothing."""
    if isinstance(structure, Tensor):
        return structure.reshape(-1)
    if structure is None:
        return torch.zeros(0, dtype=DOUBLE)
    children = structure.values() if isinstance(structure, (dict, nn.ParameterDict)) else structure
    return torch.cat([flat(child) for child in children])


def _module(x: Tensor) -> nn.Module:
    module = nn.Module()
    module.first, module.rest = nn.Parameter(x[:2].clone()), nn.Parameter(x[2:].clone())
    return module


# Ways to hold a vector of six numbers.
STRUCTURES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "one-element tensors": lambda x: [x[i : i + 1] for i in range(6)],
    "list with a matrix and a zero-dimensional tensor": lambda x: [x[:2], x[2:5].reshape(3, 1), x[5]],
    "tuple": lambda x: (x[:4], x[4:]),
    "dict": lambda x: {"weight": x[:3].reshape(1, 3), "bias": x[3:]},
    "nested": lambda x: {"layers": [{"w": x[:1]}, {"w": x[1:3]}], "head": (x[3:4], x[4:])},
    "namedtuple": lambda x: Pair(x[:5], x[5:]),
    "empty tensor among others": lambda x: [x[:3], x[3:3], x[3:]],
    "parameter list": lambda x: nn.ParameterList([nn.Parameter(x[:2]), nn.Parameter(x[2:])]),
    "parameter dict": lambda x: nn.ParameterDict({"a": nn.Parameter(x[:2]), "b": nn.Parameter(x[2:])}),
    "iterator": lambda x: _module(x).parameters(),
    "not contiguous": lambda x: [x[:4].reshape(2, 2).T.contiguous().T, x[4:]],
    "views of one storage": lambda x: list(x.clone().split(2)),
}


class EstimatorContract(ABC):
    """Inherit, supply the three factories, and give an estimator to :attr:`default`."""

    default: ClassVar[Estimator]
    """An estimator that reaches its target to rounding where the inner Hessian's eigenvalues lie in [0.25, 1.5]."""
    roundoff: ClassVar[float] = 1e-9
    """Relative difference that equivalent formulations may show in float64."""
    float32_error: ClassVar[float] = 1e-4
    """Relative error in float32 on samples with a condition number below 10."""
    bfloat16_error: ClassVar[float | None] = 0.2
    """The same in bfloat16; None where it makes no sense."""

    @abstractmethod
    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        """Estimators with all of their fields varied, as far as theory bounds their error on this sample."""

    @abstractmethod
    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        """Theory's bound of ``‖gradient − exact hypergradient‖``, without rounding."""

    @abstractmethod
    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        """Forward and backward passes of the inner loss that its documentation promises."""

    def stays(self, estimator: Estimator) -> bool:
        """Whether the outer loss is taken at the very inner parameters that were given."""
        return estimator.name != "unrolled"

    def target(self, sample: Sample) -> Tensor:
        """What the default estimator computes; the exact hypergradient unless overridden."""
        return sample.hypergradient()

    # Accuracy

    @forall(60, sample=samples(), data=st.data())
    def test_error_is_within_the_theoretical_bound(self, sample: Sample, data: st.DataObject) -> None:
        estimator = data.draw(self.estimators(sample))
        result = solve(sample, estimator)
        error = float((result.grad - sample.hypergradient()).norm())
        assert error <= 1.000001 * self.bound(estimator, sample, result) + sample.rounding()

    @forall(40, sample=samples(), data=st.data())
    def test_direct_part_value_and_point_do_not_depend_on_the_method(self, sample: Sample, data: st.DataObject) -> None:
        estimator = data.draw(self.estimators(sample))
        result = solve(sample, estimator)
        if self.stays(estimator):
            torch.testing.assert_close(result.inner, sample.inner, rtol=0, atol=0)
        torch.testing.assert_close(result.direct, sample.direct, rtol=1e-12, atol=1e-12)
        expected = float(sample.losses()[1](result.inner, sample.outer))
        assert result.value == pytest.approx(expected, rel=1e-12)

    @forall(15, sample=quadratics(max_condition=4.0, scale=False))
    def test_float32_and_bfloat16_have_their_stated_errors(self, sample: Sample) -> None:
        # relative to the largest that the implicit part can be: it may vanish by cancellation
        size = float(sample.direct.norm()) + sample.scale()
        for dtype, tolerance in ((torch.float32, self.float32_error), (torch.bfloat16, self.bfloat16_error)):
            if tolerance is None:
                continue
            result = solve(sample, self.default, dtype)
            assert result.grad.dtype == dtype or result.grad.dtype == torch.float32
            assert float((result.grad.to(DOUBLE) - self.target(sample)).norm()) <= tolerance * size

    # Structures

    @pytest.mark.parametrize("outer_structure", STRUCTURES)
    @pytest.mark.parametrize("inner_structure", ["tensor", "nested"])
    def test_result_does_not_depend_on_how_parameters_are_held(
        self, inner_structure: str, outer_structure: str
    ) -> None:
        self._check_structure(STRUCTURES[inner_structure], STRUCTURES[outer_structure])

    @pytest.mark.parametrize("inner_structure", STRUCTURES)
    def test_inner_parameters_may_be_held_in_any_structure(self, inner_structure: str) -> None:
        self._check_structure(STRUCTURES[inner_structure], STRUCTURES["tensor"])

    def _check_structure(self, hold_inner: Callable[[Tensor], Any], hold_outer: Callable[[Tensor], Any]) -> None:
        sample = _six_by_six()
        inner_loss, outer_loss = sample.losses()
        expected = solve(sample, self.default)
        result = hypergradient(
            lambda w, lam: inner_loss(flat(w), flat(lam)),
            lambda w, lam: outer_loss(flat(w), flat(lam)),
            hold_inner(sample.inner),
            hold_outer(sample.outer),
            self.default,
        )
        for name in ("grad", "direct"):
            self._close(flat(getattr(result, name)), getattr(expected, name))
        held = hold_outer(sample.outer)
        if isinstance(held, (list, tuple, dict)):
            assert type(result.grad) is type(held)
            assert [part.shape for part in _parts(result.grad)] == [part.shape for part in _parts(held)]

    def test_a_tensor_in_two_places_is_one_variable(self) -> None:
        sample = _six_by_six()
        inner_loss, outer_loss = sample.losses()
        expected = solve(sample, self.default)
        w, lam = sample.inner.clone(), sample.outer.clone()

        def mean(shared: Any) -> Tensor:
            return (shared["here"] + 2 * shared["there"][0]) / 3

        result = hypergradient(
            lambda w, lam: inner_loss(mean(w), mean(lam)),
            lambda w, lam: outer_loss(mean(w), mean(lam)),
            {"here": w, "there": [w]},
            {"here": lam, "there": [lam]},
            self.default,
        )
        self._close(result.grad["here"], expected.grad)
        assert result.grad["here"] is result.grad["there"][0]

    def test_frozen_parameters_are_constants(self) -> None:
        sample = _six_by_six()
        inner_loss, outer_loss = sample.losses()
        expected = solve(sample, self.default)
        frozen = nn.Parameter(torch.full((6,), 3.0, dtype=DOUBLE), requires_grad=False)
        counts = nn.Parameter(torch.arange(6), requires_grad=False)  # not differentiable at all, and need not be

        def inner(w: Any, lam: Any) -> Tensor:
            return inner_loss(w[0] * w[1] / 3, lam["free"] * lam["fixed"] / 3) + 0.0 * lam["counts"].sum()

        result = hypergradient(
            inner,
            lambda w, lam: outer_loss(w[0] * w[1] / 3, lam["free"] * lam["fixed"] / 3),
            [sample.inner, frozen],
            {"free": sample.outer, "fixed": frozen, "counts": counts},
            self.default,
        )
        self._close(result.grad["free"], expected.grad)
        assert result.grad["fixed"] is None
        assert result.grad["counts"] is None
        assert result.direct["fixed"] is None
        assert result.inner[1] is frozen

    def test_unused_parameters_have_no_influence(self) -> None:
        # Betty's conjugate gradient and Neumann series crash on an inner parameter that is not used.
        sample = _six_by_six()
        inner_loss, outer_loss = sample.losses()
        expected = solve(sample, self.default)
        unused = torch.ones(3, 2, dtype=DOUBLE)
        result = hypergradient(
            lambda w, lam: inner_loss(w["used"], lam["used"]),
            lambda w, lam: outer_loss(w["used"], lam["used"]),
            {"unused": unused, "used": sample.inner},
            {"used": sample.outer, "unused": unused.clone()},
            self.default,
        )
        self._close(result.grad["used"], expected.grad)
        assert torch.equal(result.grad["unused"], torch.zeros(3, 2, dtype=DOUBLE))

    def test_inner_parameter_that_only_the_outer_loss_uses_has_no_response(self) -> None:
        sample = _six_by_six()
        inner_loss, outer_loss = sample.losses()
        expected = solve(sample, self.default)
        result = hypergradient(
            lambda w, lam: inner_loss(w[0], lam),
            lambda w, lam: outer_loss(w[0], lam) + (w[1] * lam.detach()).sum(),
            [sample.inner, torch.ones(6, dtype=DOUBLE)],
            sample.outer,
            self.default,
        )
        self._close(result.grad, expected.grad)

    def test_inner_loss_without_outer_parameters_leaves_the_direct_part(self) -> None:
        sample = _six_by_six()
        inner_loss, outer_loss = sample.losses()
        constant = sample.outer.clone()
        result = hypergradient(
            lambda w, lam: inner_loss(w, constant), outer_loss, sample.inner, sample.outer, self.default
        )
        torch.testing.assert_close(result.grad, result.direct, rtol=0, atol=0)

    def test_scalar_parameters(self) -> None:
        # A peer returns zero here without a word.
        for shape in ((), (1,), (1, 1)):
            w, lam = torch.full(shape, 2.0, dtype=DOUBLE), torch.full(shape, 2.0, dtype=DOUBLE)
            result = hypergradient(
                lambda w, lam: (w - lam).square().sum() / 2, lambda w, lam: w.square().sum() / 2, w, lam, self.default
            )
            assert result.grad.shape == shape
            assert float(result.grad) == pytest.approx(2.0, rel=1e-8)  # the Hessian is 1: every method is exact

    # Invariances

    @forall(20, sample=samples(max_condition=100.0), cut=st.integers(0, 8), data=st.data())
    def test_splitting_a_tensor_changes_rounding_only(self, sample: Sample, cut: int, data: st.DataObject) -> None:
        estimator = data.draw(self.estimators(sample))
        inner_loss, outer_loss = sample.losses()
        place = min(cut, len(sample.inner))
        result = hypergradient(
            lambda w, lam: inner_loss(flat(w), lam),
            lambda w, lam: outer_loss(flat(w), lam),
            [sample.inner[:place], sample.inner[place:]],
            sample.outer,
            estimator,
        )
        self._close_on(sample, result.grad, solve(sample, estimator).grad)

    @forall(20, sample=samples(max_condition=100.0), number=st.integers(0, 2**31), data=st.data())
    def test_permuting_coordinates_changes_rounding_only(
        self, sample: Sample, number: int, data: st.DataObject
    ) -> None:
        estimator = data.draw(self.estimators(sample))
        inner_loss, outer_loss = sample.losses()
        generator = torch.Generator().manual_seed(number)
        order = torch.randperm(len(sample.inner), generator=generator)
        outer_order = torch.randperm(len(sample.outer), generator=generator)
        back, outer_back = order.argsort(), outer_order.argsort()
        result = hypergradient(
            lambda w, lam: inner_loss(w[back], lam[outer_back]),
            lambda w, lam: outer_loss(w[back], lam[outer_back]),
            sample.inner[order],
            sample.outer[outer_order],
            estimator,
        )
        self._close_on(sample, result.grad[outer_back], solve(sample, estimator).grad)

    @pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12])
    def test_tiny_and_huge_outer_losses_scale_the_answer(self, factor: float) -> None:
        # Squares of such cotangents leave the range of float32: conjugate gradient took the first for zero.
        sample = make_quadratic(4, 3, 4.0, 1.0, 5)
        inner_loss, outer_loss = sample.losses(torch.float32)
        w, lam = sample.inner.float(), sample.outer.float()
        plain = hypergradient(inner_loss, outer_loss, w, lam, self.default).grad
        scaled = hypergradient(inner_loss, lambda w, lam: outer_loss(w, lam) * factor, w, lam, self.default).grad
        torch.testing.assert_close(scaled / factor, plain, rtol=1e-3, atol=1e-3 * float(plain.norm()))

    # Purity

    @forall(10, sample=quadratics(max_condition=100.0), data=st.data())
    def test_nothing_that_is_passed_in_changes(self, sample: Sample, data: st.DataObject) -> None:
        estimator = data.draw(self.estimators(sample))
        inner_loss, outer_loss = sample.losses()
        w, lam = nn.Parameter(sample.inner.clone()), sample.outer.clone().requires_grad_()
        marked = torch.ones_like(lam)
        lam.grad = marked
        versions, generator = (w._version, lam._version), torch.get_rng_state()
        fields = dataclasses.asdict(estimator)
        result = hypergradient(
            lambda w, lam: inner_loss(w[0], lam["lam"]),
            lambda w, lam: outer_loss(w[0], lam["lam"]),
            [w],
            {"lam": lam},
            estimator,
        )
        assert torch.equal(w, sample.inner)
        assert torch.equal(lam, sample.outer)
        assert (w._version, lam._version) == versions
        assert w.grad is None
        assert lam.grad is marked
        assert torch.equal(marked, torch.ones_like(lam))
        assert w.requires_grad
        assert lam.requires_grad
        assert dataclasses.asdict(estimator) == fields
        assert torch.equal(torch.get_rng_state(), generator)  # these losses draw nothing, and so does the method
        assert not result.grad["lam"].requires_grad
        assert not result.direct["lam"].requires_grad

    @forall(10, sample=samples(), data=st.data())
    def test_repetition_gives_the_same_bits(self, sample: Sample, data: st.DataObject) -> None:
        estimator = data.draw(self.estimators(sample))
        assert torch.equal(solve(sample, estimator).grad, solve(sample, estimator).grad)

    @forall(10, sample=quadratics(), data=st.data())
    def test_result_is_the_same_without_gradient_mode(self, sample: Sample, data: st.DataObject) -> None:
        estimator = data.draw(self.estimators(sample))
        with torch.no_grad():
            quiet = solve(sample, estimator)
        assert torch.equal(quiet.grad, solve(sample, estimator).grad)

    def test_result_is_the_same_under_autocast(self) -> None:
        # Products and solves are taken in full precision whatever autocast does elsewhere.
        sample = _six_by_six()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = solve(sample, self.default, torch.float32)
        assert torch.equal(inside.grad, solve(sample, self.default, torch.float32).grad)

    def test_all_passes_see_the_same_dropout_masks(self) -> None:
        # New masks in each pass are a factor of 4 to 26 off in a peer.
        sample = make_quadratic(6, 3, 3.0, 1.0, 7)
        inner_loss, outer_loss = sample.losses()
        w, lam = sample.inner, sample.outer

        def dropped(w: Tensor, lam: Tensor) -> Tensor:
            return inner_loss(0.5 * F.dropout(w, 0.5), lam) + w.square().sum() / 4

        torch.manual_seed(3)
        found = hypergradient(dropped, outer_loss, w, lam, self.default)
        torch.manual_seed(3)
        mask = 0.5 * F.dropout(torch.ones(6, dtype=DOUBLE), 0.5)
        expected = hypergradient(
            lambda w, lam: inner_loss(w * mask, lam) + w.square().sum() / 4, outer_loss, w, lam, self.default
        )
        self._close(found.grad, expected.grad)
        assert 0 < int((mask == 0).sum()) < 6

    def test_the_inner_loss_always_sees_parameters_that_require_gradients(self) -> None:
        # A loss with "if p.requires_grad", or with a derivative of its own (a gradient penalty), is evaluated as it is.
        sample = _six_by_six()
        inner_loss, outer_loss = sample.losses()

        def asking(w: Tensor, lam: Tensor) -> Tensor:
            assert w.requires_grad
            (slope,) = torch.autograd.grad(w.square().sum() / 2, w, create_graph=True)
            return inner_loss(slope, lam)

        found = hypergradient(asking, outer_loss, sample.inner, sample.outer, self.default)
        self._close(found.grad, hypergradient(inner_loss, outer_loss, sample.inner, sample.outer, self.default).grad)

    def test_generators_advance_by_one_evaluation_of_each_loss(self) -> None:
        sample = _six_by_six()
        inner_loss, outer_loss = sample.losses()

        def noisy(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda w, lam: loss(w + 0 * torch.rand(6, dtype=DOUBLE), lam)

        torch.manual_seed(11)
        hypergradient(noisy(inner_loss), noisy(outer_loss), sample.inner, sample.outer, self.default)
        after = torch.rand(4)
        torch.manual_seed(11)
        torch.rand(6, dtype=DOUBLE)
        torch.rand(6, dtype=DOUBLE)
        assert torch.equal(after, torch.rand(4))

    def test_no_graph_survives(self) -> None:
        sample = _six_by_six()
        inner_loss, outer_loss = sample.losses()
        born: list[weakref.ref[Tensor]] = []

        def watched(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def inner(w: Tensor, lam: Tensor) -> Tensor:
                intermediate = w * 1.0
                born.append(weakref.ref(intermediate))
                return loss(intermediate, lam)

            return inner

        gc.collect()
        gc.disable()
        try:
            result = hypergradient(watched(inner_loss), watched(outer_loss), sample.inner, sample.outer, self.default)
            assert born
            assert all(reference() is None for reference in born)  # freed by reference counting alone
        finally:
            gc.enable()
        assert result.grad.grad_fn is None

    # Report and costs

    @forall(20, sample=samples(max_condition=100.0), data=st.data())
    def test_passes_are_what_the_documentation_says(self, sample: Sample, data: st.DataObject) -> None:
        estimator = data.draw(self.estimators(sample))
        evaluations = 0
        inner_loss, outer_loss = sample.losses()

        def counted(w: Tensor, lam: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return inner_loss(w, lam)

        result = hypergradient(counted, outer_loss, sample.inner, sample.outer, estimator)
        forward, backward = self.passes(estimator, result)
        assert evaluations == forward

        passes = PassCount()
        objective = FunctionObjective(
            lambda w, lam: inner_loss(w[0], lam[0]), "the inner problem", Replay(("cpu",)), passes
        )
        problem = InnerProblem(objective, leaves((sample.inner,)), leaves((sample.outer,)))
        response = estimator.respond(problem)
        with torch.enable_grad():
            point = response.point[0].detach().requires_grad_()
            (cotangent,) = torch.autograd.grad(outer_loss(point, sample.outer), point)
        pulled = response.pullback((cotangent,), {})
        assert pulled.info == result.info or math.isnan(result.info.residual)
        assert (passes.forward, passes.backward) == (forward, backward)

    @forall(10, sample=quadratics(max_condition=100.0), data=st.data())
    def test_a_pullback_may_be_taken_again(self, sample: Sample, data: st.DataObject) -> None:
        inner_loss, _ = sample.losses()
        objective = FunctionObjective(
            lambda w, lam: inner_loss(w[0], lam[0]), "the inner problem", Replay(("cpu",)), PassCount()
        )
        problem = InnerProblem(objective, leaves((sample.inner,)), leaves((sample.outer,)))
        response = data.draw(self.estimators(sample)).respond(problem)
        first = response.pullback((sample.cotangent,), {})
        other = response.pullback((-sample.cotangent,), {})
        assert torch.equal(first.value[0], response.pullback((sample.cotangent,), {}).value[0])
        torch.testing.assert_close(other.value[0], -first.value[0], rtol=1e-6, atol=1e-6 * sample.scale())

    def test_outer_loss_that_ignores_inner_parameters_leaves_the_direct_part(self) -> None:
        sample = _six_by_six()
        inner_loss, _ = sample.losses()
        result = hypergradient(inner_loss, lambda w, lam: lam.square().sum(), sample.inner, sample.outer, self.default)
        assert torch.equal(result.grad, 2 * sample.outer)
        assert not result.info.status.failed

    def test_is_its_own_configuration(self) -> None:
        described = self.default.describe()
        assert as_estimator(described) == self.default
        assert described["method"] == self.default.name
        with pytest.raises(dataclasses.FrozenInstanceError):
            self.default.name = "other"  # type: ignore[misc]
        if type(self.default).__module__.startswith("bilevel."):
            assert available_methods()[self.default.name] is type(self.default)
        for text in (self.default.summary, self.default.cost, self.default.needs):
            assert text

    # Bad input

    @pytest.mark.parametrize("loss", ["inner", "outer"])
    def test_losses_must_be_finite_scalars(self, loss: str) -> None:
        def call(bad: Callable[..., Any]) -> None:
            good = lambda w, lam: ((w - lam) ** 2).sum()  # noqa: E731
            losses = (bad, good) if loss == "inner" else (good, bad)
            hypergradient(*losses, torch.ones(2), torch.zeros(2), self.default)

        with pytest.raises(LossError, match=rf"{loss} problem must be a scalar; it has shape \(2,\).*\.mean\(\)"):
            call(lambda w, lam: (w - lam) ** 2)
        with pytest.raises(LossError, match=f"{loss} problem must be a scalar tensor; it is a float"):
            call(lambda w, lam: 1.0)
        for value in (math.nan, math.inf):
            with pytest.raises(NonFiniteError, match=f"{loss} problem is {value}.*finite number"):
                call(lambda w, lam, value=value: ((w - lam) ** 2).sum() * value)

    def test_inner_loss_must_depend_on_inner_parameters(self) -> None:
        losses = [lambda w, lam: lam.square().sum()]
        if self.default.needs_double_backward:  # differences of losses see through a detach
            losses.append(lambda w, lam: ((w.detach() - lam) ** 2).sum())
        for inner in losses:
            with pytest.raises(LossError, match=r"does not depend on its inner parameters.*detach"):
                hypergradient(inner, lambda w, lam: (w * lam).sum(), torch.ones(2), torch.ones(2), self.default)

    def test_outer_loss_must_depend_on_something(self) -> None:
        with pytest.raises(LossError, match=r"outer problem depends neither on the inner nor on the outer.*detach"):
            hypergradient(
                lambda w, lam: ((w - lam) ** 2).sum(),
                lambda w, lam: (w * lam).sum().detach(),
                torch.ones(2),
                torch.ones(2),
                self.default,
            )

    @pytest.mark.parametrize("bad", [torch.arange(3), torch.ones(3, dtype=torch.complex64), torch.ones(3) > 0])
    def test_parameters_must_be_real_floating_point(self, bad: Tensor) -> None:
        loss = lambda w, lam: (w * lam).sum()  # noqa: E731
        with pytest.raises(ParameterError, match=r"inner parameter 'x' has dtype .*real floating point is needed"):
            hypergradient(loss, loss, {"x": bad}, torch.ones(3), self.default)
        with pytest.raises(ParameterError, match=r"outer parameter '\[1\]' has dtype .*closure"):
            hypergradient(loss, loss, torch.ones(3), [torch.ones(3), bad], self.default)

    def test_a_tensor_cannot_be_inner_and_outer(self) -> None:
        x = torch.ones(2)
        loss = lambda w, lam: (w["a"] * lam[0]).sum()  # noqa: E731
        with pytest.raises(ParameterError, match=r"inner and an outer parameter at once: a\. Clone"):
            hypergradient(loss, loss, {"a": x}, [x], self.default)

    # Helpers

    def _close(self, found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=self.roundoff, atol=self.roundoff * float(expected.norm()))

    def _close_on(self, sample: Sample, found: Tensor, expected: Tensor) -> None:
        tolerance = self.roundoff * (sample.scale() + float(sample.direct.norm())) + EPSILON
        torch.testing.assert_close(found, expected, rtol=self.roundoff, atol=tolerance)


class Field(torch.autograd.Function):
    """Zero, with ``N w`` for its gradient: an inner gradient that is no gradient."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, N: Tensor) -> Tensor:
        ctx.save_for_backward(w, N)
        return w.new_zeros(())

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        w, N = ctx.saved_tensors
        return cotangent * (N @ w), None


def operator_norm(matrix: Tensor) -> float:
    """The largest singular value."""
    return float(torch.linalg.matrix_norm(matrix, 2))


def status_of(matrix: Tensor, estimator: Estimator, v: Tensor) -> tuple[Tensor, Hypergradient]:
    """Solves ``H q = v`` through an estimator; returns q and the result.

    With ``f = wᵀHw/2 − wᵀλ`` and ``F = vᵀw`` the hypergradient is q itself.
    """
    zero = torch.zeros_like(v)
    result = hypergradient(
        lambda w, lam: w @ (matrix @ w) / 2 - w @ lam, lambda w, lam: w @ v, zero, zero.clone(), estimator
    )
    return result.grad, result


def _six_by_six() -> Sample:
    sample = make_quadratic(6, 6, 3.0, 1.0, 1)
    return dataclasses.replace(sample, outer=sample.outer.clone(), inner=sample.inner.clone())


def _parts(structure: Any) -> Iterator[Tensor]:
    if isinstance(structure, Tensor):
        yield structure
        return
    for child in structure.values() if isinstance(structure, dict) else structure:
        yield from _parts(child)


__all__ = [
    "DOUBLE",
    "EPSILON",
    "EstimatorContract",
    "Field",
    "Sample",
    "flat",
    "forall",
    "operator_norm",
    "solve",
    "status_of",
]
