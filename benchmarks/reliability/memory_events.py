"""What else a long run does at each step: data, evaluations, callbacks, checkpoints, and faults that are survived."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.reliability.memory_cases import (
    Case,
    Classifier,
    Step,
    batches,
    configured,
    loader,
    make_engine,
)
from bilevel import BilevelError, Engine, EngineConfig, Identity, argmin, hypergradcheck, hypergradient
from bilevel.callbacks import Callback
from bilevel.hypergrad import available_methods
from bilevel.result import StepResult

__all__ = ["event_cases"]


class Last(Callback):
    """Keeps the last result and evaluation, as displays do, and copies of the outer parameters."""

    def __init__(self) -> None:
        self.result: StepResult | None = None
        self.metrics: Mapping[str, float] = {}
        self.copies: list[Tensor] = []

    def on_step_end(self, engine: Engine, result: StepResult) -> None:
        self.result = result
        self.copies = [p.detach().clone() for problem in engine.problems.values() for p in problem.parameters]

    def on_evaluate(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        self.metrics = metrics


class RaisingError(Exception):
    """What a user's code raises."""


class Raising(Callback):
    """Raises at every other step."""

    def on_step_end(self, engine: Engine, result: StepResult) -> None:
        if result.step % 2:
            raise RaisingError("from a callback")


class Faulty(Classifier):
    """A classifier that, at each second call of a step, does what its batch says."""

    def loss(self, batch: Any) -> dict[str, Tensor]:
        data, fault = batch
        result = super().loss(data)
        if fault == "raise":
            raise RaisingError(f"at a loss of {float(result['loss'].detach())}")
        return {**result, "loss": result["loss"] * (math.nan if fault == "nan" else 1.0)}


def examples(seed: int) -> list[Any]:
    """Returns data of :class:`Faulty` (seed 0) and of the problem above."""
    (batch,) = batches(1, seed)
    return [batch] if seed else [(batch, "")]


def data_cases() -> list[Case]:
    """Returns cases of where batches come from."""
    fresh = EngineConfig(progress=False, hypergradient_batch="fresh", num_hypergradient_batches=2)

    def outside(folder: Path) -> Step:
        engine, ((valid,), (first, second)) = make_engine(), (batches(1, 1), batches(2, 0))
        return lambda: engine.step({"decay": valid, "classifier": iter([first, second])})

    return [
        Case("identity, DataLoader", lambda folder: make_engine(data=loader).step, period=6),
        Case(
            "identity, DataLoader with workers",
            lambda folder: make_engine(data=partial(loader, num_workers=1, persistent_workers=True)).step,
            period=6,
        ),
        Case(
            "conjugate_gradient, fresh batches, DataLoader",
            lambda folder: make_engine(configured("conjugate_gradient"), config=fresh, data=loader).step,
            period=6,
        ),
        Case("stocbio, fresh batches", lambda folder: make_engine(configured("stocbio"), config=fresh).step),
        Case("identity, batches from outside", outside),
    ]


def asking_cases() -> list[Case]:
    """Returns cases of what is asked beside steps: hypergradients, evaluations, checks, runs, callbacks."""

    def asked(ask: Callable[[Engine], object], method: Any = "identity", **settings: Any) -> Callable[[Path], Step]:
        def make(folder: Path) -> Step:
            engine = make_engine(method, **settings)
            return lambda: [engine.step(), ask(engine)]

        return make

    graphs = {"method": "unrolled", "memory": "graph"}
    evaluating = EngineConfig(progress=False, evaluate_every=2)
    plain = EngineConfig(progress=False, restore_on_error=False)
    return [
        Case(
            "hypergradient() after each step, conjugate_gradient",
            asked(lambda engine: engine.hypergradient(), configured("conjugate_gradient")),
        ),
        Case(
            "hypergradient() after each step, unrolled with graphs",
            asked(lambda engine: engine.hypergradient(), graphs),
        ),
        Case(
            "hypergradcheck(engine) after each step", asked(lambda engine: hypergradcheck(engine, rtol=1e9), "identity")
        ),
        Case("run() of two steps", asked(lambda engine: engine.run(2))),
        Case(
            "evaluations, a callback that keeps the last",
            lambda folder: make_engine(config=evaluating, callbacks=(Last(),)).step,
            period=2,
        ),
        Case("no copy for failed steps", lambda folder: make_engine(config=plain).step),
    ]


def checkpoint_cases() -> list[Case]:
    """Returns cases that save, and load, every few steps."""

    def saving(load: bool, method: str) -> Callable[[Path], Step]:
        def make(folder: Path) -> Step:
            engine = make_engine(
                configured(method), optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3), data=loader
            )
            path = folder / "state"
            turns = cycle(range(4))

            def step() -> None:
                engine.step()
                turn = next(turns)
                if turn == 1:
                    engine.save(path)
                if load and turn == 3:
                    engine.load(path)

            return step

        return make

    return [
        Case("checkpoints, conjugate_gradient", saving(False, "conjugate_gradient"), period=12),
        Case("checkpoints, unrolled", saving(False, "unrolled"), period=12),
        Case("checkpoints and loading, soba", saving(True, "soba"), period=12),
    ]


def fault_cases() -> list[Case]:
    """Returns cases in which every second step fails, and the caller goes on."""

    def failing(
        fault: str,
        config: EngineConfig,
        method: Any = "identity",
        callbacks: Callable[[], tuple[Callback, ...]] = tuple,
    ) -> Callable[[Path], Step]:
        def make(folder: Path) -> Step:
            engine = make_engine(method, config=config, kind=Faulty, callbacks=callbacks(), data=examples)
            (valid,), (train,) = batches(1, 1), batches(1, 0)
            faults = cycle(("", fault))

            def step() -> None:
                # The second inner update fails: the first one has to be undone.
                given = {"decay": valid, "classifier": iter([(train, ""), (train, next(faults))] + [(train, "")] * 2)}
                with suppress(BilevelError, RaisingError):
                    engine.step(given)

            return step

        return make

    raising, skipping = EngineConfig(progress=False), EngineConfig(progress=False, on_non_finite="skip")
    graphs = {"method": "unrolled", "memory": "graph"}
    return [
        Case("NaN in every second step, skipped", failing("nan", skipping), period=2),
        Case("NaN in every second step, refused", failing("nan", raising), period=2),
        Case("NaN in every second step, refused, unrolled with graphs", failing("nan", raising, graphs), period=2),
        Case("an exception in every second step", failing("raise", raising), period=2),
        Case("an exception in every second step, unrolled with graphs", failing("raise", raising, graphs), period=2),
        Case("a callback that raises", failing("", raising, callbacks=lambda: (Raising(),)), period=2),
        Case("failed solves, raised", failing_solves("raise"), period=1),
        Case("failed solves, fallback", failing_solves("fallback"), period=1),
    ]


def failing_solves(policy: str) -> Callable[[Path], Step]:
    def make(folder: Path) -> Step:
        fallback = Identity() if policy == "fallback" else None
        config = EngineConfig(progress=False, on_solve_failure=policy, fallback=fallback)
        engine = make_engine({"method": "neumann", "terms": 3, "step_size": 1e3}, config=config)

        def step() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    engine.step()
                except BilevelError:
                    assert policy == "raise"

        return step

    return make


def function_cases() -> list[Case]:
    """Returns a case of every method as a function, and of ``argmin``."""
    generator = torch.Generator().manual_seed(0)
    matrix, target = torch.randn(8, 4, generator=generator), torch.randn(8, generator=generator)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return (matrix @ w - target).square().mean() + (lam.exp() * w.square()).sum()

    def outer(w: Tensor, lam: Tensor) -> Tensor:
        return (w - 1.0).square().sum() + 0.1 * lam.square().sum()

    def asked(name: str) -> Callable[[Path], Step]:
        fields: dict[str, Any] = configured(name)
        if name in ("one_step", "sama", "unrolled", "pzobo"):
            fields["learning_rate"] = 0.1
        if name == "sama":
            fields["optimizer"] = "sgd"
        if name in ("unrolled", "pzobo"):
            fields["steps"] = 3

        def make(folder: Path) -> Step:
            w, lam = torch.zeros(4), torch.zeros(4)
            state: dict[str, Any] = {}

            def step() -> None:
                state.update(hypergradient(inner, outer, w, lam, fields, state=state).state)

            return step

        return make

    def solved(folder: Path) -> Step:
        @argmin(inner, method=configured("conjugate_gradient"))
        def solution(lam: Tensor) -> Tensor:
            found: Tensor = torch.linalg.solve(matrix.T @ matrix / 4 + 2 * lam.exp().diag(), matrix.T @ target / 4)
            return found

        lam = torch.zeros(4, requires_grad=True)

        def step() -> None:
            torch.autograd.grad(outer(solution(lam), lam), lam)

        return step

    return [
        # Betty's sama reads an inner optimiser, which only an engine has.
        *(Case(f"hypergradient(…, {name!r})", asked(name)) for name in available_methods() if name != "betty:sama"),
        Case("argmin, differentiated", solved),
    ]


def event_cases() -> list[Case]:
    """Returns all cases of this module."""
    return [*data_cases(), *asking_cases(), *checkpoint_cases(), *fault_cases(), *function_cases()]
