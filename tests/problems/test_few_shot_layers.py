"""Layers of many tasks' images on the CPU: torch's numbers and derivatives, without copies between layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel.problems.few_shot import layers
from bilevel.problems.few_shot.batching import convolved
from bilevel.problems.few_shot.layers import Geometry, Window
from bilevel.problems.few_shot.stacked import stacked_outputs

DOUBLE = torch.float64
Function = Callable[..., Tensor]


def random(*shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def derivatives(function: Function, given: Sequence[Tensor], orders: int = 3) -> list[Tensor]:
    """Returns the value, and the derivatives of first order, second, …, each flat and of a sum that is not linear."""
    found = [function(*given)]
    orders_found = [found[0].detach().flatten()]
    for order in range(orders):
        total = sum(part.sin().sum() for part in found if part.requires_grad)
        assert isinstance(total, Tensor)
        grads = torch.autograd.grad(total, list(given), create_graph=order + 1 < orders, materialize_grads=True)
        found = list(grads)
        orders_found.append(torch.cat([grad.detach().flatten() for grad in found]))
    return orders_found


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(
        float((ours - other).norm() / (1e-30 + other.norm())) for ours, other in zip(found, expected, strict=True)
    )


def each_task(function: Function) -> Function:
    """Returns a function of ``(n, M, …)`` and of parameters ``(M, …)`` that takes task after task."""

    def all_of_them(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.stack([function(*own) for own in zip(x.unbind(1), *parameters, strict=True)], 1)

    return all_of_them


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=40, deadline=None)
@given(
    tasks=st.integers(1, 3),
    images=st.integers(1, 3),
    groups=st.integers(1, 2),
    wide=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    kernel=pairs,
    stride=pairs,
    dilation=pairs,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    more=st.tuples(st.integers(0, 2), st.integers(0, 3)),
    biased=st.booleans(),
)
def test_convolutions_and_their_derivatives_are_those_of_each_task(
    tasks: int,
    images: int,
    groups: int,
    wide: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    more: tuple[int, int],
    biased: bool,
) -> None:
    torch.manual_seed(0)
    size = [max(1, d * (k - 1) + 1 - 2 * p) + m for d, k, p, m in zip(dilation, kernel, padding, more, strict=True)]
    x = random(images, tasks, groups * wide[0], *size)
    weight, bias = random(tasks, groups * wide[1], wide[0], *kernel), random(tasks, groups * wide[1])
    geometry = Geometry(stride, padding, dilation, groups)

    def single(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return layers.convolution(x, weight, bias, geometry)

    inputs = [x, weight, bias] if biased else [x, weight]
    assert error(derivatives(ours, inputs), derivatives(each_task(single), inputs)) < 1e-12


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("shape", [(4, 2, 3, 3, 2), (1, 1, 2, 3, 3), (7, 3, 1, 1, 1)])
def test_normalisation_and_its_derivatives_are_those_of_the_formula(
    shape: tuple[int, ...], scaled: bool, shifted: bool
) -> None:
    # not those of F.batch_norm, whose third derivatives are wrong: they take mean and variance for constants
    torch.manual_seed(0)

    def formula(x: Tensor, *parameters: Tensor) -> Tensor:
        rest = [part[:, :, None, None] for part in parameters]
        away = x - x.mean((0, 3, 4), keepdim=True)
        found = away / (away.square().mean((0, 3, 4), keepdim=True) + 0.1).sqrt()
        found = found * rest.pop(0) if scaled else found
        return found + rest.pop(0) if shifted else found

    def ours(x: Tensor, *parameters: Tensor) -> Tensor:
        rest = list(parameters)
        scale = rest.pop(0) if scaled else None
        return layers.normalisation(x, scale, rest.pop(0) if shifted else None, 0.1)

    inputs = [random(*shape), *(random(*shape[1:3]) for _ in range(scaled + shifted))]
    assert error(derivatives(ours, inputs), derivatives(formula, inputs)) < 1e-11


def test_a_scale_of_zero_has_its_derivatives() -> None:
    torch.manual_seed(0)
    x, scale = random(3, 1, 2, 2, 2), torch.zeros(1, 2, dtype=DOUBLE, requires_grad=True)
    slopes = torch.randn_like(x)

    def single(x: Tensor, scale: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, scale, None, True, 0.0, 1e-5)

    def ours(x: Tensor, scale: Tensor) -> Tensor:
        return layers.normalisation(x, scale, None, 1e-5)

    found, expected = (
        derivatives(lambda x, scale, way=way: way(x, scale) * slopes, [x, scale], orders=2)
        for way in (ours, each_task(single))
    )
    assert float(expected[2].norm()) > 0.1
    assert error(found, expected) < 1e-12


@settings(max_examples=40, deadline=None)
@given(
    size=pairs,
    stride=pairs,
    dilation=pairs,
    padded=st.booleans(),
    ceil=st.booleans(),
    more=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_pooling_and_its_derivatives_are_those_of_each_task(
    size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padded: bool,
    ceil: bool,
    more: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    padding = (size[0] // 2, size[1] // 2) if padded else (0, 0)
    rows, columns = (d * (k - 1) + 1 + m for d, k, m in zip(dilation, size, more, strict=True))
    x = torch.randint(3, (2, 3, 2, rows, columns)).double().requires_grad_()  # many are equal
    window = Window(size, stride, padding, dilation, ceil)

    def single(x: Tensor) -> Tensor:
        return F.max_pool2d(x, size, stride, padding, dilation, ceil)

    def square(way: Function) -> Function:
        return lambda x: way(x).square()

    found, expected = (
        derivatives(square(way), [x]) for way in (lambda x: layers.pooling(x, window), each_task(single))
    )
    assert error(found, expected) < 1e-12


# Networks of them


class Residual(nn.Module):
    """Layers whose tensors are not where the layers here would leave them, with weights of their own or shared."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
        self.second = nn.Conv2d(4, 4, 3, padding="same", bias=False)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        x = self.pool(x + torch.tanh(self.second(x)).transpose(2, 3))
        return F.avg_pool2d(x, 2).flatten(1)


def blocks(*, inplace: bool = False, given: int = 2, channels: int = 4) -> nn.Sequential:
    """Returns two blocks of the usual network for 8 × 8 images, and its head."""
    made: list[nn.Module] = []
    for before in (given, channels):
        norm = nn.BatchNorm2d(channels, track_running_stats=False)
        made += [nn.Conv2d(before, channels, 3, padding=1), norm, nn.ReLU(inplace), nn.MaxPool2d(2)]
    return nn.Sequential(*made, nn.Flatten(), nn.Linear(4 * channels, 3))


def convolved_in_place() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.LeakyReLU(0.1, inplace=True), nn.MaxPool2d(2), nn.ReLU(inplace=True))


class Viewed(nn.Module):
    """What expects channels first: ``view``, and normalisation of groups of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.tanh(self.norm(self.first(x))), 2)
        found: Tensor = self.last(x.view(x.size(0), -1)) + self.last(x.view(size=(len(x), 36)))
        return found


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "blocks": blocks,
    "blocks, in place": lambda: blocks(inplace=True),
    "in place, without norms": convolved_in_place,
    "residual": Residual,
    "views and groups": Viewed,
}


def stacked(made: nn.Module, tasks: int, own: Callable[[str], bool], dtype: torch.dtype = DOUBLE) -> dict[str, Tensor]:
    """Returns parameters, some of which differ between tasks."""
    torch.manual_seed(1)
    return {
        name: (part.detach() + 0.1 * torch.randn(tasks, *part.shape) if own(name) else part.detach())
        .to(dtype)
        .requires_grad_()
        for name, part in made.named_parameters()
    }


def outputs_of(made: nn.Module, names: Iterable[str], vectorized: bool) -> Function:
    """Returns the network as a function of inputs and parameters."""
    return lambda x, *given: stacked_outputs(made, dict(zip(names, given, strict=True)), x, vectorized=vectorized)


OWN: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "biases": lambda name: name.endswith("bias"),
    "first": lambda name: name.startswith(("0.", "first.")),
    "none": lambda name: False,
}


def distance_to_each_task(name: str, own: str) -> float:
    """Returns that of a network's outputs and derivatives, whose parameters with names in ``OWN[own]`` differ."""
    torch.manual_seed(0)
    made = NETWORKS[name]()
    values, x = stacked(made, 3, OWN[own]), random(3, 5, 2, 8, 8)
    inputs = [x, *values.values()]
    return error(*(derivatives(outputs_of(made, values, way), inputs, orders=2) for way in (True, False)))


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_the_derivatives_of_each_task(name: str, own: str) -> None:
    assert distance_to_each_task(name, own) < 1e-12


@pytest.mark.parametrize("own", ["all", "none"])
def test_the_public_way_gives_the_same(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    made = blocks()
    values, x = stacked(made, 3, OWN[own]), random(3, 5, 2, 8, 8)
    inputs = [x, *values.values()]
    stacks = derivatives(outputs_of(made, values, vectorized=True), inputs, orders=2)
    monkeypatch.setattr("bilevel.problems.few_shot.batching.HAS_STACKS", False)
    monkeypatch.delattr("bilevel.problems.few_shot.batching.retrieve_current_functorch_interpreter")
    public = derivatives(outputs_of(made, values, vectorized=True), inputs, orders=2)
    assert all(torch.equal(a, b) for a, b in zip(public, stacks, strict=True))


def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.problems.few_shot.batching._channels_last", lambda *tensors: False)
    monkeypatch.setattr("bilevel.problems.few_shot.batching._by_matrices", lambda images: True)


@pytest.mark.parametrize("own", ["all", "biases", "none"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_for_cuda_has_the_derivatives_of_each_task(
    name: str, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_cuda(monkeypatch)
    used: list[int] = []
    monkeypatch.setattr(
        "bilevel.problems.few_shot.batching.convolved", lambda *given: (used.append(1), convolved(*given))[1]
    )
    assert distance_to_each_task(name, own) < 1e-12
    assert bool(used) == (own == "all" and name != "residual")  # whose kernels are in groups, or padded by a name


def test_groups_are_normalised_in_half_precision_too() -> None:
    made = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4))
    made[0].register_forward_hook(lambda module, given, found: found.bfloat16())
    values, x = stacked(made, 3, OWN["all"], torch.float32), random(3, 5, 2, 8, 8, dtype=torch.float32)
    found, expected = (outputs_of(made, values, vectorized)(x, *values.values()) for vectorized in (True, False))
    assert torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=2e-2)


def test_no_images_have_no_outputs() -> None:
    made = nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2))
    for own in ("all", "none"):
        values = stacked(made, 3, OWN[own])
        assert stacked_outputs(made, values, random(3, 0, 2, 8, 8)).shape == (3, 0, 3, 3, 3)


def test_a_view_that_does_not_fit_is_torchs_error() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(2, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.first(x)
            return found.view(7, 11)

    with pytest.raises(RuntimeError, match="invalid for input"):
        stacked_outputs(Wrong(), stacked(Wrong(), 3, OWN["all"]), random(3, 5, 2, 8, 8))


def digits(images: int) -> Tensor:
    """Returns images that are mostly empty, as characters are: numbers of one sign, with means above their spread."""
    generator = torch.Generator().manual_seed(0)
    return ((torch.rand(2, images, 2, 28, 28, generator=generator) < 0.1).float() + 3.0).requires_grad_()


def products(function: Function, given: Sequence[Tensor]) -> list[Tensor]:
    """Returns the value, and first and second derivatives along random numbers, by each tensor that is given."""
    given = [part.clone().requires_grad_() for part in given]
    generator = torch.Generator().manual_seed(3)

    def along(tensors: Sequence[Tensor]) -> Tensor:
        slopes = [torch.randn(part.shape, generator=generator, dtype=DOUBLE).to(part) for part in tensors]
        return torch.stack([(part * slope).sum() for part, slope in zip(tensors, slopes, strict=True)]).sum()

    value = function(*given)
    first = torch.autograd.grad(along([value]), given, create_graph=True)
    second = torch.autograd.grad(along(first), given, materialize_grads=True)
    return [part.detach().double() for part in (value, *first, *second)]


@settings(max_examples=40, deadline=None)
@given(
    spreads=st.sampled_from([0, 1, 10, 100, 1000, 10_000]),
    images=st.integers(2, 9),
    tasks=st.integers(1, 3),
    size=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    apart=st.sampled_from([0, 5]),
    seed=st.integers(0, 2**16),
)
def test_normalisation_in_single_precision_is_as_exact_as_torchs_whatever_the_mean(
    spreads: int, images: int, tasks: int, size: tuple[int, int], apart: int, seed: int
) -> None:
    # torch's errors grow with the mean in units of the spread; here they don't, however unlike others one image is
    torch.manual_seed(seed)
    x, scale, shift = torch.randn(images, tasks, 5, *size) + spreads, torch.randn(tasks, 5), torch.randn(tasks, 5)
    x[0] += apart

    def single(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.batch_norm(x.contiguous(), None, None, scale, shift, True, 0.0, 1e-5)

    def ours(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return layers.normalisation(x, scale, shift, 1e-5)

    exact = products(each_task(single), [part.double() for part in (x, scale, shift)])
    for found, torchs, expected in zip(
        products(ours, [x, scale, shift]), products(each_task(single), [x, scale, shift]), exact, strict=True
    ):
        assert error([found], [expected]) <= max(error([torchs], [expected]), 6e-7)


def test_statistics_in_single_precision_are_as_good_as_those_of_each_task() -> None:
    # torch's kernel for channels last adds up 20,000 numbers one by one: 1e-4
    x = digits(25).detach().transpose(0, 1)

    def normalised(x: Tensor) -> Tensor:
        return layers.normalisation(x, None, None, 1e-5)

    assert error([normalised(x).double()], [normalised(x.double())]) < 2e-7


def test_gradients_in_single_precision_are_as_good_as_those_of_each_task() -> None:
    torch.manual_seed(0)
    made = nn.Sequential(*blocks()[:8], nn.AvgPool2d(7), nn.Flatten(), nn.Linear(4, 3))
    errors = []
    for vectorized in (True, False):
        found = []
        for dtype in (torch.float32, DOUBLE):
            values = stacked(made, 2, OWN["all"], torch.float32)
            values = {name: value.detach().to(dtype).requires_grad_() for name, value in values.items()}

            outputs = outputs_of(made.to(dtype), values, vectorized)
            orders = derivatives(outputs, [digits(25).to(dtype), *values.values()], orders=2)
            found.append([part.double() for part in orders])
        errors.append(error(*found))
    assert errors[0] < 1e-4
    assert errors[0] < 2 * errors[1]


class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the copies of tensors above a size."""

    def __init__(self, least: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.least, self.count = least, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        copying = func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy)
        self.count += copying and result.numel() >= self.least
        return result


def test_nothing_is_copied_between_layers() -> None:
    torch.manual_seed(0)
    made = blocks(given=1, channels=8)
    values, x = stacked(made, 4, OWN["all"], torch.float32), torch.randn(4, 10, 1, 8, 8)
    with Copies(x.numel() + 1) as copies:  # all that two convolutions, norms and poolings compute is larger
        outputs = stacked_outputs(made, values, x)
        grads = torch.autograd.grad(outputs.square().sum(), list(values.values()), create_graph=True)
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), list(values.values()))
    assert copies.count == 0


# What goes torch's own way


@pytest.mark.parametrize("kind", ["half precision", "autocast", "single images", "single images as on CUDA", "text"])
def test_what_is_not_covered_goes_torchs_own_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> Tensor:
        raise AssertionError("not covered")

    torch.manual_seed(0)
    made: nn.Module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2))
    dtype = torch.bfloat16 if kind == "half precision" else torch.float32
    x = torch.randn(3, 2, 2, 6, 6, dtype=dtype)
    if kind.startswith("single images"):
        x = x[:, 0]
    elif kind == "text":
        made = nn.Conv2d(2, 4, 3, padding="same")
    made = made.to(dtype)
    values = {name: part.detach().expand(3, *part.shape) for name, part in made.named_parameters()}
    expected = stacked_outputs(made, values, x, vectorized=False)
    if kind.endswith("CUDA"):
        as_on_cuda(monkeypatch)
    for name in ("convolution", "pooling", "convolved"):
        monkeypatch.setattr(f"bilevel.problems.few_shot.batching.{name}", refused)
    with torch.autocast("cpu", enabled=kind == "autocast"):
        found = stacked_outputs(made, values, x)
    assert torch.allclose(found.to(expected.dtype), expected, rtol=2e-2, atol=2e-2)


def test_errors_are_torchs_own() -> None:
    made = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    values = {name: part.detach().expand(3, *part.shape) for name, part in made.named_parameters()}
    with pytest.raises(RuntimeError, match="channels"):
        stacked_outputs(made, values, torch.randn(3, 2, 5, 6, 6))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        stacked_outputs(made, values, torch.randn(3, 1, 2, 3, 3))
