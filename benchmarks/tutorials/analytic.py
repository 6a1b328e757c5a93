"""Errors of methods against closed forms: what conditioning costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.tutorials.study import Estimate, Study, Table
from bilevel import ConjugateGradient, Exact, Identity, Neumann, hypergradient
from bilevel.problems.analytic import Quadratic

CONDITIONINGS = (10.0, 100.0, 1000.0)
METHODS = {
    "identity": Identity(),
    "neumann, 10 terms": Neumann(terms=10),
    "neumann, 100 terms": Neumann(terms=100),
    "conjugate_gradient, 10 iterations": ConjugateGradient(max_iterations=10, rtol=0.0),
    "conjugate_gradient, 30 iterations": ConjugateGradient(max_iterations=30, rtol=0.0),
    "exact": Exact(),
}


@dataclass(frozen=True)
class Budget:
    seeds: int
    counts: tuple[int, ...]


SMALL = Budget(seeds=2, counts=(2, 8))
FULL = Budget(seeds=10, counts=(1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 48, 64, 96, 128))


def error(problem: Quadratic, method: Any) -> float:
    lam = problem.start
    found = hypergradient(problem.inner_loss, problem.outer_loss, problem.solution(lam), lam, method)
    exact = problem.hypergradient(lam)
    return float((found.grad - exact).norm() / exact.norm())


def run(budget: Budget) -> Study:
    problems = {
        conditioning: [Quadratic.random(30, 3, conditioning=conditioning, seed=seed) for seed in range(budget.seeds)]
        for conditioning in CONDITIONINGS
    }
    rows = []
    for name, method in METHODS.items():
        errors = [
            Estimate.of([error(problem, method) for problem in problems[c]], digits=3).mean for c in CONDITIONINGS
        ]
        rows.append([name, *(f"{value:.1e}" for value in errors)])
    curves: dict[str, Any] = {}
    for conditioning, draws in problems.items():
        rate = 1 / float(torch.linalg.eigvalsh(draws[0].H)[-1])
        curves[f"{conditioning:g}"] = {
            "neumann": [mean(draws, Neumann(terms=n, step_size=rate)) for n in budget.counts],
            "conjugate_gradient": [mean(draws, ConjugateGradient(max_iterations=n, rtol=0.0)) for n in budget.counts],
            "bound": [(1 - 1 / conditioning) ** (n + 1) for n in budget.counts],
        }
    columns = ["method", *(f"κ = {conditioning:g}" for conditioning in CONDITIONINGS)]
    return Study({"methods": Table(columns, rows)}, {"counts": list(budget.counts), "curves": curves})


def mean(problems: list[Quadratic], method: Any) -> float:
    return sum(error(problem, method) for problem in problems) / len(problems)


def draw(study: Study, figure: Any) -> None:
    axes = figure.subplots()
    counts = study.data["counts"]
    for place, (conditioning, curve) in enumerate(study.data["curves"].items()):
        color = f"C{place}"
        axes.plot(counts, curve["neumann"], "--", color=color, label=f"neumann, κ = {conditioning}")
        axes.plot(counts, curve["conjugate_gradient"], color=color, label=f"conjugate_gradient, κ = {conditioning}")
        axes.plot(counts, curve["bound"], ":", color=color)
    axes.set(xlabel="products with the Hessian", ylabel="relative error", yscale="log", ylim=(1e-13, 10))
    axes.legend(fontsize=9)
