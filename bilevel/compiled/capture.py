"""Losses as ``torch.compile`` captures them, and the compiled graphs of their derivatives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from bilevel.compiled.tracing import (
    NO_LOOKS,
    Compiled,
    compiler_of,
    refuse_wrapped,
    restricted,
    split,
    trace,
    traced_graph,
)
from bilevel.errors import BilevelError, ConfigError, LossError
from bilevel.functional import Objective, independent, loss_and_outputs
from bilevel.vector import Tensors, promote

__all__ = ["Derivatives", "Report", "Request", "capture"]


@dataclass
class Report:
    """What was compiled in one solve."""

    graphs: int = 0
    seconds: float = 0.0

    @contextmanager
    def compiling(self, name: str) -> Iterator[None]:
        """Counts what the body compiles, and says what a failure means for a user."""
        start = time.perf_counter()
        try:
            yield
        except (BilevelError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a compiler raises whatever its parts raise
            raise _not_compiled(name, error) from error
        self.graphs += 1
        self.seconds += time.perf_counter() - start

    def __str__(self) -> str:
        new = f": {self.graphs} new graph{'s' * (self.graphs != 1)} in {self.seconds:.1f} s" if self.graphs else ""
        return "compiled" + new


@dataclass
class Request:
    """What one evaluation of a captured loss is asked for, and what it answers."""

    name: str
    inner: Tensors
    outer: Tensors
    compiler: str
    report: Report = field(default_factory=Report)
    derivatives: Derivatives | None = None
    outputs: Tensors = ()
    gradient: Tensors = ()
    kept: Tensors = ()

    @property
    def value(self) -> Tensor:
        """The loss."""
        return self.outputs[0].detach().reshape(())


_REQUEST: ContextVar[Request] = ContextVar("request")
_CAPTURES: WeakKeyDictionary[Any, Callable[..., Tensor]] = WeakKeyDictionary()
"""By owner of a loss: a function that ``torch.compile`` knows it by, and counts its captures by."""


def capture(objective: Objective, request: Request) -> None:
    """Evaluates a loss as its captured graph, which answers the request."""
    plain = objective.plain(request.inner, request.outer)
    if plain is None:
        raise ConfigError(
            f"compile cannot be used for {objective.name}: its loss contains the best responses of problems below it. "
            "Leave compile out there"
        )
    function = _CAPTURES.get(plain.owner)
    if function is None:
        function = _CAPTURES[plain.owner] = torch.compile(
            _fresh(_loss_of), backend=_CapturedLoss, fullgraph=True, dynamic=False
        )
    token = _REQUEST.set(request)
    try:
        with torch.enable_grad():
            value = function(plain.function, plain.arguments, objective.name)
    except Exception as error:
        if not isinstance(error, (torch._dynamo.exc.TorchDynamoException, *_limits())):
            raise
        raise _not_captured(objective.name, error) from error
    finally:
        _REQUEST.reset(token)
    if request.derivatives is None or value is not request.outputs[0]:
        raise independent(objective.name)  # no operation on tensors: a constant


def _loss_of(function: Callable[..., object], arguments: tuple[Any, ...], name: str) -> Tensor:
    return loss_and_outputs(function(*arguments), name)[0]


def _fresh(function: Any) -> FunctionType:
    """Returns the function with code of its own, by which ``torch.compile`` keeps what it has compiled."""
    code: CodeType = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _not_compiled(name: str, error: Exception) -> LossError:
    return LossError(
        f"compile: the second derivatives of the loss of {name} could not be compiled ({type(error).__name__}: "
        f"{_first_line(error)}). On the CPU the default back end needs a C++ compiler; compile='aot_eager' "
        "needs none, and tells whether the fault is in the loss. Or leave compile out"
    )


def _limits() -> tuple[type[Exception], ...]:
    """What is raised where code was captured as often as is allowed; the name depends on the version."""
    names = ("FailOnRecompileLimitHit", "FailOnCacheLimitHit")
    return tuple(kind for name in names if (kind := getattr(torch._dynamo.exc, name, None)) is not None)


def _not_captured(name: str, error: Exception) -> LossError:
    if isinstance(error, _limits()):
        return LossError(
            f"the loss of {name} was captured anew as often as torch.compile allows: some Python value in it, or the "
            "shape of a batch, differs from call to call. Pass numbers that change as tensors, give all batches one "
            "shape (drop_last=True), count and log under `if not torch.compiler.is_compiling():`, or leave compile out"
        )
    return LossError(f"compile: the loss of {name} cannot be captured as one graph ({_first_line(error)}). {NO_LOOKS}")


class _CapturedLoss:
    """A loss as a graph, as ``torch.compile`` gives it to a back end and calls it: with all tensors that it reads."""

    def __init__(self, module: fx.GraphModule, example: Sequence[Tensor]) -> None:
        self._module = module
        self._derivatives: dict[tuple[Any, ...], Derivatives] = {}

    def __call__(self, *inputs: Tensor) -> Tensors:
        request = _REQUEST.get()
        place = {id(part): number for number, part in enumerate(inputs)}
        inner = tuple(place.get(id(part)) for part in request.inner)
        outer = tuple(place.get(id(part)) for part in request.outer)
        key = (inner, outer, request.compiler)
        with torch.no_grad():
            if key not in self._derivatives:
                with request.report.compiling(request.name):
                    refuse_wrapped(self._module, request.name)
                    self._derivatives[key] = Derivatives(self._module, inputs, request, inner, outer)
            found = self._derivatives[key]
            request.derivatives = found
            request.outputs, request.gradient, request.kept = found.set_up(inputs)
        return request.outputs


class Derivatives:
    """The graphs of one captured loss and one choice of variables."""

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: Tensors,
        request: Request,
        inner: tuple[int | None, ...],
        outer: tuple[int | None, ...],
    ) -> None:
        self._name = request.name
        self._compiler = compiler_of(request.compiler)
        self._dtypes: list[torch.dtype] = []
        self._iterations: dict[str, Compiled] = {}
        self._products: dict[str, Compiled] = {}
        joint, shape = trace(module, inputs, request.name, (request.inner, request.outer), inner, outer)
        self.active = shape.active
        self._num_outputs, self._num_active = shape.outputs, sum(shape.active)
        setup, self._product_module, self._from_inputs = split(joint, len(inputs), shape)
        self._setup = self._compiler(setup, list(inputs))

    def set_up(self, inputs: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """Returns the captured loss's outputs, ``g``, and what products need."""
        results = iter(self._setup(*inputs))
        outputs = tuple(next(results) for _ in range(self._num_outputs))
        gradient = tuple(next(results) for _ in range(self._num_active))
        kept = tuple(inputs[place] if place is not None else next(results) for place in self._from_inputs)
        self._dtypes = [part.dtype for part in gradient]
        return outputs, gradient, tuple(part.detach() for part in kept)

    def product(self, kind: str, kept: Tensors, q: Tensors, report: Report) -> Tensors:
        """Returns ``"hessian"``, ``"mixed"``, or ``"both"`` products with q."""
        compiled = self._products.get(kind)
        if compiled is None:
            with report.compiling(self._name):
                module = restricted(self._product_module, kind, self._num_active)
                compiled = self._products[kind] = self._compiler(module, [*kept, *q])
        return tuple(compiled(*kept, *q))

    def iteration(
        self, name: str, body: Callable[..., Tensors], kept: Tensors, tensors: Tensors, report: Report
    ) -> Tensors:
        """Returns a solver's tensors after one more iteration."""
        compiled = self._iterations.get(name)
        if compiled is None:
            with report.compiling(self._name):
                compiled = self._iterations[name] = self._compile_iteration(body, kept, tensors)
        return tuple(compiled(*kept, *tensors))

    def _compile_iteration(self, body: Callable[..., Tensors], kept: Tensors, tensors: Tensors) -> Compiled:
        module = restricted(self._product_module, "hessian", self._num_active)

        def whole(*given: Tensor) -> Tensors:
            known, state = given[: len(kept)], given[len(kept) :]

            def operator(q: Tensors) -> Tensors:
                parts = [part.to(dtype) for part, dtype in zip(q, self._dtypes, strict=True)]
                return promote(module(*known, *parts))

            return body(operator, *state)

        # Separate tensors: what is one tensor twice would be taken for one for ever.
        example = [*kept, *(part.clone() for part in tensors)]
        return self._compiler(traced_graph(whole, example), example)
