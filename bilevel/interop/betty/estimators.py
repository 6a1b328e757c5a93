"""The hypergradient functions of betty-ml 0.2.1 as methods: Betty's numbers, mistakes included, on this engine.

Each product is made by calling the function that betty-ml ships. betty-ml is imported when a method is constructed, and
nowhere else. The methods are registered through the entry-point group ``bilevel.methods``, as any package's would be.

What stays this engine's, so that the numbers of a whole Betty run can differ: every pass of a product sees the same
random numbers (Betty draws new dropout masks in each), buffers stay as they are (Betty moves batch-norm statistics),
autocast is off, and the inner loss is the mean over all batches of the last update (Betty takes its last micro-batch).
Parameters are displaced on copies, so that an exception between passes leaves nothing displaced; the ``*_multitask``
switches, which leave Betty's displaced for good, are not offered. On several ranks each makes its own product on its
own data, as in Betty, and the products are averaged.
"""

from __future__ import annotations

import importlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from bilevel.double_backward import second_derivative_errors
from bilevel.errors import ConfigError
from bilevel.functional import Evaluate, leaves, require_finite
from bilevel.hypergrad import Estimator, InnerProblem, InnerStep, Pullback, Response, State
from bilevel.levels.response import NestedObjective
from bilevel.optim import Rule
from bilevel.products import TOLERATED_ROUNDING, displacement_error
from bilevel.result import SolveInfo, Status
from bilevel.validation import check_integer, check_number
from bilevel.vector import Tensors, add, is_finite, norm

__all__ = ["BettyCG", "BettyDarts", "BettyMethod", "BettyNeumann", "BettySAMA"]


def released(name: str) -> Callable[..., Any]:
    """Returns one of betty-ml's hypergradient functions.

    Raises:
        ConfigError: betty-ml is not installed, or another package has the name ``betty``.
    """
    try:
        function: Callable[..., Any] = getattr(importlib.import_module("betty.hypergradient"), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"method 'betty:{name}' calls betty-ml's own function, which cannot be imported ({error}). betty-ml "
            "declares Python < 3.11 and runs on later ones: "
            "pip install --no-deps --ignore-requires-python betty-ml==0.2.1"
        ) from error
    return function


@dataclass(frozen=True)
class BettyMethod(Estimator):
    """Base of the methods that call a function of betty-ml.

    Raises:
        ConfigError: A field out of range; betty-ml cannot be imported; where a product is taken, a problem with others
            below it, which Betty differentiates without the response of those, or what the function crashes on.
    """

    function: ClassVar[str]
    """Name of the function in ``betty.hypergradient``."""
    right: ClassVar[str]
    """The method here that computes the same thing without Betty's mistakes."""

    def __post_init__(self) -> None:
        """Validates the fields, and finds the function; a subclass calls it."""
        self._check()
        released(self.function)

    def respond(self, problem: InnerProblem) -> Response:
        """See :meth:`Estimator.respond`. Nothing is computed until the pullback."""
        self.check_place(problem.objective.name, below=isinstance(problem.objective, NestedObjective))
        return _BettyResponse(self, problem)

    def check_place(self, problem: str, *, below: bool, optimizer: str = "") -> None:
        """Raises where Betty's function cannot serve a problem.

        Args:
            problem: What to call it.
            below: Whether problems below it respond to it.
            optimizer: The class of its optimiser, where it has one.

        Raises:
            ConfigError: It cannot.
        """
        if below:
            raise ConfigError(
                f"method {self.name!r} is for inner problems with none below them: {problem} has some, whose response "
                f"to it Betty leaves out. Use {self.right!r}."
            )

    @abstractmethod
    def _check(self) -> None:
        """Validates the fields."""

    @abstractmethod
    def config(self) -> SimpleNamespace:
        """Returns what the function reads from Betty's configuration."""

    @property
    @abstractmethod
    def backward_passes(self) -> int:
        """How many backward passes the function makes."""

    def wanted(self, point: Tensors, outer: Tensors) -> Tensors:
        """Returns the variables whose products the function is asked for; the outer ones first."""
        return outer

    def optimizer(self, problem: InnerProblem, point: Tensors) -> dict[str, Any]:
        """Returns what the function reads from Betty's optimiser."""
        return {}

    @abstractmethod
    def report(self, problem: InnerProblem, level: SimpleNamespace, v: Tensors, rest: Tensors) -> SolveInfo:
        """Returns the report of a product.

        Args:
            problem: The inner problem.
            level: It, as the function saw it.
            v: The cotangent.
            rest: The products for what :meth:`wanted` adds to the outer variables.
        """


@dataclass(frozen=True)
class _BettyResponse(Response):
    estimator: BettyMethod
    problem: InnerProblem

    @property
    def point(self) -> Tensors:  # type: ignore[override]
        return self.problem.inner

    def pullback(self, cotangent: Tensors, state: State) -> Pullback:
        estimator, problem, objective = self.estimator, self.problem, self.problem.objective
        point = leaves([part.detach().clone() for part in problem.inner])  # the function displaces them in place
        v = tuple(part.detach().to(p.dtype) for part, p in zip(cotangent, point, strict=True))

        def body(evaluate: Evaluate) -> tuple[SimpleNamespace, Tensors]:
            level = SimpleNamespace(
                config=estimator.config(),
                paths=[],  # none below
                cur_batch=None,  # the loss has its batch already
                training_step_exec=lambda batch: _finite(evaluate(), objective.name),
                parameters=lambda: point,
                trainable_parameters=lambda: point,
                meta_trainable_parameters=lambda: point,
                _strategy="default",
                **estimator.optimizer(problem, point),
            )
            above = SimpleNamespace(trainable_parameters=lambda: estimator.wanted(point, problem.outer))
            with _told(estimator, objective.name):
                return level, tuple(released(estimator.function)(v, level, above, False))

        level, found = objective.within(point, problem.outer, body)
        objective.passes.backward += estimator.backward_passes
        found = objective.reduce(tuple(part.detach() for part in found))
        value, rest = found[: len(problem.outer)], found[len(problem.outer) :]
        info = estimator.report(problem, level, v, rest)
        if not is_finite(value):
            info = SolveInfo(Status.DIVERGED, info.residual, info.iterations, info.products, method=info.method)
        return Pullback(value, info, state)


def _finite(value: Tensor, name: str) -> Tensor:
    require_finite(value, name)
    return value


@contextmanager
def _told(estimator: BettyMethod, name: str) -> Iterator[None]:
    """Says in a user's words what Betty's functions crash on."""
    try:
        with second_derivative_errors(name):
            yield
    except RuntimeError as error:
        text = str(error)
        if "not have been used in the graph" not in text and "does not require grad" not in text:
            raise
        raise ConfigError(
            f"method {estimator.name!r}: Betty's function crashes where a parameter does not reach the gradient of the "
            f"loss of {name} ({text.splitlines()[0]}). Use {estimator.right!r}, which takes its part for zero."
        ) from error


@dataclass(frozen=True)
class _Difference(BettyMethod):
    """Base of the methods that move the inner parameters along a direction and back."""

    needs_double_backward: ClassVar[bool] = False
    radius: ClassVar[str]
    """Betty's name of the length of the displacement."""
    alpha: float

    def _check(self) -> None:
        check_number(type(self).__name__, "alpha", self.alpha, minimum=0.0, exclusive=True)

    def config(self) -> SimpleNamespace:
        """See :meth:`BettyMethod.config`."""
        return SimpleNamespace(**{self.radius: self.alpha, f"{self.function}_multitask": False})

    @property
    def backward_passes(self) -> int:
        """One on each side."""
        return 2

    def direction(self, level: SimpleNamespace, v: Tensors) -> Sequence[Tensor]:
        """Returns the direction of the displacement."""
        return v

    def report(self, problem: InnerProblem, level: SimpleNamespace, v: Tensors, rest: Tensors) -> SolveInfo:
        """See :meth:`BettyMethod.report`: how much of the displacement rounding has changed."""
        q = tuple(self.direction(level, v))
        size = float(norm(q))
        factor = self.alpha / (size + 1e-15)  # Betty's guard against division by zero
        lost = 0.0
        if size > 0.0:
            here = float(norm([part.detach() for part in problem.inner]))
            lost = displacement_error(problem.inner, q, factor, factor * size, here)
        status = Status.INACCURATE if lost > TOLERATED_ROUNDING else Status.NOT_APPLICABLE
        message = f"alpha {self.alpha:g}, rounding of the displacement at most {lost:.0e}"
        return SolveInfo(status, products=2, method=self.name, message=message)


@dataclass(frozen=True)
class BettyDarts(_Difference):
    """Betty's ``darts``: ``−(∂f/∂λ(w + hv) − ∂f/∂λ(w − hv)) / 2h`` with ``h = α / (‖v‖ + 10⁻¹⁵)``.

    The same as :class:`~bilevel.FiniteDifference` with ``epsilon=α`` up to rounding, where ``‖v‖`` is well above
    ``10⁻¹⁵``: the displacement is added and taken away in the parameters' own dtype.

    Attributes:
        alpha: α, Betty's ``darts_alpha``: the length of the displacement.

    Cost: 2 forward passes, 2 backward passes to the outer parameters only.
    """

    alpha: float = 0.01

    name: ClassVar[str] = "betty:darts"
    summary: ClassVar[str] = "betty-ml's darts: identity for the inverse Hessian, central differences"
    cost: ClassVar[str] = "2 forward, 2 backward to the outer parameters only"
    needs: ClassVar[str] = "betty-ml; first derivatives only"
    storage: ClassVar[str] = "the parameters twice"
    purpose: ClassVar[str] = "numbers of a Betty program, to compare with; else finite_difference"
    function: ClassVar[str] = "darts"
    radius: ClassVar[str] = "darts_alpha"
    right: ClassVar[str] = "finite_difference"


@dataclass(frozen=True)
class BettySAMA(_Difference):
    """Betty's ``sama``: as ``darts``, along ``D v``, with D for the derivative of the inner optimiser's update.

    For an optimiser with "adam" in its name ``D = η ((1 − β₁) β₂ s̃ − β₁ (1 − β₂) g m̃) / (√s + ε)³`` with the moments
    m and s after the update, m̃ and s̃ before it, and the update's gradient g. Betty leaves the bias correction out,
    which makes D 5.8 × too large at the fifth step; :class:`~bilevel.SAMA` differentiates the update itself. All other
    optimisers count as gradient descent, with ``D = I``, their rates and momentum left out; RMSprop is refused, as
    Betty's function raises there.

    With a scheduler Betty reads the rate of the next update for η, where this reads that of the update that was made:
    the product is in proportion to it.

    Attributes:
        alpha: Betty's ``sama_adam_alpha``: the length of the displacement.

    Cost: 2 forward passes, 2 backward passes to the outer parameters only.

    Raises:
        ConfigError: No update was recorded: as a function, or before the first step; RMSprop.
    """

    alpha: float = 1.0

    name: ClassVar[str] = "betty:sama"
    summary: ClassVar[str] = "betty-ml's sama: darts along Adam's derivative, without bias correction"
    cost: ClassVar[str] = "2 forward, 2 backward to the outer parameters only"
    needs: ClassVar[str] = "betty-ml; an engine, with a torch optimiser other than RMSprop"
    storage: ClassVar[str] = "the parameters twice, one recorded step"
    purpose: ClassVar[str] = "numbers of a Betty program, to compare with; else sama"
    needs_trajectory: ClassVar[bool] = True
    function: ClassVar[str] = "sama"
    radius: ClassVar[str] = "sama_adam_alpha"
    right: ClassVar[str] = "sama"

    @property
    def recorded_steps(self) -> int | None:
        """The last one."""
        return 1

    def respond(self, problem: InnerProblem) -> Response:
        """See :meth:`BettyMethod.respond`."""
        if not problem.trajectory:
            raise ConfigError(
                "method 'betty:sama' reads the state of the inner optimiser after an update, which an engine records: "
                "take a step first"
            )
        kind = type(_rules(problem.trajectory[-1])[0]).__name__
        self.check_place(problem.objective.name, below=False, optimizer=kind)
        return super().respond(problem)

    def check_place(self, problem: str, *, below: bool, optimizer: str = "") -> None:
        """See :meth:`BettyMethod.check_place`."""
        super().check_place(problem, below=below)
        if "rmsprop" in optimizer.lower():
            raise ConfigError(f"method 'betty:sama': Betty's function has nothing for {optimizer}. Use 'sama'.")

    def optimizer(self, problem: InnerProblem, point: Tensors) -> dict[str, Any]:
        """See :meth:`BettyMethod.optimizer`: the state after the recorded update."""
        step = problem.trajectory[-1]
        assert step.gradient is not None
        rules = _rules(step)
        with torch.no_grad():
            _, memory = step.update(step.inner, step.gradient, step.memory)
        rest, groups, states = iter(memory), {}, {}
        for part, rule, gradient in zip(point, rules, step.gradient, strict=True):
            groups[id(part)] = {**vars(rule), "lr": rule.learning_rate}
            states[id(part)] = {"last_grad": gradient, **{slot: next(rest) for slot in rule.slots}}
        return {
            "optimizer": rules[0],  # Betty looks at the name of the class, which is that of the optimiser's
            "get_opt_param_group_for_param": lambda part: groups[id(part)],
            "get_opt_state_for_param": lambda part: states[id(part)],
        }

    def direction(self, level: SimpleNamespace, v: Tensors) -> Sequence[Tensor]:
        """See :meth:`_Difference.direction`: ``D v`` by Betty's own function."""
        found: Sequence[Tensor] = importlib.import_module("betty.hypergradient.utils").precondition(v, level)
        return found


def _rules(step: InnerStep) -> Sequence[Rule]:
    return cast("Sequence[Rule]", cast(Any, step.update).rules)


@dataclass(frozen=True)
class _Solve(BettyMethod):
    """Base of the methods that iterate for ``H q = v``.

    Betty's last product is asked for ``Hq`` as well: the true residual comes with the answer.
    """

    iterations: int = 1
    alpha: float = 1.0

    least: ClassVar[int]
    """The smallest number of iterations that makes sense."""

    def _check(self) -> None:
        owner = type(self).__name__
        check_integer(owner, "iterations", self.iterations, minimum=self.least)
        check_number(owner, "alpha", self.alpha, minimum=0.0, exclusive=True)

    def config(self) -> SimpleNamespace:
        """See :meth:`BettyMethod.config`."""
        prefix = self.function
        return SimpleNamespace(**{f"{prefix}_iterations": self.iterations, f"{prefix}_alpha": self.alpha})

    @property
    def backward_passes(self) -> int:
        """The gradient, a product an iteration, the last product."""
        return self.iterations + 2

    def wanted(self, point: Tensors, outer: Tensors) -> Tensors:
        """See :meth:`BettyMethod.wanted`. What no iteration has differentiated may have no derivative at all."""
        return outer + point if self.iterations else outer

    def report(self, problem: InnerProblem, level: SimpleNamespace, v: Tensors, rest: Tensors) -> SolveInfo:
        """See :meth:`BettyMethod.report`: the residual, from ``−Hq``."""
        residual, size = math.nan, float(norm(v))
        if rest:
            residual = float(norm(add(rest, v)))
            residual = residual / size if size > 0.0 else residual
        return SolveInfo(
            self.judge(residual),
            residual,
            self.iterations,
            self.iterations + 1,
            method=self.name,
            message=self.note(),
        )

    def judge(self, residual: float) -> Status:
        """Returns the status: worse than no solution at all is divergence."""
        return Status.DIVERGED if residual > 1.0 else Status.STOPPED_AT_CAP

    def note(self) -> str:
        """Returns what is known to be wrong with these fields."""
        return ""


@dataclass(frozen=True)
class BettyNeumann(_Solve):
    """Betty's ``neumann``: ``α Σₖ₌₀ᴷ (I − αH)ᵏ v`` for ``H⁻¹v``.

    The same as :class:`~bilevel.Neumann` with ``terms=K, step_size=α`` up to rounding, where every parameter reaches
    the inner gradient (Betty's crashes on others, which is refused). Betty says nothing where it diverges, as at its
    default ``α = 1`` for a Hessian with an eigenvalue above 2; here the residual is told.

    Attributes:
        iterations: K, Betty's ``neumann_iterations``; the sum has K + 1 summands.
        alpha: α, Betty's ``neumann_alpha``.

    Cost: 1 forward and 1 backward pass with graph, K + 1 products.
    """

    name: ClassVar[str] = "betty:neumann"
    summary: ClassVar[str] = "betty-ml's neumann: truncated Neumann series with a fixed step size"
    cost: ClassVar[str] = "1 forward, 1 backward with graph, iterations + 1 products"
    needs: ClassVar[str] = "betty-ml; double backward; every parameter in the inner gradient; alpha < 2/λmax"
    storage: ClassVar[str] = "the gradient's graph, 3 vectors"
    purpose: ClassVar[str] = "numbers of a Betty program, to compare with; else neumann"
    function: ClassVar[str] = "neumann"
    right: ClassVar[str] = "neumann"
    least: ClassVar[int] = 0


@dataclass(frozen=True)
class BettyCG(_Solve):
    """Betty's ``cg``: conjugate gradient for ``H q = v`` as betty-ml 0.2.1 ships it.

    Right for one iteration, where α cancels and it is :class:`~bilevel.ConjugateGradient` with ``max_iterations=1``.
    Beyond that it is not conjugate gradient: the direction is updated with the residual from before the step, and where
    ``α ≠ 1`` the residual no longer belongs to the solution. Once it has vanished, or for ``v = 0``, the answer is NaN,
    and the status *diverged*.

    Attributes:
        iterations: Betty's ``cg_iterations``.
        alpha: α, Betty's ``cg_alpha``: Hessian products are multiplied by it in the step's length only.

    Cost: 1 forward and 1 backward pass with graph, iterations + 1 products.
    """

    name: ClassVar[str] = "betty:cg"
    summary: ClassVar[str] = "betty-ml's cg: right for one iteration only"
    cost: ClassVar[str] = "1 forward, 1 backward with graph, iterations + 1 products"
    needs: ClassVar[str] = "betty-ml; double backward; every parameter in the inner gradient"
    storage: ClassVar[str] = "the gradient's graph, 6 vectors"
    purpose: ClassVar[str] = "numbers of a Betty program, to compare with; else conjugate_gradient"
    function: ClassVar[str] = "cg"
    right: ClassVar[str] = "conjugate_gradient"
    least: ClassVar[int] = 1

    def judge(self, residual: float) -> Status:
        """See :meth:`_Solve.judge`. A right first iteration lowers the energy, and may raise the residual."""
        return super().judge(residual) if self.note() else Status.STOPPED_AT_CAP

    def note(self) -> str:
        """See :meth:`_Solve.note`."""
        return "Betty's cg is wrong beyond one iteration; 'conjugate_gradient' is right" if self.iterations > 1 else ""
