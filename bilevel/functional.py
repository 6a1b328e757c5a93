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
from torch import Tensor
from torch.overrides import has_torch_function

from bilevel.double_backward import raise_explained, refuse_once_differentiable
from bilevel.errors import LossError, NonFiniteError, ParameterError
from bilevel.randomness import Replay
from bilevel.slots import BufferValues, ParameterSlots
from bilevel.vector import Tensors

__all__ = [
    "Evaluate",
    "FunctionObjective",
    "ModuleObjective",
    "Objective",
    "PassCount",
    "PlainLoss",
    "dense_gradient",
    "derivatives",
    "gradient",
    "gradients_on",
    "independent",
    "leaves",
    "loss_and_outputs",
    "pulled_through",
    "refuse_inference_mode",
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
        with _no_autocast(casts) if casts else _NOTHING, self.replay(), gradients_on():
            value, outputs = loss_and_outputs(loss(), self.name)
        self.passes.forward += 1
        return value, outputs


def gradients_on() -> AbstractContextManager[object]:
    """Returns ``torch.enable_grad()``, where that changes anything: it takes longer than to see.

    Raises:
        LossError: Inside ``torch.inference_mode()``, where that changes nothing: all gradients would be zero.
    """
    refuse_inference_mode()
    return _NOTHING if torch.is_grad_enabled() else torch.enable_grad()


def refuse_inference_mode() -> None:
    """Raises where torch records nothing.

    Raises:
        LossError: This is inside ``torch.inference_mode()``.
    """
    if torch.is_inference_mode_enabled():
        raise LossError(
            "a loss cannot be differentiated inside torch.inference_mode(), where torch records nothing: leave it, or "
            "put torch.inference_mode(False) around this call"
        )


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
    grads = derivatives(value, inputs, create_graph=create_graph, name=objective.name)
    objective.passes.backward += 1
    if create_graph:
        return grads
    present = iter(objective.reduce(tuple([grad for grad in grads if grad is not None])))
    return tuple([None if grad is None else next(present) for grad in grads])


def derivatives(
    value: Tensor, inputs: Tensors, *, create_graph: bool = False, name: str = ""
) -> tuple[Tensor | None, ...]:
    """Returns ``torch.autograd.grad`` of a scalar: None for an input that does not reach it, as its type should say.

    Args:
        value: The scalar.
        inputs: What to differentiate by.
        create_graph: Whether the graph of the derivatives is kept, and with it that of the scalar.
        name: Whose loss it is: then what cannot be differentiated is named in the error.

    Raises:
        LossError: The loss of ``name`` has no such derivative.
    """
    assert value.dim() == 0
    return _run_backward((value,), inputs, (torch.ones_like(value),), create_graph, create_graph, name)


def pulled_through(
    field: Sequence[Tensor], bars: Sequence[Tensor], inputs: Tensors, name: str, *, retain_graph: bool
) -> tuple[Tensor | None, ...] | None:
    """Returns ``(∂g/∂inputs)ᵀ bar`` for a gradient g with its graph: None for an input that does not reach it.

    Args:
        field: g.
        bars: Cotangents of g's shapes.
        inputs: What to differentiate by.
        name: Whose loss g is the gradient of, for errors.
        retain_graph: Whether the graph is kept.

    Returns:
        The product; None where nothing reaches anything, as where the loss is linear with constant coefficients.

    Raises:
        LossError: The loss cannot be differentiated twice.
    """
    pairs = [
        (g, bar if bar.dtype is g.dtype else bar.to(g.dtype))
        for g, bar in zip(field, bars, strict=True)
        if g.requires_grad
    ]
    if not pairs or not inputs:
        return None
    heads, cotangents = zip(*pairs, strict=True)
    return _run_backward(heads, inputs, cotangents, retain_graph, False, name)


def _run_backward(
    outputs: Tensors, inputs: Tensors, cotangents: Tensors, retain_graph: bool, create_graph: bool, name: str
) -> tuple[Tensor | None, ...]:
    """Returns ``torch.autograd.grad``, for cotangents that have their outputs' shapes.

    Torch's function compares those as symbolic shapes first, which takes 40 µs for six outputs: longer than a product
    of a small model. Autograd's engine, which compares them again, is what is called here.
    """
    try:
        engine = getattr(torch.autograd, "_engine_run_backward", None)  # not public: what torch's function ends with
        if engine is not None and not has_torch_function((*outputs, *inputs)):
            found: tuple[Tensor | None, ...] = engine(
                outputs, cotangents, retain_graph, create_graph, inputs, allow_unreachable=True, accumulate_grad=False
            )
            return found
        return torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
        )
    except RuntimeError as error:
        if name:
            raise_explained(error, name)
        raise


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
        "Check for a detach() or no_grad() between the parameters and the loss, and in an engine for the order of its "
        "problems: top level first."
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
