"""Numbers by name over the steps of a run."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bilevel.errors import ConfigError

__all__ = ["History"]


class History(Mapping[str, npt.NDArray[np.float64]]):
    """What was measured, step by step: a mapping from names to arrays, all as long as :attr:`steps`.

    A name that was not measured in a step has NaN there.

    Args:
        limit: The most entries to keep: where they would be more, every second one goes and only every second of those
            to come is taken, and so on. An even number; None to keep all.

    Raises:
        ConfigError: An odd limit, or one below 2.

    Example:
        >>> history = History()
        >>> history.append(1, {"loss": 0.5})
        >>> history.append(2, {"loss": 0.25, "accuracy": 0.9})
        >>> history.steps, history["loss"], history["accuracy"]
        (array([1, 2]), array([0.5 , 0.25]), array([nan, 0.9]))
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and (limit < 2 or limit % 2):
            raise ConfigError(f"History.limit must be an even number of at least 2, not {limit}")
        self._limit = limit
        self._stride = 1
        self._offered = 0
        self._steps = array("q")
        self._columns: dict[str, array[float]] = {}

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """The numbers of the steps."""
        return np.array(self._steps, dtype=np.int64)

    @property
    def due(self) -> bool:
        """Whether the next entry will be kept: where not, its values need not be measured."""
        return self._offered % self._stride == 0

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Adds what was measured in a step."""
        kept, self._offered = self.due, self._offered + 1
        if not kept:
            return
        if self._limit is not None and len(self._steps) >= self._limit:
            # An even number of entries: the one that is to come has its place in the thinned rhythm too.
            self._stride *= 2
            self._steps = self._steps[::2]
            self._columns = {name: column[::2] for name, column in self._columns.items()}
        for name in values:
            if name not in self._columns:
                self._columns[name] = array("d", [math.nan] * len(self._steps))
        self._steps.append(step)
        for name, column in self._columns.items():
            column.append(float(values.get(name, math.nan)))

    def state_dict(self) -> dict[str, Any]:
        """Returns everything as tensors."""
        columns = {name: torch.tensor(column, dtype=torch.float64) for name, column in self._columns.items()}
        steps = torch.tensor(self._steps, dtype=torch.int64)
        return {"steps": steps, "columns": columns, "stride": self._stride, "offered": self._offered}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` returned."""
        self._steps = array("q", state["steps"].tolist())
        self._columns = {name: array("d", column.tolist()) for name, column in state["columns"].items()}
        self._stride, self._offered = int(state["stride"]), int(state["offered"])

    def __getitem__(self, name: str) -> npt.NDArray[np.float64]:
        """Returns the values of a name."""
        return np.array(self._columns[name], dtype=np.float64)

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names."""
        return iter(self._columns)

    def __len__(self) -> int:
        """Returns the number of names."""
        return len(self._columns)
