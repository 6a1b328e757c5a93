"""A weight network whose inner loss hides nothing: its gradient is the published update, its Hessian whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bilevel import Engine, EngineConfig, hypergradcheck
from bilevel.errors import ConfigError, GraphError, LossError, UnknownNameError
from bilevel.hypergrad import available_methods
from bilevel.problems.supervised import Training, Validation
from bilevel.problems.weight_network import LossWeighted, WeightNetwork

DOUBLE = torch.float64
QUIET = EngineConfig(progress=False)
SOLVERS = ("exact", "conjugate_gradient", {"method": "neumann", "terms": 200}, "minres")
METHODS = [name for name in available_methods() if not name.startswith("betty:")]


def data(count: int, wrong: float, seed: int, dtype: torch.dtype = DOUBLE) -> Any:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (count,), generator=generator)
    x = torch.randn(count, 2, generator=generator) + 2 * y[:, None] - 1
    bad = torch.rand(count, generator=generator) < wrong
    return x.to(dtype), (y + bad) % 2


class Hidden(LossWeighted):
    """The usual code: the weight is taken from the loss's value, so that autograd does not see where it comes from."""

    def weighted(self, losses: torch.Tensor) -> torch.Tensor:
        return self.weight_network().weights(losses.detach()) * losses


def engine(
    method: Any = "exact",
    dtype: torch.dtype = DOUBLE,
    kind: type[LossWeighted] = LossWeighted,
    lr: float = 0.05,
    steps: int = 40,
    **inner: Any,
) -> Engine:
    torch.manual_seed(0)
    outer = WeightNetwork(
        hidden=5, data=[data(30, 0.0, 1, dtype)], optimizer=lambda params: torch.optim.Adam(params, lr=lr)
    )
    outer.module.to(dtype)
    with torch.no_grad():
        outer.module[0].weight.mul_(2)  # steep enough for what is hidden to matter
    lower = kind(
        nn.Linear(2, 2).to(dtype),
        weight_decay=0.5,
        data=[data(40, 0.3, 0, dtype)],
        optimizer=lambda params: torch.optim.SGD(params, lr=0.8),
        steps=steps,
        **inner,
    )
    return Engine([outer, lower], QUIET, method)


def solved(method: Any, **settings: Any) -> Engine:
    made = engine(method, lr=0.0, **settings)
    made.step()
    return made


@pytest.mark.parametrize("form", ["integral", "product"])
@pytest.mark.parametrize("method", SOLVERS, ids=str)
def test_hypergradients_are_those_of_the_reference(method: Any, form: str) -> None:
    report = hypergradcheck(solved(method, form=form), rtol=1e-4)
    assert report.passed, str(report)
    assert report.hidden < 1e-3
    assert report.asymmetry < 1e-9


@pytest.mark.parametrize("reference", ["central_difference", "unrolled"])
def test_solving_again_gives_the_same(reference: str) -> None:
    assert hypergradcheck(solved("exact"), reference=reference, rtol=1e-3, raise_on_failure=True).passed


def test_a_detached_weight_hides_a_derivative_and_is_found_out() -> None:
    """The same update as the integral's, and another hypergradient: of the Hessian a term is missing."""
    honest, hidden = solved("exact", nodes=40), solved("conjugate_gradient", kind=Hidden)
    hidden.problems["hidden"].module.load_state_dict(honest.problems["loss_weighted"].module.state_dict())
    report = hypergradcheck(hidden, rtol=1e-3)
    assert not report.passed
    assert report.hidden > 0.01
    # What is right for the detached field by differences is what the integral says by autograd.
    field = solved({"method": "exact", "products": "field"}, kind=Hidden)
    field.problems["hidden"].module.load_state_dict(honest.problems["loss_weighted"].module.state_dict())
    expected, found = honest.hypergradient().grad, field.hypergradient().grad
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("nodes", [1, 2, 8, 32])
def test_the_integrals_gradient_is_the_weight(nodes: int) -> None:
    """``dU/dℓ = V(ℓ)``, up to the rule's error."""
    made = engine(nodes=nodes)
    lower, network = made.problems["loss_weighted"], made.problems["weight_network"]
    losses = torch.linspace(0, 6, 13, dtype=DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(lower.weighted(losses).sum(), losses)
    error = float((slope - network.weights(losses)).detach().abs().max())
    assert error < {1: 1.0, 2: 0.2, 8: 2e-3, 32: 1e-9}[nodes]
    assert error > {1: 0.01, 2: 1e-3, 8: 0.0, 32: -1.0}[nodes]


def test_the_first_update_is_the_published_one() -> None:
    """``Σ V(ℓᵢ) ∇ℓᵢ / n`` with V at the present losses."""
    made = engine(nodes=40)
    lower, network = made.problems["loss_weighted"], made.problems["weight_network"]
    x, y = lower.data[0]
    losses = F.cross_entropy(lower(x), y, reduction="none")
    decay = torch.stack([part.square().sum() for part in lower.parameters]).sum() / 4
    published = (network.weights(losses).detach() * losses).mean() + decay
    expected = torch.autograd.grad(published, lower.parameters)
    found = torch.autograd.grad(lower.loss((x, y))["loss"], lower.parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_a_constant_weight_is_a_scaled_loss() -> None:
    for form in ("integral", "product"):
        made = engine(form=form)
        network = made.problems["weight_network"]
        with torch.no_grad():
            network.module[2].weight.zero_()
            network.module[2].bias.fill_(0.4)
        lower = made.problems["loss_weighted"]
        x, y = lower.data[0]
        losses = F.cross_entropy(lower(x), y, reduction="none")
        torch.testing.assert_close(lower.weighted(losses), torch.tensor(0.4, dtype=DOUBLE).sigmoid() * losses)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_every_method_runs(method: str, dtype: torch.dtype) -> None:
    made = engine(method, dtype, steps=3)
    network = made.problems["weight_network"]
    losses = torch.linspace(0, 4, 5, dtype=dtype)
    before = network.weights(losses).detach().clone()
    made.step()
    made.step()
    after = network.weights(losses).detach()
    assert after.dtype == dtype
    assert bool(after.isfinite().all())
    assert not torch.equal(before, after)


@pytest.mark.parametrize("method", ["one_step", "minres", "unrolled"])
def test_large_losses_lose_weight_where_labels_are_wrong(method: str) -> None:
    made = engine(method, steps=3)
    made.run(100)
    weights = made.problems["weight_network"].weights(torch.tensor([0.1, 2.0], dtype=DOUBLE)).detach()
    assert float(weights[1]) < 0.7 * float(weights[0])


class ByClass(WeightNetwork):
    """A network of a user's own shape of input."""

    def weights(self, losses: torch.Tensor) -> torch.Tensor:
        return super().weights(losses.log1p())


def test_a_network_of_ones_own() -> None:
    outer = ByClass(
        nn.Sequential(nn.Linear(1, 2), nn.Softplus(), nn.Linear(2, 1)).double(),
        data=[data(30, 0.0, 1)],
        optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
    )
    sgd = lambda params: torch.optim.SGD(params, lr=0.8)  # noqa: E731
    lower = LossWeighted(nn.Linear(2, 2).double(), weight_decay=0.5, data=[data(40, 0.3, 0)], optimizer=sgd, steps=40)
    made = Engine([outer, lower], QUIET, "minres")
    made.step()
    assert hypergradcheck(made, rtol=1e-4, raise_on_failure=True).passed


def test_the_default_network_serves_models_of_every_dtype() -> None:
    batch = data(10, 0.0, 0)
    assert batch[0].dtype == torch.float64
    sgd = lambda params: torch.optim.SGD(params, lr=0.8)  # noqa: E731
    for form in ("integral", "product"):
        lower = LossWeighted(nn.Linear(2, 2).double(), form=form, data=[batch], optimizer=sgd)
        outer = WeightNetwork(data=[batch], optimizer=sgd)
        Engine([outer, lower], QUIET, "one_step").step()
        assert lower.weighted(torch.rand(3, dtype=torch.float64)).dtype == torch.float64
        assert outer.parameters[0].dtype == torch.float32


def test_saved_networks_come_back(tmp_path: Any) -> None:
    first, second = engine(steps=3), engine(steps=3)
    first.run(2)
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    assert first.step().losses == second.step().losses


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: WeightNetwork(hidden=0), ConfigError, r"WeightNetwork.hidden must be an integer of at least 1"),
        (lambda: LossWeighted(nn.Linear(1, 1), form="detached"), UnknownNameError, r"'integral', 'product'"),
        (lambda: LossWeighted(nn.Linear(1, 1), nodes=0), ConfigError, r"LossWeighted.nodes must be an integer"),
        (lambda: LossWeighted(nn.Linear(1, 1), weight_decay=-1.0), ConfigError, r"loss_weighted.weight_decay must be"),
    ],
)
def test_settings_without_sense_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_engines_that_lack_a_part_say_so() -> None:
    sgd = lambda params: torch.optim.SGD(params, lr=0.8)  # noqa: E731
    batch = data(10, 0.0, 0, torch.float32)
    outer = Validation(nn.Linear(1, 1), data=[batch], optimizer=sgd)
    with pytest.raises(GraphError, match=r"works with a WeightNetwork, of which its engine has 0"):
        Engine([outer, LossWeighted(nn.Linear(2, 2), data=[batch], optimizer=sgd)], QUIET, "identity")
    network = WeightNetwork(data=[batch], optimizer=sgd)
    mean = lambda outputs, targets, reduction="mean": F.cross_entropy(outputs, targets)  # noqa: E731
    with pytest.raises(LossError, match=r"values for each of the 10 examples"):
        Engine([network, LossWeighted(nn.Linear(2, 2), criterion=mean, data=[batch], optimizer=sgd)], QUIET, "identity")
    with pytest.raises(GraphError, match=r"does not depend on the parameters of any problem above it"):
        Engine([network, Training(nn.Linear(2, 2), data=[batch], optimizer=sgd)], QUIET, "identity")
