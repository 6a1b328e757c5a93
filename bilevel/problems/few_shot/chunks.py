"""Tasks in chunks: sums of losses of which one chunk's graph exists at a time, and responses chunk by chunk.

``torch.func.vmap(…, chunk_size=c)`` keeps the graphs of all chunks until the backward pass. Here each chunk is
differentiated as soon as it was evaluated, so that memory is that of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Function

from bilevel.errors import LossError
from bilevel.functional import Evaluate, Objective, derivatives, leaves
from bilevel.hypergrad import Estimator, InnerProblem, InnerStep, Pullback, Response, State
from bilevel.randomness import preserved
from bilevel.result import SolveInfo, Status
from bilevel.vector import Tensors, add, norm

__all__ = ["Chunk", "ChunkObjective", "ResponseInChunks", "Standing", "chunks_of", "summed"]

T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """The tasks ``start … stop − 1``.

    Attributes:
        start: The first.
        stop: The first that is no longer in it.
        index: Which chunk it is, counted from 0.
    """

    start: int
    stop: int
    index: int = 0

    def of(self, tensors: Sequence[Tensor]) -> Tensors:
        """Returns the tasks' parts of tensors ``(M, …)``."""
        return tuple(part[self.start : self.stop] for part in tensors)


def chunks_of(count: int, size: int | None) -> list[Chunk]:
    """Returns M tasks in chunks of a size, the last one smaller where it does not divide M; one chunk for None."""
    size = size or count
    return [Chunk(start, min(start + size, count), index) for index, start in enumerate(range(0, count, size))]


class Standing:
    """What stands in the places of modules' parameters, each tensor once: other ones can be put there for a while.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.tensors: list[Tensor] = []
        self._places: list[list[tuple[dict[str, Any], str]]] = []
        known: dict[int, int] = {}
        for part in {id(part): part for module in modules for part in module.modules()}.values():
            table: dict[str, Any] = part._parameters
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    known[id(tensor)] = len(self.tensors)
                    self.tensors.append(tensor)
                    self._places.append([])
                self._places[known[id(tensor)]].append((table, name))

    @contextmanager
    def replaced(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Puts tensors into the places of :attr:`tensors`."""
        # What stands there now, which another swap may have put there.
        before = [(table, name, table[name]) for places in self._places for table, name in places]
        try:
            for tensor, places in zip(tensors, self._places, strict=True):
                for table, name in places:
                    table[name] = tensor
            yield
        finally:
            for table, name, tensor_before in before:
                table[name] = tensor_before


@dataclass
class Sum:
    """A sum of losses, one a chunk.

    Attributes:
        chunks: The chunks.
        loss: Returns the loss of a chunk, with the chunk's tensors in their places.
        stacked: Holds the tensors that have a row for each task.
        shared: Holds those that all tasks share.
        seed: From which the random numbers of each chunk follow.
        device: Where the tensors are.
        autocast: Restores the autocast state of the first evaluation in a later one.
    """

    chunks: Sequence[Chunk]
    loss: Callable[[Chunk], Tensor]
    stacked: Standing
    shared: Standing
    seed: int
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]] = field(init=False)

    def __post_init__(self) -> None:
        """Looks up whether autocast is on."""
        self.autocast = _autocast_again({"cpu", self.device.type})

    def at(self, chunk: Chunk, stacked: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        """Returns the loss of a chunk at tensors of its own."""
        with (
            self.autocast(),
            self.stacked.replaced(stacked),
            self.shared.replaced(shared),
            seeded(self.seed, chunk, self.device),
        ):
            return self.loss(chunk)

    def leaves(self, chunk: Chunk, stacked: Sequence[Tensor], shared: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        """Returns the chunk's rows, and the shared tensors, as leaves that require gradients where the originals do."""
        rows, others = (
            tuple(part.detach().requires_grad_(whole.requires_grad) for part, whole in zip(parts, wholes, strict=True))
            for parts, wholes in ((chunk.of(stacked), stacked), (shared, shared))
        )
        return rows, others


@contextmanager
def seeded(seed: int, chunk: Chunk, device: torch.device) -> Iterator[None]:
    """Lets the body draw the random numbers that belong to a chunk, and leaves the generators as they were."""
    with preserved({"cpu", str(device)} - {"meta"}):
        torch.default_generator.manual_seed(seed + chunk.index)
        if device.type not in ("cpu", "meta"):
            module = torch.get_device_module(device)
            with torch.device(device):
                module.manual_seed(seed + chunk.index)
        yield


def summed(total: Sum, *, shared_too: bool) -> Tensor:
    """Returns ``Σ_c f_c`` over the chunks; its derivatives are taken while it is evaluated, chunk after chunk.

    Second derivatives evaluate each chunk again, with its graph, when they are asked for.

    Args:
        total: The sum.
        shared_too: Whether derivatives with respect to the shared tensors are taken at once, too. If not, they are
            taken if they are asked for, by another evaluation.

    Cost: 1 forward and 1 backward pass; a derivative with respect to shared tensors that were left out as much again;
    a second derivative 1 forward pass, 1 backward pass with graph and 1 product.
    """
    stacked, shared = tuple(total.stacked.tensors), tuple(total.shared.tensors)
    wanted = [part.requires_grad for part in stacked + shared]
    if not torch.is_grad_enabled() or not any(wanted):
        return sum((total.at(c, c.of(stacked), shared) for c in total.chunks), torch.zeros((), device=total.device))
    count, places = len(stacked), [place for place, needed in enumerate(wanted) if needed]
    own = places if shared_too else [place for place in places if place < count]
    value: Tensor = _apply(_Sum, total, tuple(own), True, stacked + shared, *((stacked + shared)[p] for p in own))
    later = [place for place in places if place not in own]
    if later:
        value = value + _apply(
            _Sum, total, tuple(later), False, stacked + shared, *((stacked + shared)[p] for p in later)
        ).to(value)
    return value


class _Sum(Function):
    """The sum as a function of some of its tensors: the others are held fixed.

    At once: the value, and its gradient with it. Otherwise: 0 (the value is another node's), and the gradient once it
    is asked for.
    """

    @staticmethod
    def forward(ctx: Any, total: Sum, own: tuple[int, ...], at_once: bool, everything: Tensors, *given: Tensor) -> Any:
        ctx.total, ctx.own = total, own
        ctx.save_for_backward(*everything)
        ctx.taken = None
        if not at_once:
            return torch.zeros((), device=total.device)
        value, ctx.taken = _first(total, own, everything)
        return value

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        everything = ctx.saved_tensors
        if ctx.taken is None:
            ctx.taken = _first(ctx.total, ctx.own, everything)[1]
        missing = [grad is None for grad in ctx.taken]
        if all(missing):
            return (None,) * (4 + len(missing))
        found = iter(_apply(_Gradient, ctx.total, ctx.own, tuple(ctx.taken), slopes[0], *everything))
        return (None,) * 4 + tuple(None if absent else next(found) for absent in missing)


class _Gradient(Function):
    """The gradient by some tensors, times a slope, as a function of the slope and of all tensors."""

    @staticmethod
    def forward(
        ctx: Any, total: Sum, own: tuple[int, ...], taken: Sequence[Tensor | None], slope: Tensor, *everything: Tensor
    ) -> Any:
        ctx.total = total
        ctx.own = [place for place, grad in zip(own, taken, strict=True) if grad is not None]
        ctx.save_for_backward(slope, *everything)
        ctx.set_materialize_grads(False)
        return tuple(grad * slope.to(grad) for grad in taken if grad is not None)

    @staticmethod
    def backward(ctx: Any, *bars: Any) -> Any:
        if torch.is_grad_enabled():
            raise LossError(
                "tasks in chunks have no third derivatives, nor second ones with a graph: evaluate them together, "
                "Adaptation(chunk_size=None)"
            )
        slope, *everything = ctx.saved_tensors
        pairs = [(place, bar) for place, bar in zip(ctx.own, bars, strict=True) if bar is not None]
        if not pairs:
            return (None,) * (4 + len(everything))
        by_slope, found = _second(ctx.total, tuple(everything), slope, pairs)
        return (None, None, None, by_slope, *found)


def _first(total: Sum, own: Sequence[int], everything: Tensors) -> tuple[Tensor, list[Tensor | None]]:
    """Returns the value and the gradient by the tensors at some places."""
    count = len(total.stacked.tensors)
    value: Tensor | None = None
    found: dict[int, Tensor] = {}
    for chunk in total.chunks:
        with torch.enable_grad():
            rows, others = total.leaves(chunk, everything[:count], everything[count:])
            loss = total.at(chunk, rows, others)
            inputs = tuple((rows + others)[place] for place in own)
            grads = derivatives(loss, inputs) if loss.requires_grad else (None,) * len(own)
        value = loss.detach() if value is None else value + loss.detach()
        _collect(found, chunk, count, own, grads, everything)
        del loss, rows, others, inputs
    assert value is not None
    return value, [found.get(place) for place in own]


def _second(
    total: Sum, everything: Tensors, slope: Tensor, pairs: Sequence[tuple[int, Tensor]]
) -> tuple[Tensor, list[Tensor | None]]:
    """Returns ``⟨g, b⟩`` and the derivative of ``s ⟨g, b⟩`` by all tensors, for the gradient g, b and the slope s."""
    count = len(total.stacked.tensors)
    along = torch.zeros_like(slope)
    found: dict[int, Tensor] = {}
    wanted = [place for place, part in enumerate(everything) if part.requires_grad]
    for chunk in total.chunks:
        bars = [chunk.of([bar])[0] if place < count else bar for place, bar in pairs]
        with torch.enable_grad():
            rows, others = total.leaves(chunk, everything[:count], everything[count:])
            loss, both = total.at(chunk, rows, others), rows + others
            grads = derivatives(loss, tuple(both[place] for place, _ in pairs), create_graph=True)
        curved = [(grad, bar) for grad, bar in zip(grads, bars, strict=True) if grad is not None]
        along = along + sum((grad.detach() * bar).sum().to(slope) for grad, bar in curved)
        curved = [(grad, bar) for grad, bar in curved if grad.requires_grad]
        if curved:
            inputs = tuple(both[place] for place in wanted)
            heads, weights = zip(*curved, strict=True)
            products = torch.autograd.grad(
                heads, inputs, [bar.to(head) * slope.to(head) for head, bar in curved], allow_unused=True
            )
            _collect(found, chunk, count, wanted, products, everything)
            del heads, weights, products, inputs
        del loss, rows, others, both, grads, curved
    return along, [found.get(place) for place in range(len(everything))]


def _collect(
    found: dict[int, Tensor],
    chunk: Chunk,
    count: int,
    places: Sequence[int],
    grads: Sequence[Tensor | None],
    everything: Tensors,
) -> None:
    """Puts a chunk's gradients into their rows, and adds those of shared tensors up."""
    for place, grad in zip(places, grads, strict=True):
        if grad is None:
            continue
        if place >= count:
            found[place] = found[place] + grad if place in found else grad
            continue
        if place not in found:
            found[place] = torch.zeros_like(everything[place], memory_format=torch.contiguous_format)
        found[place][chunk.start : chunk.stop] = grad


def _apply(function: type[Function], *arguments: Any) -> Any:
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


def _autocast_again(devices: set[str]) -> Callable[[], AbstractContextManager[Any]]:
    """Returns what puts the present autocast state back."""
    on = {device: torch.is_autocast_enabled(device) for device in devices if torch.amp.is_autocast_available(device)}
    kinds = {device: torch.get_autocast_dtype(device) for device in on}

    def again() -> AbstractContextManager[Any]:
        stack = ExitStack()
        for device, enabled in on.items():
            if enabled or torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, dtype=kinds[device], enabled=enabled))
        return stack

    return again


class ChunkObjective(Objective):
    """The loss of one chunk, as a function of the chunk's rows of the inner variables.

    Args:
        whole: The loss of all tasks.
        taking: Lets the problem's loss be that of a chunk alone, for as long as a context lasts.
        chunk: The chunk.
    """

    def __init__(self, whole: Objective, taking: Callable[[Chunk], AbstractContextManager[None]], chunk: Chunk) -> None:
        super().__init__(whole.name, whole.replay, whole.passes, whole.reduce)
        self._whole, self._taking, self._chunk = whole, taking, chunk

    def within(self, inner: Tensors, outer: Tensors, body: Callable[[Evaluate], T]) -> T:
        """See :meth:`Objective.within`."""
        with self._taking(self._chunk):
            return self._whole.within(inner, outer, body)


@dataclass(frozen=True)
class ResponseInChunks(Response):
    """The best response of all tasks, cotangents being pulled back chunk after chunk.

    The tasks' losses have no variables in common, and so ``vᵀ dw*/dλ`` is the sum of the chunks' own. A solver has
    scalars of its own in each chunk, and stops there by itself.

    Attributes:
        estimator: The method.
        problem: The inner problem of all tasks.
        chunks: The chunks.
        taking: See :class:`ChunkObjective`.
    """

    estimator: Estimator
    problem: InnerProblem
    chunks: Sequence[Chunk]
    taking: Callable[[Chunk], AbstractContextManager[None]]

    @property
    def point(self) -> Tensors:  # type: ignore[override]
        """See :class:`Response`."""
        return self.problem.inner

    def pullback(self, cotangent: Tensors, state: State) -> Pullback:
        """See :meth:`Response.pullback`."""
        value: Tensors | None = None
        infos: list[SolveInfo] = []
        sizes: list[float] = []
        kept: dict[str, Tensors] = {}
        for chunk in self.chunks:
            rows = chunk.of(cotangent)
            own = {
                key.removesuffix(_suffix(chunk)): part for key, part in state.items() if key.endswith(_suffix(chunk))
            }
            pulled = self.estimator.respond(self._part(chunk)).pullback(rows, own)
            value = pulled.value if value is None else add(value, pulled.value)
            infos.append(pulled.info)
            sizes.append(float(norm(rows)))
            kept |= {f"{key}{_suffix(chunk)}": part for key, part in pulled.state.items()}
        assert value is not None
        return Pullback(value, _joined(infos, sizes), kept)

    def _part(self, chunk: Chunk) -> InnerProblem:
        whole, count = self.problem, self.chunks[-1].stop

        def rows(tensors: Tensors) -> Tensors:  # an optimiser's memory may hold numbers beside what has a row a task
            return tuple(part[chunk.start : chunk.stop] if _has_rows(part, count) else part for part in tensors)

        def loss(objective: Objective) -> Objective:
            return ChunkObjective(objective, self.taking, chunk)

        def step(made: InnerStep) -> InnerStep:
            gradient = None if made.gradient is None else rows(made.gradient)
            return InnerStep(loss(made.objective), rows(made.inner), rows(made.memory), made.update, gradient)

        return replace(
            whole,
            objective=loss(whole.objective),
            inner=leaves(rows(whole.inner)),
            trajectory=[step(made) for made in whole.trajectory],
            samples=[loss(sample) for sample in whole.samples],
            diagonal=None if whole.diagonal is None else rows(whole.diagonal),
        )


def _has_rows(part: Tensor, count: int) -> bool:
    return part.dim() > 0 and len(part) == count


def _suffix(chunk: Chunk) -> str:
    return f" of chunk {chunk.index}"


def _joined(infos: Sequence[SolveInfo], sizes: Sequence[float]) -> SolveInfo:
    """Returns one report for all chunks: the worst status, the residual of the whole, the most iterations."""
    order = [Status.NOT_APPLICABLE, Status.CONVERGED, Status.STOPPED_AT_CAP]
    worst = max(infos, key=lambda info: order.index(info.status) if info.status in order else len(order))
    total = math.hypot(*sizes)
    lost = math.hypot(*(info.residual * size for info, size in zip(infos, sizes, strict=True)))
    bounds = [info.error_bound for info in infos if info.error_bound is not None]
    return replace(
        worst,
        residual=lost / total if total > 0.0 else worst.residual,
        iterations=max(info.iterations for info in infos),
        products=max(info.products for info in infos),
        error_bound=sum(bounds) if len(bounds) == len(infos) else None,
        inner_gradient_norm=math.hypot(*(info.inner_gradient_norm for info in infos)),
        message="; ".join(dict.fromkeys(info.message for info in infos if info.message)),
    )
