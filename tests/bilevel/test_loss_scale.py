"""Loss scaling is that of torch.amp.GradScaler, and an endless overflow is not taken for one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bilevel.errors import CheckpointError, ConfigError, NonFiniteError
from bilevel.loss_scale import LossScale, LossScaling

LARGE = 1e35  # times a scale of 2**16 it is past the largest float32


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_it_moves_as_torchs_own(interval):
    """Scale, skipped updates and parameters, bit for bit, over a sequence with overflows in it."""
    start, sizes = 2.0**14, [1.0, 1.0, LARGE, 1.0, LARGE, LARGE, 1.0, 1.0, 1.0, 1.0, 1.0, LARGE, 1.0]
    theirs, ours = (nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=start, growth_interval=interval)
    scale = LossScale("inner", LossScaling(initial=start, interval=interval))
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in (theirs, ours)]
    for size in sizes:
        optimizers[0].zero_grad()
        scaler.scale((theirs * size).square().sum()).backward()
        scaler.step(optimizers[0])
        scaler.update()
        grads = scale.unscaled(torch.autograd.grad(scale.scaled((ours * size).square().sum()), [ours]))
        scale.update(overflow=grads is None)
        if grads is not None:
            ours.grad = grads[0]
            optimizers[1].step()
        assert scale.value == scaler.get_scale()
        assert scale.good == scaler.state_dict()["_growth_tracker"]
        assert torch.equal(theirs, ours)
    assert scale.overflows == 4


def test_the_defaults_are_torchs_own():
    scaler, settings = torch.amp.GradScaler("cpu"), LossScaling()
    assert settings.growth == scaler.get_growth_factor()
    assert settings.backoff == scaler.get_backoff_factor()
    assert settings.interval == scaler.get_growth_interval()
    assert settings.initial == scaler.get_scale() == 65536.0


def test_a_half_precision_loss_is_scaled_in_float32():
    scale = LossScale("inner")
    loss = torch.tensor(4.0, dtype=torch.float16)
    assert scale.scaled(loss).item() == 4.0 * 65536
    assert scale.scaled(loss).dtype == torch.float32
    assert scale.unscaled([torch.tensor([65504.0], dtype=torch.float16)])[0].dtype == torch.float32
    assert scale.scaled(loss.double()).dtype == torch.float64


def test_powers_of_two_scale_without_rounding():
    grads = [torch.randn(50, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    scale = LossScale("inner")
    assert all(map(torch.equal, scale.unscaled([grad * scale.value for grad in grads]), grads))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_asking_for_unscaled_gradients_changes_nothing(bad):
    scale = LossScale("inner")
    before = scale.state_dict()
    assert scale.unscaled([torch.ones(3), torch.tensor([1.0, bad])]) is None
    assert scale.state_dict() == before


def test_it_does_not_grow_past_what_float32_holds():
    scale = LossScale("inner", LossScaling(initial=2.0**126, interval=1))
    for _ in range(4):
        scale.update(overflow=False)
    assert scale.value == 2.0**127


def test_gradients_that_never_become_finite_are_no_overflow():
    """``GradScaler`` backs off for ever, and the run stands still without a word."""
    scale = LossScale("inner")
    for _ in range(40):
        scale.update(overflow=True)
    assert scale.value == 2.0**-24
    with pytest.raises(NonFiniteError, match=r"problem 'inner' is not finite even at a loss scale .*bfloat16"):
        scale.update(overflow=True)


def test_its_state_goes_out_and_in():
    scale = LossScale("inner", LossScaling(interval=3))
    for overflow in (True, False, False):
        scale.update(overflow=overflow)
    assert scale.state_dict() == {"value": 2.0**15, "good": 2, "overflows": 1}
    other = LossScale("inner", LossScaling(interval=3))
    other.load_state_dict(scale.state_dict())
    for made in (scale, other):
        made.update(overflow=False)
    assert other.state_dict() == scale.state_dict() == {"value": 2.0**16, "good": 0, "overflows": 1}


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"value": "x", "good": 0, "overflows": 0},
        {"value": -1.0, "good": 0, "overflows": 0},
        {"value": math.nan, "good": 0, "overflows": 0},
        {"value": 1.0, "good": -1, "overflows": 0},
    ],
)
def test_a_state_that_is_none_is_refused_and_changes_nothing(state):
    scale = LossScale("inner")
    before = scale.state_dict()
    with pytest.raises(CheckpointError, match="inner"):
        scale.load_state_dict(state)
    assert scale.state_dict() == before


@pytest.mark.parametrize(
    "field", [{"initial": 0.0}, {"growth": 1.0}, {"backoff": 1.0}, {"backoff": 0.0}, {"interval": 0}], ids=str
)
def test_settings_are_validated(field):
    with pytest.raises(ConfigError, match=next(iter(field))):
        LossScaling(**field)
