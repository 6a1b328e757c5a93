from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import Estimator, FiniteDifference, Hypergradient, Identity, Status, argmin, hypergradient
from bilevel.errors import ConfigError
from tests.bilevel.strategies import samples
from tests.contract.contract import EstimatorContract, Sample, forall, operator_norm, solve


class TestIdentity(EstimatorContract):
    default = Identity()

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        return st.just(Identity())

    def target(self, sample: Sample) -> Tensor:
        return sample.direct - sample.mixed.T @ sample.cotangent

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        distance = float((1 - 1 / sample.eigenvalues).abs().max())
        return operator_norm(sample.mixed) * float(sample.cotangent.norm()) * distance

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert result.info.products == 1
        return 1, 2


@forall(150, sample=samples())
def test_is_the_mixed_product_with_the_cotangent(sample: Sample) -> None:
    result = solve(sample, Identity())
    expected = sample.direct - sample.mixed.T @ sample.cotangent
    size = float(sample.mixed.norm() * sample.cotangent.norm() + sample.direct.norm())
    torch.testing.assert_close(result.grad, expected, rtol=1e-12, atol=1e-13 * size)
    assert result.info.status is Status.NOT_APPLICABLE
    assert torch.tensor(result.info.residual).isnan()


def test_fields_are_named_and_checked() -> None:
    with pytest.raises(TypeError):
        Identity("old")  # type: ignore[misc]
    with pytest.raises(ConfigError, match=r"unknown value of Identity\.center 'middle'"):
        Identity(center="middle")


@pytest.mark.parametrize("method", [Identity(center="old"), FiniteDifference(center="old", difference="forward")])
def test_the_old_point_is_that_of_an_engines_step(method: Estimator) -> None:
    # As a function no step was made: what is given may be any point.
    w = lam = torch.ones(2)
    loss = lambda w, lam: ((w - lam) ** 2).sum()  # noqa: E731
    with pytest.raises(ConfigError, match=r"center='old'.*no engine has recorded one.*center='new', or OneStep"):
        hypergradient(loss, loss, w, lam.clone(), method)
    with pytest.raises(ConfigError, match="no engine has recorded one"):
        argmin(loss, method)(lambda lam: lam.clone())(lam.clone().requires_grad_())
