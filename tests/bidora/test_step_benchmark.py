"""The benchmark of BiDoRA's step: what is timed side by side is the same, and the page shows what was measured."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import bidora_step
from tests.pages import DOCS

RESULTS = DOCS / "benchmarks" / "results"


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


def test_the_page_shows_the_results():
    page = (DOCS / "benchmarks" / "bidora_step.md").read_text(encoding="utf-8")
    found = sorted(RESULTS.glob("bidora_step_*.json"))
    assert found
    for file in found:
        results = json.loads(file.read_text(encoding="utf-8"))
        device = file.stem.removeprefix("bidora_step_")
        assert device == results["results"][0]["setting"]["device"]
        shown = page.split(f"<!-- results: {device} -->\n")[1].split("<!-- end -->")[0]
        assert shown.strip() == bidora_step.markdown(results)
