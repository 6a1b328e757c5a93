"""(f) by this library: its exact DoRA layers, ``Direction`` and ``Magnitude``."""

from __future__ import annotations

import torch

from benchmarks.peers.side import KeepingSGD, Method, NotOffered, Side
from benchmarks.peers.sides.bilevel.engine import EngineSide
from benchmarks.peers.sides.hand.minilm import Pass
from benchmarks.peers.workloads.minilm import ALPHA, OUTER_RATE, RANK, RATE, TARGETS, Texts, in_peft
from bidora import BiDoRAConfig, Direction, Magnitude, get_bidora_model
from bilevel import FiniteDifference, Identity


class Library(EngineSide):
    def __init__(self, texts: Texts, method: Method) -> None:
        model = adapted(texts)
        in_peft(model, texts)
        sgd = lambda params: torch.optim.SGD(params, lr=RATE)  # noqa: E731
        keeping = lambda params: KeepingSGD(params, lr=OUTER_RATE)  # noqa: E731
        inner = Direction(model, optimizer=sgd, data=[texts.inner], orthogonality=0.0, compute_loss=texts.loss)
        outer = Magnitude(model, optimizer=keeping, data=[texts.outer], compute_loss=texts.loss)
        estimator = FiniteDifference(epsilon=0.01) if "differences" in method.kind else Identity()
        super().__init__(outer, inner, estimator)


def adapted(texts: Texts) -> torch.nn.Module:
    config = BiDoRAConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    return get_bidora_model(texts.base(), config).eval()


def build(texts: Texts, method: Method) -> Side:
    if method.kind.endswith("LoRA"):
        raise NotOffered("its LoRA is PEFT's")
    if "step" not in method.kind:
        model = adapted(texts)
        return Pass(texts, model, in_peft(model, texts))
    return Library(texts, method)
