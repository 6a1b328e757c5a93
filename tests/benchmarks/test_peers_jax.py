"""The workloads' copies in jax are the same functions: their hypergradients in float64 are the references'.

They run in the environment that ``python -m benchmarks.peers --environments DIR --create`` makes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.peers.protocol import Remote
from benchmarks.peers.run import has_side
from benchmarks.peers.side import NotOffered
from benchmarks.peers.verdict import error
from tests.benchmarks.images import noise
from tests.benchmarks.test_peers_workloads import method_of, workload

ENVIRONMENTS = os.environ.get("BILEVEL_PEERS", "")
CASES = {
    "regularisation": ("identity", "neumann"),
    "reweighting": ("identity", "cg"),
    "unrolled": ("conv_5", "conv_20_memory", "transformer_20_memory"),
    "few_shot": ("conv_1_16", "implicit_5_16", "sinusoid_5_64"),
    "adapters": ("neumann",),
}
needs_jaxopt = pytest.mark.skipif(
    not ENVIRONMENTS,
    reason="set BILEVEL_PEERS to the folder that python -m benchmarks.peers --environments FOLDER --create has made",
)


def test_jaxopt_has_a_side_for_every_workload_but_minilm() -> None:
    assert all(has_side("jaxopt", name) for name in CASES)


def test_workloads_in_the_functional_form_hand_their_arrays_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy in another language takes its data from there."""
    monkeypatch.setitem(workload("adapters").SIZES["small"], "iterations", 1)
    arrays, _ = workload("adapters").data("small", None)
    assert workload("adapters").task(arrays, "small").extra["arrays"] is arrays


@pytest.fixture(scope="module")
def remote() -> Iterator[Remote]:
    python = Path(ENVIRONMENTS) / "jaxopt" / "bin" / "python"
    with Remote("jaxopt", python, environment={"JAX_ENABLE_X64": "1"}) as worker:
        yield worker


def loaded(name: str, remote: Remote, file: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Returns a workload's arrays, of noise, that the worker has read."""
    module = workload(name)
    if hasattr(module, "digits"):
        monkeypatch.setattr(module, "digits", noise)
    if name == "adapters":
        monkeypatch.setitem(module.SIZES["small"], "iterations", 30)
    arrays: dict[str, Any] = module.data("small", None)[0]
    np.savez(file, **arrays)
    remote.ask("load", data=name, file=str(file))
    return arrays


@needs_jaxopt
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_hypergradient_in_float64_is_the_references(
    name: str, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = loaded(name, remote, tmp_path / "data.npz", monkeypatch)
    for key in CASES[name]:
        method = method_of(name, key)
        fields = {name: getattr(method, name) for name in ("kind", "products", "step_size", "options")}
        remote.ask("build", key=key, data=name, workload=name, method=fields, size="small", dtype="float64")
        found, passes = remote.gradient(key)
        assert error(found, workload(name).reference(arrays, "small", method).own) < 1e-10, key
        assert passes["backward"] == 0  # XLA's are not counted


@needs_jaxopt
@pytest.mark.slow
def test_what_jaxopt_has_not_is_not_offered(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded("regularisation", remote, tmp_path / "data.npz", monkeypatch)
    fields = {"data": "regularisation", "workload": "regularisation", "size": "small"}
    with pytest.raises(NotOffered, match="finite_difference"):
        remote.ask("build", key="k", method="finite_difference", **fields)


@needs_jaxopt
@pytest.mark.slow
def test_memory_is_what_xla_plans_and_steps_evaluated_again_take_less(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded("unrolled", remote, tmp_path / "data.npz", monkeypatch)
    found = {}
    for key in ("conv_20", "conv_20_memory"):
        remote.ask("build", key=key, data="unrolled", workload="unrolled", method=key, size="small")
        found[key] = remote.ask("memory", key=key)
    assert {row["kind"] for row in found.values()} == {"planned"}
    assert 0 < 4 * found["conv_20_memory"]["peak"] < found["conv_20"]["peak"]
