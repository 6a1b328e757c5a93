"""Sequences of layers and losses of all tasks without vmap: the numbers and derivatives of task after task."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from bilevel.errors import DataError
from bilevel.problems.few_shot import stacked as stacked_module
from bilevel.problems.few_shot.stacked import stacked_losses, stacked_outputs

DOUBLE = torch.float64
TASKS = 3
ACTIVATIONS = (nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Softplus, nn.Softsign, nn.Mish, nn.LogSigmoid, nn.Identity)


def values_of(network: nn.Module, own: Callable[[str], bool]) -> dict[str, Tensor]:
    """Returns parameters, some of which differ between tasks."""
    return {
        name: part.detach() + 0.1 * torch.randn(*[TASKS] * own(name), *part.shape, dtype=part.dtype)
        for name, part in network.named_parameters()
    }


def orders(network: nn.Module, values: dict[str, Tensor], x: Tensor, **how: Any) -> list[Tensor]:
    """Returns outputs, and the first and second derivatives by inputs and parameters of sums that are not linear."""
    given = [part.detach().clone().requires_grad_() for part in (x, *values.values())]
    found = stacked_outputs(network, dict(zip(values, given[1:], strict=True)), given[0], **how)
    first = torch.autograd.grad(found.sin().sum(), given, create_graph=True, materialize_grads=True)
    second = torch.autograd.grad(torch.stack([part.sin().sum() for part in first]).sum(), given, materialize_grads=True)
    return [part.detach() for part in (found, *first, *second)]


def assert_each_tasks(network: nn.Module, values: dict[str, Tensor], x: Tensor, **how: Any) -> None:
    expected = orders(network, values, x, vectorized=False)
    for ours, own in zip(orders(network, values, x, **how), expected, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-9, atol=1e-11)


@pytest.fixture
def no_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("vmap")

    monkeypatch.setattr(stacked_module, "vmap", refused)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    vmap = stacked_module.vmap
    monkeypatch.setattr(stacked_module, "vmap", lambda *given, **named: (calls.append(1), vmap(*given, **named))[1])
    return calls


# What is known


@pytest.mark.usefixtures("no_vmap")
@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.sampled_from(ACTIVATIONS)), min_size=1, max_size=3),
    more=st.lists(st.integers(1, 3), max_size=2),
    flat=st.booleans(),
    features=st.integers(1, 2),
    own=st.integers(0, 63),
    size=st.sampled_from([None, 2, TASKS]),
)
def test_sequences_have_the_derivatives_of_each_task(
    widths: list[tuple[int, bool, type[nn.Module]]],
    more: list[int],
    flat: bool,
    features: int,
    own: int,
    size: int | None,
) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()] if flat else []
    before = features * (math.prod(more) if flat else 1)
    for width, biased, activation in widths:
        layers.append(nn.Sequential(nn.Linear(before, width, bias=biased), activation()))
        before = width
    network = nn.Sequential(*layers).double()
    places = {name: place for place, (name, _) in enumerate(network.named_parameters())}
    values = values_of(network, lambda name: bool(own >> places[name] & 1))
    assert_each_tasks(network, values, torch.randn(TASKS, 4, *more, features, dtype=DOUBLE), chunk_size=size)


@pytest.mark.usefixtures("no_vmap")
def test_functions_with_kinks_in_place_and_dropout_that_drops_nothing() -> None:
    torch.manual_seed(0)
    parts = [nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.ELU(), nn.CELU(), nn.SELU(), nn.ReLU6(), nn.Hardtanh()]
    layers = [layer for part in parts for layer in (nn.Linear(3, 3), part)]
    network = nn.Sequential(*layers, nn.Dropout(0.0), nn.Sequential(nn.Dropout(0.5)).eval()).double()
    assert_each_tasks(network, values_of(network, lambda name: True), torch.randn(TASKS, 4, 3, dtype=DOUBLE))


@pytest.mark.usefixtures("no_vmap")
def test_a_flatten_in_the_middle_and_parameters_that_are_not_given() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Flatten(1, -2), nn.Tanh(), nn.Linear(4, 2), nn.Flatten(-2)).double()
    values = {key: value for key, value in values_of(network, lambda name: True).items() if key != "3.bias"}
    assert_each_tasks(network, values, torch.randn(TASKS, 4, 2, 2, 3, dtype=DOUBLE))


@pytest.mark.usefixtures("no_vmap")
def test_a_device_without_autocast() -> None:
    network = nn.Sequential(nn.Linear(3, 2, device="meta"))
    assert stacked_outputs(network, {}, torch.empty(TASKS, 4, 3, device="meta")).shape == (TASKS, 4, 2)


@pytest.mark.usefixtures("no_vmap")
@pytest.mark.parametrize("own", range(4))
def test_all_inputs_of_a_task_flattened_together(own: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(0), nn.Linear(12, 2), nn.Tanh()).double()
    values = values_of(network, lambda name: bool(own & (1 if name.endswith("weight") else 2)))
    assert_each_tasks(network, values, torch.randn(TASKS, 4, 3, dtype=DOUBLE))


@pytest.mark.usefixtures("no_vmap")
def test_rows_of_no_inputs() -> None:
    network = nn.Sequential(nn.Linear(3, 2))
    found = stacked_outputs(network, values_of(network, lambda name: True), torch.empty(TASKS, 0, 5, 3))
    assert found.shape == (TASKS, 0, 5, 2)


# What is not


class Doubled(nn.Linear):
    """A layer that does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def tied() -> nn.Sequential:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


def hooked(where: int | None) -> nn.Sequential:
    made = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    place: nn.Module = made if where is None else made[where]
    place.register_forward_hook(lambda module, given, found: 3 * found)
    return made


def replaced() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    made[1].forward = torch.sin
    return made


def with_a_plain_tensor() -> nn.Sequential:
    layer: Any = nn.Linear(3, 3, dtype=DOUBLE)
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight
    return nn.Sequential(layer)


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "subclass": lambda: nn.Sequential(Doubled(3, 3)),
    "tied": tied,
    "hook of a layer": lambda: hooked(1),
    "hook of the sequence": lambda: hooked(None),
    "another forward": replaced,
    "parametrised": lambda: nn.Sequential(register_parametrization(nn.Linear(3, 3), "weight", nn.Tanh())),
    "a plain tensor": with_a_plain_tensor,
    "another layer": lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)),
    "not a sequence": lambda: Doubled(3, 3),
}


@pytest.mark.parametrize("vectorized", [True, False])
def test_a_network_that_holds_a_layer_twice_keeps_its_parameters(vectorized: bool) -> None:
    network = tied()
    held = [*network[0]._parameters.values()]
    values = values_of(network, lambda name: True)
    stacked_outputs(network, values, torch.randn(TASKS, 4, 3), vectorized=vectorized)
    assert all(a is b for a, b in zip(network[0]._parameters.values(), held, strict=True))


@pytest.mark.parametrize("name", UNKNOWN)
def test_whatever_is_not_known_goes_through_vmap(name: str, counted: list[int]) -> None:
    torch.manual_seed(0)
    network = UNKNOWN[name]().double()
    assert_each_tasks(network, values_of(network, lambda name: True), torch.randn(TASKS, 4, 3, dtype=DOUBLE))
    assert counted


def test_hooks_of_all_modules_are_called(counted: list[int]) -> None:
    network = nn.Sequential(nn.Linear(3, 3)).double()
    values, x = values_of(network, lambda name: True), torch.randn(TASKS, 4, 3, dtype=DOUBLE)
    plain = stacked_outputs(network, values, x)
    assert not counted
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, given, found: 2 * found if isinstance(module, nn.Linear) else found
    )
    try:
        torch.testing.assert_close(stacked_outputs(network, values, x), 2 * plain)
    finally:
        hook.remove()
    assert counted


def test_dropout_draws_a_mask_for_each_task(counted: list[int]) -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).double()
    values = {name: part.expand(TASKS, *part.shape) for name, part in network.named_parameters()}
    x = torch.randn(1, 40, 3, dtype=DOUBLE).expand(TASKS, -1, -1)
    found = stacked_outputs(network, values, x)
    assert counted
    assert not torch.equal(found[0] == 0, found[1] == 0)


def test_inputs_that_are_numbers_and_autocast_go_through_vmap(counted: list[int]) -> None:
    network = nn.Sequential(nn.Linear(3, 3))
    values, x = values_of(network, lambda name: True), torch.randn(TASKS, 3)
    expected = stacked_outputs(network, values, x, vectorized=False)
    torch.testing.assert_close(stacked_outputs(network, values, x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        stacked_outputs(network, values, x.unsqueeze(1))
    assert len(counted) == 2


# Losses


def test_classes_in_32_bits_are_those_in_64(counted: list[int]) -> None:
    outputs, targets = torch.randn(TASKS, 4, 5), torch.randint(5, (TASKS, 4))
    expected = stacked_losses(F.cross_entropy, outputs, targets)
    assert not counted
    torch.testing.assert_close(stacked_losses(F.cross_entropy, outputs, targets.int()), expected)


def losses(criterion: Callable[..., Tensor], outputs: Tensor, targets: Tensor, vectorized: bool) -> list[Tensor]:
    given = outputs.detach().clone().requires_grad_()
    found = stacked_losses(criterion, given, targets, vectorized=vectorized)
    (first,) = torch.autograd.grad(found.sin().sum(), given, create_graph=True)
    (second,) = torch.autograd.grad(first.sin().sum(), given)
    return [part.detach() for part in (found, first, second)]


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2, 3)])
def test_squared_errors_are_those_of_each_task(shape: tuple[int, ...], no_vmap: None) -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(TASKS, *shape, dtype=DOUBLE), torch.randn(TASKS, *shape, dtype=DOUBLE)
    for ours, own in zip(*(losses(F.mse_loss, outputs, targets, way) for way in (True, False)), strict=True):
        torch.testing.assert_close(ours, own)


def test_cross_entropies_are_those_of_each_task_whose_ignored_examples_differ_in_number(no_vmap: None) -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(TASKS, 4, 5, dtype=DOUBLE), torch.randint(5, (TASKS, 4))
    targets[0, 1], targets[2, :3] = -100, -100
    for ours, own in zip(*(losses(F.cross_entropy, outputs, targets, way) for way in (True, False)), strict=True):
        torch.testing.assert_close(ours, own)


def test_a_class_without_output_is_an_error(no_vmap: None) -> None:
    with pytest.raises(DataError, match="a task has the class 5, and the network 5 outputs"):
        stacked_losses(F.cross_entropy, torch.randn(TASKS, 4, 5), torch.full((TASKS, 4), 5))


OTHERS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], Tensor]] = {
    "another": (F.l1_loss, (4, 1), torch.rand(TASKS, 4, 1)),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), (4, 5), torch.randint(5, (TASKS, 4))),
    "probabilities": (F.cross_entropy, (4, 5), torch.rand(TASKS, 4, 5).softmax(-1)),
    "classes of places": (F.cross_entropy, (4, 5, 2), torch.randint(5, (TASKS, 4, 2))),
    "one example": (F.cross_entropy, (5,), torch.randint(5, (TASKS,))),
    "a scalar": (F.mse_loss, (), torch.rand(TASKS)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_losses_go_through_vmap(name: str, counted: list[int]) -> None:
    criterion, shape, targets = OTHERS[name]
    outputs = torch.randn(TASKS, *shape)
    found, expected = (stacked_losses(criterion, outputs, targets, vectorized=way) for way in (True, False))
    torch.testing.assert_close(found, expected)
    assert counted
