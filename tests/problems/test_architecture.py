"""Architecture search: mixtures and cells against their formulas, their hypergradient, and what a choice leaves."""

from __future__ import annotations

import copy
import functools
import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from bilevel import Engine, EngineConfig, OneStep, Unrolled, hypergradcheck
from bilevel.errors import ConfigError, GraphError, ParameterError, UnknownNameError
from bilevel.hypergrad import available_methods
from bilevel.problems.architecture import Architecture, SupernetTraining, discretise, genotype
from bilevel.problems.search_space import Cell, DiscreteCell, MixedOperation, image_operations, tabular_operations

DOUBLE = torch.float64
QUIET = EngineConfig(progress=False)
NAMES = ("none", "skip_connect", "tanh")
adam = lambda params: torch.optim.Adam(params, lr=0.05)  # noqa: E731
sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731


def blobs(count: int, seed: int, dtype: torch.dtype = DOUBLE) -> Any:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (count,), generator=generator)
    angle = y * 2 * torch.pi / 3
    x = torch.stack([angle.cos(), angle.sin()], 1) + torch.randn(count, 2, generator=generator) / 2
    return x.to(dtype), y


def supernet(dtype: torch.dtype = DOUBLE) -> nn.Sequential:
    torch.manual_seed(0)
    cell = Cell(tabular_operations(2, NAMES), num_inputs=1, num_nodes=2, combine="sum")
    return nn.Sequential(cell, nn.Linear(2, 3)).to(dtype)


def search(method: Any = "exact", dtype: torch.dtype = DOUBLE, steps: int = 1, decay: float = 0.2) -> Engine:
    network = supernet(dtype)
    outer = Architecture(network, optimizer=adam, data=[blobs(30, 1, dtype)], entropy=0.01)
    inner = SupernetTraining(
        network,
        optimizer=sgd,
        data=[blobs(40, 2, dtype)],
        steps=steps,
        weight_decay=decay,
        criterion=nn.functional.cross_entropy,
    )
    return Engine([outer, inner], QUIET, method)


def uneven(engine: Engine) -> Engine:
    with torch.no_grad():
        for place, logits in enumerate(engine.problems["architecture"].parameters):
            logits.copy_(torch.linspace(-1, 1, 3).roll(place))
    return engine


@functools.cache
def solution() -> dict[str, Any]:
    """Uneven α, and the weights that solve the inner problem there."""
    inner = uneven(search()).problems["supernet_training"]
    solver = torch.optim.LBFGS(inner.parameters, max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Any:
        solver.zero_grad()
        loss = inner.loss(inner.data[0])["loss"]
        loss.backward()
        return loss

    for _ in range(3):
        solver.step(closure)
    return {name: value.clone() for name, value in inner.module.state_dict().items()}


def solved(method: Any) -> Engine:
    engine = search(method)
    engine.problems["supernet_training"].module.load_state_dict(solution())
    return engine


@pytest.mark.parametrize(
    "method", ["exact", "conjugate_gradient", {"method": "neumann", "terms": 300}, "gmres"], ids=str
)
def test_hypergradients_are_those_of_the_reference(method: Any) -> None:
    report = hypergradcheck(solved(method), rtol=1e-4)
    assert report.passed, str(report)
    assert report.hidden < 1e-3
    assert report.inner_distance < 1e-3


def test_solving_again_gives_the_same() -> None:
    hypergradcheck(solved("exact"), reference="central_difference", rtol=1e-3, raise_on_failure=True)


def test_unrolled_updates_tend_to_the_reference() -> None:
    errors = []
    for steps in (5, 20, 80):
        engine = search("unrolled", steps=steps)
        engine.problems["supernet_training"].module.load_state_dict(solution())
        engine.problems["architecture"].optimizer.param_groups[0]["lr"] = 0.0
        engine.step()
        errors.append(hypergradcheck(engine).relative_error)
    assert errors[2] < 0.3 * errors[1] < 0.3 * errors[0]


def test_darts_second_order_is_one_plain_step_ahead() -> None:
    """``∇F(w', α) − ξ ∇²f(w, α) ∇F(w', α)`` at ``w' = w − ξ ∇f(w, α)``: equation 7, by hand."""
    twin = copy.deepcopy(uneven(search()).problems["architecture"].module)
    x, y = blobs(40, 2)
    u, z = blobs(30, 1)
    alphas = [m.logits for m in twin.modules() if isinstance(m, MixedOperation)]
    weights = {name: p for name, p in twin.named_parameters() if not name.endswith("logits")}
    training = nn.functional.cross_entropy(twin(x), y) + 0.1 * sum(p.square().sum() for p in weights.values())
    grads = torch.autograd.grad(training, list(weights.values()), create_graph=True)
    ahead = {name: p - 0.1 * g for (name, p), g in zip(weights.items(), grads, strict=True)}
    validation = nn.functional.cross_entropy(torch.func.functional_call(twin, ahead, (u,)), z)
    entropies = [torch.special.entr(a.softmax(0)).sum() / torch.tensor(3.0, dtype=DOUBLE).log() for a in alphas]
    (validation + 0.01 * torch.stack(entropies).mean()).backward()
    for method, tolerance in ((OneStep(difference="central"), 1e-6), (Unrolled(steps=1), 1e-10)):
        other = uneven(search(method))
        other.problems["architecture"].optimizer.param_groups[0]["lr"] = 0.0
        other.step()
        found = other.hypergradient().grad.values()
        for mine, alpha in zip(found, alphas, strict=True):
            torch.testing.assert_close(mine, alpha.grad, rtol=0, atol=tolerance)


def test_darts_first_order_is_the_direct_part() -> None:
    engine = search(OneStep(learning_rate=0.0, difference="central"))
    engine.step()
    found = engine.hypergradient()
    for name, grad in found.grad.items():
        assert torch.equal(grad, found.direct[name])
        assert float(grad.norm()) > 0


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("method", available_methods())
def test_every_method_searches(method: str, dtype: torch.dtype) -> None:
    engine = search(method, dtype)
    before = [p.detach().clone() for p in engine.problems["architecture"].parameters]
    for _ in range(2):
        engine.step()
    for start, end in zip(before, engine.problems["architecture"].parameters, strict=True):
        assert end.dtype == dtype
        assert not torch.equal(start, end)


def test_the_useful_candidate_wins() -> None:
    """Labels that are a parity need a product of features: the only candidate that can make one is chosen."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 2, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.left(x) * self.right(x)

    torch.manual_seed(0)
    mixture = MixedOperation({"linear": lambda: nn.Linear(2, 2), "skip": nn.Identity, "product": Product})
    network = nn.Sequential(mixture, nn.Linear(2, 2))
    outer = Architecture(network, optimizer=adam, data=[(x[200:], y[200:])])
    momentum = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)  # noqa: E731
    inner = SupernetTraining(network, optimizer=momentum, data=[(x[:200], y[:200])])
    Engine([outer, inner], QUIET, "finite_difference").run(100)
    assert outer.genotype() == {"0": "product"}
    assert float(outer.weights()["0"]["product"].detach()) > 0.9
    assert outer.evaluate()["entropy"] < 0.5
    assert outer.evaluate()["parameter_free"] < 0.1


def test_a_mixture_is_the_weighted_sum() -> None:
    parts = {"linear": nn.Linear(2, 2), "none": nn.Identity(), "skip": nn.Identity()}
    mixture = MixedOperation(parts, temperature=0.5)
    with torch.no_grad():
        mixture.logits.copy_(torch.tensor([0.3, -0.2, 0.1]))
    x = torch.randn(5, 2)
    p = (2 * mixture.logits).softmax(0)
    torch.testing.assert_close(mixture(x), p[0] * parts["linear"](x) + (p[1] + p[2]) * x)
    assert mixture.choice() == ("linear", pytest.approx(float(p[0].detach().log())))
    mixture.temperature = 0.001
    torch.testing.assert_close(mixture(x), parts["linear"](x))


def with_logits(cell: Cell, **logits: list[float]) -> Cell:
    with torch.no_grad():
        for edge, values in logits.items():
            cell.edges[edge.removeprefix("edge_")].logits.copy_(torch.tensor(values))
    return cell


def test_a_mixture_that_has_chosen_has_an_entropy_of_zero_and_a_gradient() -> None:
    # softmax rounds π to 0 here, where -π log π has no derivative
    mixture = MixedOperation({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)}, temperature=0.01)
    with torch.no_grad():
        mixture.logits.copy_(torch.tensor([1.5, 0.0]))
    entropy = Architecture(mixture, optimizer=adam, entropy=1.0).mean_entropy()
    entropy.backward()
    assert float(entropy.detach()) == 0.0 == float(mixture.weights()[1].detach())
    assert torch.equal(mixture.logits.grad, torch.zeros(2))


@pytest.mark.parametrize("logits", [[0.0, 0.0, 0.0], [1.0, -0.5, 0.2]])
def test_the_entropy_is_relative_to_its_maximum(logits: list[float]) -> None:
    mixture = MixedOperation({"a": nn.Identity, "b": nn.Tanh, "c": nn.ReLU}, temperature=0.7)
    with torch.no_grad():
        mixture.logits.copy_(torch.tensor(logits))
    expected = torch.distributions.Categorical(logits=mixture.logits.detach() / 0.7).entropy() / math.log(3)
    torch.testing.assert_close(Architecture(mixture, optimizer=adam).mean_entropy().detach(), expected)


def test_a_choice_follows_darts_rule() -> None:
    """``none`` weakens an edge and is never chosen; the two strongest edges of each node stay."""
    names = ("none", "linear", "tanh")
    cell = with_logits(
        Cell(tabular_operations(2, names), num_inputs=2, num_nodes=2),
        edge_0_2=[0.0, 1.0, 0.0],
        edge_1_2=[9.0, 0.0, 1.0],  # almost nothing but none: weak, and still one of two
        edge_0_3=[5.0, 2.0, 1.0],  # the largest α of its node, and yet the weakest edge
        edge_1_3=[0.0, 0.0, 0.5],
        edge_2_3=[0.0, 1.0, 0.0],
    )
    expected = {"2": {"0": "linear", "1": "tanh"}, "3": {"1": "tanh", "2": "linear"}}
    assert cell.genotype() == expected
    assert cell.genotype(num_edges=1) == {"2": {"0": "linear"}, "3": {"2": "linear"}}
    assert json.loads(json.dumps(genotype(nn.Sequential(cell)))) == {"0": expected}
    x, z = torch.randn(4, 2), torch.randn(4, 2)
    edge = lambda key, name: cell.edges[key].candidates[name]  # noqa: E731
    second = edge("0_2", "linear")(x) + edge("1_2", "tanh")(z)
    third = edge("1_3", "tanh")(z) + edge("2_3", "linear")(second)
    torch.testing.assert_close(discretise(cell)(x, z), torch.cat([second, third], 1))
    assert sum(p.numel() for p in discretise(cell).parameters()) == 4 * 6


@pytest.mark.parametrize("combine", ["concat", "sum", "last"])
def test_a_decided_network_is_what_it_is_cut_to(combine: str) -> None:
    torch.manual_seed(0)
    cell = Cell(tabular_operations(3), num_inputs=2, num_nodes=2, combine=combine, temperature=1e-3)
    for edge in cell.edges.values():
        nn.init.normal_(edge.logits)
        nn.init.constant_(edge.logits[0], -9.0)  # "none"
    x, z = torch.randn(2, 4, 3)
    torch.testing.assert_close(cell(x, z), discretise(cell, num_edges=3)(x, z))


def test_an_engine_s_network_is_cut_without_a_trace() -> None:
    engine = search("identity")
    engine.run(3)
    network = engine.problems["architecture"].module
    state = copy.deepcopy(network.state_dict())
    found, fresh = discretise(network), discretise(network, fresh=True)
    assert not any(isinstance(part, MixedOperation | Cell) for part in found.modules())
    assert not any("logits" in name for name in found.state_dict())
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name])
    torch.testing.assert_close(found[1].weight, network[1].weight)
    assert not torch.equal(fresh[1].weight, network[1].weight)
    assert found(blobs(4, 0)[0]).shape == (4, 3)
    assert genotype(network) == engine.problems["architecture"].genotype()


def test_shared_cells_choose_alike_and_have_weights_of_their_own() -> None:
    operations = tabular_operations(2, NAMES)
    first = Cell(operations, num_inputs=1, num_nodes=2, combine="last")
    second = Cell(operations, num_inputs=1, num_nodes=2, combine="last", share=first)
    network = nn.Sequential(first, second, nn.Linear(2, 3)).double()
    outer = Architecture(network, optimizer=adam, data=[blobs(20, 1)])
    inner = SupernetTraining(network, optimizer=sgd, data=[blobs(20, 2)], weight_decay=0.3)
    engine = Engine([outer, inner], QUIET, "exact")
    engine.run(3)
    assert len(outer.parameters) == 3
    chosen = outer.genotype()
    assert chosen["0"] == chosen["1"]
    assert not torch.equal(
        first.edges["0_1"].candidates["tanh"][0].weight, second.edges["0_1"].candidates["tanh"][0].weight
    )
    assert hypergradcheck(engine, rtol=1e-6).passed


def test_mixtures_are_found_wherever_they_are() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([MixedOperation(tabular_operations(2, ("relu", "glu"))) for _ in range(2)])
            self.logits = nn.Parameter(torch.zeros(2))  # a parameter of the network that only has the name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.parts[1](self.parts[0](x)) + self.logits

    network = nn.Sequential(Block(), nn.Linear(2, 3))
    outer = Architecture(network, optimizer=adam)
    inner = SupernetTraining(network, optimizer=sgd)
    assert outer.parameter_names == ("0.parts.0.logits", "0.parts.1.logits")
    assert "0.logits" in inner.parameter_names
    assert len(outer.parameters) + len(inner.parameters) == len(list(network.parameters()))
    ready = Architecture(network, optimizer=adam(list(outer.parameters)))
    assert ready.parameter_names == outer.parameter_names


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [8, 7])
def test_image_operations_fit_each_other(stride: int, size: int) -> None:
    operations = image_operations(4, stride=stride)
    assert len(operations) == 8
    out = -(-size // stride)
    assert MixedOperation(operations)(torch.randn(2, 4, size, size)).shape == (2, 4, out, out)
    assert not any(isinstance(m, nn.BatchNorm2d) and m.affine for f in operations.values() for m in f().modules())
    assert image_operations(4, affine=True)["sep_conv_3x3"]()[3].affine


def test_a_reduction_cell_has_strides_at_its_inputs_only() -> None:
    def operations(source: int, node: int) -> Any:
        return image_operations(4, ("skip_connect", "max_pool_3x3"), stride=2 if source < 2 else 1)

    cell = Cell(operations, num_nodes=3)
    x = torch.randn(2, 4, 8, 8)
    assert cell(x, x).shape == (2, 12, 4, 4)
    found = DiscreteCell({"2": {"0": "skip_connect"}, "3": {"2": "max_pool_3x3", "1": "skip_connect"}}, operations)
    assert found(x, x).shape == (2, 8, 4, 4)


def test_a_run_goes_on_where_it_stopped(tmp_path: Any) -> None:
    whole, first, second = (search("identity") for _ in range(3))
    whole.run(4)
    first.run(2)
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    second.run(2)
    for mine, other in zip(
        whole.problems["architecture"].parameters, second.problems["architecture"].parameters, strict=True
    ):
        assert torch.equal(mine, other)


CHOICE = {"skip_connect": nn.Identity, "linear": lambda: nn.Linear(2, 2)}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MixedOperation({"linear": nn.Identity}), ConfigError, r"at least two candidates.*\['linear'\]"),
        (lambda: MixedOperation({}), ConfigError, "at least two candidates"),
        (lambda: MixedOperation({"none": nn.Identity, "skip": nn.Identity}), ConfigError, "'none' cannot"),
        (lambda: MixedOperation(CHOICE, temperature=0.0), ConfigError, "temperature must be a finite number above 0"),
        (
            lambda: MixedOperation(CHOICE, logits=nn.Parameter(torch.zeros(3))),
            ConfigError,
            r"shape \(3,\).*2 candidates",
        ),
        (
            lambda: MixedOperation({**CHOICE, "pop": nn.Identity}),
            ConfigError,
            "'pop' cannot be the name of a candidate",
        ),
        (lambda: MixedOperation({**CHOICE, "conv1.5": nn.Identity}), ConfigError, "'conv1.5'.*have a dot"),
        (lambda: MixedOperation({"a": 3, "b": nn.Identity}), ConfigError, "candidate 'a' must be a module.*not 3"),
        (
            lambda: MixedOperation({"wide": nn.Linear(2, 3), "same": nn.Identity()})(torch.randn(4, 2)),
            ConfigError,
            r"one shape, not \{'wide': \(4, 3\), 'same': \(4, 2\)\}",
        ),
        (lambda: MixedOperation(CHOICE).choice(), ConfigError, "equally strong.*before a search"),
        (lambda: Cell({**CHOICE, "relu": nn.ReLU()}), ConfigError, r"modules of its own.*\['relu'\]"),
        (lambda: Cell(CHOICE, num_nodes=0), ConfigError, "Cell.num_nodes must be an integer of at least 1"),
        (lambda: Cell(CHOICE, num_inputs=0), ConfigError, "Cell.num_inputs"),
        (lambda: Cell(CHOICE, combine="mean"), UnknownNameError, "'concat', 'last', 'sum'"),
        (lambda: Cell(CHOICE, share=Cell(CHOICE, num_nodes=2)), ConfigError, "another graph"),
        (lambda: Cell(CHOICE)(torch.randn(1, 2)), ConfigError, "a cell of 2 inputs was called with 1"),
        (lambda: discretise(Cell(CHOICE)), ConfigError, "before a search"),
        (lambda: Cell(CHOICE).genotype(num_edges=0), ConfigError, "num_edges"),
        (lambda: discretise(nn.Linear(2, 2)), ConfigError, "Linear has no MixedOperation"),
        (lambda: genotype(nn.Linear(2, 2)), ConfigError, "Linear has no MixedOperation"),
        (lambda: Architecture(nn.Linear(2, 2), optimizer=adam), ConfigError, "Linear has no MixedOperation"),
        (lambda: SupernetTraining(nn.Linear(2, 2), optimizer=sgd), ConfigError, "Linear has no MixedOperation"),
        (lambda: Architecture(Cell(CHOICE), entropy=float("nan")), ConfigError, "Architecture.entropy"),
        (lambda: DiscreteCell({"1": {"0": "linear"}}, CHOICE), ConfigError, "node 2 of a genotype with 2 inputs"),
        (lambda: DiscreteCell({"2": {"2": "linear"}}, CHOICE), ConfigError, r"sources of \['0', '1'\]"),
        (lambda: DiscreteCell({"2": {}}, CHOICE), ConfigError, "node 2"),
        (
            lambda: DiscreteCell({"2": {"0": "lineer"}}, CHOICE),
            UnknownNameError,
            "edge 0 → 2 'lineer': did you mean 'linear'",
        ),
        (lambda: image_operations(4, ("conv",)), UnknownNameError, "'sep_conv_3x3'"),
        (lambda: tabular_operations(4, ("conv",)), UnknownNameError, "'glu'"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_equally_strong_edges_are_refused() -> None:
    edges = {f"edge_{source}_{node}": [1.0, 0.0] for node in (2, 3) for source in range(node)}
    with pytest.raises(ConfigError, match="edges 1 and 2 into node 3 are equally strong"):
        with_logits(Cell(CHOICE, num_nodes=2), **edges).genotype()


def test_edges_that_are_decided_are_told_apart() -> None:
    """Their weights are all rounded to 1."""
    cell = with_logits(
        Cell(CHOICE, num_inputs=3, num_nodes=1), edge_0_3=[30.0, 0.0], edge_1_3=[20.0, 0.0], edge_2_3=[0.0, 40.0]
    )
    assert cell.genotype() == {"3": {"0": "skip_connect", "2": "linear"}}


def test_the_weights_may_be_trained_alone_first() -> None:
    network = supernet()
    outer = Architecture(network, optimizer=adam, data=[blobs(20, 1)], start=2)
    inner = SupernetTraining(network, optimizer=sgd, data=[blobs(20, 2)])
    engine = Engine([outer, inner], QUIET, "identity")
    before = copy.deepcopy(network.state_dict())
    engine.run(2)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(inner.parameter_names)
    engine.run(3)
    assert not any(
        torch.equal(p, before[name]) for name, p in zip(outer.parameter_names, outer.parameters, strict=True)
    )


def test_a_layer_that_cannot_be_drawn_anew_is_named() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * x

    mixture = MixedOperation({"scale": Scale, "skip": nn.Identity})
    nn.init.constant_(mixture.logits[:1], 1.0)
    assert isinstance(discretise(mixture), Scale)
    with pytest.raises(ParameterError, match=r"Scale '0' has parameters but no reset_parameters"):
        discretise(nn.Sequential(mixture), fresh=True)


def test_attention_is_drawn_anew() -> None:
    # torch names its method _reset_parameters there
    mixture = MixedOperation({"attention": lambda: nn.MultiheadAttention(4, 2), "skip": nn.Identity})
    nn.init.constant_(mixture.logits[:1], 1.0)
    found = discretise(nn.Sequential(mixture), fresh=True)
    assert not torch.equal(found[0].in_proj_weight, mixture.candidates["attention"].in_proj_weight)


def test_a_network_that_the_weights_own_too_is_refused() -> None:
    from bilevel.problems.supervised import Training

    network = supernet()
    outer = Architecture(network, optimizer=adam, data=[blobs(20, 1)])
    with pytest.raises(GraphError, match="both own one parameter"):
        Engine([outer, Training(network, optimizer=sgd, data=[blobs(20, 2)])], QUIET)
