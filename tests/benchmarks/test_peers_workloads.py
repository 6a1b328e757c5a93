"""The problems that libraries are compared on: loops by hand and this library agree with the float64 references."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.peers.side import Arrays, Method, Reference, Side
from benchmarks.peers.verdict import reason
from benchmarks.peers.worker import as_array
from tests.benchmarks.images import noise

CASES = {
    "unrolled": ("conv_5", "transformer_5", "conv_20_memory"),
    "few_shot": ("conv_1_16", "implicit_5_16", "sinusoid_5_64"),
    "adapters": ("identity", "cg"),
}
SIDES = {"unrolled": ("hand", "bilevel"), "few_shot": ("hand", "vmap", "bilevel"), "adapters": ("hand", "bilevel")}
OFFERED = [
    pytest.param(workload, method, library, id=f"{workload}-{method}-{library}")
    for workload, methods in CASES.items()
    for method in methods
    for library in SIDES[workload]
    if (method, library) != ("implicit_5_16", "vmap")  # there is none
]

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def arrays() -> Iterator[dict[str, Arrays]]:
    """Every workload's arrays, made once, of noise: reading images and a good start for adapters take seconds."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("unrolled", "few_shot"):
            patched.setattr(workload(name), "digits", noise)
        patched.setitem(workload("adapters").SIZES["small"], "iterations", 30)
        yield {name: workload(name).data("small", None)[0] for name in CASES}


@pytest.fixture(scope="module")
def reference(arrays: dict[str, Arrays]) -> Callable[[str, str], Reference]:
    """References, each made once for all sides."""
    return functools.cache(lambda name, key: workload(name).reference(arrays[name], "small", method_of(name, key)))


def workload(name: str) -> Any:
    return importlib.import_module(f"benchmarks.peers.workloads.{name}")


def method_of(name: str, key: str) -> Method:
    """Returns a method; fewer tasks say the same."""
    method: Method = workload(name).METHODS[key]
    few = {"tasks": 5} if "tasks" in method.options else {}
    return dataclasses.replace(method, options={**method.options, **few})


def built(name: str, library: str, method: Method, arrays: Arrays) -> Side:
    side = importlib.import_module(f"benchmarks.peers.sides.{library}.{name}")
    found: Side = side.build(workload(name).task(arrays, "small"), method)
    return found


def hypergradient(side: Side) -> np.ndarray:
    side.step()
    return np.concatenate([as_array(part).ravel() for part in side.hypergradient()])


@pytest.mark.parametrize(("name", "key", "library"), OFFERED)
def test_the_hypergradient_is_the_references(
    name: str, key: str, library: str, arrays: dict[str, Arrays], reference: Callable[[str, str], Reference]
) -> None:
    method = method_of(name, key)
    found = hypergradient(built(name, library, method, arrays[name]))
    assert reason(found, reference(name, key), method.tolerance) == ""


@pytest.mark.parametrize("library", ["hand", "bilevel"])
def test_evaluating_steps_again_gives_the_same_number(library: str, arrays: dict[str, Arrays]) -> None:
    """“Least memory” is another way to the same derivative, step after step."""
    methods = workload("unrolled").METHODS
    kept, again = (
        built("unrolled", library, methods[key], arrays["unrolled"]) for key in ("conv_20", "conv_20_memory")
    )
    for _ in range(2):
        torch.testing.assert_close(hypergradient(again), hypergradient(kept), rtol=1e-3, atol=0.0)


def test_what_another_number_of_steps_gives_is_called_wrong(arrays: dict[str, Arrays]) -> None:
    module = workload("unrolled")
    found = hypergradient(built("unrolled", "hand", module.METHODS["conv_5"], arrays["unrolled"]))
    expected = module.reference(arrays["unrolled"], "small", module.METHODS["conv_20"])
    assert reason(found, expected, 5e-3) != ""


def test_the_first_order_gradient_is_recognised(reference: Callable[[str, str], Reference]) -> None:
    """A library that left the second derivative out would be told so."""
    expected, method = reference("few_shot", "sinusoid_5_64"), method_of("few_shot", "sinusoid_5_64")
    assert "first-order" in reason(expected.others["the first-order gradient"], expected, method.tolerance)


def test_every_row_of_a_size_is_a_method() -> None:
    module = workload("few_shot")
    assert {key for keys in module.ROWS.values() for key in keys} <= set(module.METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["dora", "bidora_difference", "bidora_exact"])
def test_steps_on_minilm(key: str) -> None:
    module = workload("minilm")
    made, method = module.data("small", None)[0], module.METHODS[key]
    reference = module.reference(made, "small", method)
    for library in ("hand", "bilevel"):
        found = hypergradient(built("minilm", library, method, made))
        assert reason(found, reference, method.tolerance) == "", library


@pytest.mark.slow
@pytest.mark.parametrize("key", ["dora", "bidora_difference", "bidora_exact"])
def test_a_detached_norm_is_recognised(key: str) -> None:
    """PEFT's DoRA takes the norm of the adapted weight for a constant."""
    module = workload("minilm")
    made, method = module.data("small", None)[0], module.METHODS[key]
    found = hypergradient(built("minilm", "peft", method, made))
    assert "norm detached" in reason(found, module.reference(made, "small", method), method.tolerance)
