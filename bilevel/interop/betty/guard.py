"""What callbacks may not do where a method differentiates the optimiser's updates: it would not see it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from bilevel.errors import BilevelWarning, ConfigError
from bilevel.hypergrad import Estimator
from bilevel.vector import Tensors

__all__ = ["Guard"]


class Guard:
    """Calls the user's callbacks, and raises where one has changed what the method takes as it was.

    Methods that solve a linear system see the inner parameters as they are in the end; for them nothing is compared.

    Args:
        name: The problem's name.
        parameters: Its parameters.
        optimizer: Its optimiser.
        method: How it is differentiated; None if it is not.
    """

    def __init__(self, name: str, parameters: Tensors, optimizer: Optimizer | None, method: Estimator | None) -> None:
        self._name = name
        self._parameters = parameters
        self._optimizer = optimizer
        self._method = method
        self._follows = method is not None and method.needs_trajectory
        self._follows_loop = method is not None and self._follows and method.recorded_steps != 1
        self._told = False

    def gradients(self, gradients: Tensors, callback: Callable[[], object]) -> Tensors:
        """Lets the user change the gradients in ``.grad``, and returns what they are then.

        Args:
            gradients: What they are now.
            callback: What to call.

        Raises:
            ConfigError: Gradients or the optimiser's settings have changed, and the update is followed.
        """
        settings = self._settings()
        callback()
        after = tuple(torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self._parameters)
        if self._follows and not all(map(torch.equal, gradients, after)):
            raise self._unseen("grad_callback", "the gradients")
        if self._follows and settings != self._settings():
            raise self._unseen("grad_callback", "the optimizer's settings")
        return after

    def update(self, hook: str, callback: Callable[[], object]) -> None:
        """Lets the user change the parameters after an update.

        Raises:
            ConfigError: They have changed, and the update is followed.
        """
        self._compared(hook, callback, self._follows)

    def within_loop(self, hook: str, callback: Callable[[], object]) -> None:
        """Lets the user change the parameters between two updates.

        Raises:
            ConfigError: They have changed, and several updates are followed.
        """
        self._compared(hook, callback, self._follows_loop)

    def start(self, callback: Callable[[], object], uppers: Iterable[Tensor]) -> None:
        """Lets the user set the parameters before a loop.

        Args:
            callback: What to call.
            uppers: Parameters of the problems above.

        Raises:
            ConfigError: They are now those of a problem above, and the loop is followed, but not its start.
        """
        before = self._values(self._follows_loop)
        callback()
        changed = [own for own, value in zip(self._parameters, before, strict=False) if not torch.equal(own, value)]
        # Where all entries are equal, equality says nothing.
        telling = [own for own in changed if not torch.equal(own, own.reshape(-1)[:1].expand_as(own))]
        if telling and any(p.shape == own.shape and torch.equal(p, own) for p in uppers for own in telling):
            raise ConfigError(
                f"on_inner_loop_start() of problem {self._name!r} copies parameters of a problem above, and the "
                "problem is differentiated by its updates, which would leave the start out: tie the loss to them by "
                "a proximal term under another type (implicit MAML), or declare the start as bilevel.Problem(reset=…) "
                "in our own terms"
            )
        if changed and not self._told:
            self._told = True
            warnings.warn(
                f"on_inner_loop_start() of problem {self._name!r} sets parameters, and the problem is differentiated "
                "by its updates: where they start from counts as a constant",
                BilevelWarning,
                stacklevel=2,
            )

    def _compared(self, hook: str, callback: Callable[[], object], follows: bool) -> None:
        before = self._values(follows)
        callback()
        if before and not all(map(torch.equal, before, self._parameters)):
            raise self._unseen(hook, "the parameters")

    def _values(self, follows: bool) -> Tensors:
        return tuple(p.detach().clone() for p in self._parameters) if follows else ()

    def _settings(self) -> str:
        groups = [] if self._optimizer is None or not self._follows else self._optimizer.param_groups
        return repr([{key: value for key, value in group.items() if key != "params"} for group in groups])

    def _unseen(self, hook: str, what: str) -> ConfigError:
        assert self._method is not None
        return ConfigError(
            f"{hook}() of problem {self._name!r} has changed {what}, and the problem is differentiated by its updates "
            f"(method {self._method.name!r}), which does not see that: use another type, or only look"
        )
