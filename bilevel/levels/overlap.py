"""Examples that a problem and one below it both draw."""

from __future__ import annotations

from collections.abc import Mapping

from bilevel.data.overlap import shared_examples
from bilevel.errors import warn
from bilevel.levels.graph import Dependencies
from bilevel.problems.base import Problem

__all__ = ["warn_of_shared_examples"]


def warn_of_shared_examples(problems: Mapping[str, Problem], dependencies: Dependencies) -> None:
    """Warns where a problem is judged by examples that a problem below it is fitted to.

    Only what data loaders and data sets tell of themselves counts; nothing is drawn.
    """
    for outer, below in dependencies.lower.items():
        for inner in sorted(below):
            shared = shared_examples(problems[outer].data, problems[inner].data)
            if shared is None or not len(shared):
                continue
            few = ", ".join(str(int(index)) for index in shared[:3]) + (", …" if len(shared) > 3 else "")
            warn(
                f"problems {outer!r} and {inner!r} draw the same examples, {len(shared)} of them (indices {few}): "
                f"{outer!r} then judges {inner!r} by what that was fitted to, and learns to overfit. Give them "
                "disjoint parts, as torch.utils.data.random_split makes them",
            )
