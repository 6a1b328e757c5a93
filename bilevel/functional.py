"""A loss as a pure function of (inner, outer) tensors, and its second-order products.

Everything above this layer (solvers, estimators, the check, the engine) sees an :class:`Objective`: something that
can be evaluated at tensors of its caller's choice, any number of times, with the same random numbers and without side
effects.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bilevel.double_backward import refuse_once_differentiable, second_derivative_errors
from bilevel.errors import LossError, NonFiniteError, ParameterError
from bilevel.randomness import Replay
from bilevel.vector import Tensors

__all__ = [
    "BufferValues",
    "Evaluate",
    "FunctionObjective",
    "ModuleObjective",
    "Objective",
    "ParameterSlots",
    "PassCount",
    "PlainLoss",
    "buffers_apart",
    "buffers_protected",
    "dense_gradient",
    "derivatives",
    "gradient",
    "independent",
    "leaves",
    "loss_and_outputs",
    "require_finite",
    "scalar_loss",
    "transform_errors",
]

_AUTOCASTS = ("cpu", "cuda", "xpu", "mps")
_NOTHING = nullcontext()

T = TypeVar("T")
Reduce = Callable[[Tensors], Tensors]


@dataclass
class PassCount:
    """Passes taken: the cost model of everything here. A Hessian or mixed product is one backward pass."""

    forward: int = 0
    backward: int = 0

    def copy(self) -> PassCount:
        """Returns a snapshot."""
        return PassCount(self.forward, self.backward)

    def since(self, earlier: PassCount) -> tuple[int, int]:
        """Returns the (forward, backward) passes taken since a snapshot."""
        return self.forward - earlier.forward, self.backward - earlier.backward


@dataclass(frozen=True)
class Evaluate:
    """One pass of a loss, as often as it is called."""

    run: Callable[[], tuple[Tensor, Tensors]]

    def __call__(self) -> Tensor:
        """Returns the loss."""
        return self.run()[0]

    def with_outputs(self) -> tuple[Tensor, Tensors]:
        """Returns the loss and the model's outputs that it named, if any."""
        return self.run()


@dataclass(frozen=True)
class PlainLoss:
    """A loss as its user wrote it, for a compiler: to be called inside :meth:`Objective.within` at the same point.

    Attributes:
        function: The loss.
        arguments: What it is called with.
        owner: Whose compiled code it shares; weakly referenced.
    """

    function: Callable[..., object]
    arguments: tuple[Any, ...]
    owner: object


class Objective(ABC):
    """A loss ``f(inner, outer)``.

    Args:
        name: Whose loss it is, for messages.
        replay: Makes all passes draw the same random numbers.
        passes: Where passes are counted.
        reduce: Applied to every gradient and product: the mean over data-parallel ranks, or nothing.
    """

    def __init__(self, name: str, replay: Replay, passes: PassCount, reduce: Reduce | None = None) -> None:
        self.name = name
        self.replay = replay
        self.passes = passes
        self.reduce: Reduce = reduce or (lambda tensors: tensors)

    @abstractmethod
    def within(self, inner: Tensors, outer: Tensors, body: Callable[[Evaluate], T]) -> T:
        """Returns ``body(evaluate)`` where ``evaluate()`` is the loss at ``inner``, ``outer``.

        Backward passes belong into ``body`` too: activation checkpointing recomputes the forward pass with whatever
        parameters are in place at that moment.
        """

    def plain(self, inner: Tensors, outer: Tensors) -> PlainLoss | None:
        """Returns the loss without what surrounds its passes here; None where it is more than its user wrote."""
        return None

    def _evaluate(self, loss: Callable[[], object]) -> tuple[Tensor, Tensors]:
        # Products and solves stay in full precision, whatever autocast does elsewhere.
        casts = list(filter(torch.is_autocast_enabled, _AUTOCASTS))
        with _no_autocast(casts) if casts else _NOTHING, self.replay(), torch.enable_grad():
            value, outputs = loss_and_outputs(loss(), self.name)
        self.passes.forward += 1
        return value, outputs


@contextmanager
def _no_autocast(devices: Iterable[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


class FunctionObjective(Objective):
    """An objective made of a function of two flat tuples of tensors; ``plain`` tells what of it its user wrote."""

    def __init__(
        self,
        function: Callable[[Tensors, Tensors], object],
        name: str,
        replay: Replay,
        passes: PassCount,
        reduce: Reduce | None = None,
        plain: Callable[[Tensors, Tensors], PlainLoss] | None = None,
    ) -> None:
        super().__init__(name, replay, passes, reduce)
        self._function = function
        self._plain = plain

    def plain(self, inner: Tensors, outer: Tensors) -> PlainLoss | None:
        """See :meth:`Objective.plain`."""
        if self._plain is not None:
            return self._plain(inner, outer)
        return PlainLoss(self._function, (inner, outer), getattr(self._function, "__code__", type(self._function)))

    def within(self, inner: Tensors, outer: Tensors, body: Callable[[Evaluate], T]) -> T:
        """See :meth:`Objective.within`."""
        return body(Evaluate(lambda: self._evaluate(lambda: self._function(inner, outer))))


@dataclass(frozen=True)
class BufferValues:
    """Copies of all buffers at one moment, by module.

    Attributes:
        stamps: Identity and version of each buffer.
        values: The copies.
    """

    stamps: tuple[tuple[tuple[int, int], ...], ...]
    values: tuple[Tensors, ...]


def _held_buffers(module: nn.Module) -> Tensors:
    return tuple(buffer for buffer in module._buffers.values() if buffer is not None)


class ParameterSlots:
    """Where in a set of modules every parameter and buffer is held, each module visited once.

    ``torch.func.functional_call`` on one root would do as well where no two problems share modules; with a module (or a
    part of one) held by two problems it sees the same slot under two names and restores the wrong tensor. Slots are
    keyed by the parameter itself, so tied and shared parameters are swapped everywhere at once, and nothing is walked
    per pass.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        unique = {id(part): part for module in modules for part in module.modules()}.values()
        self._parameters: dict[int, list[tuple[nn.Module, str]]] = {}
        for part in unique:
            for name, parameter in _parameters(part).items():
                if parameter is not None:
                    self._parameters.setdefault(id(parameter), []).append((part, name))
        self._with_buffers = tuple(part for part in unique if part._buffers)
        self.has_buffers = bool(self._with_buffers)
        """Whether any module has buffers, which registering one later does not change."""
        self.evaluating = 0
        """How many evaluations of losses are going on."""

    def holds(self, parameter: Tensor) -> bool:
        """Whether some module holds this parameter."""
        return id(parameter) in self._parameters

    def swapped(self, live: Sequence[Tensor], given: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Puts ``given`` in the places of ``live`` parameters; what is there already costs nothing.

        The places hold afterwards what they held before, also where they were swapped then.
        """
        return _Swapped(self._parameters, live, given)

    @contextmanager
    def buffers_apart(self) -> Iterator[None]:
        """Lets the body work on copies of all buffers, and then gives the buffers the copies' values."""
        with buffers_apart(self._with_buffers):
            yield

    def buffer_values(self, earlier: BufferValues | None = None) -> BufferValues:
        """Returns copies of all buffers, for :meth:`buffers_protected`.

        A module whose buffers are as they were in ``earlier`` shares the copies. Their versions are looked at first,
        and then their values: autograd is not told of what batch norm does to its statistics, nor of writing through
        ``.data``. Cost: where versions are the same, a comparison in the place of a copy.
        """
        stamps: list[tuple[tuple[int, int], ...]] = []
        values: list[Tensors] = []
        for place, module in enumerate(self._with_buffers):
            held = _held_buffers(module)
            stamps.append(tuple((id(buffer), buffer._version) for buffer in held))
            shared = earlier is not None and earlier.stamps[place] == stamps[place]
            if earlier is not None and shared and all(map(_is_equal, held, earlier.values[place])):
                values.append(earlier.values[place])
            else:
                values.append(tuple(buffer.detach().clone() for buffer in held))
        return BufferValues(tuple(stamps), tuple(values))

    @contextmanager
    def buffers_protected(self, values: BufferValues | None = None) -> Iterator[None]:
        """Lets the body work on copies of all buffers (batch-norm statistics), and drops the copies.

        Args:
            values: What the copies hold; the buffers' present values by default.
        """
        with buffers_protected(self._with_buffers):
            if values is not None:
                for module, kept in zip(self._with_buffers, values.values, strict=True):
                    for buffer, value in zip(_held_buffers(module), kept, strict=True):
                        buffer.detach().copy_(value)
            yield


class _Swapped(AbstractContextManager[None]):
    __slots__ = ("_given", "_live", "_moved", "_places")

    def __init__(
        self, places: Mapping[int, Sequence[tuple[nn.Module, str]]], live: Sequence[Tensor], given: Sequence[Tensor]
    ) -> None:
        self._places = places
        self._live = live
        self._given = given
        self._moved: list[tuple[dict[str, Any], str, Any]] = []

    def __enter__(self) -> None:
        try:
            for parameter, tensor in zip(self._live, self._given, strict=True):
                for module, name in self._places[id(parameter)]:
                    table = _parameters(module)
                    held = table[name]
                    if held is not tensor:
                        self._moved.append((table, name, held))
                        table[name] = tensor
        except BaseException:
            self._put_back()
            raise

    def __exit__(self, *_: object) -> None:
        self._put_back()

    def _put_back(self) -> None:
        for table, name, held in reversed(self._moved):
            table[name] = held


def _parameters(module: nn.Module) -> dict[str, Any]:
    """The module's own table: ``functional_call`` writes plain tensors there too."""
    return module._parameters


@contextmanager
def buffers_protected(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Lets the body work on copies of the modules' own buffers, and drops the copies."""
    kept = [(module, dict(module._buffers)) for module in modules if module._buffers]
    try:
        for module, buffers in kept:
            for name, buffer in buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)


@contextmanager
def buffers_apart(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Lets the body work on copies of the modules' own buffers, and then gives the buffers the copies' values.

    A graph that the body makes holds the copies, so that later passes, which change the buffers in place, leave it
    valid. An expanded buffer, which torch lets nobody change in place, is its own copy.
    """
    kept = [(module, dict(module._buffers)) for module in modules if module._buffers]
    copies = {id(b): b if _is_expanded(b) else b.clone() for _, bs in kept for b in bs.values() if b is not None}
    try:
        for module, buffers in kept:
            for name, buffer in buffers.items():
                module._buffers[name] = None if buffer is None else copies[id(buffer)]
        yield
    finally:
        for module, buffers in kept:
            for name, buffer in buffers.items():
                current = module._buffers[name]
                if buffer is None or current is None or current is buffer or current is not copies[id(buffer)]:
                    continue  # the body put another tensor there: it stays
                with torch.no_grad():
                    buffer.copy_(current)
                module._buffers[name] = buffer


def _is_equal(tensor: Tensor, copy: Tensor) -> bool:
    """Whether a copy can stand for a tensor; of sparse ones it is not known, since torch compares not all layouts."""
    return tensor.layout is torch.strided and torch.equal(tensor, copy)


def _is_expanded(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


class ModuleObjective(Objective):
    """An objective whose parameters live in modules.

    Args:
        loss: The loss with its batch bound; it reads parameters from the modules.
        slots: Where the modules hold their parameters.
        live_inner: The inner variables as the modules hold them.
        live_outer: The outer variables, likewise.
        name: See :class:`Objective`.
        replay: See :class:`Objective`.
        passes: See :class:`Objective`.
        reduce: See :class:`Objective`.
        buffers: Values of all buffers that every pass starts from; the present ones by default.
    """

    def __init__(
        self,
        loss: Callable[[], object],
        slots: ParameterSlots,
        live_inner: Tensors,
        live_outer: Tensors,
        name: str,
        replay: Replay,
        passes: PassCount,
        reduce: Reduce | None = None,
        buffers: BufferValues | None = None,
    ) -> None:
        super().__init__(name, replay, passes, reduce)
        self._buffers = buffers
        self._plain_loss = loss
        self._slots = slots
        self._live_inner = live_inner
        self._live_outer = live_outer

    def within(self, inner: Tensors, outer: Tensors, body: Callable[[Evaluate], T]) -> T:
        """See :meth:`Objective.within`. Only tensors that differ from the live parameters are swapped."""
        slots = self._slots
        with (
            slots.buffers_protected(self._buffers) if slots.has_buffers else _NOTHING,
            slots.swapped(self._live_inner + self._live_outer, inner + outer),
        ):
            return body(Evaluate(lambda: self._evaluate(self._loss)))

    def plain(self, inner: Tensors, outer: Tensors) -> PlainLoss | None:
        """See :meth:`Objective.plain`."""
        return PlainLoss(self._plain_loss, (), self._slots)

    def _loss(self) -> object:
        self._slots.evaluating += 1
        try:
            return self._plain_loss()
        finally:
            self._slots.evaluating -= 1


def gradient(
    value: Tensor, inputs: Tensors, objective: Objective, *, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Returns the gradient of a loss, None for an input that does not reach it; counts one backward pass.

    With ``create_graph`` the graph of the gradient is kept, and gradients are not reduced over ranks (their products
    are).
    """
    if not inputs:
        return ()
    if not value.requires_grad:
        return (None,) * len(inputs)
    if create_graph:
        refuse_once_differentiable(value, inputs, objective.name)
    with second_derivative_errors(objective.name):
        grads = derivatives(value, inputs, create_graph=create_graph)
    objective.passes.backward += 1
    if create_graph:
        return grads
    present = iter(objective.reduce(tuple([grad for grad in grads if grad is not None])))
    return tuple([None if grad is None else next(present) for grad in grads])


def derivatives(value: Tensor, inputs: Tensors, *, create_graph: bool = False) -> tuple[Tensor | None, ...]:
    """Returns ``torch.autograd.grad`` of a scalar: None for an input that does not reach it, as its type should say."""
    return torch.autograd.grad(value, inputs, create_graph=create_graph, allow_unused=True)


def loss_and_outputs(result: object, name: str) -> tuple[Tensor, Tensors]:
    """Returns the scalar loss and the model's outputs: a loss is a tensor, or a mapping with ``"loss"`` and more.

    Raises:
        LossError: A mapping without ``"loss"``, outputs that are no tensors, or what :func:`scalar_loss` refuses.
    """
    if isinstance(result, Tensor) or not isinstance(result, Mapping):
        return scalar_loss(result, name), ()
    if "loss" not in result:
        raise LossError(
            f"the loss of {name} returned a mapping without 'loss'; it has: {', '.join(map(str, result)) or 'nothing'}"
        )
    outputs = result.get("outputs", ())
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    if not all(isinstance(part, Tensor) for part in outputs):
        raise LossError(f"the 'outputs' of the loss of {name} must be a tensor or a sequence of tensors")
    return scalar_loss(result["loss"], name), outputs


def scalar_loss(value: object, name: str) -> Tensor:
    """Returns a loss as a zero-dimensional tensor.

    Raises:
        LossError: It is no tensor, or has more than one element, or is not real floating point.
    """
    if not isinstance(value, Tensor):
        raise LossError(f"the loss of {name} must be a scalar tensor; it is a {type(value).__name__}")
    if value.numel() != 1:
        raise LossError(
            f"the loss of {name} must be a scalar; it has shape {tuple(value.shape)}. Reduce it with .mean() or .sum()."
        )
    if not value.dtype.is_floating_point:
        raise LossError(f"the loss of {name} must be real floating point; it has dtype {value.dtype}")
    return value if value.dim() == 0 else value.reshape(())


def independent(name: str) -> LossError:
    """Returns the error for a loss that no inner parameter reaches."""
    return LossError(
        f"the loss of {name} does not depend on its inner parameters: nothing to differentiate through. "
        "Check for a detach() or no_grad() between the parameters and the loss."
    )


def require_finite(value: Tensor, name: str, number: float | None = None) -> float:
    """Returns a loss as a number, which may have been read before.

    Raises:
        NonFiniteError: It is NaN or infinite.
    """
    number = value.item() if number is None else number
    if not math.isfinite(number):
        raise NonFiniteError(f"the loss of {name} is {number}, where a finite number was expected")
    return number


def dense_gradient(grads: Sequence[Tensor | None], inputs: Tensors) -> Tensors:
    """Returns the gradients with zeros in the places of inputs that do not reach the loss."""
    return tuple(
        [
            torch.zeros_like(i) if g is None else g if g.layout is torch.strided else g.to_dense()
            for g, i in zip(grads, inputs, strict=True)
        ]
    )


def leaves(tensors: Sequence[Tensor]) -> Tensors:
    """Returns the tensors as new leaves that require gradients, sharing their storage.

    Raises:
        ParameterError: They are those of a ``torch.func`` transform, which allows no leaves.
    """
    try:
        return tuple([part.detach().requires_grad_() for part in tensors])
    except RuntimeError:
        with transform_errors():  # the same again, for its message
            return tuple(part.detach().requires_grad_() for part in tensors)


@contextmanager
def transform_errors() -> Iterator[None]:
    """Says what to do instead of a ``torch.func`` transform of what takes derivatives by ``torch.autograd``."""
    try:
        yield
    except RuntimeError as error:
        if "functorch transform" not in str(error):
            raise
        raise ParameterError(
            "hypergradients cannot be taken inside torch.func transforms (vmap, grad, jacrev, …). For a batch of "
            "problems give the sum of their losses, torch.func.vmap(loss)(inner, outer).sum(), with stacked parameters:"
            " every method then returns the hypergradient of each. For second derivatives use torch.autograd on argmin."
        ) from error
