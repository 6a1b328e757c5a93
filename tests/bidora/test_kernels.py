"""The layer as one autograd function: its hand-written derivatives, what it keeps, and where it applies."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from bidora.dora import ExactDoraVariant, dora_linear
from bidora.kernels import fused_dora_linear, obstacle
from bidora.kernels.plain import PlainKernels, split_factors
from bilevel.errors import ConfigError, UnknownNameError

in_torch_operations = functools.partial(dora_linear, kernels="torch")

NAMES = ("x", "A", "B", "m")
SCALING = 2.0


def layer_tensors(
    seed: int, shape: tuple[int, ...], rows: int, rank: int, *, bias: bool, special: bool = True
) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """Returns x, A, B, m; W₀; and the bias, in float64. Special rows: V = 0, m = 0, and V a hundredth of its terms."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    columns = shape[-1]
    weight, A, B = random(rows, columns), random(rank, columns) / columns**0.5, 0.5 * random(rows, rank)
    if special:
        weight[0], B[0] = 0.0, 0.0
        weight[2 % rows] = -SCALING * B[2 % rows] @ A + 0.01 * random(columns).sign()
    m = weight.norm(dim=1) * (1 + 0.1 * random(rows))
    if special:
        m[1 % rows] = 0.0
    return {"x": random(*shape), "A": A, "B": B, "m": m}, weight, random(rows) if bias else None


def dense(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, m: Tensor, s: float, bias: Tensor | None) -> Tensor:
    """The definition; a zero row gives the bias."""
    V = weight + s * B @ A
    zero = (V == 0).all(1)
    norm = torch.where(zero, 1.0, V.square().sum(1)).sqrt()
    return F.linear(x, torch.where(zero, 0.0, m / norm).unsqueeze(1) * V, bias)


def fused(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, m: Tensor, s: float, bias: Tensor | None) -> Tensor:
    result = F.linear(x, weight, bias)
    return fused_dora_linear(x, weight, A, B, m, s, bias, result, reference=in_torch_operations)


Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, "Tensor | None"], Tensor]


def derivatives(
    layer: Layer, tensors: dict[str, Tensor], weight: Tensor, bias: Tensor | None, needed: tuple[str, ...] = NAMES
) -> dict[str, Tensor]:
    """Returns y, and the derivatives of Σ cos(3 y) in what needs them."""
    given_ = {name: t.detach().clone().requires_grad_(name in needed) for name, t in tensors.items()}
    y = layer(given_["x"], weight, given_["A"], given_["B"], given_["m"], SCALING, bias)
    found = torch.autograd.grad((3 * y.double()).cos().sum(), [given_[name] for name in needed])
    return {"y": y.detach(), **dict(zip(needed, found, strict=True))}


def error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm().clamp_min(1e-30))


# The derivatives


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(5,), (1, 1), (4, 6), (2, 3, 7)]),
    rows=st.integers(3, 9),
    rank=st.integers(1, 9),
    bias=st.booleans(),
    needed=st.lists(st.sampled_from(NAMES), min_size=1, unique=True).map(lambda names: tuple(sorted(names))),
)
def test_derivatives_are_those_of_the_dense_definition(seed, shape, rows, rank, bias, needed):
    tensors, weight, shift = layer_tensors(seed, shape, rows, rank, bias=bias)
    expected = derivatives(dense, tensors, weight, shift, needed)
    found = derivatives(fused, tensors, weight, shift, needed)
    size = max(float(reference.abs().max()) for reference in expected.values())
    for name, reference in expected.items():
        torch.testing.assert_close(found[name], reference, rtol=1e-7, atol=1e-10 * size, msg=name)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), bias=st.booleans(), autocast=st.booleans(), factors=st.booleans())
def test_bfloat16_layers_have_the_rounding_error_of_bfloat16(seed, bias, autocast, factors):
    """With bfloat16 or float32 factors; the reference is the dense one from the same, rounded, values."""
    tensors, weight, shift = layer_tensors(seed, (24, 48), 32, 4, bias=bias, special=False)
    low = {name: t.bfloat16() for name, t in tensors.items()}
    if factors:
        low |= {name: tensors[name].float() for name in ("A", "B", "m")}
    weight, shift = weight.bfloat16(), None if shift is None else shift.bfloat16()

    def rounded(layer: Layer, tensors: dict[str, Tensor], weight: Tensor, shift: Tensor | None) -> dict[str, Tensor]:
        given_ = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        y = layer(given_["x"], weight, given_["A"], given_["B"], given_["m"], SCALING, shift)
        generator = torch.Generator().manual_seed(seed)
        cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64).bfloat16().to(y.dtype)
        return dict(zip(("y", *NAMES), (y, *torch.autograd.grad(y, list(given_.values()), cotangent)), strict=True))

    wide = {name: t.double() for name, t in low.items()}
    expected = rounded(dense, wide, weight.double(), None if shift is None else shift.double())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = rounded(fused, low, weight, shift)
    for name in expected:
        assert error(found[name].detach(), expected[name].detach()) < 3 * 2.0**-8, name


def test_a_rows_magnitude_is_recovered_from_zero_in_bfloat16():
    tensors, weight, _ = layer_tensors(0, (16, 32), 8, 2, bias=False, special=False)
    tensors["m"][3] = 0.0
    low = {name: t.bfloat16() for name, t in tensors.items()}
    expected = derivatives(dense, {k: t.double() for k, t in low.items()}, weight.bfloat16().double(), None)
    found = derivatives(fused, low, weight.bfloat16(), None)
    assert float(found["y"][:, 3].abs().max()) < 1e-17
    assert float(expected["m"].abs().max()) == 0 or error(found["y"], expected["y"]) < 0.01
    cotangent = torch.ones(16, 8, dtype=torch.bfloat16)
    m = low["m"].clone().requires_grad_()
    y = fused(low["x"], weight.bfloat16(), low["A"], low["B"], m, SCALING, None)
    (gradient,) = torch.autograd.grad(y, m, cotangent)
    V = weight.bfloat16().double() + SCALING * low["B"].double() @ low["A"].double()
    exact = (low["x"].double() @ (V[3] / V[3].norm())).sum()
    assert abs(float(gradient[3]) - float(exact)) < 0.02 * float(low["x"].double().norm())


def test_split_factors_keep_sixteen_bits():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 32, generator=generator), torch.randn(16, 4, generator=generator)
    exact = B.double() @ A.double()
    rounded_A, rounded_B = split_factors(A, B, torch.bfloat16, False)
    assert error(rounded_B.double() @ rounded_A.double(), exact) > 2.0**-11
    wide_A, wide_B = split_factors(A, B, torch.bfloat16, True)
    assert error(wide_B.double() @ wide_A.double(), exact) < 2.0**-15


def test_differences_of_float32_factors_survive_bfloat16_products():
    """What differencing a layer needs: a step in A below bfloat16's resolution still moves the product."""
    tensors, weight, _ = layer_tensors(0, (64, 128), 32, 4, bias=False, special=False)
    weight = weight.bfloat16()
    A, B, m = (tensors[name].float() for name in ("A", "B", "m"))
    step = 2.0**-10 * A.abs() * torch.randn(A.shape, generator=torch.Generator().manual_seed(1)).sign()
    moved = [PlainKernels.row_scale(weight, a, B, m, SCALING, project=False, recoverable=False) for a in (A, A + step)]
    difference = moved[1].stats[0].double() - moved[0].stats[0].double()
    scales = []
    for a in (A.double(), A.double() + step.double()):
        V = weight.double() + SCALING * B.double() @ a
        scales.append(m.double() / V.norm(dim=1))
    assert error(difference, scales[1] - scales[0]) < 1e-2


def test_without_autocast_wide_factors_are_not_rounded_in_products():
    """∂m sums over many rows, where the rounding of outputs averages out and that of the factors does not."""
    tensors, weight, _ = layer_tensors(0, (20_000, 16), 8, 4, bias=False, special=False)
    tensors["x"] = tensors["x"].abs()
    low = {name: t.float() for name, t in tensors.items()} | {"x": tensors["x"].bfloat16()}
    base = (0.05 * weight).bfloat16()

    def gradient(layer: Layer, given_: dict[str, Tensor], weight: Tensor) -> Tensor:
        m = given_["m"].clone().requires_grad_()
        y = layer(given_["x"], weight, given_["A"], given_["B"], m, SCALING, None)
        return torch.autograd.grad(y, m, torch.ones_like(y))[0]

    exact = gradient(dense, {name: t.double() for name, t in low.items()}, base.double())
    split = error(gradient(fused, low, base), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = error(gradient(fused, low, base), exact)
    assert split < rounded / 3


# Second derivatives


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), bias=st.booleans())
def test_second_derivatives_are_those_of_finite_differences(seed, bias):
    tensors, weight, shift = layer_tensors(seed, (2, 4), 3, 2, bias=bias, special=False)
    inputs = tuple(t.requires_grad_() for t in tensors.values())

    def layer(x: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        return fused(x, weight, A, B, m, SCALING, shift)

    assert torch.autograd.gradcheck(layer, inputs, rtol=1e-3, atol=1e-4)
    assert torch.autograd.gradgradcheck(layer, inputs, rtol=1e-3, atol=1e-4)


def test_second_derivatives_through_two_layers_with_the_same_factors_are_the_torch_paths():
    """The second layer's input is a function of the factors, whose derivative must not count twice."""
    tensors, weight, _ = layer_tensors(0, (6, 5), 5, 2, bias=False, special=False)

    def product(layer: Layer) -> tuple[Tensor, ...]:
        inputs = [tensors[name].clone().requires_grad_() for name in ("A", "B", "m")]
        hidden = layer(tensors["x"], weight, *inputs, SCALING, None).tanh()
        first = torch.autograd.grad(
            layer(hidden, weight, *inputs, SCALING, None).sin().sum(), inputs, create_graph=True
        )
        return (*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs))

    for found, expected in zip(product(fused), product(in_torch_operations), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_second_derivatives_through_an_update_count_its_dependence_once():
    """B after a step is a function of m, as in unrolled differentiation."""
    tensors, weight, _ = layer_tensors(0, (6, 5), 5, 2, bias=False, special=False)

    def response(layer: Layer) -> Tensor:
        B, m = (tensors[name].clone().requires_grad_() for name in ("B", "m"))
        x, A = tensors["x"], tensors["A"]
        loss = layer(x, weight, A, B, m, SCALING, None).sin().sum()
        (step,) = torch.autograd.grad(loss, B, create_graph=True)
        return torch.autograd.grad(layer(x, weight, A, B - 0.1 * step, m, SCALING, None).cos().sum(), m)[0]

    torch.testing.assert_close(response(fused), response(in_torch_operations), rtol=1e-10, atol=1e-12)


def test_second_derivatives_under_autocast_have_its_rounding_error():
    tensors, weight, _ = layer_tensors(0, (6, 5), 5, 2, bias=False, special=False)
    low = {name: t.float() for name, t in tensors.items()} | {"x": tensors["x"].bfloat16()}

    def product(layer: Layer) -> tuple[Tensor, ...]:
        inputs = [low[name].clone().requires_grad_() for name in ("A", "B", "m")]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = layer(low["x"], weight.bfloat16(), *inputs, SCALING, None).float().square().sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.sum() for g in first), inputs)

    for found, expected in zip(product(fused), product(in_torch_operations), strict=True):
        assert error(found, expected.double()) < 0.03


# What is kept


def kept_by(tensors: dict[str, Tensor], weight: Tensor, bias: Tensor | None, needed: tuple[str, ...]) -> list[Tensor]:
    given_ = {name: t.requires_grad_(name in needed) for name, t in tensors.items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = fused(given_["x"], weight, given_["A"], given_["B"], given_["m"], SCALING, bias)
    own = {t.data_ptr() for t in (*given_.values(), weight, y, *([] if bias is None else [bias]))}
    assert y.requires_grad
    return [t for t in kept if t.data_ptr() not in own]


def test_no_second_tensor_of_the_outputs_size_is_kept():
    """Beside inputs, parameters and the output only (n, r), (out, r) and (out,); with a bias the base's output."""
    for bias, larger in ((False, 0), (True, 1)):
        tensors, weight, shift = layer_tensors(0, (50, 20), 30, 2, bias=bias)
        kept = kept_by(tensors, weight, shift, NAMES)
        assert sum(t.numel() >= 50 * 30 for t in kept) == larger
        assert sum(t.numel() for t in kept) <= larger * 50 * 30 + 50 * 2 + 30 * 2 + 2 * 30


def test_where_only_the_magnitude_is_differentiated_little_is_kept():
    tensors, weight, _ = layer_tensors(0, (50, 20), 30, 2, bias=False)
    assert sum(t.numel() for t in kept_by(tensors, weight, None, ("m",))) == 2 * 30
    counted: list[str] = []

    class Counting(PlainKernels):
        @staticmethod
        def factor_gradients(*arguments: Any) -> Any:
            counted.append("factors")
            return PlainKernels.factor_gradients(*arguments)

    m = tensors["m"].clone().requires_grad_()
    base = F.linear(tensors["x"], weight)
    arguments = tensors["x"].detach(), weight, tensors["A"].detach(), tensors["B"].detach()
    y = fused_dora_linear(*arguments, m, SCALING, None, base, reference=in_torch_operations, kernels=Counting)
    y.sum().backward()
    assert counted == []


def test_an_operation_that_overwrites_the_output_is_an_error_and_no_wrong_gradient():
    tensors, weight, _ = layer_tensors(0, (4, 5), 6, 2, bias=False)
    m = tensors["m"].requires_grad_()
    y = fused(tensors["x"], weight, tensors["A"], tensors["B"], m, SCALING, None)
    y.relu_()
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.sum().backward()


# The layers


def make_layer(kind: str = "linear", *, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> LoraLinear:
    torch.manual_seed(0)
    base = nn.Linear(5, 7) if kind == "linear" else Conv1D(7, 5)
    nn.init.normal_(base.bias)
    base.to(dtype).requires_grad_(False)
    config = LoraConfig(use_dora=True, r=3, lora_alpha=6, lora_dropout=dropout, fan_in_fan_out=kind == "conv1d")
    layer = LoraLinear(base, "default", r=3, lora_alpha=6, config=config)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    layer.lora_variant["default"] = ExactDoraVariant("fused")
    layer.cast_input_dtype_enabled = False
    return layer


def both(layer: LoraLinear, run: Callable[[LoraLinear, Tensor], Tensor], dtype: torch.dtype) -> list[list[Tensor]]:
    """Returns output and gradients with "fused" and with "torch"."""
    results = []
    for kernels in ("fused", "torch"):
        layer.lora_variant["default"] = ExactDoraVariant(kernels)
        x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        parameters = [p for p in layer.parameters() if p.requires_grad]
        y = run(layer, x)
        gradients = torch.autograd.grad((y * torch.arange(1.0, 8.0)).sum(), [x, *parameters])
        results.append([y.detach(), *gradients])
    return results


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_layers_are_the_torch_paths_also_when_recomputed(kind, reentrant):
    """The base layer's own graph is not followed as well: the input's gradient would count twice."""

    layer = make_layer(kind)
    results = []
    for kernels in ("fused", "torch"):
        layer.lora_variant["default"] = ExactDoraVariant(kernels)
        layer.zero_grad()
        x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        y = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
        (y * torch.arange(1.0, 8.0)).sum().backward()  # reentrant checkpoints know no autograd.grad
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_layers_under_autocast_and_with_wide_adapters_are_the_torch_paths():
    layer = make_layer(dtype=torch.bfloat16)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for autocast in (True, False):

        def run(layer: LoraLinear, x: Tensor, autocast: bool = autocast) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                return layer(x)

        found, expected = both(layer, run, torch.bfloat16)
        assert all(a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
        assert max(error(a, b.double()) for a, b in zip(found, expected, strict=True)) < 0.02


def test_layers_compile_to_one_graph():
    layer, x = make_layer(), torch.randn(3, 5, dtype=torch.float64)
    layer.lora_variant["default"] = ExactDoraVariant("auto")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    parameters = [p for p in layer.parameters() if p.requires_grad]
    found, expected = (torch.autograd.grad(f(x).square().sum(), parameters) for f in (compiled, layer))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# Where it applies


def test_auto_takes_the_torch_path_on_the_cpu():
    layer, x = make_layer(), torch.ones(1, 5, dtype=torch.float64)
    layer.lora_variant["default"] = ExactDoraVariant()
    assert "DoraLinear" not in type(layer(x).grad_fn).__name__
    layer.lora_variant["default"] = ExactDoraVariant("fused")
    assert "DoraLinear" in type(layer(x).grad_fn).__name__


def test_an_unknown_choice_lists_the_choices():
    with pytest.raises(UnknownNameError, match="'triton'.*'auto', 'fused', 'torch'"):
        ExactDoraVariant("triton")


def change_hooks(layer: LoraLinear) -> None:
    layer.base_layer.register_forward_hook(lambda *_: None)


def change_training(layer: LoraLinear) -> None:
    layer.base_layer.weight.requires_grad_()


def change_adapters(layer: LoraLinear) -> None:
    layer.update_layer("other", 3, lora_alpha=6, config=LoraConfig(use_dora=True, r=3, lora_alpha=6))
    layer.set_adapter(["default", "other"])
    layer.lora_variant["other"] = ExactDoraVariant("torch")


def change_class(layer: LoraLinear) -> None:
    class Subclass(nn.Linear):
        pass

    layer.base_layer.__class__ = Subclass


def change_dropout(layer: LoraLinear) -> None:
    layer.lora_dropout["default"] = nn.Dropout(0.5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_hooks, "hooks"),
        (change_training, "require gradients"),
        (change_adapters, "2 adapters are active"),
        (change_class, "the base layer is a Subclass"),
        (change_dropout, "dropout"),
        (lambda layer: layer.half(), "float16"),
    ],
)
def test_what_is_in_the_way_is_said(change, reason):
    layer = make_layer()
    change(layer)
    x = torch.ones(2, 5).to(layer.base_layer.weight.dtype)
    with pytest.raises(ConfigError, match=f"kernels='fused' is impossible here: .*{reason}"):
        layer(x)
    layer.lora_variant["default"] = ExactDoraVariant("auto")
    assert layer(x).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, at the first jvp
def test_transforms_and_autocast_of_another_dtype_are_in_the_way():
    tensors, weight, _ = layer_tensors(0, (4, 5), 6, 2, bias=False)
    x, A, B, m = (t.float() for t in tensors.values())
    weight = weight.float()

    def reason(x: Tensor, weight: Tensor = weight, result: Tensor | None = None) -> str:
        found = obstacle(x, weight, A, B, m, None, result)
        assert found is not None
        return found

    assert obstacle(x, weight, A, B, m, None, None) is None
    seen: list[str] = []

    def loss(x: Tensor) -> Tensor:
        seen.append(reason(x))
        return dora_linear(x, weight, A, B, m, SCALING).sum()

    torch.vmap(loss)(x.unsqueeze(1))
    torch.func.grad(loss)(x)
    torch.func.jvp(loss, (x,), (x,))
    assert len(seen) == 3
    assert all("torch.func" in text for text in seen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast computes in torch.bfloat16" in reason(x)
    assert "meta" in reason(x.to("meta"))
    assert "base result" in reason(x, result=torch.ones(4, 6, dtype=torch.float64))
    assert "type Special" in reason(x.as_subclass(Special))
    with pytest.raises(ConfigError, match="torch.func"):
        torch.vmap(lambda x: dora_linear(x, weight, A, B, m, SCALING, kernels="fused"))(x)


class Special(Tensor):
    pass


# The Triton kernels

INTERPRETED = """
import torch
from bidora.kernels.fused import FusedKernels
from tests.bidora.test_kernels import differences
for dtype in (torch.float32, torch.float16):
    print(differences(FusedKernels, dtype, "cpu", 1e-4 if dtype == torch.float32 else 1e-2))
"""


def differences(kernels: type[PlainKernels], dtype: torch.dtype, device: str, tolerance: float) -> int:
    """Compares every primitive's part in layers with the dense definition; returns how many layers."""
    count = 0
    for shape, rows, rank in (((20, 72), 40, 5), ((2, 9, 40), 150, 20)):
        for bias in (False, True):
            for factors in (dtype, torch.float32):
                tensors, weight, shift = layer_tensors(
                    count, shape, rows, rank, bias=bias, special=dtype == torch.float32
                )
                low = {name: t.to(device, dtype if name == "x" else factors) for name, t in tensors.items()}
                base, b = weight.to(device, dtype), None if shift is None else shift.to(device, dtype)

                def layer(*arguments: Any) -> Tensor:
                    x, W, A, B, m, s, c = arguments
                    y = F.linear(x, W, c)
                    return fused_dora_linear(x, W, A, B, m, s, c, y, reference=in_torch_operations, kernels=kernels)

                def linear(layer: Layer, given_: dict[str, Tensor], W: Tensor, c: Tensor | None) -> list[Tensor]:
                    inputs = [t.detach().clone().requires_grad_() for t in given_.values()]
                    y = layer(inputs[0], W, *inputs[1:], SCALING, c)
                    cotangent = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=device).view(y.shape)
                    return [y.detach(), *torch.autograd.grad(y, inputs, cotangent.to(dtype).to(y.dtype))]

                wide = {name: t.double() for name, t in low.items()}
                exact = linear(dense, wide, base.double(), None if b is None else b.double())
                for value, reference in zip(linear(layer, low, base, b), exact, strict=True):
                    assert error(value, reference) < tolerance, (shape, bias, factors)
                count += 1
    return count


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_are_the_torch_operations_in_tritons_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["8", "8"]


def needs_cuda(test: Any) -> Any:
    for warning in ("there was no current CUDA context", "Synchronization debug mode is a prototype"):  # torch's own
        test = pytest.mark.filterwarnings(f"ignore:.*{warning}:UserWarning")(test)
    return pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")(test)


@needs_cuda
def test_kernels_are_the_dense_definition_on_the_gpu():
    from bidora.kernels.fused import FusedKernels

    assert differences(FusedKernels, torch.bfloat16, "cuda", 0.03) == 8


@needs_cuda
@pytest.mark.parametrize("autocast", [False, True])
def test_the_gpus_layer_is_fused_and_synchronises_nothing(autocast):
    layer = make_layer(dtype=torch.bfloat16).cuda()
    layer.lora_variant["default"] = ExactDoraVariant()
    x = torch.randn(3, 5, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ones = torch.ones(3, 7, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            y = layer(x)
        assert "DoraLinear" in type(y.grad_fn).__name__
        y.backward(ones)

    step()  # compiles
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@needs_cuda
def test_a_pass_is_captured_as_a_cuda_graph():
    layer = make_layer(dtype=torch.bfloat16).cuda()
    layer.lora_variant["default"] = ExactDoraVariant()
    x, later = torch.randn(2, 300, 5, device="cuda", dtype=torch.bfloat16).unbind()
    x = x.clone().requires_grad_()
    parameters = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(layer(x).square().sum(), parameters))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        gradients()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    with torch.no_grad():
        x.copy_(later)
        for parameter in parameters[1:]:
            parameter.mul_(1.5)
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, gradients(), strict=True))


@needs_cuda
def test_one_layers_gradients_are_reproducible_on_the_gpu():
    tensors, weight, _ = layer_tensors(0, (300, 128), 256, 8, bias=False)
    low = {name: t.cuda().bfloat16() for name, t in tensors.items()}
    first, second = (derivatives(fused, low, weight.cuda().bfloat16(), None) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_misspelt_choice_is_refused() -> None:
    x, W, A, B, m = torch.randn(4, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2), torch.rand(6)
    with pytest.raises(UnknownNameError, match=r"unknown kernels 'fusd': did you mean 'fused'\?"):
        dora_linear(x, W, A, B, m, 1.0, kernels="fusd")  # type: ignore[arg-type]
