"""The base class of callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bilevel.hooks import check_hooks
from bilevel.validation import NamedArguments

if TYPE_CHECKING:
    from bilevel.engine import Engine
    from bilevel.result import Hypergradient, StepResult

__all__ = ["Callback"]


class Callback(NamedArguments):
    """Watches a run: override the hooks you need, hand an instance to ``Engine(callbacks=[...])``.

    A method whose name starts with ``on_`` but is no hook of this class is an error when the class is defined. What a
    callback remembers between steps belongs into its ``state_dict``, so that a resumed run continues as if it had not
    stopped. Under data parallelism every rank has its own callbacks: what writes files does so on rank 0 only.

    Raises:
        UnknownNameError: At class definition, for a misspelt hook.

    Example:
        >>> class Losses(Callback):
        ...     def __init__(self):
        ...         self.seen = []
        ...     def on_step_end(self, engine, result):
        ...         self.seen.append(result.losses)
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuses a misspelt hook."""
        super().__init_subclass__(**kwargs)
        check_hooks(cls, Callback)

    def on_run_start(self, engine: Engine, steps: int) -> None:
        """Called once when ``run()`` begins.

        Args:
            engine: The engine that runs.
            steps: Outer steps that this run will take.
        """

    def on_hypergradient(self, engine: Engine, problem: str, hypergradient: Hypergradient) -> None:
        """Called within a step, before a problem that has problems below it is updated with its total gradient.

        The step may still be refused, skipped or undone: what is noted here counts once ``on_step_end`` comes. The
        tensors are those of the update, which may change them in place: copy what is kept, change nothing.

        Args:
            engine: The engine that steps.
            problem: Name of the problem.
            hypergradient: Its total gradient, as :meth:`Engine.hypergradient` returns it.
        """

    def on_step_end(self, engine: Engine, result: StepResult) -> None:
        """Called after every outer step, also where ``step()`` is driven by someone else's loop.

        Args:
            engine: The engine that stepped.
            result: What the step did.
        """

    def on_evaluate(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Called with what the problems' ``evaluate()`` returned.

        Args:
            engine: The engine that evaluated.
            metrics: Values by ``"problem/metric"``.
        """

    def on_step_complete(self, engine: Engine, result: StepResult) -> None:
        """Called when every callback has seen the step, and its evaluation if there was one.

        The engine's state is complete here, callbacks' included: what saves it belongs here.

        Args:
            engine: The engine that stepped.
            result: What the step did.
        """

    def on_run_end(self, engine: Engine) -> None:
        """Called once when ``run()`` ends, also where it ends by an exception.

        Args:
            engine: The engine that ran.
        """

    def values(self) -> Mapping[str, float]:
        """Returns what this callback has measured of the last step, for logs to record with it. Nothing by default.

        Called when every callback's ``on_step_end`` has seen the step. Names go into the logs as they are; those of
        two callbacks must differ.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns what must survive a restart: tensors and JSON values only. Empty by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` returned; the default has nothing to take.

        Args:
            state: The saved state.
        """
