"""Edges that a loss uses later, and what an update's derivative would leave out."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel.errors import BilevelWarning, ConfigError, LossError

ITERATIONS = 12
OURS = "bilevel.interop.betty"
pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # betty-ml's imports
]


class Value(nn.Module):
    def __init__(self, *numbers: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(numbers))


def program(
    library: str,
    losses: dict[str, Callable[[Any], Tensor]],
    edges: tuple[dict[str, list[str]], dict[str, list[str]]],
    *,
    kind: str = "ImplicitProblem",
    below: dict[str, Any] | None = None,
    hooks: dict[str, Any] | None = None,
    **engine: Any,
) -> dict[str, Tensor]:
    """Returns all parameters after a run. ``below`` is the configuration of ``low``, and ``hooks`` are its methods."""
    problems_of, configs = (importlib.import_module(f"{library}.{part}") for part in ("problems", "configs"))
    made = {}
    for place, (name, loss) in enumerate(losses.items()):
        low = name == "low"
        base = getattr(problems_of, kind if low else "ImplicitProblem")
        methods = {"training_step": lambda self, batch, loss=loss: loss(self), **((hooks or {}) if low else {})}
        module = Value(1.0 + place, 0.5 - place)
        config = configs.Config(**{"type": "neumann", "neumann_iterations": 2, "neumann_alpha": 0.3} | (below or {}))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        made[name] = type(name.title(), (base,), methods)(
            name, config if low else configs.Config(), module, optimizer, train_data_loader=[(0,)]
        )
    u2l, l2u = ({made[key]: [made[one] for one in several] for key, several in part.items()} for part in edges)
    settings = configs.EngineConfig(**{"train_iters": ITERATIONS, "strategy": "cpu", **engine})
    whole = importlib.import_module(f"{library}.engine").Engine(list(made.values()), settings, {"u2l": u2l, "l2u": l2u})
    whole.run()
    return {name: problem.module.value.detach().clone() for name, problem in made.items()}


TWO = ({"top": ["low"]}, {"low": ["top"]})


def top_loss(self: Any) -> Tensor:
    return (self.low.module.value - 3.0).square().sum()


def low_loss(self: Any) -> Tensor:
    return (self.module.value - self.top.module.value).square().sum() / 2


def weighted_later(self: Any) -> Tensor:
    plain = self.module.value.square().sum() / 2
    return plain if self.count <= 5 else plain - (self.top.module.value * self.module.value).sum()


@pytest.mark.filterwarnings("ignore:.*is declared to use the parameters of 'top':bilevel.errors.BilevelWarning")
def test_an_edge_that_a_loss_uses_later_is_followed_from_then_on() -> None:
    losses = {"top": top_loss, "low": weighted_later}
    bettys, ours = (program(library, losses, TWO) for library in ("betty", OURS))
    for name, value in bettys.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=0)
    assert not torch.equal(ours["top"], torch.tensor([1.0, 0.5]))


@pytest.mark.filterwarnings("ignore:.*is declared to use the parameters of 'top':bilevel.errors.BilevelWarning")
def test_the_same_in_the_middle_of_three() -> None:
    def middle(self: Any) -> Tensor:
        towards = (self.module.value - self.low.module.value).square().sum() / 2
        return towards if self.count <= 2 else towards - (self.top.module.value * self.module.value).sum() / 3

    losses = {
        "top": lambda self: (self.middle.module.value - 3.0).square().sum(),
        "middle": middle,
        "low": low_loss,
    }
    edges = ({"top": ["low", "middle"]}, {"low": ["middle"], "middle": ["top"]})
    bettys, ours = (program(library, losses, edges) for library in ("betty", OURS))
    for name, value in bettys.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=0)  # darts in the middle


def test_an_edge_that_is_not_used_is_told() -> None:
    losses = {"top": top_loss, "low": lambda self: self.module.value.square().sum()}
    with pytest.raises(BilevelWarning, match="'low' is declared to use the parameters of 'top', and does not"):
        program(OURS, losses, TWO)


FOLLOWED = [("IterativeProblem", {"unroll_steps": 2}), ("ImplicitProblem", {"type": "sama", "unroll_steps": 2})]


def clamp(self: Any) -> None:
    with torch.no_grad():
        self.module.value.clamp_(-0.2, 0.2)


def scale(self: Any) -> None:
    for p in self.module.parameters():
        p.grad.mul_(0.5)


def step_halved(self: Any) -> None:
    scale(self)
    super(type(self), self).optimizer_step()


@pytest.mark.parametrize(("kind", "below"), FOLLOWED, ids=["unrolled", "sama"])
@pytest.mark.parametrize(
    ("hook", "method", "message"),
    [
        ("param_callback", clamp, r"param_callback\(\) of problem 'low' has changed the parameters"),
        ("grad_callback", scale, r"grad_callback\(\) of problem 'low' has changed the gradients"),
        ("optimizer_step", step_halved, r"optimizer_step\(\) makes in a way that is not known"),
        ("clip_grad", scale, r"clip_grad\(\) makes in a way that is not known"),
        ("custom_optimizer_step", scale, r"custom_optimizer_step\(\) makes in a way that is not known"),
    ],
)
def test_what_changes_a_followed_update_is_refused(
    kind: str, below: dict[str, Any], hook: str, method: Any, message: str
) -> None:
    losses = {"top": top_loss, "low": low_loss}
    with pytest.raises(ConfigError, match=message):
        program(OURS, losses, TWO, kind=kind, below=below, hooks={hook: method})


@pytest.mark.parametrize(("kind", "below"), FOLLOWED, ids=["unrolled", "sama"])
def test_callbacks_that_only_look_change_nothing(kind: str, below: dict[str, Any]) -> None:
    losses, look = {"top": top_loss, "low": low_loss}, lambda self: None
    plain = program(OURS, losses, TWO, kind=kind, below=below)
    seen = program(
        "bilevel.interop.betty",
        losses,
        TWO,
        kind=kind,
        below=below,
        hooks={"param_callback": look, "grad_callback": look},
    )
    assert all(torch.equal(seen[name], value) for name, value in plain.items())


def by_hand(rate: Callable[[int], float], weight: Callable[[int], float], steps: int, gas: int = 1) -> Tensor:
    """``top`` after a run in which ``low`` takes ``steps`` updates of ``gas`` batches, differentiated one by one."""
    top, low, count = torch.tensor([1.0, 0.5]), torch.tensor([2.0, -0.5]), 0
    for _ in range(ITERATIONS // (steps * gas)):
        top.requires_grad_()
        w = low
        for _ in range(steps):
            grads = []
            for _ in range(gas):
                count += 1
                grads.append(weight(count) * (w - top))
            w = w - rate(count) * torch.stack(grads).mean(0)
        (gradient,) = torch.autograd.grad((w - 3.0).square().sum(), top)
        top, low = (top - 0.1 * gradient).detach(), w.detach()
    return top


@pytest.mark.parametrize(("memory", "gas"), [("replay", 1), ("graph", 1), ("replay", 2)])
def test_a_loss_reads_its_count_and_sets_its_rate(memory: str, gas: int) -> None:
    def mine(self: Any) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 / self.count
        return low_loss(self) * self.count

    below = {"type": {"method": "unrolled", "memory": memory}, "unroll_steps": 3, "gradient_accumulation": gas}
    ours = program(OURS, {"top": top_loss, "low": mine}, TWO, below=below)
    expected = by_hand(lambda count: 0.1 / count, lambda count: count, 3, gas)
    torch.testing.assert_close(ours["top"], expected, rtol=1e-12, atol=0)


def test_sama_takes_the_rate_that_its_loss_has_set() -> None:
    def mine(self: Any) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 / self.count
        return low_loss(self)

    below = {"type": {"method": "sama", "difference": "exact", "center": "old"}}
    ours = program(OURS, {"top": top_loss, "low": mine}, TWO, below=below)
    torch.testing.assert_close(ours["top"], by_hand(lambda count: 0.1 / count, lambda _: 1.0, 1), rtol=1e-12, atol=0)


def copied(self: Any) -> None:
    self.module.load_state_dict(self.top.module.state_dict())


def copied_data(self: Any) -> None:
    self.module.value.data = self.top.module.value.data.clone()


def halved(self: Any) -> None:
    with torch.no_grad():
        self.module.value.copy_(self.top.module.value / 2)


def rate_changed(self: Any) -> None:
    self.optimizer.param_groups[0]["lr"] *= 0.9


UNROLLED: dict[str, Any] = {"kind": "IterativeProblem", "below": {"unroll_steps": 2}}
LOSSES = {"top": top_loss, "low": low_loss}


def test_a_start_copied_from_above_is_not_followed() -> None:
    for hook in (copied, copied_data):
        with pytest.raises(ConfigError, match="copies parameters of a problem above.*proximal term"):
            program(OURS, LOSSES, TWO, **UNROLLED, hooks={"on_inner_loop_start": hook})
    with pytest.warns(BilevelWarning, match="where they start from counts as a constant"):
        program(OURS, LOSSES, TWO, **UNROLLED, hooks={"on_inner_loop_start": halved})
    # A linear system does not ask where the loop began.
    below = {"unroll_steps": 2}
    bettys, ours = (
        program(library, LOSSES, TWO, below=below, hooks={"on_inner_loop_start": copied}) for library in ("betty", OURS)
    )
    torch.testing.assert_close(ours["top"], bettys["top"], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ({"grad_callback": rate_changed}, r"grad_callback\(\) of problem 'low' has changed the optimizer's settings"),
        ({"epoch_callback": clamp}, r"epoch_callback\(\) of problem 'low' has changed the parameters"),
        (
            {"on_inner_loop_start": lambda self: None, "custom_optimizer_step": clamp},
            r"custom_optimizer_step\(\) makes in a way that is not known",
        ),
    ],
    ids=["rate", "epoch", "step"],
)
def test_what_else_changes_a_followed_update_is_refused(hooks: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        program(OURS, LOSSES, TWO, **UNROLLED, hooks=hooks)


def test_a_loss_that_trains_nothing_is_refused() -> None:
    losses = {"top": lambda self: top_loss(self).detach(), "low": low_loss}
    with pytest.raises(LossError, match="problem 'top' depends on the parameters of no problem"):
        program(OURS, losses, TWO)


def test_the_optimizers_settings_of_a_parameter_are_found_in_a_loss() -> None:
    def mine(self: Any) -> Tensor:
        group = self.get_opt_param_group_for_param(self.module.value)
        assert "momentum_buffer" not in self.get_opt_state_for_param(self.module.value)
        return low_loss(self) + group["lr"] * (self.module.value.square() * self.top.module.value).sum()

    bettys, ours = (
        program(library, {"top": top_loss, "low": mine}, TWO, below={"type": "darts"}) for library in ("betty", OURS)
    )
    torch.testing.assert_close(ours["top"], bettys["top"], rtol=1e-9, atol=0)


def test_roll_back_out_of_step_is_refused() -> None:
    losses = {
        "top": lambda self: (self.low.module.value + self.other.module.value - 3.0).square().sum(),
        "low": low_loss,
        "other": low_loss,
    }
    edges = ({"top": ["low", "other"]}, {"low": ["top"], "other": ["top"]})
    with pytest.raises(ConfigError, match="'low' is rolled back, and 'other' beside it keeps another pace"):
        program(OURS, losses, edges, below={"unroll_steps": 2}, roll_back=True)


def test_a_setting_is_changed_by_the_configuration_alone() -> None:
    def mine(self: Any) -> Tensor:
        self.gas = 2
        return low_loss(self)

    with pytest.raises(ConfigError, match="gas of problem 'low' is set by Config.gradient_accumulation"):
        program(OURS, {"top": top_loss, "low": mine}, TWO)


def test_a_loss_that_is_not_finite_is_told_without_advice_that_is_refused() -> None:
    losses = {"top": top_loss, "low": lambda self: low_loss(self) / 0.0}
    with pytest.raises(ArithmeticError, match=r"problem 'low' is (inf|nan)") as caught:
        program(OURS, losses, TWO)
    assert "skip" not in str(caught.value)


def test_betty_s_functions_are_refused_where_they_cannot_serve_when_the_engine_is_made() -> None:
    from bilevel.interop.betty import Config, Engine, EngineConfig, ImplicitProblem

    def made(kind: str, optimizer: Any, *, nested: bool) -> Engine:
        names = ["top", "middle", "low"] if nested else ["top", "low"]
        parts = []
        for name in names:
            others = [other for other in names if other != name]
            step = {
                "training_step": lambda self, batch, others=others: sum(
                    (self.module.value - getattr(self, other).module.value).square().sum() for other in others
                )
            }
            module = Value(1.0, 2.0)
            config = Config(type=kind) if name == names[1] else Config(type="neumann")
            made_of = optimizer(module.parameters(), lr=0.1)
            parts.append(type(name.title(), (ImplicitProblem,), step)(name, config, module, made_of, None, [(0,)]))
        u2l = {upper: parts[place + 1 :] for place, upper in enumerate(parts[:-1])}
        l2u = {lower: parts[:place] for place, lower in enumerate(parts) if place}
        return Engine(parts, EngineConfig(strategy="cpu"), {"u2l": u2l, "l2u": l2u})

    with pytest.raises(ConfigError, match="'betty:sama': Betty's function has nothing for RMSprop"):
        made("betty:sama", torch.optim.RMSprop, nested=False)
    with pytest.raises(ConfigError, match="'betty:darts' is for inner problems with none below them: problem 'middle'"):
        made("betty:darts", torch.optim.SGD, nested=True)
    made("betty:darts", torch.optim.RMSprop, nested=False)
