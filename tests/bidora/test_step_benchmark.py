"""The benchmark of BiDoRA's step: what is timed side by side is the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bidora_rows


@pytest.fixture(scope="module")
def setting() -> bidora_rows.Setting:
    return bidora_rows.Setting("minilm", 4, 2, 8, "cpu", 1e-3, 1e-5)


@pytest.mark.parametrize("method", [bidora_rows.CENTRAL, bidora_rows.FORWARD, bidora_rows.EXACT, bidora_rows.SHARED])
def test_the_loop_by_hand_takes_the_engines_step(setting, method):
    def after(runs: str) -> list[torch.Tensor]:
        model = setting.model("exact")
        bidora_rows.attention(model, "eager")
        step = bidora_rows.runner(setting, bidora_rows.Row("", method, runs), {"exact": model})
        step()
        inner, outer = bidora_rows.split_parameters(model)
        return [p.detach().clone() for p in inner + outer]

    engine, hand = after("engine"), after("hand")
    # AdamW's first step is the gradient's sign: an entry near zero may turn, by rounding.
    wrong = sum(int((~torch.isclose(a, b, rtol=0, atol=1e-5)).sum()) for a, b in zip(engine, hand, strict=True))
    assert wrong <= 1e-3 * sum(p.numel() for p in hand)
