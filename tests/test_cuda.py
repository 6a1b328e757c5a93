"""The same promises on a GPU; skipped where there is none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from bilevel import Engine, EngineConfig, FiniteDifference, Identity, Problem
from tests.bilevel.test_every_method import METHODS, check_resuming, engine

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning"),
]


def test_the_passes_of_one_derivative_draw_the_same_masks_on_the_gpu():
    grads = []
    for method in (Identity(), FiniteDifference(epsilon=1e-5)):
        made = engine(method, device="cuda")
        torch.manual_seed(5)
        made.step()
        torch.manual_seed(9)
        result = made.hypergradient()
        grads.append(result.grad["weight"] - result.direct["weight"])
    assert grads[0].norm() > 0
    assert (grads[0] - grads[1]).norm() < 1e-7 * grads[0].norm()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_gives_on_the_gpu_what_it_gives_on_the_cpu(method):
    grads = []
    for device in ("cpu", "cuda"):
        made = engine(method, dropout=0.0, device=device)
        for _ in range(3):
            result = made.step()
        assert result.skipped is None
        grads.append(made.problems["scale"].module.weight.detach().cpu())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_asking_and_resuming_change_nothing_on_the_gpu(method, tmp_path):
    check_resuming(method, tmp_path, "cuda")


def three_levels(device: str) -> Engine:
    """Quartic losses: the middle level's response has third derivatives of the lowest one's in it."""

    def level(kind: type[Problem], seed: int, **settings: Any) -> Problem:
        torch.manual_seed(seed)
        module = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64).to(device)
        return kind(module, optimizer=lambda params: torch.optim.SGD(params, lr=0.05), **settings)

    return Engine(
        [level(Top, 0, name="top"), level(Middle, 1, name="middle", steps=3), level(Lowest, 2, name="lowest", steps=3)],
        EngineConfig(progress=False),
        hypergradient="conjugate_gradient",
    )


class Top(Problem):
    def loss(self, batch):
        return (self.middle.module.weight - self.lowest.module.weight).square().sum()


class Middle(Problem):
    def loss(self, batch):
        w = self.module.weight
        return (w - self.top.module.weight).square().sum() + (w * self.lowest.module.weight).sum().square()


class Lowest(Problem):
    def loss(self, batch):
        w = self.module.weight
        return (w - self.middle.module.weight).square().sum() + 0.1 * w.pow(4).sum()


def test_three_levels_on_the_gpu_are_those_on_the_cpu():
    ends = []
    for device in ("cpu", "cuda"):
        made = three_levels(device)
        made.run(5)
        ends.append([p.detach().cpu() for problem in made.problems.values() for p in problem.parameters])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-12)


def test_bfloat16_training_passes_and_float32_products_on_the_gpu():
    made = engine("identity", torch.float32, EngineConfig(progress=False, precision="bfloat16"), device="cuda")
    seen = []
    made.problems["network"].module.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    made.step()
    assert seen == [torch.bfloat16] * 3 + [torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bidora_on_the_gpu(dtype, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    from bidora import BiDoRAConfig, Direction, Magnitude, get_bidora_model

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=50, max_position_embeddings=16, num_labels=3, **sizes)
    base = BertForSequenceClassification(config).to("cuda", dtype)
    batch = {"input_ids": torch.randint(1, 50, (8, 12)), "labels": torch.randint(0, 3, (8,))}
    with torch.no_grad():
        expected = base.eval()(input_ids=batch["input_ids"].cuda()).logits
    model = get_bidora_model(base, BiDoRAConfig(task_type="SEQ_CLS", r=4))
    with torch.no_grad():
        found = model.eval()(input_ids=batch["input_ids"].cuda()).logits
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.float(), expected.float(), **tolerance)
    frozen = copy.deepcopy({n: p for n, p in model.named_parameters() if not p.requires_grad})
    adamw = lambda params: torch.optim.AdamW(params, lr=1e-3)  # noqa: E731
    problems = [Magnitude(model, optimizer=adamw, data=[batch]), Direction(model, optimizer=adamw, data=[batch])]
    made = Engine(problems, EngineConfig(progress=False), hypergradient=FiniteDifference(epsilon=0.01))
    model.train()
    losses = [made.step().losses["direction"] for _ in range(10)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
