"""When a step reads numbers from a device, which stands still from then on until it is given further work.

Tensors of the CPU pass for those of a device here: nothing of them is said to be at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import Engine, EngineConfig, Problem
from bilevel.callbacks import Callback
from bilevel.errors import NonFiniteError, SolveError
from bilevel.levels import differentiate

Events = list[str]
Spoil = Callable[[Tensor, Problem], Tensor]


def held(problem: Problem) -> Iterator[Tensor]:
    """Yields what stands in the places of the parameters: copies that a product displaces are none."""
    return (part for module in problem.module.modules() for part in module._parameters.values() if part is not None)


class Noted(Problem):
    """A problem that says when it is evaluated, and whose loss can be spoilt."""

    note: Callable[[str], object] = staticmethod(lambda what: None)
    spoil: Spoil | None = None

    def noted(self, loss: Tensor) -> Tensor:
        self.note(f"{self.name} forward")
        network = self if isinstance(self, Classifier) else self.classifier
        assert all(bool(p.isfinite().all()) for p in held(network)), "a pass with NaN"
        return loss if self.spoil is None else self.spoil(loss, network)


class Weights(Noted):
    """Outer: weights of the training examples."""

    def loss(self, batch: Any) -> Tensor:
        return self.noted(F.cross_entropy(self.classifier(batch[0]), batch[1]))


class Classifier(Noted):
    """Inner: a network of several tensors, and metrics."""

    def loss(self, batch: Any) -> Mapping[str, Any]:
        each = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        loss = self.noted((torch.sigmoid(self.weights.module.logits) * each).mean())
        return {"loss": loss, "largest": each.detach().max(), "count": len(each)}


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.linspace(-1.0, 1.0, 8))


class OwnSGD(torch.optim.SGD):
    """An optimiser that is not torch's own."""


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def engine_of(
    method: Any = "identity", inner: Any = sgd, outer: Any = sgd, callbacks: Any = (), **config: Any
) -> Engine:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    batches = [(torch.randn(8, 5), torch.randint(3, (8,))) for _ in range(2)]
    problems = [
        Weights(Logits(), optimizer=outer, data=[batches[0]]),
        Classifier(network, optimizer=inner, data=[batches[1]]),
    ]
    return Engine(problems, EngineConfig(progress=False, **config), method, callbacks)


def values(engine: Engine) -> list[Tensor]:
    return [p.detach().clone() for problem in engine.problems.values() for p in problem.parameters]


class TorchReads(TorchDispatchMode):
    """Notes numbers that are read one by one; those of several come through ``Tensor.tolist``."""

    def __init__(self, events: Events) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.events.append("read")
        return func(*args, **(kwargs or {}))


def far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has tensors pass for those of a device."""
    for module in ("vector", "step"):
        monkeypatch.setattr(f"bilevel.{module}.on_host", lambda part: False)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """What happens, where tensors pass for those of a device."""
    found: Events = []
    transfer, backward = Tensor.tolist, torch.autograd._engine_run_backward
    far_away(monkeypatch)
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: (found.append("read"), transfer(tensor))[1])
    counted = lambda *a, **k: (found.append("backward"), backward(*a, **k))[1]  # noqa: E731
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", counted)
    monkeypatch.setattr(Noted, "note", staticmethod(found.append))
    return found


def happens(engine: Engine, events: Events) -> Events:
    """Returns what happens in a step."""
    for problem in engine.problems.values():
        assert problem.optimizer is not None
        problem.optimizer.step = updating(problem.optimizer.step, f"{problem.name} update", events)  # type: ignore[method-assign]
    events.clear()
    with TorchReads(events):
        engine.step()
    return events


def updating(step: Callable[[], Any], what: str, events: Events) -> Callable[[], Any]:
    return lambda: (events.append(what), step())[1]


PASS = ["classifier forward", "backward"]
INNER = [*PASS, "classifier update", "read"]
OUTER = ["weights forward", "backward"]
END = ["weights update", "read"]
FORWARD = {"method": "finite_difference", "difference": "forward", "center": "old"}
SHARED = {"method": "identity", "center": "old"}
NEUMANN = {"method": "neumann", "damping": 5.0, "step_size": 0.1}
METHODS = ["identity", "auto", SHARED, "finite_difference", FORWARD, NEUMANN]
OPTIMIZERS = [sgd, lambda params: torch.optim.AdamW(params, lr=0.1)]


@pytest.mark.parametrize(
    ("method", "product"),
    [
        ("identity", [*PASS, "backward", "read"]),
        ("auto", [*PASS, "backward", "read"]),
        (SHARED, ["backward", "read"]),
        ("finite_difference", ["read", *PASS, *PASS, "read"]),
        (FORWARD, ["read", *PASS, "read"]),
    ],
)
def test_a_step_reads_after_an_update_where_it_can_and_only_what_it_needs(
    method: Any, product: Events, events: Events, reads_of_checks: None
) -> None:
    assert happens(engine_of(method), events) == INNER + OUTER + product + END


@pytest.fixture
def reads_of_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what the problems above read to check themselves."""
    monkeypatch.setattr(Noted, "noted", lambda self, loss: (self.note(f"{self.name} forward"), loss)[1])


class Looks(Callback):
    """Wants to see the hypergradient before it is used."""

    def on_hypergradient(self, engine: Engine, problem: str, hypergradient: Any) -> None:
        assert math.isfinite(hypergradient.value)


@pytest.mark.parametrize(
    ("which", "made"),
    [
        ("both", {"restore_on_error": False}),
        ("classifier", {"inner": lambda params: OwnSGD(params, lr=0.1)}),
        ("weights", {"callbacks": [Looks()]}),
    ],
)
def test_an_update_waits_where_it_could_not_be_undone_or_somebody_would_see_it(
    which: str, made: Any, events: Events, reads_of_checks: None
) -> None:
    found = happens(engine_of(**made), events)
    for name, reads in (("classifier", 0), ("weights", 1)):  # which has read how the product went
        before = found[: found.index(f"{name} update")]
        since = before[::-1].index("backward")
        assert (since > reads) == (which in (name, "both")), found


@pytest.mark.parametrize("inner", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_numbers_are_those_that_are_read_at_once(method: Any, inner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[list[Any], list[Tensor]]:
        engine = engine_of(method, inner)
        results = [engine.step() for _ in range(3)]
        return [(r.losses, r.metrics, r.gradient_norms) for r in results], values(engine)

    expected, ends = run()
    far_away(monkeypatch)
    found, others = run()
    for one, other in zip(expected, found, strict=True):
        for left, right in zip(one, other, strict=True):
            assert left == pytest.approx(right, rel=1e-6)
            assert list(left) == list(right)
    for left, right in zip(ends, others, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def spoilt_loss(loss: Tensor, network: Problem) -> Tensor:
    return loss * math.nan


def spoilt_gradient(loss: Tensor, network: Problem) -> Tensor:
    return loss + (0.0 * network.module[0].weight).sqrt().sum()


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("inner", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("spoil", "what"), [(spoilt_loss, "loss"), (spoilt_gradient, "gradient's norm")])
@pytest.mark.parametrize("name", ["classifier", "weights"])
def test_what_is_not_finite_is_named_where_it_came_first_and_no_pass_sees_it(
    name: str, spoil: Spoil, what: str, method: Any, inner: Any, far: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if far:
        far_away(monkeypatch)
    engine = engine_of(method, inner, on_solve_failure="raise")
    engine.step()
    before = values(engine)
    states = [str(problem.optimizer.state_dict()) for problem in engine.problems.values() if problem.optimizer]
    engine.problems[name].spoil = spoil
    # A gradient of the outer loss that is not finite is the direction of a product first.
    in_product = (name, what) == ("weights", "gradient's norm")
    text = "problem 'classifier', step 2: .*diverged" if in_product else f"step 2: the {what} of problem '{name}'"
    with pytest.raises(SolveError if in_product else NonFiniteError, match=text):
        engine.step()
    assert all(map(torch.equal, values(engine), before)), "the step is not undone"
    after = [str(problem.optimizer.state_dict()) for problem in engine.problems.values() if problem.optimizer]
    assert after == states


def test_what_an_optimiser_says_of_a_gradient_that_is_not_finite_is_not_the_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    far_away(monkeypatch)
    engine = engine_of()
    optimizer = engine.problems["classifier"].optimizer
    assert optimizer is not None

    def step() -> None:
        raise RuntimeError("a decomposition failed")

    optimizer.step = step  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="a decomposition failed"):
        engine.step()
    engine.problems["classifier"].spoil = spoilt_gradient
    with pytest.raises(NonFiniteError, match="the gradient's norm of problem 'classifier' is nan"):
        engine.step()


@pytest.mark.parametrize(("preconditioner", "calls"), [("none", 0), ("nystrom", 0), ("optimizer", 1)])
def test_the_optimiser_s_diagonal_is_taken_only_where_it_is_read(
    preconditioner: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It is four operations for every tensor of the inner problem.
    taken: Events = []
    curvature = differentiate.curvature_of
    monkeypatch.setattr(differentiate, "curvature_of", lambda *of: (taken.append("diagonal"), curvature(*of))[1])
    method = {"method": "conjugate_gradient", "damping": 5.0, "preconditioner": preconditioner}
    for other in (method, "identity"):
        engine_of(other, OPTIMIZERS[1]).step()
    assert len(taken) == calls


@pytest.mark.parametrize("method", METHODS)
def test_a_hypergradient_of_a_loss_that_is_not_finite_is_refused(method: Any) -> None:
    # An infinite constant leaves every derivative finite.
    engine = engine_of(method)
    engine.step()
    engine.problems["weights"].spoil = lambda loss, network: loss + math.inf
    with pytest.raises(NonFiniteError, match="the loss of problem 'weights' is inf"):
        engine.hypergradient()
    with pytest.raises(NonFiniteError, match="step 2: the loss of problem 'weights' is inf"):
        engine.step()
