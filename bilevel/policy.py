"""What happens where a best-response product fails or takes too long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bilevel.errors import SolveError, SolveTimeoutError, warn
from bilevel.hypergrad import Estimator, Pullback, State, Unrolled
from bilevel.result import SolveInfo, Status
from bilevel.settings import EngineConfig

__all__ = ["SolvePolicy"]


class SolvePolicy:
    """Warns of failed products, raises, or takes them again by another method, as the configuration says.

    Args:
        config: The engine's settings.
        step: Returns the number of the present step, counted from 1, for messages.
    """

    def __init__(self, config: EngineConfig, step: Callable[[], int]) -> None:
        self._config = config
        self._step = step
        self._warned: set[tuple[str, str]] = set()
        self._below: tuple[str, SolveInfo] | None = None

    def take(
        self, name: str, method: Estimator, product: Callable[[Estimator, State | None], Pullback], state: State | None
    ) -> Pullback:
        """Takes a product through a problem.

        Args:
            name: The problem.
            method: How it is differentiated.
            product: Takes the product by a method, from a state.
            state: The method's own state, which stays where another method answers.

        Raises:
            SolveError: It failed, and the configuration says ``"raise"``.
            SolveTimeoutError: It took too long, and there is no fallback.
        """
        fallback, self._below = self._config.fallback, None
        try:
            pulled = self._with_those_below(product(method, state))
        except SolveTimeoutError as error:
            if fallback is None:
                raise
            self._warn_once(name, "timeout", str(error))
            return replace(product(fallback, None), state=state or {})
        info = pulled.info
        if not info.status.failed and not (info.message and info.method == Unrolled.name):
            return pulled
        text = f"hypergradient through problem {name!r}, step {self._step()}: {info.explain()}"
        if info.status.failed and self._config.on_solve_failure == "raise":
            raise SolveError(text)
        self._warn_once(name, info.status.value, text)
        if not info.status.failed or fallback is None:
            return pulled
        return replace(product(fallback, None), state=state or {})

    def judge(self, names: str, info: SolveInfo) -> None:
        """Hears how the system of problems that respond to each other was solved: it has no fallback.

        Raises:
            SolveError: It failed, and the configuration does not say ``"warn"``.
        """
        if info.status is Status.CONVERGED:
            return
        text = f"equilibrium of problems {names}, step {self._step()}: {info.explain()}"
        if info.status.failed and self._config.on_solve_failure != "warn":
            raise SolveError(text)
        self._warn_once(names, info.status.value, text)

    def below(self, name: str, info: SolveInfo) -> None:
        """Hears of a solve by which the response of a problem below the present one is differentiated again."""
        if info.status.failed and self._below is None:
            self._below = name, info

    def _with_those_below(self, pulled: Pullback) -> Pullback:
        """Gives a product the status of a solve below that failed: it is no better than that."""
        if self._below is None or pulled.info.status.failed:
            return pulled
        name, failed = self._below
        why = f"a second derivative of the response of problem {name!r} failed: {failed.explain()}"
        message = "; ".join(part for part in (pulled.info.message, why) if part)
        return replace(pulled, info=replace(pulled.info, status=failed.status, message=message))

    def _warn_once(self, name: str, what: str, text: str) -> None:
        if (name, what) not in self._warned:
            self._warned.add((name, what))
            warn(f"{text} (said once)")
