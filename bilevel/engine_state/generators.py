"""The part of the state that holds the random generators: torch's on every device, NumPy's and Python's."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bilevel.engine_state.part import Part, count
from bilevel.errors import warn
from bilevel.randomness import capture, generator_devices, restore

if TYPE_CHECKING:
    from bilevel.engine import Engine

__all__ = ["GENERATORS"]

_TWISTER = 624  # words of a Mersenne twister


def _take(engine: Engine) -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "torch": capture(generator_devices(p for problem in engine.problems.values() for p in problem.parameters)),
        "numpy": [
            kind,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss_next],
    }


def _differences(engine: Engine, saved: Mapping[str, Any]) -> list[str]:
    own = _take(engine)
    for device, state in saved["torch"].items():
        if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
            raise TypeError(f"the state of the generator of {device!r:.40} is none")
        if device in own["torch"] and state.shape != own["torch"][device].shape:
            raise ValueError(f"the state of the generator of {device!r:.40} has another size than here")
    if "cpu" not in saved["torch"]:
        raise KeyError("cpu")
    kind, keys, position, has_gauss, gauss = saved["numpy"]
    version, internal, gauss_next = saved["python"]
    if (kind, version) != (own["numpy"][0], own["python"][0]):
        raise ValueError("the generators of NumPy or Python are of another kind than here")
    whole = count(position) <= _TWISTER and count(has_gauss) < 2 and isinstance(gauss, float)
    if not whole or not (gauss_next is None or isinstance(gauss_next, float)):
        raise ValueError("the generators' numbers are none")
    for words, number in ((keys, _TWISTER), (internal, _TWISTER + 1)):
        if words.dtype != torch.int64 or words.shape != (number,) or int(words.min()) < 0 or int(words.max()) >= 2**32:
            raise ValueError("the generators' words are none")
    count(int(internal[-1]) if int(internal[-1]) <= _TWISTER else None)
    return []


def _put(engine: Engine, saved: Mapping[str, Any]) -> None:
    own = capture(generator_devices(p for problem in engine.problems.values() for p in problem.parameters))
    states = saved["torch"]
    if set(states) != set(own):
        warn(
            f"the checkpoint holds the random generators of {', '.join(states)}; this engine draws from "
            f"{', '.join(own)}: the run goes on, but not bit for bit as it would have",
        )
    restore({device: states[device] for device in own if device in states})
    kind, keys, position, has_gauss, gauss = saved["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = saved["python"]
    random.setstate((version, tuple(internal.tolist()), gauss_next))


GENERATORS = Part("generators", _take, _differences, _put)
