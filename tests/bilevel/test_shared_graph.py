"""Mixed products where the last inner step started, on what the step itself has computed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bilevel import Automatic, Engine, EngineConfig, FiniteDifference, Identity, OneStep, hypergradcheck
from bilevel.errors import BilevelWarning, ConfigError, LossError
from bilevel.hypergrad import SAMA, as_estimator
from tests.bilevel.test_engine import QUIET, Classifier, Decay, Quadratic, Target, adam, data, sgd
from tests.bilevel.test_one_step_engine import double, implicit_parts, network

OLD = {
    "identity": Identity(center="old"),
    "central": FiniteDifference(center="old"),
    "forward": FiniteDifference(center="old", difference="forward"),
}
TOLERANCE = {"identity": 1e-12, "central": 1e-7, "forward": 1e-5}
pytestmark = pytest.mark.filterwarnings("ignore:method 'unrolled':bilevel.errors.BilevelWarning")


def passes(method, **settings) -> tuple[int, int]:
    """Those of a whole outer step with one inner step."""
    engine = double(method, **{"steps": 1, **settings})
    engine.step()
    return engine.step().passes


def test_whole_steps_take_the_promised_passes():
    # inner step, outer loss, product
    assert passes(Identity(center="old")) == (2, 3)
    assert passes(Identity()) == (3, 4)
    assert passes(FiniteDifference(center="old", difference="forward")) == (3, 3)
    assert passes(FiniteDifference(center="old")) == (4, 4)
    assert passes(FiniteDifference()) == (4, 4)
    assert passes(Automatic()) == (3, 4)
    assert passes(OneStep(memory="graph")) == (2, 3)
    assert passes(SAMA(center="old", difference="exact", memory="graph"), optimizer=adam(0.1)) == (2, 3)
    # Further inner steps cost a plain pass each.
    for method, (forward, backward) in ((Identity(center="old"), (2, 3)), (OLD["forward"], (3, 3))):
        assert passes(method, steps=8) == (forward + 7, backward + 7)
    # Under autocast the step's own gradient does not count, and is made again.
    half = EngineConfig(progress=False, precision="bfloat16")
    assert passes(OLD["forward"], config=half) == (4, 4)


@pytest.mark.parametrize("kind", OLD)
@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_one_step_without_the_learning_rate(kind, steps):
    # vᵀ dw⁺/dλ = −η vᵀ ∂²f/∂w∂λ at the old point, for any network, and whatever the optimiser makes of the gradient.
    settings = {"module": network(), "steps": steps, "optimizer": sgd(0.2, momentum=0.9)}
    expected = implicit_parts(double(OneStep(1.0), **settings))
    found = implicit_parts(double(OLD[kind], **settings))
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[kind], atol=0)
    assert not torch.allclose(implicit_parts(double(Identity(), **settings)), expected, rtol=1e-4)


def test_a_kept_graph_gives_the_same_bits_as_a_replayed_step():
    for replayed, kept in (
        (OneStep(), OneStep(memory="graph")),
        (SAMA(center="old", difference="exact"), SAMA(center="old", difference="exact", memory="graph")),
    ):
        settings = {"module": network(), "optimizer": adam(0.05)}
        assert torch.equal(*(implicit_parts(double(method, **settings)) for method in (replayed, kept)))


def test_the_report_says_where_the_product_was_taken():
    for kind, method in OLD.items():
        info = double(method).step().solves["classifier"]
        assert info.method == method.name
        assert info.message.startswith("at the inner parameters before the last step")
        assert ("on the graph of the step's own gradient" in info.message) == (kind == "identity")
        assert info.products == {"identity": 1, "central": 2, "forward": 1}[kind]
    assert double(Identity()).step().solves["classifier"].message == ""


@pytest.mark.parametrize("kind", OLD)
def test_after_the_step_the_old_point_is_evaluated_again(kind):
    # The graph is freed with the outer update, and belongs to outer parameters that are no more.
    engine = double(OLD[kind], module=network())
    with pytest.raises(ConfigError, match="none are recorded.*take a step first"):
        engine.hypergradient()
    engine.step()
    found = engine.hypergradient()
    assert "on the graph" not in found.info.message
    engine.hypergradient_method = OneStep(1.0)
    expected = engine.hypergradient()
    torch.testing.assert_close(found.grad["0"], expected.grad["0"], rtol=TOLERANCE[kind], atol=0)


@pytest.mark.parametrize("kind", OLD)
def test_any_optimizer_and_clipping_will_do(kind):
    # The product asks for the point and the gradient, not for the update.
    class Mine(torch.optim.SGD):
        pass

    def run(method):
        rule = lambda params: Mine(params, lr=0.3)  # noqa: E731
        return implicit_parts(double(method, optimizer=rule, clip=0.05))

    inverse = FiniteDifference() if kind != "identity" else Identity()
    assert torch.isfinite(run(OLD[kind])).all()
    # On a quadratic inner loss both points have the same mixed derivative.
    assert quadratic(OLD[kind]) == pytest.approx(quadratic(inverse), rel=1e-6)


def quadratic(method) -> float:
    outer = Target(0.5, {"inner": 1.0}, "outer", optimizer=sgd(0.1))
    inner = Quadratic(0.1, {"outer": 2.0}, "inner", optimizer=sgd(0.3))
    engine = Engine([outer, inner], QUIET, hypergradient=method)
    for _ in range(3):
        engine.step()
    return outer.module[0].item()


def test_several_problems_above_share_one_graph():
    def run(method):
        first = Target(0.5, {"inner": 1.0}, "first", optimizer=sgd(0.1))
        second = Target(-0.5, {"inner": 2.0}, "second", optimizer=sgd(0.1))
        inner = Quadratic(0.1, {"first": 2.0, "second": 1.0}, "inner", optimizer=sgd(0.3))
        engine = Engine([first, second, inner], QUIET, hypergradient=method)
        result = [engine.step() for _ in range(3)][-1]
        return first.module[0].item(), second.module[0].item(), result.passes

    first, second, taken = run(Identity(center="old"))
    plain = run(Identity())
    assert (first, second) == pytest.approx(plain[:2], rel=1e-6)
    assert taken == (1 + 2, 1 + 2 + 2)
    assert plain[2] == (1 + 2 + 2, 1 + 2 + 4)


def test_activation_checkpointing_computes_again_with_the_parameters_of_the_step():
    # Backward of the kept graph runs after the update: the modules hold other values by then.
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    class Scaled(Classifier):  # the product goes through the network's forward pass, and so through the checkpoint
        def loss(self, batch):
            return F.cross_entropy(self(batch[0] * self.decay.module[0].exp()), batch[1])

    def run(module):
        batches = [(x.double(), y) for x, y in data(shuffle=False)]
        decay = Decay(nn.ParameterList([torch.tensor(-0.5).double()]), optimizer=sgd(0.1), data=batches)
        inner = Scaled(module.double(), steps=2, optimizer=sgd(0.5), data=batches, name="classifier")
        return implicit_parts(Engine([decay, inner], QUIET, hypergradient=Identity(center="old")))

    torch.testing.assert_close(run(Checkpointed()), run(Checkpointed().body), rtol=1e-12, atol=0)


def test_where_a_graph_cannot_be_kept_the_new_point_is_named():
    with pytest.raises(ConfigError, match=r"keeps the graphs.*precision='bfloat16'.*use center='new'"):
        double(Identity(center="old"), config=EngineConfig(progress=False, precision="bfloat16"))
    with pytest.raises(ConfigError, match=r"precision='bfloat16'.*use memory='replay'"):
        double(OneStep(memory="graph"), config=EngineConfig(progress=False, precision="bfloat16"))

    class Kept(Classifier):
        def project(self):
            pass

    decay = Decay(nn.ParameterList([torch.tensor(-2.0)]), optimizer=sgd(0.1), data=data())
    inner = Kept(nn.Linear(4, 3), optimizer=sgd(0.1), data=data(), name="classifier")
    for method in OLD.values():
        with pytest.raises(ConfigError, match=r"project\(\) or response_loss\(\).*use center='new'"):
            Engine([decay, inner], QUIET, hypergradient=method)


@pytest.mark.parametrize("kind", OLD)
def test_below_a_middle_level_the_new_point_is_named(kind):
    top = Target(0.5, {"middle": 1.0}, "top", optimizer=sgd(0.1))
    middle = Quadratic(0.1, {"top": 1.0, "low": 1.0}, "middle", optimizer=sgd(0.1))
    low = Quadratic(0.2, {"middle": 0.5}, "low", optimizer=sgd(0.1), hypergradient=OLD[kind])
    with pytest.raises(ConfigError, match=r"'low' started.*itself differentiated through.*use center='new'"):
        Engine([top, middle, low], QUIET, hypergradient="identity").step()


def test_below_a_middle_level_auto_is_identity():
    def run(method):
        top = Target(0.5, {"middle": 1.0}, "top", optimizer=sgd(0.1))
        middle = Quadratic(0.1, {"top": 1.0, "low": 1.0}, "middle", optimizer=sgd(0.1))
        low = Quadratic(0.2, {"middle": 0.5}, "low", optimizer=sgd(0.1))
        engine = Engine([top, middle, low], QUIET, hypergradient=method)
        for _ in range(3):
            engine.step()
        return top.module[0].item()

    assert run("auto") == run("identity")


def test_old_points_can_be_checked_and_configured():
    assert as_estimator({"method": "identity", "center": "old"}) == OLD["identity"]
    assert as_estimator({"method": "fd", "center": "old", "difference": "forward"}) == OLD["forward"]
    engine = double(Identity(center="old"), steps=50)
    engine.step()
    report = hypergradcheck(engine, rtol=1.0)
    assert 0.5 < report.cosine <= 1.0


class Attention(nn.Module):
    """One layer of torch's fused attention, which has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = (part[:, None] for part in self.inside(x[:, None].expand(-1, 8, -1)).chunk(3, -1))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


class Weighted(Classifier):
    def loss(self, batch):
        return self.decay.module[0].exp() * F.cross_entropy(self(batch[0]), batch[1])


def test_auto_in_an_engine_says_once_what_it_does_and_keeps_it(tmp_path):
    def engine():
        torch.manual_seed(0)
        decay = Decay(nn.ParameterList([torch.tensor(-2.0)]), optimizer=sgd(0.1), data=data(shuffle=False))
        inner = Weighted(Attention(), optimizer=sgd(0.3), data=data(shuffle=False), name="classifier")
        return Engine([decay, inner], QUIET, hypergradient="auto")

    first = engine()
    with pytest.warns(BilevelWarning, match="'auto' takes central differences: the loss of problem 'classifier'"):
        assert first.step().passes == (2 + 1 + 2, 2 + 1 + 2)  # with those that found out
    result = first.step()  # warnings are errors here
    assert result.passes == (4, 4)
    assert result.solves["classifier"].message.startswith("central differences; epsilon")
    first.save(tmp_path / "state")
    second = engine()
    second.load(tmp_path / "state")
    assert second.step().losses == first.step().losses
    assert double("auto").step().solves["classifier"].message == "exact mixed product"


def test_an_engine_holds_no_graph_of_a_loss_that_has_no_second_derivative():
    # The error that says so was kept with its traceback, and that with the graph: gigabytes for a language model.
    born = []

    class Hook:
        def __call__(self, grad):
            pass

    class Watched(Weighted):
        def loss(self, batch):
            logits, hook = self(batch[0]), Hook()
            logits.register_hook(hook)  # alive as long as the graph
            born.append(weakref.ref(hook))
            return self.decay.module[0].exp() * F.cross_entropy(logits, batch[1])

    gc.collect()
    decay = Decay(nn.ParameterList([torch.tensor(-2.0)]), optimizer=sgd(0.1), data=data(shuffle=False))
    inner = Watched(Attention(), optimizer=sgd(0.3), data=data(shuffle=False), name="classifier")
    engine = Engine([decay, inner], QUIET, hypergradient=FiniteDifference())
    assert list(engine.dependencies.inner) == ["classifier"]
    assert born
    assert not any(reference() is not None for reference in born)
    with pytest.raises(LossError, match="fused attention"):
        Engine([decay, inner], QUIET, hypergradient="identity")
