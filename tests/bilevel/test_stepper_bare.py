"""An update leaves out what torch wraps around a step only where nobody sees it."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

from bilevel.stepper import Stepper

Make = Callable[[list[Tensor]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "nesterov": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda params: torch.optim.Adam(params, lr=0.1),
    "adamw, amsgrad": lambda params: torch.optim.AdamW(params, lr=0.1, amsgrad=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.1, momentum=0.5),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "adadelta": lambda params: torch.optim.Adadelta(params),
    "adamax": lambda params: torch.optim.Adamax(params),
    "nadam": lambda params: torch.optim.NAdam(params),
    "radam": lambda params: torch.optim.RAdam(params),
    "asgd": lambda params: torch.optim.ASGD(params),
    "rprop": lambda params: torch.optim.Rprop(params),
    "adafactor": lambda params: torch.optim.Adafactor(params),
    "differentiable": lambda params: torch.optim.SGD(params, lr=0.1, differentiable=True),
}


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (4,))]


def gradients(params: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) for p in params]


def stepper_of(make: Make, params: list[Tensor]) -> Stepper:
    return Stepper("inner", make(params), {str(place): p for place, p in enumerate(params)})


def updated(stepper: Stepper, params: list[Tensor]) -> None:
    stepper.update(gradients(params, 1), {})


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "differentiable"])
def test_an_update_is_bit_for_bit_that_of_the_optimizer(name: str) -> None:
    ours = parameters()
    theirs = copy.deepcopy(ours)
    stepper, optimizer = stepper_of(OPTIMIZERS[name], ours), OPTIMIZERS[name](theirs)
    assert stepper._goes_bare()
    for seed in range(4):
        stepper.update(gradients(ours, seed), {})
        for p, grad in zip(theirs, gradients(theirs, seed), strict=True):
            p.grad = grad
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        for key, kept in optimizer.state[b].items():
            assert torch.equal(torch.as_tensor(stepper.optimizer.state[a][key]), torch.as_tensor(kept)), key
    assert torch.is_grad_enabled()
    assert all(p.requires_grad and p.grad is None and p.grad_fn is None for p in ours)


@contextmanager
def global_hook(register: Callable[[Any], Any], seen: list[str]) -> Iterator[None]:
    handle = register(lambda *_: seen.append("seen"))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_hooks_of_all_optimizers_are_called(register: Any) -> None:
    seen: list[str] = []
    params = parameters()
    stepper = stepper_of(OPTIMIZERS["sgd"], params)
    with global_hook(register, seen):
        assert not stepper.plain
        updated(stepper, params)
    updated(stepper, params)
    assert seen == ["seen"]


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_hooks_of_the_optimizer_are_called(register: str) -> None:
    seen: list[str] = []
    params = parameters()
    stepper = stepper_of(OPTIMIZERS["sgd"], params)
    getattr(stepper.optimizer, register)(lambda *_: seen.append("seen"))
    updated(stepper, params)
    assert seen == ["seen"]


def test_a_step_that_somebody_wrapped_is_called() -> None:
    seen: list[str] = []
    params = parameters()
    stepper = stepper_of(OPTIMIZERS["sgd"], params)
    step = stepper.optimizer.step
    stepper.optimizer.step = lambda: (seen.append("object"), step())[1]  # type: ignore[method-assign, assignment]
    updated(stepper, params)
    assert seen == ["object"]


def test_a_step_that_somebody_wrapped_for_the_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    params = parameters()
    stepper = stepper_of(OPTIMIZERS["sgd"], params)
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: (seen.append("class"), step(self))[1])
    updated(stepper, params)
    assert seen == ["class"]


@pytest.mark.parametrize("inside", [False, True])
def test_a_step_that_was_wrapped_for_the_class_before_the_problem_was_made_is_called(
    inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    step = torch.optim.SGD.step

    @functools.wraps(step)
    def traced(self: Any, closure: Any = None) -> Any:
        seen.append("class")
        return step(self, closure)

    made: Any = torch.optim.Optimizer.profile_hook_step(traced) if inside else traced
    monkeypatch.setattr(torch.optim.SGD, "step", made)
    params = parameters()
    updated(stepper_of(OPTIMIZERS["sgd"], params), params)
    assert seen == ["class"]


def test_a_stepper_can_be_pickled() -> None:
    params = parameters()
    ours = stepper_of(OPTIMIZERS["adam"], params)
    updated(ours, params)
    theirs = pickle.loads(pickle.dumps(ours))  # noqa: S301
    held = theirs.optimizer.param_groups[0]["params"]
    for stepper, owned in ((ours, params), (theirs, held)):
        assert stepper._goes_bare()
        updated(stepper, owned)
    assert all(torch.equal(a, b) for a, b in zip(params, held, strict=True))


def test_a_subclass_makes_its_own_step() -> None:
    seen: list[str] = []

    class Mine(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append("mine")
            return super().step(closure)

    params = parameters()
    updated(stepper_of(lambda params: Mine(params, lr=0.1), params), params)
    assert seen == ["mine"]


def test_a_scheduler_knows_that_a_step_was_made() -> None:
    params = parameters()
    stepper = Stepper(
        "inner",
        OPTIMIZERS["sgd"](params),
        {str(place): p for place, p in enumerate(params)},
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )
    for _ in range(2):  # torch warns of a scheduler that moves on before the first step, which is an error here
        updated(stepper, params)
    assert stepper.optimizer.param_groups[0]["lr"] == 0.025


def test_a_profiler_finds_the_label() -> None:
    params = parameters()
    stepper = stepper_of(OPTIMIZERS["sgd"], params)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        updated(stepper, params)
    assert "Optimizer.step#SGD.step" in {event.name for event in found.events()}


@pytest.mark.parametrize("missing", [("_profiles", None), ("_hooks_of_all", [None, {}]), ("_hooks_of_all", [{}, None])])
def test_a_torch_that_lacks_a_name_makes_the_same_step(missing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bare, wrapped = parameters(), parameters()
    updated(stepper_of(OPTIMIZERS["adam"], bare), bare)
    monkeypatch.setattr(f"bilevel.stepper.{missing[0]}", missing[1])
    stepper = stepper_of(OPTIMIZERS["adam"], wrapped)
    assert stepper.plain
    assert not stepper._goes_bare()
    updated(stepper, wrapped)
    assert all(torch.equal(a, b) for a, b in zip(bare, wrapped, strict=True))


def test_a_differentiable_optimizer_is_left_as_it_is() -> None:
    assert not stepper_of(OPTIMIZERS["differentiable"], parameters())._goes_bare()
