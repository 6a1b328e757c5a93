"""(f) by hand: the passes of LoRA and DoRA, and BiDoRA's step with the fewest of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.peers.side import Method, Side
from benchmarks.peers.sides.hand.implicit import dot, move
from benchmarks.peers.workloads.minilm import OUTER_RATE, RATE, Texts, by_hand, parts


class Pass(Side):
    """The gradient of all adapter parameters."""

    def __init__(self, texts: Texts, model: nn.Module, adapters: dict[str, list[nn.Parameter]]) -> None:
        self.texts, self.model = texts, model
        self.parameters = [p for part in adapters.values() for p in part]

    def step(self) -> None:
        self.found = torch.autograd.grad(self.texts.loss(self.model, self.texts.inner), self.parameters)


class Step(Side):
    """BiDoRA's step: 2 passes, and 2 more for the differences, or 1 with graph and its product."""

    def __init__(
        self, texts: Texts, model: nn.Module, adapters: dict[str, list[nn.Parameter]], *, differences: bool
    ) -> None:
        self.texts, self.model, self.by_differences = texts, model, differences
        self.w, self.m = (list(part) for part in parts(adapters))

    def step(self) -> None:
        texts, model = self.texts, self.model
        move(self.w, -RATE, torch.autograd.grad(texts.loss(model, texts.inner), self.w))
        both = torch.autograd.grad(texts.loss(model, texts.outer), [*self.w, *self.m])
        v, direct = both[: len(self.w)], both[len(self.w) :]
        mixed = self.differences(v) if self.by_differences else self.product(v)
        self.found = torch._foreach_sub(list(direct), list(mixed))
        move(self.m, -OUTER_RATE, self.found)

    def product(self, v: Sequence[Tensor]) -> Sequence[Tensor]:
        graph = torch.autograd.grad(self.texts.loss(self.model, self.texts.inner), self.w, create_graph=True)
        return torch.autograd.grad(graph, self.m, v)

    def differences(self, v: Sequence[Tensor]) -> Sequence[Tensor]:
        """Central differences of ``∂f/∂m`` along v, of length 0.01."""
        epsilon = 0.01 / float(dot(v, v).sqrt())
        kept, sides = [p.detach().clone() for p in self.w], []
        for sign in (epsilon, -2 * epsilon):
            move(self.w, sign, v)
            sides.append(torch.autograd.grad(self.texts.loss(self.model, self.texts.inner), self.m))
        with torch.no_grad():
            torch._foreach_copy_(self.w, kept)
        return torch._foreach_div(torch._foreach_sub(list(sides[0]), list(sides[1])), 2 * epsilon)


def side(texts: Texts, method: Method, model: nn.Module, adapters: dict[str, list[nn.Parameter]]) -> Side:
    """Returns what the method asks for, on a model."""
    if "step" not in method.kind:
        return Pass(texts, model, adapters)
    return Step(texts, model, adapters, differences="differences" in method.kind)


def build(texts: Texts, method: Method) -> Side:
    return side(texts, method, *by_hand(texts, magnitude=not method.kind.endswith("LoRA")))
