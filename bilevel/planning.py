"""Who depends on whom, and what follows from that: how gradients are taken, and the order of updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from bilevel.errors import BilevelError, DataError
from bilevel.feed import Feed
from bilevel.hypergrad import Estimator
from bilevel.levels import Dependencies, discover
from bilevel.levels.differentiate import Differentiator, Policy
from bilevel.levels.gradients import Gradients
from bilevel.levels.method_check import check_levels, check_method, check_structure
from bilevel.levels.overlap import warn_of_shared_examples
from bilevel.levels.schedule import Round, schedule
from bilevel.problems import Problem
from bilevel.randomness import preserved
from bilevel.settings import EngineConfig

__all__ = ["Planner"]


class Planner:
    """Evaluates every loss once, when that is possible, and remembers what was found.

    Args:
        problems: By name, top level first.
        gradients: Takes training passes.
        config: The engine's settings.
        policy: What happens where a product fails.
        default: Returns the method for inner problems that have none of their own.
    """

    def __init__(
        self,
        problems: Mapping[str, Problem],
        gradients: Gradients,
        config: EngineConfig,
        policy: Policy,
        default: Callable[[], Estimator],
    ) -> None:
        self._problems = problems
        self._gradients = gradients
        self._config = config
        self._policy = policy
        self._default = default
        self._plan: tuple[Differentiator, Round] | None = None

    def plan(self, feed: Feed) -> tuple[Differentiator, Round]:
        """Returns how gradients are taken, and the order of updates.

        Raises:
            DataError: A loss cannot do without the batch that its problem has not got.
            ParameterError: A problem's optimiser no longer holds what it held.
            GraphError: The problems are no nested structure.
            ConfigError: Settings or methods that do not fit where a problem stands.
        """
        try:
            return self._planned(feed)
        except TypeError as error:
            missing = [name for name, each in self._problems.items() if each.data is None and feed.peek(name) is None]
            if not missing:
                raise
            raise DataError(
                f"a loss failed ({error}), and problems without data were handed no batch: {', '.join(missing)}. Pass "
                f"data= to the problem, or the batch to the step: engine.step({{{missing[0]!r}: batch}})"
            ) from error

    def _planned(self, feed: Feed) -> tuple[Differentiator, Round]:
        for problem in self._problems.values():
            if problem.stepper is not None:
                problem.stepper.check()
        if self._plan is None:
            self._plan = self._discover(feed)
        differentiator, rounds = self._plan
        methods = self._methods(differentiator.dependencies)
        if methods != differentiator.estimators:  # somebody has changed a problem's method
            self._check_methods(methods, differentiator.dependencies)
            self._plan = replace(differentiator, estimators=methods), rounds
        return self._plan

    def plan_early(self, feed: Feed) -> None:
        """Plans where every problem has data, or can do without."""
        try:
            self._planned(feed)
        except BilevelError:
            raise
        except Exception:
            # A loss that cannot be evaluated without a batch: batches will come with step(), where any error shows.
            if all(problem.data is not None for problem in self._problems.values()):
                raise

    def _dependencies(self, feed: Feed) -> Dependencies:
        batches = {name: feed.peek(name) for name in self._problems}
        return discover(list(self._problems.values()), self._gradients.slots, batches)

    def _methods(self, dependencies: Dependencies) -> dict[str, Estimator]:
        return {name: self._problems[name].hypergradient or self._default() for name in dependencies.inner}

    def _check_methods(self, methods: Mapping[str, Estimator], dependencies: Dependencies) -> None:
        for name, estimator in methods.items():
            check_method(self._problems[name], estimator, self._config.precision, dependencies)
        for name, estimator in methods.items():
            self._problems[name].method = estimator

    def _discover(self, feed: Feed) -> tuple[Differentiator, Round]:
        check_structure(self._problems, self._config.evaluate_every)
        with preserved(self._gradients.devices):
            dependencies = self._dependencies(feed)
        check_levels(self._problems, dependencies)
        estimators = self._methods(dependencies)
        self._check_methods(estimators, dependencies)
        warn_of_shared_examples(self._problems, dependencies)
        differentiator = Differentiator(
            self._gradients,
            dependencies,
            estimators,
            self._config.nested_solver,
            self._policy,
            self._config.solve_timeout,
        )
        return differentiator, schedule(dependencies)
