"""A Betty problem as a problem of ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bilevel.data import BatchStream
from bilevel.errors import ConfigError, ParameterError
from bilevel.hypergrad import Estimator, Unrolled, as_estimator
from bilevel.interop.betty.clock import Pace
from bilevel.interop.betty.data import Together, converted, share
from bilevel.interop.betty.dependencies import Declared
from bilevel.interop.betty.guard import Guard
from bilevel.interop.betty.log import flat, is_number
from bilevel.interop.betty.methods import method_of
from bilevel.interop.betty.overrides import check_spelling, defined
from bilevel.interop.betty.problems import HOOKS, IterativeProblem
from bilevel.interop.betty.problems import Problem as BettyProblem
from bilevel.problems import Problem
from bilevel.vector import Tensors, add

__all__ = ["Dated", "Level", "Pending"]


INTERNAL = frozenset(
    {
        "add_child",
        "add_env",
        "add_logger",
        "add_parent",
        "add_paths",
        "backward",
        "check_ready",
        "clear_dependencies",
        "configure_device",
        "configure_distributed_training",
        "configure_roll_back",
        "epoch_callback_exec",
        "get_loss",
        "initialize_optimizer_state",
        "one_step_descent",
        "patch_data_loader",
        "patch_everything",
        "patch_module",
        "patch_modules",
        "patch_optimizer",
        "patch_scheduler",
        "set_grads",
        "step",
        "step_after_roll_back",
        "step_normal",
        "synchronize_params",
        "training_step_exec",
    }
)
"""What Betty's classes call and ours do not."""


@dataclass(frozen=True)
class Pending:
    """The beginning of an accumulation.

    Attributes:
        gradients: The sum so far, of shares; None where a batch's gradients overflowed, and the update is left out.
        count: How many batches went into it.
    """

    gradients: Tensors | None
    count: int


@dataclass(frozen=True)
class Dated:
    """A batch, with when it was drawn: a loss that is evaluated on it again finds the counts of then.

    Attributes:
        batch: As it was drawn.
        count: The problem's steps, this batch's included.
        iteration: The engine's.
    """

    batch: Any
    count: int
    iteration: int


class Level(Problem):
    """Runs a Betty problem: batches as it expects them, its callbacks, its accumulation.

    An update of this problem is one batch: the optimiser steps with every ``gradient_accumulation``-th. Where the
    method follows the updates themselves, they are made of that many batches each (``accumulate``) instead.

    Args:
        user: The user's problem, initialised.
        has_parents: Whether problems are above it.
        has_children: Whether problems are below it.
        rank: This process.
        size: All processes.

    Raises:
        ConfigError: A setting that is not supported where the problem stands.
        ParameterError: Parameters to train that the optimiser does not hold.
    """

    def __init__(self, user: BettyProblem, *, has_parents: bool, has_children: bool, rank: int = 0, size: int = 1):
        assert user.module is not None
        config = user.config
        method = _method(user) if has_parents else None
        follows = method is not None and method.needs_trajectory
        self.shown: tuple[int, int] | None = None
        """The count and the engine's iteration at which a loss is evaluated again; None where that is now."""
        _check(user, method, has_children=has_children)
        _restrict(user)
        self.user = user
        self._several = False
        super().__init__(
            user.module,
            optimizer=user.optimizer,
            data=self._data(rank, size),
            scheduler=user.scheduler,
            steps=config.unroll_steps if has_parents else 1,
            hypergradient=method,
            name=user.name,
            max_grad_norm=config.gradient_clipping if follows and config.gradient_clipping > 0.0 else None,
            accumulate=config.gradient_accumulation if follows else 1,
        )
        user._owned, user._live = self.parameter_names, dict(user.module.named_parameters())
        self.carried: dict[str, Any] = {"epochs": (0,)}
        self.rolls_back = False
        self._guard = Guard(user.name, self.parameters, user.optimizer, method)
        self.said: Mapping[str, Any] = {}
        self._changes = config.gradient_clipping > 0.0 or any(
            user.is_implemented(hook) for hook in ("grad_callback", "custom_optimizer_step")
        )

    @property
    def batches_an_update(self) -> int:
        """Batches for one step of the optimiser."""
        return self.user.config.gradient_accumulation

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Calls the user's ``training_step`` with a batch as Betty hands it on."""
        if isinstance(batch, Dated):
            self.shown, before = (batch.count, batch.iteration), self.shown
            try:
                return self.loss(batch.batch)
            finally:
                self.shown = before
        user = self.user
        user.cur_batch = self._received(batch)
        result = user.training_step(user.cur_batch)
        if not isinstance(result, Mapping):
            self.said = {}
            return result
        self.said = {key: _detached(value) for key, value in result.items() if key != "loss"}
        numbers = {key: value for key, value in flat(self.said).items() if is_number(value)}
        return {"loss": result.get("loss"), **numbers} if "loss" in result else result

    def restart(self) -> None:
        """Begins an inner loop."""
        if self.user.is_implemented("on_inner_loop_start"):
            uppers = (p for upper in self.user.parents for p in upper.parameters())
            self._guard.start(self.user.on_inner_loop_start, uppers)  # type: ignore[attr-defined]

    def begin_epoch(self, stream: BatchStream, batch: Any) -> None:
        """Calls the user's ``epoch_callback``, where the batch drawn last is the first of another epoch."""
        if self.user.draws_itself:
            return
        epochs = batch[0] if self._several else (stream.epoch,)
        ended = epochs[0] > self.carried["epochs"][0]
        self.carried["epochs"] = epochs
        if ended and self.user.is_implemented("epoch_callback"):
            self._guard.within_loop("epoch_callback", self.user.epoch_callback)  # type: ignore[attr-defined]
        self.user.epoch_counter = list(epochs)

    def update(self, gradients: Sequence[Tensor], values: Mapping[str, Any]) -> None:
        """Adds a batch's gradients, lets the user see them, and steps where they complete an update.

        Args:
            gradients: One a parameter, of the batch's loss; of the mean over all batches where ``accumulate`` says so.
            values: What the loss returned, for a scheduler that asks for a metric.
        """
        parts = self.batches_an_update // self.accumulate
        share_of_all = tuple(gradients) if parts == 1 else tuple(part / parts for part in gradients)
        before: Pending | None = self.carried.pop("pending", None)
        if before is not None and before.gradients is not None:
            share_of_all = add(before.gradients, share_of_all)
        spoilt = before is not None and before.gradients is None
        count = 1 + (0 if before is None else before.count)
        assert self.stepper is not None
        grads = self.stepper.own(share_of_all, changed=self._changes)
        with self.stepper.holding(grads):
            if self.user.is_implemented("grad_callback"):
                share_of_all = self._guard.gradients(share_of_all, self.user.grad_callback)  # type: ignore[attr-defined]
            if count == parts and not spoilt:
                self.user.optimizer_step()
                if self.user.is_implemented("param_callback"):
                    self._guard.update("param_callback", self.user.param_callback)  # type: ignore[attr-defined]
                if type(self.user).zero_grad is not BettyProblem.zero_grad:  # gradients are put back anyway
                    self.user.zero_grad()
                self.num_updates += 1
        self._end(None if spoilt else share_of_all, count, parts, values)

    def leave_out(self, values: Mapping[str, Any]) -> None:
        """Counts a batch whose gradients overflowed: the update that it belongs to is left out."""
        before: Pending | None = self.carried.pop("pending", None)
        count = 1 + (0 if before is None else before.count)
        self._end(None, count, self.batches_an_update // self.accumulate, values)

    def _end(self, total: Tensors | None, count: int, parts: int, values: Mapping[str, Any]) -> None:
        if count < parts:
            self.carried["pending"] = Pending(total, count)
        if self.stepper is not None and not self.rolls_back:
            for _ in range(self.accumulate):  # Betty's schedulers count batches
                self.stepper.advance_scheduler(values)

    def _received(self, batch: Any) -> Any:
        if self.user.draws_itself:
            return batch
        if self._several:
            _, batches = batch
            return tuple(converted(part, self.user.device, self.name) for part in batches)
        return converted(batch, self.user.device, self.name)

    def _data(self, rank: int, size: int) -> Iterable[Any] | None:
        user = self.user
        if user.draws_itself:
            return None
        loaders = user._loaders
        if size > 1:
            loaders = tuple(share(loader, rank, size) for loader in loaders)
        if len(loaders) == 1:
            return loaders[0]
        self._several = True
        return Together(loaders, user.name)


def check_pace(levels: Mapping[str, Level], graph: Declared, paces: Mapping[str, Pace]) -> None:
    """Raises where a problem above would step in the middle of a loop that is followed or rolled back.

    Args:
        levels: All problems, by name.
        graph: Who is above whom.
        paces: How often those above step.

    Raises:
        ConfigError: Such a problem keeps another pace than one beside it.
    """
    for name, level in levels.items():
        method = level.hypergradient
        followed = method is not None and method.needs_trajectory and method.recorded_steps != 1
        if not followed and not level.rolls_back:
            continue
        how = "rolled back" if method is None or not followed else f"differentiated by its updates ({method.name!r})"
        for parent in graph.parents[name]:
            for other in graph.children[parent]:
                same = not (graph.children[name] or graph.children[other]) and paces[name] == paces[other]
                if other != name and not same:
                    raise ConfigError(
                        f"problem {name!r} is {how}, and {other!r} beside it keeps another pace, so that {parent!r} "
                        "would step in the middle of a loop: both need the same Config.unroll_steps, "
                        "gradient_accumulation and warmup_steps, and none below them"
                    )


def _detached(value: Any) -> Any:
    """Returns a value to log, which keeps no graph alive."""
    if isinstance(value, Mapping):
        return {key: _detached(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_detached(part) for part in value]
    return value.detach() if isinstance(value, Tensor) else value


def _method(user: BettyProblem) -> Estimator:
    if not isinstance(user, IterativeProblem):
        return method_of(user.config)
    kind = user.config.type
    if not isinstance(kind, str):
        method = as_estimator(kind)
        return method if method.needs_trajectory else Unrolled()
    return Unrolled()


def _check(user: BettyProblem, method: Estimator | None, *, has_children: bool) -> None:
    name, config = user.name, user.config
    for hook in INTERNAL & defined(type(user)):
        raise ConfigError(
            f"problem {name!r} overrides {hook}(), which belongs to the machinery of Betty's that does not exist "
            f"here. What users may define: {', '.join(HOOKS)}, and the methods that Problem has"
        )
    check_spelling(type(user), [*HOOKS, "training_step"])
    if type(user).meta_trainable_parameters is not BettyProblem.meta_trainable_parameters:
        raise ConfigError(
            f"meta_trainable_parameters() of problem {name!r} is not supported: hypergradients flow through all "
            "parameters that the problem trains. Give those that it is to leave out to a problem of their own, or "
            "freeze them"
        )
    if method is None or not method.needs_trajectory:
        return
    how = f"problem {name!r} is differentiated by its updates (method {method.name!r})"
    mine = defined(type(user)) | set(vars(user))
    for own in sorted({"custom_optimizer_step", "optimizer_step", "clip_grad"} & mine):
        raise ConfigError(f"{how}, which {own}() makes in a way that is not known: use another type")
    if method.recorded_steps != 1 and config.precision != "fp32":
        raise ConfigError(
            f"Config.precision={config.precision!r} is not supported for {name!r}, whose updates are differentiated "
            "one by one. Choices: 'fp32'"
        )
    if has_children and config.gradient_accumulation > 1:
        raise ConfigError(
            f"{how} and has problems below it, which move between the batches of Config.gradient_accumulation="
            f"{config.gradient_accumulation}: set it to 1, or use another type"
        )


def _restrict(user: BettyProblem) -> None:
    """Takes the parameters out of the optimiser that an overridden ``trainable_parameters`` leaves out."""
    assert user.optimizer is not None
    if type(user).trainable_parameters is BettyProblem.trainable_parameters:
        return
    returned = user.trainable_parameters()
    if not isinstance(returned, (list, tuple)) or not all(isinstance(p, Tensor) for p in returned):
        raise ConfigError(
            f"trainable_parameters() of problem {user.name!r} must return a list of parameters, not {returned!r}"
        )
    trained = {id(p) for p in returned}
    held = {id(p) for group in user.optimizer.param_groups for p in group["params"]}
    if trained - held:
        raise ParameterError(
            f"trainable_parameters() of problem {user.name!r} returns {len(trained - held)} tensors that its optimizer "
            "does not hold, and that would never move. Give them to the optimizer"
        )
    for group in user.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in trained]
