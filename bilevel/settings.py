"""The engine's settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from bilevel.errors import ConfigError
from bilevel.hypergrad import ConjugateGradient, Estimator, as_estimator
from bilevel.implicit_function import obstacle
from bilevel.interrupt import STOP_SIGNALS, check_signals
from bilevel.validation import NamedArguments, check_choice, check_integer, check_number

__all__ = ["EngineConfig"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig(NamedArguments):
    """How an :class:`~bilevel.Engine` runs. Immutable; validated when made.

    Attributes:
        steps: Outer steps that ``run()`` takes.
        seed: Seeds the order of the data; models are initialised by their makers.
        hypergradient_batch: Inner batch on which the inner loss of a hypergradient is taken: ``"last"`` (that of the
            last inner update, with its random numbers) or ``"fresh"`` (a new one).
        num_hypergradient_batches: How many inner batches are averaged in a hypergradient; above 1 they are fresh.
        on_solve_failure: ``"warn"``, ``"raise"``, or ``"fallback"`` to the method ``fallback``, where a solve
            diverges or meets negative curvature.
        fallback: The method for ``on_solve_failure="fallback"``: an estimator, its name, or a mapping.
        on_non_finite: ``"raise"``, or ``"skip"`` the step and count it, where a loss or gradient is NaN or infinite.
            No parameter changes either way, unless ``restore_on_error`` is off, which goes with ``"raise"`` only.
        precision: ``"float32"``, or ``"bfloat16"`` or ``"float16"`` to run the training passes under autocast, the
            latter with losses scaled (one scale a problem; an update whose gradients overflow is left out and counted);
            hypergradient products stay in float32.
        restore_on_error: Keep a copy of parameters, buffers and optimiser states during a step, so that a refused or
            failed step leaves the state before it. Costs one copy of the owned parameters and their optimiser state.
        evaluate_every: Call the problems' ``evaluate()`` after every so many steps; 0 for never.
        progress: Whether ``run()`` shows a progress bar.
        nested_solver: The method by which the response of a problem below a middle level is differentiated again, where
            the problem's own method cannot be. Methods that follow the updates (``unrolled``, ``one_step``, ``pzobo``,
            ``sama``) repeat them; ``identity``, ``neumann``, ``conjugate_gradient``, ``minres``, ``gmres``, ``nystrom``
            and ``exact`` solve again by themselves, unless they continue from a state or read the optimiser's. Where it
            steps in, or a method has a state, repeated updates of the middle level are those that were made up to the
            methods' errors.
        solve_timeout: Seconds that one best-response product may take; checked after every gradient and product. A late
            one is given to ``fallback`` where there is one, and is an error otherwise. None for no limit.
        stop_signals: Names of the signals on which ``run()`` ends after the present step; a second one undoes the step
            and raises ``KeyboardInterrupt``. Add ``"SIGUSR1"`` for schedulers that announce their kill by it.
    """

    steps: int = 1000
    seed: int = 0
    hypergradient_batch: str = "last"
    num_hypergradient_batches: int = 1
    on_solve_failure: str = "warn"
    fallback: Estimator | None = None
    on_non_finite: str = "raise"
    precision: str = "float32"
    restore_on_error: bool = True
    evaluate_every: int = 0
    progress: bool = True
    nested_solver: Estimator = field(default_factory=ConjugateGradient)
    solve_timeout: float | None = None
    stop_signals: tuple[str, ...] = STOP_SIGNALS

    def __post_init__(self) -> None:
        """Validates the fields, alone and together; a fallback's name or mapping becomes the method."""
        if self.fallback is not None:
            object.__setattr__(self, "fallback", as_estimator(self.fallback))
            if self.fallback.needs_trajectory or self.fallback.needs_state:
                raise ConfigError(
                    f"EngineConfig.fallback={self.fallback}: a fallback is asked now and then only, and this method "
                    "needs recorded updates or its last call's state. Use one that solves from scratch: 'minres', say."
                )
        object.__setattr__(self, "nested_solver", as_estimator(self.nested_solver))
        reason = obstacle(self.nested_solver)
        if reason:
            raise ConfigError(f"EngineConfig.nested_solver={self.nested_solver}: {reason}")
        object.__setattr__(self, "stop_signals", check_signals(self.stop_signals))
        if self.solve_timeout is not None:
            check_number("EngineConfig", "solve_timeout", self.solve_timeout, minimum=0.0, exclusive=True)
        check_integer("EngineConfig", "steps", self.steps, minimum=1)
        check_integer("EngineConfig", "seed", self.seed, minimum=0)
        check_integer("EngineConfig", "num_hypergradient_batches", self.num_hypergradient_batches, minimum=1)
        check_integer("EngineConfig", "evaluate_every", self.evaluate_every, minimum=0)
        check_choice("EngineConfig", "hypergradient_batch", self.hypergradient_batch, ("last", "fresh"))
        check_choice("EngineConfig", "on_solve_failure", self.on_solve_failure, ("warn", "raise", "fallback"))
        check_choice("EngineConfig", "on_non_finite", self.on_non_finite, ("raise", "skip"))
        if self.on_non_finite == "skip" and not self.restore_on_error:
            raise ConfigError(
                "EngineConfig(on_non_finite='skip') goes back to the state before the step, which "
                "restore_on_error=False does not keep: leave one of them out"
            )
        check_choice("EngineConfig", "precision", self.precision, ("float32", "bfloat16", "float16"))
        if self.num_hypergradient_batches > 1 and self.hypergradient_batch == "last":
            raise ConfigError(
                "EngineConfig.num_hypergradient_batches > 1 averages fresh batches: set hypergradient_batch='fresh' "
                "with it"
            )
        if (self.on_solve_failure == "fallback") != (self.fallback is not None):
            raise ConfigError(
                "EngineConfig.on_solve_failure='fallback' and EngineConfig.fallback=<method> go together: set both or "
                "neither"
            )
