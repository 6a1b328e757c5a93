"""Few-shot learning on Omniglot: six algorithms that are one engine, beside learning every task from nothing.

OMNIGLOT=FOLDER python -m benchmarks.tutorials few_shot --budget full     # background_small1.npz, background_small2.npz
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.tutorials.study import Estimate, Study, Table
from bilevel import EngineConfig
from bilevel.errors import BilevelWarning, ConfigError
from examples import few_shot as recipe


@dataclass(frozen=True)
class Budget:
    seeds: int
    steps: Mapping[int, int]  # outer ones, by shots
    test_batches: int  # of 20 tasks
    test_steps: tuple[int, ...]  # of adaptation
    workers: int = 1
    omniglot: bool = False
    five_shot_steps: int = 0  # outer ones, of those in FIVE_SHOT


SMALL = Budget(seeds=1, steps={1: 2}, test_batches=1, test_steps=(0, 5))
FULL = Budget(
    seeds=3,
    steps={1: 300},
    test_batches=15,
    test_steps=(0, 1, 5, 10),
    workers=os.cpu_count() or 1,
    omniglot=True,
    five_shot_steps=100,
)

NAMES = {
    "maml": "MAML",
    "first_order": "first-order MAML",
    "anil": "ANIL",
    "imaml": "implicit MAML",
    "meta_sgd": "Meta-SGD",
    "protomaml": "ProtoMAML",
}
FIVE_SHOT = ("maml", "first_order", "anil", "protomaml")
SCRATCH = "a network from nothing, task by task"
PIXELS = "nearest neighbour of the pixels"
# Rates, chosen on classes of the training file that were held out: see the page.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "first_order": {"outer_rate": 0.005},
    "imaml": {"steps": 8},
    "meta_sgd": {"rate": 0.1},
    "protomaml": {"rate": 0.03, "outer_rate": 0.01},
}
SCRATCH_STEPS, SCRATCH_RATE = 50, 0.4
CURVE_BATCHES = 10


def run(budget: Budget) -> Study:
    folder = _folder(budget)
    study = _one_shot(budget, folder)
    if not budget.five_shot_steps:
        return study
    tables = {**study.tables, "five": five_shot(_five_shot(budget, folder), budget)}
    return replace(study, tables=tables)


def five_shot(found: Mapping[str, Sequence[float]], budget: Budget) -> Table:
    """Returns the table of accuracies, by algorithm and seed."""
    rows = [
        [{"pixels": PIXELS, **NAMES}[name], Estimate.of(rights, digits=1, percent=True)]
        for name, rights in found.items()
    ]
    return Table(["5-way 5-shot accuracy on new characters", f"after {budget.five_shot_steps} outer steps"], rows)


def _five_shot(budget: Budget, folder: str) -> dict[str, list[float]]:
    short = replace(budget, steps={5: budget.five_shot_steps}, test_steps=())
    jobs = [(name, 5, seed, folder, short) for name in FIVE_SHOT for seed in range(budget.seeds)]
    found = {"pixels": [_neighbours(folder, 5, short)]}
    for job, result in zip(jobs, _all(jobs, budget), strict=True):
        found.setdefault(job[0], []).append(result["accuracy"])
    return found


def _all(jobs: Sequence[Any], budget: Budget) -> list[dict[str, Any]]:
    if budget.workers == 1:
        return [_learned(job) for job in jobs]
    with ProcessPoolExecutor(budget.workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_learned, jobs))


def _one_shot(budget: Budget, folder: str) -> Study:
    jobs = [
        (algorithm, shots, seed, folder, budget)
        for shots, algorithm, seed in product(budget.steps, [*NAMES, "scratch"], range(budget.seeds))
    ]
    # The longest first, so that none is left over at the end.
    jobs.sort(key=lambda job: (job[0] not in ("imaml", "protomaml"), -job[1]))
    results = {job[:3]: result for job, result in zip(jobs, _all(jobs, budget), strict=True)}
    seeds, columns, rows = range(budget.seeds), [f"{shots}-shot" for shots in budget.steps], []
    for algorithm, name in {"pixels": PIXELS, "scratch": SCRATCH, **NAMES}.items():
        cells: list[Any] = []
        for shots in budget.steps:
            if algorithm == "pixels":
                cells.append(Estimate.of([_neighbours(folder, shots, budget)], digits=1, percent=True))
                continue
            rights = [results[algorithm, shots, seed]["accuracy"] for seed in seeds]
            cells.append(Estimate.of(rights, digits=1, percent=True))
        seconds = [
            results[algorithm, s, seed]["ms"] for s in list(budget.steps)[:1] for seed in seeds if algorithm in NAMES
        ]
        rows.append([name, *cells, Estimate.of(seconds, digits=0) if seconds else ""])
    curves = {
        str(shots): {
            algorithm: [
                Estimate.of([results[algorithm, shots, seed]["curve"][place] for seed in seeds]).mean
                for place in range(len(budget.test_steps))
            ]
            for algorithm in NAMES
        }
        for shots in budget.steps
    }
    table = Table(["5-way accuracy on new characters", *columns, "ms an outer step, 1-shot"], rows)
    return Study({"accuracy": table}, {"steps": list(budget.test_steps), "curves": curves})


def draw(study: Study, figure: Any) -> None:
    """Accuracy against the steps of adaptation at test."""
    panels = figure.subplots(1, len(study.data["curves"]), sharey=True, squeeze=False)[0]
    steps = study.data["steps"]
    for axes, (shots, curves) in zip(panels, study.data["curves"].items(), strict=True):
        for algorithm, marker in zip(NAMES, "osD^vX", strict=True):
            rights = [100 * right for right in curves[algorithm]]
            axes.plot(range(len(steps)), rights, marker=marker, markersize=5, label=NAMES[algorithm])
        axes.set_xticks(range(len(steps)), steps)
        axes.set_title(f"5-way {shots}-shot")
        axes.set_xlabel("steps of adaptation at test")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("accuracy on new characters (%)")
    panels[-1].legend(loc="lower right", frameon=False)


def configured(algorithm: str, shots: int, seed: int, folder: str, budget: Budget) -> Any:
    """Returns the recipe's configuration with the rates of an algorithm."""
    settings = {**SETTINGS.get(algorithm, {}), "shots": shots, "seed": seed, "data": folder}
    known = replace(
        recipe.DEFAULTS.recipe,
        algorithm="maml" if algorithm == "scratch" else algorithm,
        **settings,
    )
    return replace(recipe.DEFAULTS, engine=EngineConfig(steps=budget.steps[shots], progress=False), recipe=known)


def _learned(job: tuple[str, int, int, str, Budget]) -> dict[str, Any]:
    """Learns one initialisation, and tries it on new tasks with several numbers of steps."""
    algorithm, shots, seed, folder, budget = job
    torch.set_num_threads(1)
    engine = recipe.build(configured(algorithm, shots, seed, folder, budget))
    inner: Any = engine.problems["adaptation"]
    if algorithm == "scratch":
        for group in inner.optimizer.param_groups:
            group["lr"] = SCRATCH_RATE
        found = inner.assess(inner.held_out, budget.test_batches, SCRATCH_STEPS)
        return {"accuracy": float(found.accuracies.mean())}
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BilevelWarning)  # five iterations do not solve implicit MAML's system
        for _ in range(budget.steps[shots]):
            engine.step()
    spent = time.perf_counter() - started
    curve = [
        float(inner.assess(inner.held_out, budget.test_batches, steps).accuracies.mean()) for steps in budget.test_steps
    ]
    return {
        "accuracy": float(inner.assess(inner.held_out, budget.test_batches).accuracies.mean()),
        "curve": curve,
        "ms": 1e3 * spent / budget.steps[shots],
    }


def _neighbours(folder: str, shots: int, budget: Budget) -> float:
    """Returns how often the support example whose pixels are nearest is of the right class."""
    inner: Any = recipe.build(configured("scratch", shots, 0, folder, budget)).problems["adaptation"]
    rights: list[float] = []
    for number in range(budget.test_batches):
        batch = inner.held_out[number]
        distances = torch.cdist(batch.query_inputs.flatten(2), batch.support_inputs.flatten(2))
        nearest = batch.support_targets.gather(1, distances.argmin(2))
        rights.append(float((nearest == batch.query_targets).float().mean()))
    return sum(rights) / len(rights)


def _folder(budget: Budget) -> str:
    if not budget.omniglot:
        return ""
    folder: Sequence[str] = os.environ.get("OMNIGLOT", "")
    if not folder:
        raise ConfigError("set OMNIGLOT to the folder of background_small1.npz and background_small2.npz")
    return str(folder)
