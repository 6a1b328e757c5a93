"""The exact DoRA forward, its norm and its derivatives, against an independent dense formula in float64."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import bidora.dora
import bidora.norm
from bidora.dora import ExactDoraVariant, dora_linear, dora_weight, layer_row_norm
from bidora.norm import dense_row_norm, row_norm, squared_row_norm

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@dataclass
class Case:
    """Tensors of one layer, with rows of W₀ and B that are zero where asked for."""

    x: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    magnitude: Tensor
    scaling: float
    bias: Tensor | None
    zero: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        bias = None if self.bias is None else self.bias.to(dtype)
        tensors = (self.x, self.weight, self.A, self.B, self.magnitude)
        return Case(*(t.to(dtype) for t in tensors), self.scaling, bias, self.zero)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float, Tensor | None]:
        return self.x, self.weight, self.A, self.B, self.magnitude, self.scaling, self.bias


@st.composite
def cases(draw: st.DrawFn, *, zero_rows: bool = True, max_size: int = 8) -> Case:
    rows, columns = draw(st.integers(1, max_size)), draw(st.integers(1, max_size))
    rank = draw(st.integers(1, max_size + 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    size = 10.0 ** draw(st.integers(-2, 2))
    zero = torch.zeros(rows, dtype=torch.bool)
    if zero_rows:
        zero = torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    alive = (~zero).unsqueeze(1)
    return Case(
        x=random(*draw(st.sampled_from([(3,), (1, 2)])), columns),
        weight=size * random(rows, columns) * alive,
        A=random(rank, columns) / math.sqrt(columns),
        B=size * draw(st.sampled_from([0.0, 0.1, 1.0])) * random(rows, rank) * alive,
        magnitude=size * random(rows),
        scaling=draw(st.sampled_from([0.25, 1.0, 4.0])),
        bias=size * random(rows) if draw(st.booleans()) else None,
        zero=zero,
    )


def dense_norm(case: Case) -> Tensor:
    return (case.weight + case.scaling * case.B @ case.A).square().sum(1).sqrt()


def dense_forward(case: Case) -> Tensor:
    """The definition, row by row; a zero row gives the bias."""
    V = case.weight + case.scaling * case.B @ case.A
    W = [m * v / v.square().sum().sqrt() if v.any() else 0.0 * v for m, v in zip(case.magnitude, V, strict=True)]
    return case.x @ torch.stack(W).T + (0.0 if case.bias is None else case.bias)


def well_conditioned(case: Case) -> bool:
    """Whether no row of V nearly vanishes: what follows compares with tolerances relative to ‖V‖."""
    terms = case.weight.norm(dim=1) + case.scaling * case.B.norm(dim=1) * case.A.norm()
    return bool((dense_norm(case) >= 0.05 * terms)[~case.zero].all())


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).abs().max() / reference.abs().max().clamp_min(1e-300))


# The forward pass


@given(cases())
def test_forward_is_the_dense_definition(case: Case) -> None:
    assume(well_conditioned(case))
    torch.testing.assert_close(dora_linear(*case.arguments), dense_forward(case), rtol=1e-11, atol=1e-11)


@given(cases())
def test_forward_uses_a_known_base_result_and_norm(case: Case) -> None:
    known = {"base_result": F.linear(case.x, case.weight, case.bias), "squared_norm": case.weight.square().sum(1)}
    torch.testing.assert_close(
        dora_linear(*case.arguments, **known), dora_linear(*case.arguments), rtol=1e-11, atol=1e-11
    )


@given(cases())
def test_float32_forward_has_float32_error(case: Case) -> None:
    case32 = case.to(torch.float32)
    exact = case32.to(torch.float64)
    assume(well_conditioned(exact))
    terms = exact.weight.norm(dim=1) + case.scaling * exact.B.norm(dim=1) * exact.A.norm()
    scale = exact.magnitude.abs() / dense_norm(exact).clamp_min(1e-30)
    bias = 0.0 if exact.bias is None else exact.bias.abs() * (2 + scale)
    bound = 400 * UNIT_ROUNDOFF[torch.float32] * (scale * terms * exact.x.norm(dim=-1, keepdim=True) + bias)
    error = (dora_linear(*case32.arguments).double() - dense_forward(exact)).abs()
    assert bool((error <= bound + 1e-30).all())


@given(cases(zero_rows=False))
def test_with_the_initial_magnitude_the_output_is_the_base_layers_bit_for_bit(case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        start = case.to(dtype)
        start.B.zero_()
        start.magnitude = row_norm(start.weight, start.A, start.B, start.scaling)
        assert torch.equal(dora_linear(*start.arguments), F.linear(start.x, start.weight, start.bias))


def test_nan_in_a_factor_is_not_hidden() -> None:
    weight, lora_A, lora_B = torch.ones(3, 4), torch.ones(2, 4), torch.zeros(3, 2)
    lora_B[1, 0] = math.nan
    y = dora_linear(torch.ones(1, 4), weight, lora_A, lora_B, torch.ones(3), 1.0)
    assert y.isnan().tolist() == [[False, True, False]]


# The norm


@given(cases())
def test_norm_is_that_of_the_dense_sum(case: Case) -> None:
    assume(well_conditioned(case))
    norm = row_norm(case.weight, case.A, case.B, case.scaling)
    torch.testing.assert_close(norm, dense_norm(case), rtol=1e-11, atol=0)
    assert bool((norm[case.zero] == 0).all())


def cancelling(seed: int, exponent: float, rows: int = 6, columns: int = 32, rank: int = 4) -> Case:
    """W₀ = −s·BA + 10^exponent noise: V nearly vanishes beside its terms."""
    generator = torch.Generator().manual_seed(seed)
    lora_A, lora_B = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    weight = -lora_B @ lora_A + 10.0**exponent * torch.randn(rows, columns, generator=generator)
    return Case(
        torch.zeros(1), weight, lora_A, lora_B, torch.ones(rows), 1.0, None, torch.zeros(rows, dtype=torch.bool)
    )


@given(st.integers(0, 10**6), st.floats(-6, 1))
def test_norm_error_stays_within_its_stated_bound_where_rows_cancel(seed: int, exponent: float) -> None:
    case = cancelling(seed, exponent)
    exact = dense_norm(case.to(torch.float64))
    terms = case.weight.norm(dim=1) + case.B.norm(dim=1) * case.A.norm()
    norm = row_norm(case.weight, case.A, case.B, case.scaling).double()
    c, u = 32 + 4, UNIT_ROUNDOFF[torch.float32]
    assert bool(((norm - exact).abs() <= 500 * c * u * exact + c * u * terms).all())


def test_without_forming_the_cancelling_rows_the_norm_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cancelling(0, -4)
    exact = dense_norm(case.to(torch.float64))
    factors = case.weight, case.A, case.B, case.scaling
    assert relative_error(row_norm(*factors).double(), exact) < 1e-3
    monkeypatch.setattr(bidora.norm, "ILL_CONDITIONED", 0.0)
    assert relative_error(row_norm(*factors).double(), exact) > 0.1


@given(cases(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_norm_of_a_low_precision_weight_is_accumulated_in_float32(case: Case, dtype: torch.dtype) -> None:
    weight = (case.weight / case.weight.abs().max().clamp_min(1e-30)).to(dtype)
    lora_A, lora_B = case.A.float(), case.B.float()
    norm = row_norm(weight, lora_A, lora_B, case.scaling)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, row_norm(weight.float(), lora_A, lora_B, case.scaling), rtol=1e-4, atol=1e-6)


def test_autocast_does_not_reach_the_norm() -> None:
    case = cancelling(0, 0)
    factors = case.weight, case.A, case.B, case.scaling
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norm = row_norm(*factors)
    assert torch.equal(norm, row_norm(*factors))


@given(cases())
def test_norm_under_vmap_and_on_meta(case: Case) -> None:
    stacked = torch.stack([case.B, 0.5 * case.B])
    assume(well_conditioned(case))
    norms = torch.vmap(lambda B: row_norm(case.weight, case.A, B, case.scaling))(stacked)
    torch.testing.assert_close(norms[0], dense_norm(case), rtol=1e-10, atol=1e-10)
    meta = [t.to("meta") for t in (case.weight, case.A, case.B)]
    assert row_norm(*meta, case.scaling).shape == case.magnitude.shape


# Derivatives


def differentiable(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(t.clone().requires_grad_() for t in (case.x, case.A, case.B, case.magnitude))


@settings(max_examples=20)
@given(cases(zero_rows=False, max_size=4))
def test_first_and_second_derivatives_are_those_of_finite_differences(case: Case) -> None:
    assume(well_conditioned(case))
    size = float(case.weight.abs().max())
    assume(0.05 < size < 20)  # for the steps of the differences

    def forward(x: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        return dora_linear(x, case.weight, A, B, m, case.scaling, case.bias)

    inputs = differentiable(case)
    assert torch.autograd.gradcheck(forward, inputs, rtol=1e-3, atol=1e-4)
    assert torch.autograd.gradgradcheck(forward, inputs, rtol=1e-3, atol=1e-4)


@given(cases())
def test_derivatives_are_those_of_the_dense_definition(case: Case) -> None:
    """First and second ones, with zero rows, where those of the rows themselves are 0."""
    assume(well_conditioned(case) and not bool(case.zero.all()))

    def derivatives(forward: Callable[[Case], Tensor]) -> list[Tensor]:
        x, A, B, m = inputs = differentiable(case)
        y = forward(Case(x, case.weight, A, B, m, case.scaling, case.bias, case.zero))
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [t.detach() for t in (*first, *second)]

    references = derivatives(dense_forward)
    size = max(float(reference.abs().max()) for reference in references)
    for value, reference in zip(derivatives(lambda c: dora_linear(*c.arguments)), references, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-7, atol=1e-11 * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-16, 1e-12])
def test_zero_and_tiny_rows_have_finite_derivatives(dtype: torch.dtype, size: float) -> None:
    weight = torch.randn(3, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    weight[1] *= size
    A, B = torch.randn(2, 5, dtype=dtype), torch.zeros(3, 2, dtype=dtype)
    x, m = torch.ones(2, 5, dtype=dtype), row_norm(weight, A, B, 2.0)
    inputs = tuple(t.requires_grad_() for t in (x, A, B, m))
    y = dora_linear(x, weight, A, B, m, 2.0)
    first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), inputs)
    assert all(bool(t.isfinite().all()) for t in (y, *first, *second))
    if size == 0.0:
        assert bool((y[:, 1] == 0).all())
        assert not first[2][1].any()
        assert not first[3][1].any()


@given(cases(max_size=6))
def test_low_precision_weight_gives_the_derivatives_of_its_float_value(case: Case) -> None:
    weight = case.weight.bfloat16()
    A, B = case.A.float(), case.B.float()

    def products(weight: Tensor) -> tuple[Tensor, ...]:
        factors = A.clone().requires_grad_(), B.clone().requires_grad_()
        norm = row_norm(weight, *factors, case.scaling)
        first = torch.autograd.grad(norm.square().sum(), factors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), factors)
        return tuple(t.detach() for t in (*first, *second))

    for value, reference in zip(products(weight), products(weight.float()), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max()) + 1e-12)


def test_no_copy_of_a_low_precision_weight_is_kept_for_backward() -> None:
    weight = torch.randn(64, 48).bfloat16()
    A, B = torch.randn(2, 48, requires_grad=True), torch.randn(64, 2, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        row_norm(weight, A, B, 1.0)
    assert kept
    assert all(t.numel() < weight.numel() or t.data_ptr() == weight.data_ptr() for t in kept)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, at the first jacfwd
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_forward_mode_agrees_with_reverse_mode(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator).to(dtype)
    factor = torch.float64 if dtype == torch.float64 else torch.float32
    A, B = (torch.randn(*s, generator=generator, dtype=factor) for s in ((2, 6), (4, 2)))

    def norm(A: Tensor) -> Tensor:
        return row_norm(weight, A, B, 0.5)

    forward, reverse = torch.func.jacfwd(norm)(A), torch.func.jacrev(norm)(A)
    torch.testing.assert_close(forward, reverse)


def test_only_the_magnitude_costs_no_graph_of_the_norm() -> None:
    case = cancelling(0, 0)
    assert not row_norm(case.weight, case.A, case.B, case.scaling).requires_grad


# The PEFT layer


def make_layer(
    kind: str = "linear", *, rank: int = 3, dropout: float = 0.0, dtype: torch.dtype = torch.float64, bias: bool = True
) -> LoraLinear:
    torch.manual_seed(0)
    base = nn.Linear(5, 7, bias=bias) if kind == "linear" else Conv1D(7, 5)
    if kind == "conv1d":
        nn.init.normal_(base.bias)
    base.to(dtype).requires_grad_(False)
    config = LoraConfig(
        use_dora=True, r=rank, lora_alpha=2 * rank, lora_dropout=dropout, fan_in_fan_out=kind == "conv1d"
    )
    layer = LoraLinear(base, "default", r=rank, lora_alpha=2 * rank, config=config)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def exact(layer: LoraLinear) -> LoraLinear:
    twin = copy.deepcopy(layer)
    twin.lora_variant["default"] = ExactDoraVariant()
    return twin


def trainable(layer: LoraLinear) -> dict[str, Tensor]:
    return {name.split(".")[0]: p for name, p in layer.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("rank", [1, 3, 9])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("training", [False, True])
def test_layer_equals_pefts_forward(kind: str, rank: int, dropout: float, training: bool) -> None:
    layer = make_layer(kind, rank=rank, dropout=dropout).train(training)
    ours, x = exact(layer), torch.randn(2, 3, 5, dtype=torch.float64)
    torch.manual_seed(1)
    expected = layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_layer_equals_pefts_forward_in_lower_precision(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    layer = make_layer(kind, dtype=dtype)
    for name, p in layer.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()  # as PEFT's autocast_adapter_dtype does
    x = torch.randn(4, 5).to(dtype)
    y = exact(layer)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, layer(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_layer_without_bias_and_under_autocast(kind: str) -> None:
    layer = exact(make_layer(kind, dtype=torch.float32, bias=False))
    x = torch.randn(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gradient_differs_from_pefts_by_the_norm_term_alone(kind: str) -> None:
    """∂m is PEFT's; in A and B the exact gradient adds what flows through ‖V‖, taken here from the dense formula."""
    peft_layer = make_layer(kind)
    layer, x = exact(peft_layer), torch.randn(6, 5, dtype=torch.float64)
    cotangent = torch.randn(6, 7, dtype=torch.float64)
    detached = torch.autograd.grad((peft_layer(x) * cotangent).sum(), list(trainable(peft_layer).values()))
    full = torch.autograd.grad((layer(x) * cotangent).sum(), list(trainable(layer).values()))

    parameters = {k: p.detach().clone().requires_grad_() for k, p in trainable(layer).items()}
    W = layer.base_layer.weight if kind == "linear" else layer.base_layer.weight.T
    V = W + layer.scaling["default"] * parameters["lora_B"] @ parameters["lora_A"]
    through_norm = (parameters["lora_magnitude_vector"] / V.norm(dim=1)).unsqueeze(1) * V.detach()
    terms = torch.autograd.grad((x @ through_norm.T * cotangent).sum(), [parameters["lora_A"], parameters["lora_B"]])

    by_name = dict(zip(trainable(layer), zip(full, detached, strict=True), strict=True))
    torch.testing.assert_close(*by_name["lora_magnitude_vector"], rtol=1e-10, atol=1e-12)
    for name, term in zip(("lora_A", "lora_B"), terms, strict=True):
        ours, pefts = by_name[name]
        torch.testing.assert_close(ours - pefts, term, rtol=1e-9, atol=1e-12)
        assert float(term.norm()) > 1e-3 * float(pefts.norm())


def asymmetry(layer: LoraLinear) -> float:
    """|⟨u, Jv⟩ − ⟨v, Ju⟩| of the Jacobian J of the gradient in (A, B), relative; J by central differences."""
    parameters = [p for name, p in trainable(layer).items() if name != "lora_magnitude_vector"]
    generator = torch.Generator().manual_seed(3)
    u, v = ([torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters] for _ in range(2))
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64)

    def gradient(direction: list[Tensor], step: float) -> tuple[Tensor, ...]:
        moved = copy.deepcopy(layer)
        with torch.no_grad():
            ours = [p for name, p in trainable(moved).items() if name != "lora_magnitude_vector"]
            for p, d in zip(ours, direction, strict=True):
                p.add_(d, alpha=step)
        return torch.autograd.grad(moved(x).sin().sum(), ours)

    def product(a: list[Tensor], b: list[Tensor]) -> float:
        up, down = gradient(b, 1e-5), gradient(b, -1e-5)
        return float(sum((s * (p - q)).sum() for s, p, q in zip(a, up, down, strict=True))) / 2e-5

    uv, vu = product(u, v), product(v, u)
    return abs(uv - vu) / max(abs(uv), abs(vu))


def test_gradients_jacobian_is_symmetric_as_pefts_is_not() -> None:
    layer = make_layer()
    assert asymmetry(exact(layer)) < 1e-5
    assert asymmetry(layer) > 1e-3


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_dense_weight_and_norm_of_a_layer(kind: str) -> None:
    layer, x = exact(make_layer(kind)), torch.randn(4, 5, dtype=torch.float64)
    weight = dora_weight(layer, "default")
    torch.testing.assert_close(x @ weight.T + layer.base_layer.bias, layer(x), rtol=1e-12, atol=1e-12)
    W = layer.base_layer.weight if kind == "linear" else layer.base_layer.weight.T
    factors = W, layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    torch.testing.assert_close(layer_row_norm(layer, "default"), dense_row_norm(*factors), rtol=1e-12, atol=0)


# The remembered norm of the base weight


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    calls: list[Tensor] = []

    def count(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        calls.append(weight)
        return squared_row_norm(weight, dtype)

    monkeypatch.setattr(bidora.dora, "squared_row_norm", count)
    return calls


def test_base_norm_is_computed_once_and_again_when_the_weight_changes(counted: list[Tensor]) -> None:
    layer, x = exact(make_layer()), torch.randn(2, 5, dtype=torch.float64)
    weight = layer.base_layer.weight
    layer(x), layer(x)
    assert len(counted) == 1

    def replace() -> None:
        weight.data = 2 * weight.data

    def in_place() -> None:
        with torch.no_grad():
            weight[0] = 3.0

    def load() -> None:
        layer.base_layer.load_state_dict({"weight": torch.randn(7, 5), "bias": torch.randn(7)})

    for count, change in enumerate((replace, in_place, load), start=2):
        change()
        y = layer(x)
        assert len(counted) == count
        torch.testing.assert_close(y, x @ dora_weight(layer, "default").T + layer.base_layer.bias)
    assert not any("norm" in key for key in layer.state_dict())


def test_base_norm_follows_the_dtype_and_forgets_freed_storages(counted: list[Tensor]) -> None:
    layer, x = exact(make_layer()), torch.randn(2, 5, dtype=torch.float64)
    layer(x)
    layer.float()
    layer(x.float())
    assert len(counted) == 2
    for size in range(3, 6):  # a new weight may get the old one's address
        layer.base_layer.weight.data = torch.full((7, 5), float(size))
        layer(x.float())
        assert len(counted) == size


def test_base_norm_made_in_inference_mode_serves_training(counted: list[Tensor]) -> None:
    layer, x = exact(make_layer()), torch.randn(2, 5, dtype=torch.float64)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert len(counted) == 1


def test_base_norm_made_inside_a_transform_is_not_kept(counted: list[Tensor]) -> None:
    layer, x = exact(make_layer()), torch.randn(2, 5, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(gradients[name], p.grad)


def test_a_trainable_or_swapped_base_weight_is_differentiated_and_not_remembered() -> None:
    layer, x = exact(make_layer()), torch.randn(2, 5, dtype=torch.float64)
    layer(x)
    weight = layer.base_layer.weight.detach().clone().requires_grad_()

    def output(weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"base_layer.weight": weight}, (x,))

    assert torch.autograd.gradcheck(output, (weight,))


def test_layer_can_be_copied_and_pickled_after_use() -> None:
    layer, x = exact(make_layer()), torch.randn(2, 5, dtype=torch.float64)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), y)
    layer.merge()
    torch.testing.assert_close(copy.deepcopy(layer)(x), y)
