"""The weight-decomposition analysis against computations by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bidora.analysis import LayerChange, WeightDecomposition, weight_decomposition
from bidora.config import BiDoRAConfig
from bidora.model import get_bidora_model
from bilevel.errors import ParameterError

Make = Callable[..., nn.Module]


def test_against_a_computation_by_hand() -> None:
    before = {"a.weight": torch.tensor([[3.0, 4.0], [1.0, 0.0]]), "b.weight": torch.eye(2), "c.weight": torch.eye(2)}
    after = {
        "a.weight": torch.tensor([[8.0, 6.0], [0.0, 3.0]]),  # 5 → 10 and cos 48/50; 1 → 3 and a right angle
        "b.weight": torch.tensor([[-1.0, 0.0], [0.0, 2.0]]),  # reversed; doubled
        "c.weight": torch.eye(2),
    }
    change = weight_decomposition(before, after)
    assert [layer.name for layer in change.layers] == ["a", "b", "c"]
    magnitude, direction = [3.5, 0.5, 0.0], [(0.04 + 1) / 2, 1.0, 0.0]
    assert [layer.magnitude for layer in change.layers] == pytest.approx(magnitude)
    assert [layer.direction for layer in change.layers] == pytest.approx(direction)
    x, y = (torch.tensor(v, dtype=torch.float64) for v in (direction, magnitude))
    covariance = float(((x - x.mean()) * (y - y.mean())).mean())
    assert change.slope == pytest.approx(covariance / float(x.var(correction=0)))
    assert change.correlation == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]))


@given(st.floats(-5, 5), st.floats(-3, 3), st.lists(st.floats(0, 2), min_size=2, max_size=6, unique=True))
def test_slope_and_correlation_of_points_on_a_line(slope: float, offset: float, directions: list[float]) -> None:
    if max(directions) - min(directions) < 1e-2 or abs(slope) < 1e-2:
        return
    change = WeightDecomposition(tuple(LayerChange("l", slope * d + offset, d) for d in directions))
    assert change.slope == pytest.approx(slope, rel=1e-6)
    assert change.correlation == pytest.approx(math.copysign(1, slope), rel=1e-6)


def test_a_single_layer_has_no_slope() -> None:
    change = weight_decomposition({"w": torch.eye(2)}, {"w": 2 * torch.eye(2)})
    assert math.isnan(change.slope)
    assert math.isnan(change.correlation)


def test_zero_rows_have_a_defined_change() -> None:
    before = {"w": torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])}
    after = {"w": torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 0.0]])}
    (layer,) = weight_decomposition(before, after).layers
    assert layer.magnitude == pytest.approx((0 + 2 + 1) / 3)
    assert layer.direction == pytest.approx((0 + 1 + 1) / 3)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_an_adapted_model_is_compared_by_its_effective_weights(kind: str, make_model: Make) -> None:
    """The magnitude alone moves ΔM alone; of sources, a model, its state dict and a merged model agree."""
    targets = {"bert": ["query"], "llama": ["v_proj"], "gpt2": ["c_attn"]}[kind]
    config = BiDoRAConfig(r=2, target_modules=targets, task_type="SEQ_CLS", fan_in_fan_out=kind == "gpt2")
    base = make_model(kind)
    adapted = get_bidora_model(make_model(kind), config)
    start = weight_decomposition(base, adapted)
    assert len(start.layers) == 2
    assert all(layer.name.rpartition(".")[2] in targets for layer in start.layers)
    assert all(layer.magnitude < 1e-6 and layer.direction < 1e-6 for layer in start.layers)

    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "magnitude" in name:
                p.add_(0.5)
    moved = weight_decomposition(base, adapted)
    assert [layer.magnitude for layer in moved.layers] == pytest.approx([0.5, 0.5], rel=1e-4)
    assert all(layer.direction < 1e-6 for layer in moved.layers)

    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_()
    full = weight_decomposition(base, adapted)
    assert all(layer.direction > 1e-2 for layer in full.layers)
    assert_equal(weight_decomposition(base.state_dict(), adapted), full)
    adapted.merge_adapter()
    assert_equal(weight_decomposition(base, adapted), full)
    adapted.unmerge_adapter()
    merged = adapted.merge_and_unload()
    everything = {layer.name: layer for layer in weight_decomposition(base, merged).layers}
    assert len(everything) > 2
    assert_equal(WeightDecomposition(tuple(everything[layer.name] for layer in full.layers)), full)


def assert_equal(value: WeightDecomposition, reference: WeightDecomposition) -> None:
    for ours, theirs in zip(value.layers, reference.layers, strict=True):
        assert ours.name == theirs.name
        assert ours.magnitude == pytest.approx(theirs.magnitude, rel=1e-4)
        assert ours.direction == pytest.approx(theirs.direction, rel=1e-4)


def test_plain_lora_is_compared_too(make_bert: Make) -> None:
    adapted = get_peft_model(make_bert(), LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    change = weight_decomposition(make_bert(), adapted)
    merged = weight_decomposition(make_bert().state_dict(), adapted.merge_and_unload())
    by_name = {layer.name: layer for layer in merged.layers}
    assert_equal(WeightDecomposition(tuple(by_name[layer.name] for layer in change.layers)), change)
    assert all(layer.direction > 0 for layer in change.layers)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"a": torch.eye(2)}, {"b": torch.eye(2)}, "none stands on both sides: before has a …, after has b …"),
        ({"a": torch.eye(2)}, {"a": torch.eye(3)}, r"'a' has shape \(2, 2\) before and \(3, 3\) after"),
        ({"a.lora_A.default.weight": torch.eye(2)}, {"a": torch.eye(2)}, "is an adapter's: pass the model itself"),
    ],
)
def test_sources_that_do_not_fit_are_errors(before: dict[str, Tensor], after: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        weight_decomposition(before, after)
