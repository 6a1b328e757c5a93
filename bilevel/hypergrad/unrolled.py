"""Differentiation of the inner updates, in reverse and forward mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.errors import ConfigError
from bilevel.functional import Evaluate, dense_gradient, gradient, leaves
from bilevel.hypergrad.base import InnerProblem, InnerStep, Pullback, Response, State
from bilevel.hypergrad.inner_updates import InnerUpdates, Trajectory
from bilevel.hypergrad.mixed_product import pulled_back
from bilevel.hypergrad.unrolled_forward import forward_response
from bilevel.optim import Pulled, pulled_linear
from bilevel.result import SolveInfo, Status
from bilevel.validation import check_choice, check_integer
from bilevel.vector import Tensors, axpy, is_finite, promote, scale, zeros_like

__all__ = ["Unrolled"]


@dataclass(frozen=True)
class Unrolled(InnerUpdates):
    """Differentiates the inner updates: ``dw_T/dλ`` for ``w_{t+1} = U_t(w_t, ∇f(w_t, λ))``.

    w₀ is a constant, unless the inner problem starts from outer parameters (``Problem(reset=...)``): then ``dw₀/dλ`` is
    the identity there.

    Reverse mode carries cotangents of parameters and optimiser memory from the last update to the first. Forward mode
    carries ``dw_t/dλ`` from the first to the last. Sources: Franceschi et al., ICML 2017 (arXiv 1703.01785), for both;
    truncation: Shaban et al., AISTATS 2019 (arXiv 1810.10667).

    For gradient steps on a loss with ``μI ≼ ∂²f/∂w² ≼ LI`` and ``η ≤ 2 / (μ + L)``, started or truncated at the
    solution, the error is at most ``(1 − ημ)^T ‖∂²f/∂w∂λ‖ ‖v‖ / μ``.

    Attributes:
        steps: As a function (:func:`bilevel.hypergradient`), the gradient steps to take from ``inner_params``; the
            outer loss is taken at their end. In an engine, how many of the last inner updates to differentiate (None:
            all since the last outer update); the inner problem's own optimiser made them.
        learning_rate: η of those gradient steps; in an engine the optimiser's own is used.
        memory: ``"replay"`` keeps the parameters and the optimiser's memory before each step, and evaluates the step
            again on the way back: memory does not depend on the size of activations. ``"graph"`` keeps the graph of
            each step's gradient: nothing is evaluated again. Both give the same numbers. In an engine the graphs are
            freed on the way back; ``Engine.hypergradient()`` after it replays.
        graphs: For ``memory="graph"``: of how many of the last steps the graphs are kept (None: of all); steps before
            those are replayed. Memory is that of so many graphs, beside the parameters of each step.
        mode: ``"reverse"`` or ``"forward"``. Forward mode is for few outer variables (elements, not tensors): its cost
            grows with their number, and as a function it keeps nothing of past steps. The same numbers to rounding.
        optimizer: Who makes the steps, as a function: ``"sgd"``, ``"momentum"``, ``"nesterov"`` (μ = 0.9),
            ``"rmsprop"``, ``"adam"`` or ``"adamw"`` with torch's defaults. An engine's inner problem has its own.

    Raises:
        ConfigError: ``memory="graph"`` with ``mode="forward"``, which keeps no graph; ``graphs`` without
            ``memory="graph"``; forward mode where outer times inner variables exceed
            :data:`~bilevel.hypergrad.unrolled_forward.FORWARD_LIMIT`.

    Cost, for each step: making it takes 1 forward and 1 backward pass. Beyond that ``"replay"`` takes 1 forward pass, 1
    backward pass with graph and 1 product; ``"graph"`` 1 product, where the graph is kept. Forward mode takes, in place
    of the 2 passes that make the step (in an engine: beyond them), 1 forward pass, 2 backward passes with graph and 1
    product for each outer variable; it holds a tangent of parameters and optimiser memory for each outer variable.
    """

    steps: int | None = None
    learning_rate: float | None = None
    memory: str = field(default="replay", kw_only=True)
    graphs: int | None = field(default=None, kw_only=True)
    mode: str = field(default="reverse", kw_only=True)
    optimizer: str = field(default="sgd", kw_only=True)

    follows_start: ClassVar[bool] = True
    name: ClassVar[str] = "unrolled"
    summary: ClassVar[str] = "reverse or forward mode through the inner updates"
    cost: ClassVar[str] = (
        "per step: 1 forward, 1 backward with graph, 1 product (replay); 1 product (graph); "
        "1 forward, 2 backward with graph, 1 product per outer variable (forward mode)"
    )
    needs: ClassVar[str] = (
        "double backward; a torch inner optimiser with a differentiable update (SGD, Adam and kin); one copy of "
        "parameters and optimiser memory per step (replay), or its graph (graph)"
    )
    storage: ClassVar[str] = (
        "replay: parameters and optimiser memory of every step; graph: all steps' graphs, or those of the last ones"
    )
    purpose: ClassVar[str] = (
        "few inner steps from a reset start, and inner problems that are not solved: the derivative of what was done"
    )

    def __post_init__(self) -> None:
        """Validates the fields."""
        self.check_updates()
        check_choice("Unrolled", "memory", self.memory, ("replay", "graph"))
        check_choice("Unrolled", "mode", self.mode, ("reverse", "forward"))
        if self.graphs is not None:
            check_integer("Unrolled", "graphs", self.graphs, minimum=1)
            if not self.keeps_graph:
                raise ConfigError("Unrolled.graphs belongs to memory='graph': set that, or leave graphs out")
        if self.keeps_graph and self.mode == "forward":
            raise ConfigError("Unrolled(mode='forward') goes with the steps and keeps no graphs: leave memory out")

    @property
    def keeps_graph(self) -> bool:
        """See :meth:`Estimator.keeps_graph`."""
        return self.memory == "graph"

    @property
    def num_graphs(self) -> int | None:
        """See :meth:`Estimator.num_graphs`."""
        return self.graphs

    def respond(self, problem: InnerProblem) -> Response:
        """See :meth:`Estimator.respond`. Takes the gradient steps, where no trajectory was recorded."""
        if self.mode == "forward":
            return forward_response(self, problem)
        if problem.trajectory:
            return _ReverseResponse(problem, self.recorded(problem))
        kept = (self.graphs or self.steps or 0) if self.keeps_graph else 0
        found = self.made(problem, graphs=kept)
        return _ReverseResponse(problem, found)


@dataclass(frozen=True)
class _ReverseResponse(Response):
    problem: InnerProblem
    trajectory: Trajectory

    @property
    def point(self) -> Tensors:  # type: ignore[override]
        return self.trajectory.point

    def pullback(self, cotangent: Tensors, state: State) -> Pullback:
        steps = self.trajectory.steps
        inner, start = promote(cotangent), self.problem.start
        memory = zeros_like(steps[-1].memory)
        total = zeros_like(promote(self.problem.outer))
        for place in reversed(range(len(steps))):
            # nothing comes before the oldest step: its parameters need no cotangent, but where they are outer ones
            oldest = place == 0 and start is None
            inner, memory, total = _pull_step(steps[place], inner, memory, self.problem.outer, total, oldest=oldest)
        if start is not None:
            arrived = list(total)
            for place, part in zip(start, inner, strict=True):
                arrived[place] = arrived[place] + part.to(arrived[place])
            total = tuple(arrived)
        status = Status.NOT_APPLICABLE if is_finite(total) else Status.DIVERGED
        length, message = len(steps), self.trajectory.message
        return Pullback(
            total, SolveInfo(status, iterations=length, products=length, method=Unrolled.name, message=message), state
        )


def _pull_step(
    step: InnerStep, inner_bar: Tensors, memory_bar: Tensors, outer: Tensors, outer_bar: Tensors, *, oldest: bool
) -> tuple[Tensors, Tensors, Tensors]:
    """Pulls cotangents of the state after a step back to the state before it and to the outer parameters.

    With ``(w', m') = U(w, g, m)`` and ``g = ∂f/∂w (w, λ)``: first through U to ``(w̄, ḡ, m̄)``, then through g,
    which adds ``(∂g/∂w)ᵀ ḡ`` to w̄ and ``(∂g/∂λ)ᵀ ḡ`` to λ̄. Of the oldest step λ̄ alone is wanted.
    """
    objective, kept = step.objective, None if step.graph is None or step.graph.spent else step.graph
    point = leaves(step.inner) if kept is None else kept.inner

    def body(evaluate: Evaluate) -> tuple[Pulled, Tensors]:
        if kept is None:
            grads = dense_gradient(gradient(evaluate(), point, objective, create_graph=True), point)
        else:
            grads = kept.take()
        update = _pull_update(step, grads, inner_bar, memory_bar)
        inputs = outer if oldest else point + outer
        retain = kept is not None and not kept.once
        return update, pulled_back(objective, grads, update.grads, inputs, retain=retain)

    update, pulled = objective.within(point, outer, body)
    if oldest:
        return (), (), axpy(update.factor, pulled, outer_bar)
    bars = axpy(update.factor, pulled, update.params + outer_bar)
    return bars[: len(point)], update.memory, bars[len(point) :]


def _pull_update(step: InnerStep, grads: Tensors, inner_bar: Tensors, memory_bar: Tensors) -> Pulled:
    """Returns the cotangents of parameters (in float32 or better), gradient and memory that the update took."""
    linear = pulled_linear(step.update, inner_bar, memory_bar)
    if linear is not None:
        if torch.float16 in [grad.dtype for grad in grads]:  # H w̄ may leave a range that η H w̄ is in
            return linear._replace(grads=scale(linear.factor, linear.grads), factor=1.0)
        return linear
    inner, memory = leaves(step.inner), leaves(step.memory)
    # Gradients with graphs are this rank's own; the update was taken at their mean.
    values = leaves(step.objective.reduce(tuple(grad.detach() for grad in grads)))
    with torch.enable_grad():
        new_inner, new_memory = step.update(inner, values, memory)
    inputs = inner + values + memory
    pulled = _cotangents(new_inner + new_memory, inner_bar + memory_bar, inputs)
    first, second = len(inner), len(inner) + len(values)
    return Pulled(promote(pulled[:first]), pulled[first:second], pulled[second:])


def _cotangents(outputs: Sequence[Tensor], bars: Tensors, inputs: Tensors) -> Tensors:
    """Returns ``Jᵀ bar``, with zeros for inputs that reach no output."""
    pairs = [(one, bar.to(one.dtype)) for one, bar in zip(outputs, bars, strict=True) if one.requires_grad]
    if not pairs or not inputs:
        return zeros_like(inputs)
    heads, cotangents = zip(*pairs, strict=True)
    found = torch.autograd.grad(heads, inputs, cotangents, allow_unused=True)
    return dense_gradient(found, inputs)
