"""Compares hypergradients and second derivatives with JAXopt's implicit differentiation.

    python -m benchmarks.differential --environment DIR [--create] [--problems 10] [--output TABLE.md]

DIR is a virtual environment with jax, jaxlib and jaxopt; ``--create`` makes it with pip. Both sides get the same
arrays, write the losses for themselves, and are also compared with the closed form. The table holds the worst relative
difference over all problems of a family; where a method of this library reports a failed solve, that is counted and its
number is left out. JAXopt reports no status.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel import Estimator, SolveInfo, argmin, hypergradient
from bilevel.errors import BilevelWarning
from bilevel.hypergrad import available_methods
from tests.bilevel.strategies import Sample, make_quadratic, make_ridge
from tests.proofs.families import make_logistic, make_network, make_stationary

__all__ = ["compare", "main", "problems"]

PINS = ("jax==0.10.2", "jaxlib==0.10.2", "jaxopt==0.8.5")
PRECISE = {"max_iterations": 500, "rtol": 1e-14}
# ours, its fields, JAXopt's solver, whether second derivatives are compared
PAIRS: tuple[tuple[str, dict[str, Any], str, bool], ...] = (
    ("conjugate_gradient", PRECISE, "cg", True),
    ("minres", PRECISE, "normal_cg", False),
    ("gmres", PRECISE, "gmres", False),
    ("exact", {}, "lu", True),
    ("exact", {}, "bicgstab", False),
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        family: The problems.
        ours: Our method.
        theirs: JAXopt's solver.
        derivative: ``"first"`` or ``"second"``.
        our_error: Worst relative distance to the closed form where our solve did not fail.
        their_error: Worst relative distance to the closed form, everywhere.
        difference: Worst relative distance of both where our solve did not fail.
        failed: How many of our solves say that they failed.
        problems: How many problems.
    """

    family: str
    ours: str
    theirs: str
    derivative: str
    our_error: float
    their_error: float
    difference: float
    failed: int
    problems: int


def problems(count: int) -> Iterator[tuple[str, Sample]]:
    """Yields ``count`` problems of each family with its name; of one size, so that JAX compiles each once."""
    for number in range(count):
        yield "quadratic, condition 10", make_quadratic(6, 3, 10.0, 1.0, number)
        yield "quadratic, condition 1e6", make_quadratic(6, 3, 1e6, 1.0, number)
        yield "ridge", make_ridge(6, 8, 0.1, False, number)
        yield "group logistic", make_logistic((2, 2), 6, 0.1, number)
        yield "linear network, minimum", make_network(3, 3, (0,), number)
        yield "linear network, saddle", make_network(3, 3, (1,), number)
        yield "stationary point, saddle", make_stationary((-2.0, -0.5, 1.0, 1.5, 3.0), 2, number)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--environment", type=Path, required=True, help="virtual environment with jaxopt")
    parser.add_argument("--create", action="store_true", help="make it")
    parser.add_argument("--problems", type=int, default=10, help="of each family")
    parser.add_argument("--output", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    python = options.environment / "bin" / "python"
    if options.create and not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(options.environment)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PINS], check=True)
    if not python.exists():
        parser.error(f"{python} does not exist: give an environment with {', '.join(PINS)}, or --create")
    table = render(compare(python, options.problems))
    print(table)
    if options.output:
        options.output.write_text(table + "\n", encoding="utf-8")


def compare(python: Path, count: int) -> list[Row]:
    """Runs both sides; ``python`` is the interpreter of the other environment."""
    given = list(problems(count))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for place, (_, sample) in enumerate(given):
            arrays = {**sample.data, "inner": sample.inner, "outer": sample.outer}
            np.savez(folder / f"{place:05d}.npz", kind=sample.kind, **{key: x.numpy() for key, x in arrays.items()})
        script = Path(__file__).with_name("jaxopt_side.py")
        subprocess.run([str(python), str(script), str(folder)], check=True)
        theirs = json.loads((folder / "jaxopt.json").read_text())
    families = list(dict.fromkeys(family for family, _ in given))
    rows = []
    for family in families:
        members = [(sample, theirs[f"{place:05d}"]) for place, (name, sample) in enumerate(given) if name == family]
        for ours, fields, solver, second in PAIRS:
            method = available_methods()[ours](**fields)
            rows.append(_first(family, members, method, solver))
            if second:
                rows.append(_second(family, members, method, solver))
    return rows


def _first(family: str, members: list[tuple[Sample, Any]], method: Estimator, solver: str) -> Row:
    triples, failed = [], []
    for sample, answers in members:
        result = hypergradient(*sample.losses(), sample.inner, sample.outer, method)
        failed.append(_failed(result.info))
        theirs = torch.tensor(answers[solver]["grad"], dtype=torch.float64)
        triples.append((result.grad, theirs, sample.hypergradient()))
    return _row(family, method, solver, "first", triples, failed)


def _second(family: str, members: list[tuple[Sample, Any]], method: Estimator, solver: str) -> Row:
    triples, failed = [], []
    for sample, answers in members:
        inner, outer = sample.losses()
        failed.append(_failed(hypergradient(inner, outer, sample.inner, sample.outer, method).info))
        solution = argmin(inner, method)(lambda lam, w=sample.inner: w)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BilevelWarning)  # of a solve at a saddle point: counted above
            ours, closed = (_hessian(outer, solve, sample.outer) for solve in (solution, sample.solution))
        triples.append((ours, torch.tensor(answers[solver]["hessian"], dtype=torch.float64), closed))
    return _row(family, method, solver, "second", triples, failed)


def _failed(info: SolveInfo) -> bool:
    """An indefinite Hessian that was solved all the same is reported, and right."""
    return info.status.failed and not info.residual < 1e-8


def _hessian(outer: Any, solve: Any, lam: Tensor) -> Tensor:
    lam = lam.clone().requires_grad_()
    (grad,) = torch.autograd.grad(outer(solve(lam), lam), lam, create_graph=True)
    return torch.stack([torch.autograd.grad(part, lam, retain_graph=True)[0] for part in grad])


def _row(
    family: str,
    method: Estimator,
    solver: str,
    derivative: str,
    triples: list[tuple[Tensor, Tensor, Tensor]],
    failed: list[bool],
) -> Row:
    solved = [triple for triple, bad in zip(triples, failed, strict=True) if not bad]

    def worst(first: int, second: int, chosen: list[tuple[Tensor, Tensor, Tensor]]) -> float:
        distances = [float((t[first] - t[second]).norm() / t[2].norm()) for t in chosen]
        return max(distances, default=math.nan)

    errors = worst(0, 2, solved), worst(1, 2, triples), worst(0, 1, solved)
    return Row(family, method.name, solver, derivative, *errors, sum(failed), len(failed))


def render(rows: list[Row]) -> str:
    """Returns a Markdown table."""
    lines = [
        "| problems | ours | JAXopt | derivative | ours − closed form | JAXopt − closed form | ours − JAXopt | "
        "ours failed, and say so |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = " | ".join(
            "–" if math.isnan(x) else f"{x:.0e}" for x in (row.our_error, row.their_error, row.difference)
        )
        names = f"{row.family} | {row.ours} | {row.theirs} | {row.derivative}"
        lines.append(f"| {names} | {numbers} | {row.failed} of {row.problems} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
