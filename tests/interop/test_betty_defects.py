"""Where betty-ml 0.2.1 is wrong: its number is what is said of it, and ours is the true one, known in another way."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev

from bilevel import Engine, EngineConfig, Problem, Unrolled
from bilevel.errors import ConfigError, GraphError
from tests.interop.betty_programs import (
    BETTY,
    OURS,
    Level,
    Program,
    Seen,
    Vector,
    assert_same,
    flat,
    namespace,
    pair,
    play,
    watch,
)

pytest.importorskip("betty.problems")  # imports what warns

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("double")


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> bool:
    return float((found - expected).norm()) <= tolerance * float(expected.norm())


def far(found: Tensor, expected: Tensor, factor: float = 0.05) -> bool:
    """Whether an error is no matter of rounding."""
    return not close(found, expected, factor)


# A quadratic: f = wᵀHw / 2 − wᵀ(Cλ + x), F = |w − t|² / 2. With v = w − t the hypergradient is CᵀH⁻¹v.

H = torch.tensor([[2.0, 0.6, 0.1], [0.6, 1.0, 0.3], [0.1, 0.3, 0.5]], dtype=torch.float64)
C = torch.tensor([[1.0, 0.4], [-0.3, 0.8], [0.5, -0.6]], dtype=torch.float64)
T = torch.tensor([0.7, -0.4, 0.9], dtype=torch.float64)
START, OUTER = (0.3, -0.2, 0.5), (0.4, -0.7)


def lower(low: Any, top: Any, x: Tensor) -> Tensor:
    w: Tensor = low.value
    return w @ (H @ w) / 2 - w @ (C @ top.value + x)


def upper(low: Any, top: Any, x: Tensor) -> Tensor:
    difference: Tensor = low.value - T
    return difference.square().sum() / 2


def quadratic(root: str, **options: Any) -> Seen:
    return watch(root, lower, upper, Vector(START), Vector(OUTER), **options)


def released_cg(v: Tensor, iterations: int, alpha: float) -> Tensor:
    """Conjugate gradient with both mistakes: the direction takes the residual before the step, and α scales H once."""
    x, r, p = torch.zeros_like(v), v, v
    for _ in range(iterations):
        length = r @ r / (alpha * (p @ H @ p))
        x, after = x + length * p, r - length * (H @ p)
        p, r = r + (after @ after) / (r @ r) * p, after
    return alpha * x


@pytest.mark.parametrize(
    ("iterations", "alpha", "true"),
    [(1, 1.0, False), (1, 0.5, False), (3, 1.0, True), (3, 0.5, True)],
    ids=["one iteration", "one, alpha cancels", "three are exact in three dimensions", "whatever cg_alpha"],
)
def test_cg(iterations: int, alpha: float, true: bool) -> None:
    config = {"type": "cg", "cg_iterations": iterations, "cg_alpha": alpha}
    bettys, ours = quadratic(BETTY, config=config), quadratic(OURS, config=config)
    v = ours.low[0] - T
    assert close(bettys.hypergradients[0], C.T @ released_cg(v, iterations, alpha))
    if true:
        exact = C.T @ torch.linalg.solve(H, v)
        assert close(ours.hypergradients[0], exact)
        assert far(bettys.hypergradients[0], exact)
    else:
        assert close(ours.hypergradients[0], bettys.hypergradients[0])


def test_cg_alpha_alone() -> None:
    # In one dimension the first iteration is exact, and with α = 1 nothing is left to go wrong.
    def line(low: Any, top: Any, x: Tensor) -> Tensor:
        loss: Tensor = (3.0 * low.value.square() / 2 - low.value * top.value).sum()
        return loss

    def hypergradient(root: str, alpha: float) -> float:
        config = {"type": "cg", "cg_iterations": 2, "cg_alpha": alpha}
        goal = lambda low, top, x: (low.value - 1.0).square().sum() / 2  # noqa: E731
        return float(watch(root, line, goal, Vector([0.0]), Vector([0.5]), config=config).hypergradients[0])

    w = 0.1 * 0.5
    exact = (w - 1.0) / 3.0
    assert hypergradient(OURS, 0.5) == pytest.approx(exact, rel=1e-12)
    assert hypergradient(BETTY, 1.0) == pytest.approx(exact, rel=1e-12)
    assert abs(hypergradient(BETTY, 0.5) - exact) > 0.5 * abs(exact)


class Two(nn.Module):
    """A vector, and one more that comes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(START))
        self.more = nn.Parameter(torch.tensor([0.8, -0.5]))


def both(low: Any, top: Any, x: Tensor) -> Tensor:
    return lower(low, top, x) + (low.more - top.value).square().sum() / 2


def by_hand(rates: tuple[float, float], steps: int) -> Tensor:
    """Gradient descent on :func:`both` at a fixed λ, with a rate for each tensor."""
    w, more, lam = torch.tensor(START), torch.tensor([0.8, -0.5]), torch.tensor(OUTER)
    for _ in range(steps):
        w, more = w - rates[0] * (H @ w - C @ lam), more - rates[1] * (more - lam)
    return torch.cat([w, more])


def test_parameter_groups() -> None:
    # Betty makes the optimiser anew with the defaults: both groups run at 0.1.
    def last(root: str) -> Tensor:
        low = Two()
        groups = [{"params": [low.value], "lr": 0.02}, {"params": [low.more], "lr": 0.3}]
        sgd = torch.optim.SGD(groups, lr=0.1)
        return watch(root, both, upper, low, Vector(OUTER), optimizer=sgd, rate=0.0, iterations=3).low[-1]

    assert close(last(OURS), by_hand((0.02, 0.3), 3), 1e-12)
    assert close(last(BETTY), by_hand((0.1, 0.1), 3), 1e-12)


def test_parameters_that_the_optimizer_never_held() -> None:
    def last(root: str) -> Tensor:
        low = Two()
        sgd = torch.optim.SGD([low.value], lr=0.1)
        return watch(root, both, upper, low, Vector(OUTER), optimizer=sgd, rate=0.0, iterations=3).low[-1]

    assert close(last(OURS), by_hand((0.1, 0.0), 3), 1e-12)
    assert close(last(BETTY), by_hand((0.1, 0.1), 3), 1e-12)


# Dropout: f = Σ m λ w² / 2 with a mask m from torch's generator, so that −∂²f/∂w∂λ v = −m w v.


class Masked:
    """A program with masks; ``extra`` numbers are drawn between the lower problem's step and the upper one's."""

    def __init__(self, root: str, seed: int, extra: int = 0) -> None:
        self.masks: list[Tensor] = []

        def loss(low: Any, top: Any, x: Tensor) -> Tensor:
            self.masks.append((torch.rand(8) < 0.5).to(torch.float64))
            total: Tensor = (self.masks[-1] * top.value * low.value.square()).sum() / 2
            return total

        def goal(low: Any, top: Any, x: Tensor) -> Tensor:
            total: Tensor = (low.value - 0.5).square().sum() / 2
            return total

        def grad_callback(problem: Any) -> None:
            torch.rand(extra)

        low, top = Vector(torch.linspace(1.0, 2.0, 8)), Vector(torch.linspace(0.5, 1.5, 8))
        methods, engine = {"grad_callback": grad_callback}, {"train_iters": 1}
        made, seen = pair(root, loss, goal, low, top, methods=methods, engine=engine)
        self.masks.clear()  # ours evaluates the losses when the engine is made
        torch.manual_seed(seed)
        made.run()
        self.w, self.found = seen.low[0], seen.hypergradients[0]

    def product(self, plus: Tensor, minus: Tensor) -> Tensor:
        """A central difference of length 0.01 whose sides have masks of their own."""
        v = self.w - 0.5
        h = 0.01 / v.norm()
        return -(plus * (self.w + h * v).square() - minus * (self.w - h * v).square()) / 2 / (2 * h)


def test_dropout_masks() -> None:
    step = Masked(OURS, 0).masks[0]
    for seed, extra in ((0, 0), (0, 1), (0, 5), (1, 0)):
        ours = Masked(OURS, seed, extra)
        mask = ours.masks[0]
        assert all(torch.equal(each, mask) for each in ours.masks)
        assert close(ours.found, -mask * ours.w * (ours.w - 0.5))
        assert torch.equal(mask, step) == (seed == 0)


def test_betty_draws_other_masks_for_each_side() -> None:
    found = []
    for extra in (0, 1, 5):
        bettys = Masked(BETTY, 0, extra)
        mask, plus, minus = bettys.masks
        assert not torch.equal(plus, minus)
        assert close(bettys.found, bettys.product(plus, minus))
        assert far(bettys.found, bettys.product(mask, mask), 2.0)
        found.append(bettys.found)
    assert far(found[0], found[1])
    assert far(found[0], found[2])


class Normed(Vector):
    """With batch normalisation in front."""

    def __init__(self) -> None:
        super().__init__(START)
        self.norm = nn.BatchNorm1d(3, affine=False)


def test_batch_norm_statistics() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))

    def run(root: str) -> nn.BatchNorm1d:
        low = Normed()
        loss = lambda low, top, x: lower(low, top, low.norm(x).square().mean(0))  # noqa: E731
        watch(root, loss, upper, low, Vector(OUTER), batches=[(x,)], iterations=4)
        return low.norm

    ours, bettys = run(OURS), run(BETTY)
    assert int(ours.num_batches_tracked) == 4  # one a step
    assert close(ours.running_mean, (1 - 0.9**4) * x.mean(0))
    assert int(bettys.num_batches_tracked) == 12  # and one for each side of a difference
    assert close(bettys.running_mean, (1 - 0.9**12) * x.mean(0))


# SAMA


def adam(lam: Tensor, w: Tensor, m: Tensor, s: Tensor, step: int, lr: float = 0.05) -> tuple[Tensor, ...]:
    """A step of Adam on :func:`lower`."""
    g = H @ w - C @ lam
    m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
    return w - lr * (m / (1 - 0.9**step)) / ((s / (1 - 0.999**step)).sqrt() + 1e-8), m, s, g


def test_sama_leaves_out_the_bias_correction() -> None:
    def found(root: str, kind: str) -> Tensor:
        low = Vector(START)
        optimizer = torch.optim.Adam(low.parameters(), lr=0.05)
        config = {"type": kind, "unroll_steps": 5}
        return watch(
            root, lower, upper, low, Vector(OUTER), optimizer=optimizer, config=config, iterations=5
        ).hypergradients[0]

    lam = torch.tensor(OUTER)
    w, m, s = torch.tensor(START), torch.zeros(3), torch.zeros(3)
    for step in range(1, 5):
        w, m, s, _ = adam(lam, w, m, s, step)
    after, moment, second, g = adam(lam, w, m, s, 5)
    v = after - T
    exact = jacrev(lambda lam: adam(lam, w, m, s, 5)[0])(lam).T @ v
    uncorrected = 0.05 * (0.1 * 0.999 * s - 0.9 * 0.001 * g * m) / (second.sqrt() + 1e-8) ** 3
    assert close(found(OURS, "sama"), exact, 1e-8)
    assert close(found(BETTY, "sama"), C.T @ (uncorrected * v), 1e-8)
    assert close(found(OURS, "betty:sama"), found(BETTY, "sama"), 1e-8)
    assert float(found(BETTY, "sama").norm() / exact.norm()) > 4.0
    assert moment.shape == (3,)


def cubic(low: Any, top: Any, x: Tensor) -> Tensor:
    return lower(low, top, x) + top.value[0] * low.value.pow(3).sum()


@pytest.mark.parametrize("alpha", [0.05, 1.0])
def test_sama_leaves_out_the_rate_of_gradient_descent(alpha: float) -> None:
    # The derivative of a step w − ηg is η times that of g. The third power makes the length of differences visible.
    def found(root: str, kind: str) -> Seen:
        config = {"type": kind, "sama_adam_alpha": alpha, "darts_alpha": alpha}
        return watch(root, cubic, upper, Vector(START), Vector(OUTER), config=config)

    ours = found(OURS, "sama")
    w = ours.low[0]
    v = w - T
    h = alpha / v.norm()
    difference = C.T @ v - torch.tensor([1.0, 0.0]) * (3 * w * w * v + h * h * v.pow(3)).sum()
    assert close(ours.hypergradients[0], 0.1 * difference)
    for root, kind in ((BETTY, "sama"), (OURS, "betty:sama"), (BETTY, "darts"), (OURS, "darts")):
        assert close(found(root, kind).hypergradients[0], difference)


# Roll-back

BATCHES = [(torch.tensor([0.1 * k, -0.2 * k, 0.3], dtype=torch.float64),) for k in range(1, 8)]


def rolled_back(iterations: int, *, unroll: int, accumulate: int = 1, warmup: int = 0, bettys: bool = False) -> Seen:
    """Momentum below, gradient descent above, the hypergradient Cᵀv; after a step above, the loop is undone.

    What is undone are the updates that were unrolled, and what is made again is the last of them, whole. ``bettys``:
    everything since the last step above is undone, warm-up included, and made again is the last batch's share.
    """
    seen, period = Seen(), unroll * accumulate
    w, velocity, lam = torch.tensor(START), torch.zeros(3), torch.tensor(OUTER)
    kept = (w, velocity)
    for count in range(1, iterations + 1):
        begins = count == 1 or ((count - 1) % period == 0 and (count - 1 > warmup or not bettys))
        if begins:
            kept = (w, velocity)
        if count % accumulate:
            continue
        last = [BATCHES[place % len(BATCHES)][0] for place in range(count - accumulate, count)]

        def update(w: Tensor, velocity: Tensor, x: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor]:
            velocity = 0.9 * velocity + share * (H @ w - C @ lam - x)  # noqa: B023
            return w - 0.1 * velocity, velocity

        w, velocity = update(w, velocity, torch.stack(last).mean(0))
        seen.low.append(w)
        if count % period == 0 and count > warmup:
            seen.hypergradients.append(C.T @ (w - T))
            lam = lam - 0.1 * seen.hypergradients[-1]
            seen.top.append(lam)
            w, velocity = kept
            again = (last[-1], 1.0 / accumulate) if bettys else (torch.stack(last).mean(0), 1.0)
            w, velocity = update(w, velocity, *again)
            seen.low.append(w)
    return seen


@pytest.mark.parametrize(
    "fields",
    [
        {"unroll": 2},
        {"unroll": 3, "accumulate": 2},
        {"unroll": 1, "accumulate": 3},
        {"unroll": 2, "warmup": 5},
        {"unroll": 3, "warmup": 6},
        {"unroll": 2, "accumulate": 2, "warmup": 5},
    ],
    ids=str,
)
def test_roll_back(fields: dict[str, int]) -> None:
    def found(root: str) -> Seen:
        low = Vector(START)
        config = {
            "unroll_steps": fields["unroll"],
            "gradient_accumulation": fields.get("accumulate", 1),
            "warmup_steps": fields.get("warmup", 0),
        }
        sgd = torch.optim.SGD(low.parameters(), lr=0.1, momentum=0.9)
        options = {"optimizer": sgd, "config": config, "batches": BATCHES, "engine": {"roll_back": True}}
        return watch(root, lower, upper, low, Vector(OUTER), iterations=17, **options)

    def same(found: Seen, expected: Seen) -> bool:
        assert len(found.top) == len(expected.top) >= 2
        pairs = zip((*found.low, *found.top), (*expected.low, *expected.top), strict=True)
        return all(close(one, other) for one, other in pairs)

    assert same(found(OURS), rolled_back(17, **fields))
    assert same(found(BETTY), rolled_back(17, **fields, bettys=True))
    assert same(found(BETTY), rolled_back(17, **fields)) == (fields.keys() == {"unroll"})


# More than two levels

P = torch.tensor([[0.6, -0.2], [0.3, 0.5]], dtype=torch.float64)
GOAL = torch.tensor([1.0, -2.0], dtype=torch.float64)
LEVELS = ("top", "middle", "low")


def three(root: str, losses: dict[str, Callable[..., Tensor]], u2l: Any, l2u: Any, kind: str = "darts") -> Any:
    """Three problems of a vector each; every loss is a function of all three vectors."""
    names = namespace(root)
    found: list[Tensor] = []

    class Level(names.ImplicitProblem):
        def training_step(self, batch: Any) -> Any:
            problems = {name: self if name == self.name else getattr(self, name) for name in LEVELS}
            return losses[self.name](*(problems[name].module.value for name in LEVELS))

        def grad_callback(self) -> None:
            if self.name == "top":
                grad = self.module.value.grad
                found.append(torch.zeros(2) if grad is None else grad.detach().clone())

    problems = {}
    for place, name in enumerate(LEVELS):
        module = Vector([0.4 + 0.1 * place, -0.3])
        sgd = torch.optim.SGD(module.parameters(), lr=0.3)
        config = names.Config(type=kind, unroll_steps=1 if name == "top" else 20, retain_graph=True)
        problems[name] = Level(name, config, module, sgd, train_data_loader=[(0,)])
    edges = {
        key: {problems[name]: [problems[other] for other in others] for name, others in several.items()}
        for key, several in (("u2l", u2l), ("l2u", l2u))
    }
    engine = names.Engine(list(problems.values()), names.EngineConfig(train_iters=400, strategy="cpu"), edges)
    engine.run()
    return found[0], problems["middle"].module.value.detach()


NESTED = {
    "low": lambda top, middle, low: (low - P @ middle).square().sum() / 2,
    "middle": lambda top, middle, low: (middle - top).square().sum() / 2 + low @ top,
    "top": lambda top, middle, low: (middle - GOAL).square().sum() / 2,
}
NESTED_EDGES = ({"top": ["middle"], "middle": ["low"]}, {"low": ["middle"], "middle": ["top"]})


def test_a_middle_problem_s_response_includes_that_of_the_problem_below() -> None:
    # low = P middle, so that middle's gradient is middle − top + Pᵀtop. darts takes the identity for its Hessian,
    # which it is, and the mixed derivative is −1 + Pᵀ. Betty's is −1: it holds low still.
    found, middle = three(OURS, NESTED, *NESTED_EDGES)
    v = middle - GOAL
    assert close(found, (torch.eye(2) - P) @ v, 1e-6)
    found, middle = three(BETTY, NESTED, *NESTED_EDGES)
    assert close(found, middle - GOAL, 1e-6)


def test_betty_has_no_cg_over_a_problem_with_others_below() -> None:
    with pytest.raises(AssertionError, match="not supported for higher order"):
        three(BETTY, NESTED, *NESTED_EDGES, kind="cg")
    found, middle = three(OURS, NESTED, *NESTED_EDGES, kind="cg")
    assert close(found, (torch.eye(2) - P) @ (middle - GOAL), 1e-6)


def test_a_chain_declared_the_other_way_round() -> None:
    # top enters middle's loss, and middle low's, while the declaration lets low's step lead to middle's.
    losses = {
        "low": lambda top, middle, low: (low - P @ middle).square().sum() / 2,
        "middle": lambda top, middle, low: (middle - top).square().sum() / 2,
        "top": lambda top, middle, low: (low - GOAL).square().sum() / 2,
    }
    edges: Any = ({"top": ["low"]}, {"low": ["middle"], "middle": ["top"]})
    assert float(three(BETTY, losses, *edges)[0].norm()) == 0.0  # along a path that the losses do not have
    with pytest.raises(GraphError, match="missing dependency: training_step of 'top' uses the parameters of 'low'"):
        three(OURS, losses, *edges)


# What Betty does in silence, and is refused here


def test_multitask_leaves_parameters_displaced() -> None:
    bettys = quadratic(BETTY, config={"darts_multitask": True}, iterations=2, rate=0.0)
    plain = quadratic(BETTY, iterations=2, rate=0.0)
    assert torch.equal(bettys.low[0], plain.low[0])
    v = plain.low[0] - T
    displaced = plain.low[0] - 0.01 * v / v.norm()
    assert close(bettys.low[1], displaced - 0.1 * (H @ displaced - C @ torch.tensor(OUTER)))
    for name in ("darts_multitask", "sama_multitask"):
        with pytest.raises(ConfigError, match=name):
            quadratic(OURS, config={name: True})


@pytest.mark.filterwarnings("ignore:Using backward")
def test_first_order_false_drops_the_hypergradient() -> None:
    assert float(quadratic(BETTY, above={"first_order": False}).hypergradients[0].norm()) == 0.0
    with pytest.raises(ConfigError, match="first_order=False of problem 'top'"):
        quadratic(OURS, above={"first_order": False})


def test_a_missing_dependency() -> None:
    def run(root: str) -> Tensor:
        made, _ = pair(root, lower, upper, Vector(START), Vector(OUTER), engine={"train_iters": 3})
        top, low = made.problems
        edges = {"u2l": {}, "l2u": {low: [top]}}
        if root == BETTY:
            made.set_dependency(edges)
            made.run()
            return flat(top.module.parameters())
        names = namespace(root)
        parts = [
            type(problem)(name, names.Config(), module, torch.optim.SGD(module.parameters(), lr=0.1), None, [(0,)])
            for problem, name, module in ((top, "top", Vector(OUTER)), (low, "low", Vector(START)))
        ]
        names.Engine(parts, names.EngineConfig(strategy="cpu"), {"u2l": {}, "l2u": {parts[1]: [parts[0]]}})
        raise AssertionError

    assert torch.equal(run(BETTY), torch.tensor(OUTER))  # three steps of top, and nothing moves
    with pytest.raises(GraphError, match="missing dependency"):
        run(OURS)


# What crashes in Betty


def never_better(engine: Any) -> dict[str, float]:
    return {"loss": 1.0}


def test_early_stopping() -> None:
    fields = {"early_stopping": True, "early_stopping_tolerance": 2, "valid_step": 3}
    with pytest.raises(AttributeError, match="patience"):
        quadratic(BETTY, engine=fields, iterations=30, validation=never_better)
    ours = quadratic(OURS, engine=fields, iterations=30, validation=never_better)
    assert len(ours.low) == 9  # best at 3, none better at 6 and 9


def test_reinforce() -> None:
    with pytest.raises(TypeError, match="positional arguments"):
        quadratic(BETTY, config={"type": "reinforce"})
    with pytest.raises(ConfigError, match="reinforce"):
        quadratic(OURS, config={"type": "reinforce"})


def curved(low: Any, top: Any, x: Tensor) -> Tensor:
    z: Tensor = low.value - C @ top.value
    return (z @ (H @ z)) / 2 + torch.sin(low.value).sum() / 5 - low.value @ x


class Outer(Problem):
    def loss(self, batch: Any) -> Tensor:
        return upper(self.low.module, self.module, *batch)


class Inner(Problem):
    def loss(self, batch: Any) -> Tensor:
        return curved(self.module, self.top.module, *batch)


def followed(root: str, config: dict[str, Any], *, roll_back: bool = False, kind: str = "IterativeProblem") -> Seen:
    """A program whose lower problem is differentiated update by update."""
    low = Vector(START)
    sgd = torch.optim.SGD(low.parameters(), lr=0.2, momentum=0.5)
    options: dict[str, Any] = {"optimizer": sgd, "config": config, "batches": BATCHES, "kind": kind}
    return watch(root, curved, upper, low, Vector(OUTER), iterations=17, engine={"roll_back": roll_back}, **options)


def followed_by_hand(unroll: int, accumulate: int = 1, warmup: int = 0, roll_back: bool = False) -> Seen:
    """A loop that autograd follows: what the last ``unroll`` updates begin with is constant."""
    seen, period = Seen(), unroll * accumulate
    w, velocity, lam = torch.tensor(START), torch.zeros(3), torch.tensor(OUTER)
    for count in range(1, 18):
        if (count - 1) % period == 0:
            w, velocity, lam = w.detach(), velocity.detach(), lam.detach().requires_grad_()
            kept = (w, velocity)
        if count % accumulate:
            continue
        x = torch.stack([BATCHES[place % len(BATCHES)][0] for place in range(count - accumulate, count)]).mean(0)

        def update(w: Tensor, velocity: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            velocity = 0.5 * velocity + H @ (w - C @ lam) + torch.cos(w) / 5 - x  # noqa: B023
            return w - 0.2 * velocity, velocity

        w, velocity = update(w, velocity, x)
        seen.low.append(w.detach())
        if count % period == 0 and count > warmup:
            (gradient,) = torch.autograd.grad((w - T).square().sum() / 2, lam)
            seen.hypergradients.append(gradient)
            lam = lam.detach() - 0.1 * gradient
            seen.top.append(lam)
            if roll_back:
                w, velocity = update(*kept, x)
                seen.low.append(w.detach())
    return seen


@pytest.mark.parametrize(
    "fields",
    [
        {"unroll": 1},
        {"unroll": 3},
        {"unroll": 2, "accumulate": 2},
        {"unroll": 3, "warmup": 4},
        {"unroll": 2, "accumulate": 2, "warmup": 5},
        {"unroll": 3, "roll_back": True},
        {"unroll": 2, "accumulate": 2, "roll_back": True},
        {"unroll": 2, "warmup": 5, "roll_back": True},
    ],
    ids=str,
)
def test_iterative_problems_follow_the_updates(fields: dict[str, int]) -> None:
    config = {
        "unroll_steps": fields["unroll"],
        "gradient_accumulation": fields.get("accumulate", 1),
        "warmup_steps": fields.get("warmup", 0),
    }
    roll_back = bool(fields.get("roll_back"))
    with pytest.raises(KeyError, match="params"):
        followed(BETTY, config, roll_back=roll_back)
    found, expected = followed(OURS, config, roll_back=roll_back), followed_by_hand(**fields)
    assert len(expected.top) >= 2
    for one, other in zip(
        (*found.hypergradients, *found.top, *found.low),
        (*expected.hypergradients, *expected.top, *expected.low),
        strict=True,
    ):
        assert close(one, other, 1e-11)


def test_iterative_problems_are_ours_unrolled() -> None:
    top, low = Vector(OUTER), Vector(START)
    sgd = torch.optim.SGD(low.parameters(), lr=0.2, momentum=0.5)
    inner = Inner(low, optimizer=sgd, data=BATCHES, steps=3, hypergradient=Unrolled(), name="low")
    outer = Outer(top, optimizer=torch.optim.SGD(top.parameters(), lr=0.1), data=BATCHES, name="top")
    engine = Engine([outer, inner], EngineConfig(steps=5, progress=False))
    engine.run()
    seen = followed(OURS, {"unroll_steps": 3})
    assert close(seen.top[4], flat(top.parameters()), 1e-12)
    assert close(seen.low[14], flat(low.parameters()), 1e-12)
    implicit = followed(OURS, {"unroll_steps": 3}, kind="ImplicitProblem")
    assert far(implicit.hypergradients[0], seen.hypergradients[0])


def test_an_inner_loss_in_a_mapping() -> None:
    mapping = lambda low, top, x: {"loss": lower(low, top, x), "size": low.value.norm()}  # noqa: E731
    with pytest.raises(AssertionError, match="torch.Tensor"):
        watch(BETTY, mapping, upper, Vector(START), Vector(OUTER))
    expected = quadratic(OURS)
    found = watch(OURS, mapping, upper, Vector(START), Vector(OUTER))
    assert close(found.hypergradients[0], expected.hypergradients[0])


def test_an_outer_loss_with_a_direct_part() -> None:
    direct = lambda low, top, x: upper(low, top, x) * (1.0 + top.value.square().sum())  # noqa: E731
    with pytest.raises(RuntimeError, match="a second time"):
        watch(BETTY, lower, direct, Vector(START), Vector(OUTER))
    bettys = watch(BETTY, lower, direct, Vector(START), Vector(OUTER), above={"retain_graph": True})
    ours = watch(OURS, lower, direct, Vector(START), Vector(OUTER))
    assert close(ours.hypergradients[0], bettys.hypergradients[0])
    lam, w = torch.tensor(OUTER), ours.low[0]
    difference, size = w - T, 1.0 + float(lam.square().sum())
    exact = size * C.T @ difference + 2 * lam * difference.square().sum() / 2
    assert close(ours.hypergradients[0], exact)


def test_frozen_parameters() -> None:
    def freeze() -> Two:
        low = Two()
        low.more.requires_grad_(False)
        return low

    def run(root: str, config: Any) -> Seen:
        low = freeze()
        sgd = torch.optim.SGD([low.value], lr=0.1)
        return watch(root, lower, upper, low, Vector(OUTER), optimizer=sgd, config=config)

    for config in ({"type": "darts"}, {"type": "neumann", "neumann_alpha": 0.3}, {"type": "cg"}):
        with pytest.raises(RuntimeError, match="requires_grad=False|not require grad"):
            run(BETTY, config)
        assert close(run(OURS, config).hypergradients[0], quadratic(OURS, config=config).hypergradients[0])


def test_no_config() -> None:
    names = namespace(BETTY)
    with pytest.raises(AttributeError, match="precision"):
        names.ImplicitProblem("low", None)
    assert namespace(OURS).ImplicitProblem("low", None).config == namespace(OURS).Config()


@pytest.mark.skipif(
    "decoupled_weight_decay" not in torch.optim.AdamW([torch.zeros(1)]).defaults,
    reason="this torch's AdamW takes its own defaults",
)
def test_adamw() -> None:
    def run(root: str) -> Seen:
        low = Vector(START)
        return watch(root, lower, upper, low, Vector(OUTER), optimizer=torch.optim.AdamW(low.parameters(), lr=0.1))

    with pytest.raises(TypeError, match="decoupled_weight_decay"):
        run(BETTY)
    assert len(run(OURS).hypergradients) == 1


# Betty's numbers back


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        ({"type": "darts"}, 1e-9),
        ({"type": "darts", "darts_alpha": 0.2}, 1e-9),
        ({"type": "neumann", "neumann_iterations": 3, "neumann_alpha": 0.3}, 1e-11),
        ({"type": "cg"}, 1e-11),
        ({"type": "cg", "cg_iterations": 3}, 1e-9),
        ({"type": "cg", "cg_iterations": 2, "cg_alpha": 0.5}, 1e-9),
        ({"type": "sama"}, 1e-8),
        ({"type": "sama", "sama_adam_alpha": 0.1}, 1e-8),
    ],
    ids=str,
)
def test_betty_s_own_functions_give_betty_s_trajectory(config: dict[str, Any], tolerance: float) -> None:
    low = Level({**config, "unroll_steps": 2, "log_step": 1}, optimizer="adam")
    program = Program(levels={"low": low, "top": Level(optimizer="momentum")}, iterations=13)
    expected = play(BETTY, program)
    own = program.having("low", config={**low.config, "type": f"betty:{config['type']}"})
    assert_same(play(OURS, own), expected, tolerance)
    if config.get("cg_iterations", 1) > 1 or config["type"] == "sama":
        with pytest.raises(AssertionError):
            assert_same(play(OURS, program), expected, 1e-3)


# The core and betty-ml


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [node.module or ""]
    if isinstance(node, ast.Call):  # import_module and __import__, of a name in the source
        return (
            [part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            if "import" in ast.unparse(node.func)
            else []
        )
    return []


def test_betty_is_imported_by_its_methods_alone_and_late() -> None:
    found = set()
    for path in [*(ROOT / "bilevel").rglob("*.py"), *(ROOT / "bidora").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        late = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            if any(name.split(".")[0] == "betty" for name in imported(node)):
                found.add((path.relative_to(ROOT).as_posix(), id(node) in late))
    assert found == {("bilevel/interop/betty/estimators.py", True)}


PROGRAM = """
import sys
sys.modules["betty"] = None  # as if it were not there
import torch
from bilevel.interop.betty import Config, Engine, EngineConfig, ImplicitProblem

class Outer(ImplicitProblem):
    def training_step(self, batch):
        return (self.inner.module.weight - 1.0).square().sum()

class Inner(ImplicitProblem):
    def training_step(self, batch):
        return (self.module.weight - self.outer.module.weight).square().sum()

def part(kind, name):
    module = torch.nn.Linear(1, 1)
    return kind(name, Config(), module, torch.optim.SGD(module.parameters(), lr=0.1), train_data_loader=[(0,)])

outer, inner = part(Outer, "outer"), part(Inner, "inner")
Engine([outer, inner], EngineConfig(train_iters=3), {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}).run()
print("loaded:", sorted(name for name in sys.modules if name.split(".")[0] == "betty" and sys.modules[name]))
"""


def test_a_program_runs_without_betty() -> None:
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"
