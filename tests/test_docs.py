"""Every Python example of the README and the documentation runs as it stands."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{place}")
    for page in PAGES
    for place, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M))
]


def fine_tuning() -> dict[str, object]:
    """What the pages' readers have at hand: a model, tokenised data and a collator."""
    from transformers import BertConfig, BertForSequenceClassification, default_data_collator

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=8, **sizes))
    rows = [{"input_ids": [1 + place % 2, 5, 6], "labels": place % 2} for place in range(20)]
    return {"model": model, "train": rows, "validation": rows, "collator": default_data_collator}


@pytest.mark.parametrize("block", BLOCKS)
def test_example(block: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = fine_tuning() if "from bidora" in block else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*pin_memory.*")  # Trainer's default, on a machine without GPU
        exec(compile(block, "example", "exec"), names)


def test_there_are_examples():
    assert len(BLOCKS) >= 5


def test_the_readme_s_example_finds_a_weight_decay_near_the_best():
    block = next(param.values[0] for param in BLOCKS if "class Decay" in param.values[0])
    names: dict[str, object] = {}
    exec(
        compile(block.replace("EngineConfig(steps=50)", "EngineConfig(steps=50, progress=False)"), "example", "exec"),
        names,
    )
    engine = names["engine"]
    x, y, val_x, val_y = names["x"][:200], names["y"][:200], names["x"][200:], names["y"][200:]

    def validation_loss(decay: float) -> float:
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 10)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y) + decay * model.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return torch.nn.functional.cross_entropy(model(val_x), val_y).item()

    best = min(validation_loss(torch.tensor(float(power)).exp().item()) for power in range(-12, 1))
    found = validation_loss(engine.problems["decay"].module[0].exp().item())
    assert found < 1.1 * best
    assert found < 0.5 * validation_loss(1.0)  # where it started
