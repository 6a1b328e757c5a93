"""What all sides in jax share: the whole outer step is one compiled function.

All data are its arguments: what a compiled function closes over is a constant to XLA, which then computes with it at
compile time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from torch import Tensor

from benchmarks.peers.side import Side

Step = Callable[[Any, Any, Any], tuple[Any, Any, Any]]


class Compiled(Side):
    """Compiles ``step(w, λ, data)``, which returns new inner and outer parameters and the hypergradient, as lists."""

    note = "the step is one compiled function; compilation is not timed"
    countable = False

    def __init__(self, step: Step, w: Sequence[Any], lam: Sequence[Any], data: Any) -> None:
        self.outer_step = jax.jit(step)
        self.w, self.lam, self.data = arrays(w), arrays(lam), data

    def step(self) -> None:
        self.w, self.lam, self.found = self.outer_step(self.w, self.lam, self.data)

    def planned_bytes(self) -> int:
        found = self.outer_step.lower(self.w, self.lam, self.data).compile().memory_analysis()
        return int(found.temp_size_in_bytes + found.output_size_in_bytes)

    def wait(self) -> None:
        jax.block_until_ready((self.w, self.lam))


def arrays(parts: Sequence[Any]) -> list[Any]:
    """Returns tensors as arrays of jax."""
    return [jnp.asarray(part.detach().numpy()) for part in parts]


def inputs(x: Tensor) -> Any:
    """Returns data as an array of jax; images, of whatever batch, with their channels last."""
    return jnp.asarray((x.movedim(-3, -1) if x.ndim >= 4 else x).numpy())


def moved(parts: Sequence[Any], rate: float, steps: Sequence[Any]) -> list[Any]:
    """Returns the parameters after a step of gradient descent."""
    return [part - rate * step for part, step in zip(parts, steps, strict=True)]
