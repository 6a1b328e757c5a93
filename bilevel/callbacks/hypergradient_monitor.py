"""How hypergradients behave over the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bilevel.callbacks.base import Callback
from bilevel.callbacks.history import History
from bilevel.vector import dot, norm, subtract

if TYPE_CHECKING:
    from bilevel.engine import Engine
    from bilevel.result import Hypergradient, StepResult

__all__ = ["HypergradientMonitor"]


class HypergradientMonitor(Callback):
    """Measures every hypergradient with which a problem is updated, and the solves behind it.

    :attr:`history` maps these names to arrays with an entry a step; logs record them too:

    - ``hypergradient/P/norm``: ``‖dF/dλ‖`` of problem P, before any clipping.
    - ``hypergradient/P/cosine``: cosine of the angle to that of the step before; near −1 the outer learning rate is too
      high, near 0 noise prevails. NaN for the first.
    - ``hypergradient/P/direct_norm`` and ``hypergradient/P/implicit_norm``: ``‖∂F/∂λ‖`` and ``‖dF/dλ − ∂F/∂λ‖``, the
      latter being what comes through the inner problems.
    - ``solve/I/residual``, ``solve/I/products`` of inner problem I (in logs these are there without this monitor).
    - ``solve/I/failures``: solves so far whose status is a failure. :attr:`status_counts` has all of them, by problem.

    Where a problem is updated several times in a step, as one in the middle of three levels may be, an entry is of
    the last update. Steps that were skipped or undone leave no trace.

    Cost: two copies of the hypergradient and some inner products a step.

    Example:
        >>> monitor = HypergradientMonitor()  # Engine(..., callbacks=[monitor])
    """

    def __init__(self) -> None:
        self.history = History()
        self.status_counts: dict[str, dict[str, int]] = {}
        self._failures: dict[str, int] = {}
        self._before: dict[str, list[Tensor]] = {}
        self._new: dict[str, tuple[list[Tensor], dict[str, float]]] = {}
        self._step = 0
        self._values: dict[str, float] = {}

    def on_hypergradient(self, engine: Engine, problem: str, hypergradient: Hypergradient) -> None:
        """Measures one hypergradient."""
        if self._step != engine.step_count:  # what an earlier step left that did not end
            self._step, self._new = engine.step_count, {}
        total = tuple(t.detach() for t in hypergradient.grad.values() if t is not None)
        direct = tuple(t.detach() for t in hypergradient.direct.values() if t is not None)
        before = self._before.get(problem)
        prefix = f"hypergradient/{problem}"
        values = {
            f"{prefix}/norm": float(norm(total)),
            f"{prefix}/cosine": math.nan if before is None else _cosine(total, before),
            f"{prefix}/direct_norm": float(norm(direct)),
            f"{prefix}/implicit_norm": float(norm(subtract(total, direct))),
        }
        self._new[problem] = [t.clone() for t in total], values

    def on_step_end(self, engine: Engine, result: StepResult) -> None:
        """Counts what was measured, now that the step stands."""
        new, self._new, self._values = self._new, {}, {}
        if result.skipped is not None:
            return
        for problem, (copy, values) in new.items():
            self._before[problem] = copy
            self._values.update(values)
        solves: dict[str, float] = {}
        for name, info in result.solves.items():
            counts = self.status_counts.setdefault(name, {})
            counts[info.status.value] = counts.get(info.status.value, 0) + 1
            failures = self._failures.get(name, 0) + info.status.failed
            self._failures[name] = failures
            self._values[f"solve/{name}/failures"] = failures
            solves[f"solve/{name}/residual"] = info.residual
            solves[f"solve/{name}/products"] = info.products
        self.history.append(result.step, {**self._values, **solves})

    def values(self) -> Mapping[str, float]:
        """Returns the last step's measurements."""
        return self._values

    def state_dict(self) -> dict[str, Any]:
        """Returns history, counts, and the last hypergradients."""
        return {
            "history": self.history.state_dict(),
            "status_counts": {name: dict(counts) for name, counts in self.status_counts.items()},
            "failures": dict(self._failures),
            "before": {name: list(parts) for name, parts in self._before.items()},
            "values": dict(self._values),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Callback.load_state_dict`."""
        self.history.load_state_dict(state["history"])
        self.status_counts = {name: dict(counts) for name, counts in state["status_counts"].items()}
        self._failures = dict(state["failures"])
        self._before = {name: list(parts) for name, parts in state["before"].items()}
        self._values, self._new = dict(state["values"]), {}


def _cosine(total: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    moved = [b.to(a.device) for a, b in zip(total, before, strict=True)]
    size = float(norm(total)) * float(norm(moved))
    return float(dot(total, moved)) / size if size > 0 else math.nan
