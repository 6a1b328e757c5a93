from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import Estimator, Hypergradient, Identity, Status
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


def test_takes_no_fields() -> None:
    with pytest.raises(TypeError):
        Identity(1)  # type: ignore[call-arg]
