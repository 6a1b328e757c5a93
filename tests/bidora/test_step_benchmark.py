"""The benchmark of BiDoRA's step: what is timed side by side is the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bidora_step


@pytest.fixture(scope="module")
def setting() -> bidora_step.Setting:
    return bidora_step.Setting("minilm", 4, 2, 8, "cpu", 1e-3, 1e-5)


@pytest.mark.parametrize("method", [bidora_step.CENTRAL, bidora_step.FORWARD, bidora_step.EXACT, bidora_step.SHARED])
def test_the_loop_by_hand_takes_the_engines_step(setting, method):
    def after(runs: str) -> list[torch.Tensor]:
        model = setting.model("exact")
        bidora_step.attention(model, "eager")
        step = bidora_step.runner(setting, bidora_step.Row("", method, runs), {"exact": model})
        step()
        inner, outer = bidora_step.split_parameters(model)
        return [p.detach().clone() for p in inner + outer]

    engine, hand = after("engine"), after("hand")
    # AdamW's first step is the gradient's sign: an entry near zero may turn, by rounding.
    wrong = sum(int((~torch.isclose(a, b, rtol=0, atol=1e-5)).sum()) for a, b in zip(engine, hand, strict=True))
    assert wrong <= 1e-3 * sum(p.numel() for p in hand)
