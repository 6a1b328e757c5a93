"""The orthogonality penalty against its definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bidora.config import BiDoRAConfig
from bidora.dora import dora_weight
from bidora.model import get_bidora_model
from bidora.orthogonality import direction_orthogonality, orthogonality
from bidora.variants import dora_layers
from bilevel.errors import ParameterError


@st.composite
def factors(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float]:
    rows, columns, rank = draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    weight, A, B = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, columns), (rank, columns), (rows, rank))
    )
    zero = torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    weight[zero], B[zero] = 0, 0
    return weight, A, 0.3 * B, draw(st.sampled_from([0.5, 2.0]))


def definition(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """‖D Dᵀ − I‖²_F over the nonzero rows."""
    V = weight + scaling * B @ A
    V = V[V.detach().norm(dim=1) > 0]
    D = V / V.norm(dim=1, keepdim=True)
    return (D @ D.T - torch.eye(len(D), dtype=D.dtype)).square().sum()


@given(factors())
def test_value_and_derivatives_are_those_of_the_definition(case: tuple[Tensor, Tensor, Tensor, float]) -> None:
    weight, A, B, scaling = case

    def derivatives(function: Callable[..., Tensor]) -> list[Tensor]:
        inputs = A.clone().requires_grad_(), B.clone().requires_grad_()
        value = function(weight, *inputs, scaling)
        first = torch.autograd.grad(value, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [t.detach() for t in (value, *first, *second)]

    def with_known_gram(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        return direction_orthogonality(weight, A, B, scaling, gram=weight @ weight.T)

    references = derivatives(definition)
    size = max(float(reference.abs().max()) for reference in references)
    for ours in (direction_orthogonality, with_known_gram):
        for value, reference in zip(derivatives(ours), references, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-6, atol=1e-9 * size + 1e-10)


@settings(max_examples=15)
@given(factors())
def test_gradgradcheck(case: tuple[Tensor, Tensor, Tensor, float]) -> None:
    weight, A, B, scaling = case
    weight = weight + 2 * torch.eye(*weight.shape, dtype=weight.dtype) + 0.5  # no row near 0
    inputs = A.requires_grad_(), B.mul(0.1).requires_grad_()
    function = lambda A, B: direction_orthogonality(weight, A, B, scaling)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, rtol=1e-3, atol=1e-4)
    assert torch.autograd.gradgradcheck(function, inputs, rtol=1e-3, atol=1e-3)


@given(st.integers(0, 10**6), st.floats(-5, 0))
def test_rows_that_nearly_cancel_are_right_in_float32(seed: int, exponent: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    A, B, noise = (torch.randn(*shape, generator=generator) for shape in ((3, 16), (6, 3), (6, 16)))
    weight = -B @ A + 10.0**exponent * noise
    exact = definition(*(t.double() for t in (weight, A, B)), 1.0)
    value = direction_orthogonality(weight, A, B, 1.0, gram=weight @ weight.T)
    rounding = 2.0**-24 * 10.0**-exponent  # of V itself, relative
    assert float(value) == pytest.approx(float(exact), abs=36 * (1e-3 + 50 * rounding))


def test_orthogonal_rows_cost_nothing_and_equal_rows_the_most() -> None:
    A, B = torch.zeros(1, 5, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    basis = 3 * torch.linalg.qr(torch.randn(5, 4, dtype=torch.float64)).Q.T
    assert float(direction_orthogonality(basis, A, B, 1.0)) == pytest.approx(0, abs=1e-12)
    assert float(direction_orthogonality(torch.ones(4, 5, dtype=torch.float64), A, B, 1.0)) == pytest.approx(4 * 3)
    wide = torch.randn(9, 5, dtype=torch.float64)
    assert float(direction_orthogonality(wide, A, torch.zeros(9, 1, dtype=torch.float64), 1.0)) >= 9 * (9 - 5) / 5


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_model_it_is_the_mean_over_layers(
    kind: str, dtype: torch.dtype, make_model: Callable[..., nn.Module]
) -> None:
    targets = {"bert": ["query", "intermediate.dense"], "llama": ["q_proj", "v_proj"], "gpt2": ["c_attn", "c_proj"]}
    config = BiDoRAConfig(r=2, target_modules=targets[kind], task_type="SEQ_CLS", fan_in_fan_out=kind == "gpt2")
    model = get_bidora_model(make_model(kind).to(dtype), config)
    with torch.no_grad():
        for _, layer, adapter in dora_layers(model):
            layer.lora_B[adapter].weight.normal_()
        expected = []
        for _, layer, adapter in dora_layers(model):
            W = dora_weight(layer, adapter).double()
            D = W / W.norm(dim=1, keepdim=True)
            expected.append((D @ D.T - torch.eye(len(D))).square().sum())
    penalty = orthogonality(model)
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty.detach().double(), torch.stack(expected).mean(), rtol=1e-4, atol=1e-4)
    penalty.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (".lora_A." in name or ".lora_B." in name)


def test_a_model_without_dora_layers_is_an_error() -> None:
    with pytest.raises(ParameterError, match="no active layer"):
        orthogonality(nn.Linear(2, 2))
