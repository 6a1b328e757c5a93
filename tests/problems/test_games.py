"""Games: leaders and followers against closed forms, adversaries against the worst that they can do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

from bilevel import Engine, EngineConfig, hypergradcheck
from bilevel.errors import ConfigError, DataError, GraphError, ParameterError
from bilevel.hypergrad import available_methods
from bilevel.problems.constraints import Box, Constrained
from bilevel.problems.games import (
    AdversarialTraining,
    Firm,
    Perturbation,
    Player,
    QuantityGame,
    RobustValidation,
    attack,
)
from tests.bilevel.strategies import DOUBLE, forall

QUIET = EngineConfig(progress=False)


def game_of(costs: list[float], slope: float = 1.0) -> QuantityGame:
    return QuantityGame(tuple(costs), intercept=10.0, slope=slope)


COSTS = st.lists(st.floats(0.0, 1.5), min_size=2, max_size=4)


@forall(40, costs=COSTS, slope=st.floats(0.2, 5.0))
def test_no_firm_gains_by_another_quantity(costs: list[float], slope: float) -> None:
    try:
        game = game_of(costs, slope)
    except ConfigError:
        assume(False)

    def answers(fixed: list[float]) -> list[float]:
        """Moves in turn by brute force: each firm on a fine search over its own quantity."""
        if len(fixed) == len(costs):
            return fixed
        place, low, high = len(fixed), 0.0, 10.0 / slope

        def profit(quantity: float) -> float:
            all_of_them = answers([*fixed, quantity])
            return float(game.profits(all_of_them)[place])

        golden = (math.sqrt(5) - 1) / 2
        for _ in range(25):
            a, b = high - golden * (high - low), low + golden * (high - low)
            low, high = (a, high) if profit(a) < profit(b) else (low, b)
        return answers([*fixed, (low + high) / 2])

    if len(costs) == 2:
        assert answers([]) == pytest.approx(game.equilibrium(), rel=1e-2)
    # Cournot: each answers the others
    found = game.simultaneous()
    for place, cost in enumerate(costs):
        rest = sum(found) - found[place]
        assert found[place] == pytest.approx((10.0 - slope * rest - cost) / (2 * slope))
    if len(costs) == 2:  # and moving first is worth something
        assert game.profits(game.equilibrium())[0] > game.profits(found)[0]


def test_the_duopoly_is_stackelbergs() -> None:
    game = QuantityGame((1.0, 2.0), intercept=10.0, slope=2.0)
    assert game.equilibrium()[0] == pytest.approx((10 + 2 - 2 * 1) / (2 * 2))
    assert game.simultaneous()[0] == pytest.approx((10 + 2 - 2 * 1) / (3 * 2))
    equal = QuantityGame((0.0, 0.0, 0.0), intercept=8.0)
    assert equal.equilibrium() == pytest.approx([4.0, 2.0, 1.0])


@pytest.mark.parametrize("costs", [[1.0, 0.5], [0.5, 1.0, 0.7]], ids=str)
@pytest.mark.parametrize("method", ["exact", "conjugate_gradient", "unrolled"])
def test_engines_find_the_equilibrium(costs: list[float], method: str) -> None:
    game = game_of(costs)
    engine = Engine(game.problems(), QUIET, hypergradient=method)
    assert engine.dependencies.outer == ("firm_0",)
    result = engine.run(25)
    found = [float(firm.module["quantity"].detach()) for firm in engine.problems.values()]
    assert found == pytest.approx(game.equilibrium(), rel=1e-6)
    payoffs = [result.metrics[f"firm_{place}/payoff"] for place in range(len(costs))]
    assert payoffs[0] == pytest.approx(game.profits(game.equilibrium())[0], rel=1e-6)


def test_without_the_hypergradient_firms_end_where_all_move_at_once() -> None:
    game = game_of([1.0, 0.5])
    engine = Engine(game.problems(), QUIET, hypergradient="exact")  # from there
    found = engine.hypergradient()
    assert float(found.direct["quantity"]) == pytest.approx(0.0, abs=1e-12)
    assert float(found.grad["quantity"]) < -0.1  # but the follower would yield: more would pay
    assert hypergradcheck(engine, rtol=1e-6).passed


def test_a_follower_at_its_capacity_does_not_answer() -> None:
    # Then the leader is alone with what demand is left: it sells (a − b k − c) / 2b.
    class Capped(Firm, Constrained):
        pass

    game = game_of([1.0, 0.5])
    leader = Firm(2.0, 0, game, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    cap = Box(0.0, 1.0)
    follower = Capped(1.0, 1, game, constraints=cap, optimizer=lambda p: torch.optim.SGD(p, lr=0.5), steps=2)
    engine = Engine([leader, follower], QUIET, hypergradient="conjugate_gradient")
    engine.run(20)
    assert float(follower.module["quantity"].detach()) == 1.0
    assert float(leader.module["quantity"].detach()) == pytest.approx((10.0 - 1.0 - 1.0) / 2)
    assert hypergradcheck(engine, rtol=1e-6).passed


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
@pytest.mark.parametrize("method", [name for name in available_methods() if not name.startswith("betty")])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_every_method_makes_the_leader_earn_more(method: str, dtype: torch.dtype) -> None:
    game = QuantityGame((0.5, 0.5), intercept=4.0, slope=0.5)
    start = game.simultaneous()
    small = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
    engine = Engine(game.problems(optimizer=small, dtype=dtype, steps=5), QUIET, hypergradient=method)
    engine.run(5)
    assert float(engine.problems["firm_0"].module["quantity"].detach()) > start[0]
    assert engine.problems["firm_0"].module["quantity"].dtype == dtype


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantityGame((1.0,)), "one cost for each of at least 2 firms"),
        (lambda: QuantityGame((1.0, 1.0), slope=0.0, intercept=9.0), r"QuantityGame\.slope"),
        (lambda: QuantityGame((0.1, 5.0)), "firm 1 with cost 5 would sell nothing"),
        (lambda: QuantityGame((0.1, math.nan)), r"QuantityGame\.costs"),
        (lambda: game_of([1.0, 1.0]).problems([1.0]), "1 quantities for 2 firms"),
    ],
)
def test_markets_that_make_no_sense_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_payoff_is_maximised() -> None:
    class Seller(Player):
        def payoff(self, batch: Any) -> Tensor:
            return -(self.module["price"] - 3.0).square()

    seller = Seller(nn.ParameterDict({"price": torch.zeros(())}), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    found = seller.loss(None)
    assert float(found["loss"].detach()) == 9.0
    assert float(found["payoff"]) == -9.0
    assert not found["payoff"].requires_grad


# --- the adversary ----------------------------------------------------------------------------------------------------

RADIUS = 0.2


def examples(number: int, count: int = 24, features: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(count, features, generator=generator, dtype=DOUBLE)
    y = torch.arange(count) % 2
    return x + 0.8 * (2 * y[:, None] - 1), y


def robust(
    method: Any = "conjugate_gradient",
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype = DOUBLE,
    lr: float = 0.0,
    steps: int = 150,
    indices: bool = False,
    **settings: Any,
) -> Engine:
    torch.manual_seed(0)
    first, second = examples(0), examples(1)
    train, held_out = ((x.to(dtype), y) for x, y in (first, second))
    model = (model or nn.Linear(4, 2)).to(dtype)
    given = [(x, y, torch.arange(len(x))) if indices else (x, y) for x, y in (train, held_out)]
    upper = RobustValidation(
        model, data=[given[1]], decay=0.3, optimizer=lambda p: torch.optim.SGD(p, lr=lr), **settings
    )
    sgd = lambda p: torch.optim.SGD(p, lr=0.5)  # noqa: E731
    training = AdversarialTraining(model, data=[given[0]], optimizer=sgd, steps=steps)
    adversary = Perturbation(*train, radius=RADIUS, name="adversary", steps=2)
    other = Perturbation(*held_out, radius=RADIUS, name="validation_adversary", steps=8)
    return Engine([upper, other, training, adversary], QUIET, hypergradient=method)


def worst_of_linear(engine: Engine, x: Tensor, y: Tensor) -> Tensor:
    """In closed form: each feature moves by the radius towards the other class."""
    weight = engine.problems["adversarial_training"].module.weight.detach()
    sign = (2 * y[:, None] - 1).to(x)
    return x - sign * RADIUS * (weight[1] - weight[0]).sign()


def test_the_adversary_of_a_linear_model_finds_the_worst_there_is() -> None:
    engine = robust()
    engine.step()
    for name, number in (("adversary", 0), ("validation_adversary", 1)):
        problem = engine.problems[name]
        moved, y = problem.perturbed()
        assert torch.allclose(moved, worst_of_linear(engine, *examples(number)))
        assert problem.evaluate()["active"] == 1.0
        few, labels = problem.perturbed(torch.tensor([3, 1]))
        assert torch.equal(few, moved[[3, 1]])
        assert torch.equal(labels, y[[3, 1]])


def test_the_hypergradient_through_model_and_adversary_is_right() -> None:
    engine = robust()
    engine.step()
    for reference in ("exact", "central_difference"):
        report = hypergradcheck(engine, reference=reference, rtol=1e-4)
        assert report.passed, report
    # and by training it all again, with the linear model's adversary in closed form
    upper = engine.problems["robust_validation"]
    (x, y), (u, z) = examples(0), examples(1)

    def value(logit: float) -> float:
        w = torch.zeros(2, 5, dtype=DOUBLE, requires_grad=True)
        share = 1 / (1 + math.exp(-logit))

        def outputs(inputs: Tensor, labels: Tensor, *, moved: bool) -> Tensor:
            away = RADIUS * (2 * labels[:, None] - 1) * (w[1, :4] - w[0, :4]).sign().detach() if moved else 0.0
            return F.linear(inputs - away, w[:, :4], w[:, 4])

        for _ in range(3000):
            loss = (1 - share) * F.cross_entropy(outputs(x, y, moved=False), y)
            loss = loss + share * F.cross_entropy(outputs(x, y, moved=True), y) + 0.15 * w.square().sum()
            (slope,) = torch.autograd.grad(loss, w)
            w = (w - 0.5 * slope).detach().requires_grad_()
        clean = F.cross_entropy(outputs(u, z, moved=False), z)
        return float((0.5 * clean + 0.5 * F.cross_entropy(outputs(u, z, moved=True), z)).detach())

    slope = (value(1e-3) - value(-1e-3)) / 2e-3
    found = engine.hypergradient().grad["share"]
    assert float(upper.share().detach()) == 0.5
    assert float(found) == pytest.approx(slope, rel=1e-3)


def test_losses_are_their_formulas() -> None:
    engine = robust(weight=0.25, share=0.75, steps=1)
    engine.step()
    upper, training = engine.problems["robust_validation"], engine.problems["adversarial_training"]
    (x, y), (u, z) = examples(0), examples(1)
    model = training.module
    moved, seen = (engine.problems[name].perturbed()[0] for name in ("adversary", "validation_adversary"))
    expected = 0.25 * F.cross_entropy(model(x), y) + 0.75 * F.cross_entropy(model(moved), y)
    expected = expected + 0.15 * sum(p.square().sum() for p in model.parameters())
    assert torch.allclose(training.loss((x, y))["loss"], expected)
    expected = 0.75 * F.cross_entropy(model(u), z) + 0.25 * F.cross_entropy(model(seen), z)
    assert torch.allclose(upper.loss((u, z))["loss"], expected)
    assert torch.allclose(upper.decay(), torch.full((2,), 0.3, dtype=DOUBLE))
    few = torch.tensor([5, 2])
    assert torch.allclose(
        training.loss((x[few], y[few], few))["robust"], F.cross_entropy(model(moved[few]), y[few]).detach()
    )


@pytest.mark.parametrize("owned", ["0.weight", ["0.bias", "1.weight"]])
def test_each_owned_tensor_has_its_own_decay(owned: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    (x, y), (v, u) = examples(0), examples(1)
    upper = RobustValidation(model, data=[(v, u)])
    training = AdversarialTraining(model, data=[(x, y)], optimizer=lambda p: torch.optim.SGD(p, lr=0.1), params=owned)
    adversaries = [
        Perturbation(v, u, radius=RADIUS, name="validation_adversary"),
        Perturbation(x, y, radius=RADIUS, name="adversary"),
    ]
    decay = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=DOUBLE)
    with torch.no_grad():
        upper.module["decay"].copy_(decay.log())
    Engine([upper, adversaries[0], training, adversaries[1]], QUIET, "identity")
    found = training.loss((x, y))
    by_name = dict(zip(("0.weight", "0.bias", "1.weight", "1.bias"), decay, strict=True))
    names = [owned] if isinstance(owned, str) else owned
    expected = sum(by_name[name] / 2 * model.get_parameter(name).square().sum() for name in names)
    assert float((found["loss"] - (found["clean"] + found["robust"]) / 2).detach()) == pytest.approx(
        float(expected.detach())
    )


def test_a_validation_of_another_model_is_refused() -> None:
    x, y = examples(0)
    model = nn.Linear(4, 2).double()
    problems = [
        RobustValidation(nn.Sequential(model, nn.Linear(2, 2).double()), data=[(x, y)]),
        Perturbation(x, y, radius=RADIUS, name="validation_adversary"),
        AdversarialTraining(model, data=[(x, y)], optimizer=lambda p: torch.optim.SGD(p, lr=0.1)),
        Perturbation(x, y, radius=RADIUS, name="adversary"),
    ]
    with pytest.raises(ConfigError, match="decay for 4 parameter tensors.*has 2 that are trainable"):
        Engine(problems, QUIET, "identity")


def test_batches_with_indices_are_the_same_problem() -> None:
    answers = []
    for indices in (False, True):
        engine = robust(indices=indices, steps=5)
        engine.step()
        answers.append(engine.hypergradient().grad["decay"])
    assert torch.allclose(*answers)


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
@pytest.mark.parametrize("method", [name for name in available_methods() if not name.startswith("betty")])
def test_every_method_trains_a_robust_model(method: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    engine = robust(method, model=model, dtype=torch.float32, lr=0.1, steps=2)
    before = engine.problems["robust_validation"].decay().detach().clone()
    engine.run(2)
    after = engine.problems["robust_validation"].decay()
    assert bool(after.isfinite().all())
    assert not torch.equal(before, after)
    for name in ("adversary", "validation_adversary"):
        assert float(engine.problems[name].module["delta"].detach().abs().max()) <= RADIUS * (1 + 1e-6)


def test_perturbed_pixels_stay_pixels_and_balls_are_balls() -> None:
    x, y = torch.rand(6, 2, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(6, dtype=torch.long)
    boxed = Perturbation(x, y, radius=0.3, bounds=(0.0, 1.0))
    far = boxed.project((torch.full_like(x, 5.0),))[0] + x
    assert torch.allclose(far, (x + 0.3).clamp(max=1.0))
    sgd = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
    ball = Perturbation(x, y, radius=0.3, norm="2", optimizer=sgd)
    norms = ball.project((torch.full_like(x, 5.0),))[0].flatten(1).norm(dim=1)
    assert torch.allclose(norms, torch.full((6,), 0.3))


def test_the_attack_finds_the_worst_of_a_linear_model_and_leaves_no_gradient() -> None:
    engine = robust(steps=20)
    engine.step()
    x, y = examples(3)
    model = engine.problems["adversarial_training"].module
    torch.manual_seed(0)
    found = attack(model, x, y, radius=RADIUS, steps=10, restarts=2)
    assert torch.allclose(found, worst_of_linear(engine, x, y))
    assert not found.requires_grad
    assert all(p.grad is None for p in model.parameters())
    inside = attack(model, x.sigmoid(), y, radius=0.9, bounds=(0.0, 1.0), steps=5)
    assert 0.0 <= float(inside.min()) <= float(inside.max()) <= 1.0


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda x, y: Perturbation(x, y, radius=0.0), ConfigError, r"Perturbation\.radius"),
        (lambda x, y: Perturbation(x, y[:3], radius=0.1), DataError, "24 inputs and 3 targets"),
        (lambda x, y: Perturbation(x, y, radius=0.1, norm="1"), ConfigError, r"value of Perturbation\.norm '1'"),
        (lambda x, y: Perturbation(x, y, radius=0.1, bounds=(0.0, 1.0)), ConfigError, r"out of bounds \(0\.0, 1\.0\)"),
        (lambda x, y: Perturbation(x.half(), y, radius=0.1), ConfigError, "which float16 cannot hold"),
        (lambda x, y: Perturbation(x, y, radius=0.1, norm="2"), ConfigError, "norm='2' needs optimizer="),
        (
            lambda x, y: Perturbation(x, y, radius=0.1, norm="2", bounds=(-9.0, 9.0), optimizer=torch.optim.SGD),
            ConfigError,
            "bounds go with norm='inf' only",
        ),
        (
            lambda x, y: RobustValidation(nn.Linear(4, 2), share=1.0),
            ConfigError,
            r"\.share must be between 0 and 1",
        ),
        (
            lambda x, y: RobustValidation(nn.Linear(4, 2), weight=2.0),
            ConfigError,
            r"\.weight must be between 0 and 1",
        ),
        (lambda x, y: RobustValidation(nn.Linear(4, 2), decay=0.0), ConfigError, r"RobustValidation\.decay"),
        (
            lambda x, y: RobustValidation(nn.Linear(4, 2).requires_grad_(False)),
            ParameterError,
            "each trainable parameter of the model, which has none",
        ),
        (lambda x, y: AdversarialTraining(nn.Linear(4, 2), weight_decay=0.1), ConfigError, "leave weight_decay out"),
        (lambda x, y: attack(nn.Linear(4, 2).double(), x, y, radius=0.1, steps=0), ConfigError, r"attack\.steps"),
        (
            lambda x, y: robust(indices=False).problems["adversarial_training"].loss((x[:5], y[:5])),
            DataError,
            "24 exam",
        ),
    ],
)
def test_bad_input_is_refused(make: Callable[[Tensor, Tensor], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make(*examples(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, DOUBLE])
def test_steps_are_signs_however_small_gradients_are(dtype: torch.dtype) -> None:
    x, y = torch.zeros(1, 4, dtype=dtype), torch.zeros(1).long()
    adversary = Perturbation(x, y, radius=0.25)
    adversary.update([torch.tensor([[0.0, 1e-8, 1.0, -1.0]], dtype=dtype)], {})
    expected = torch.tensor([[0.0, -0.0625, -0.0625, 0.0625]], dtype=dtype)
    torch.testing.assert_close(adversary.module["delta"].detach(), expected)


def test_examples_of_one_number_have_a_ball_each() -> None:
    sgd = lambda p: torch.optim.SGD(p, lr=10.0)  # noqa: E731
    adversary = Perturbation(torch.zeros(2), torch.zeros(2), radius=1.0, norm="2", optimizer=sgd)
    adversary.update([torch.tensor([-3.0, 4.0])], {})
    assert adversary.module["delta"].tolist() == [1.0, -1.0]


def test_an_adversary_that_would_answer_an_earlier_model_is_refused() -> None:
    problems = list(robust().problems.values())
    upper, other, training, adversary = problems
    with pytest.raises(GraphError, match="list 'validation_adversary' before 'adversarial_training'"):
        Engine([upper, training, other, adversary], QUIET, "identity")


@pytest.mark.parametrize("indices", [torch.tensor([0, 24]), torch.tensor([-1]), torch.tensor([0.0])])
def test_perturbations_of_examples_that_there_are_not_are_refused(indices: Tensor) -> None:
    with pytest.raises(DataError, match="24 examples|tensor of integers"):
        Perturbation(*examples(0), radius=0.1).perturbed(indices)


def test_a_missing_adversary_is_named() -> None:
    model = nn.Linear(4, 2).double()
    upper = RobustValidation(model, data=[examples(1)])
    training = AdversarialTraining(model, data=[examples(0)])
    with pytest.raises(GraphError, match="works with the Perturbation 'validation_adversary'"):
        Engine([upper, training], QUIET)
