"""Second-order products of an inner loss as compiled graphs, and the iterations of a solver with them.

``torch.compile`` has no second derivatives of what it compiles. So it only *captures* the loss here, as one graph of
tensors in and tensors out: parameters, batch, buffers and every other tensor that the loss reads are inputs of it, what
is no tensor is guarded, and a change makes a new capture. The derivatives are taken of the captured graph by autograd
while that is traced once more, down to elementary operations. What does not depend on the vector that is multiplied is
split off: it is computed once a point (*set-up*), and its results are inputs of the product. Both are then given to the
compiler, and the product also together with the vector arithmetic of a solver's iteration.
"""

from __future__ import annotations

import functools
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

from bilevel import distributed
from bilevel.double_backward import second_derivative_errors
from bilevel.errors import BilevelError, ConfigError, LossError, unknown_name
from bilevel.functional import Evaluate, Objective, dense_gradient, independent, loss_and_outputs, require_finite
from bilevel.products import GaussNewtonGraph, GradientGraph
from bilevel.vector import Tensors, promote

__all__ = ["DEFAULT_COMPILER", "CompiledGraph", "check_compile", "graph_kind"]

DEFAULT_COMPILER = "inductor"
KNOWN_COMPILERS = ("inductor", "aot_eager", "eager")

Compiled = Callable[..., Sequence[Tensor]]
Iteration = Callable[..., Tensors]


def check_compile(owner: str, value: object, products: str, curvature: str) -> None:
    """Raises unless a field says whether to compile, or names a back end of ``torch.compile``, and that can be done.

    Args:
        owner: The class that has the field, for the message.
        value: What came.
        products: How products are taken.
        curvature: Which ones.
    """
    if not isinstance(value, (bool, str)):
        raise ConfigError(f"{owner}.compile must be True, False or the name of a back end, not {value!r}")
    if isinstance(value, str) and value not in KNOWN_COMPILERS:
        choices = torch._dynamo.list_backends(exclude_tags=())
        if value not in choices:
            raise unknown_name(f"value of {owner}.compile", value, choices)
    if value and (products != "autodiff" or curvature != "hessian"):
        raise ConfigError(
            f"{owner}.compile is for products='autodiff' with curvature='hessian', not products={products!r} with "
            f"curvature={curvature!r}"
        )


def graph_kind(curvature: str, compiler: bool | str) -> Callable[..., GradientGraph]:
    """Returns what makes the retained graph that an estimator's fields ask for."""
    if compiler:
        return functools.partial(CompiledGraph, compiler=compiler if isinstance(compiler, str) else DEFAULT_COMPILER)
    return GaussNewtonGraph if curvature == "gauss_newton" else GradientGraph


class CompiledGraph(GradientGraph):
    """As :class:`GradientGraph`, by compiled graphs.

    The first product at a loss captures and compiles: seconds, and again for other shapes, dtypes, devices, or Python
    values in the loss. Later points, batches and buffers only run what was compiled: 1 forward and 1 backward pass in
    one graph for the set-up, 1 backward pass a product.

    Args:
        objective: Whose gradient.
        evaluate: What ``within`` passes to its body.
        inner: The inner variables, leaves that require gradients.
        outer: The outer variables, likewise.
        compiler: The back end of ``torch.compile``.

    Raises:
        LossError: The loss cannot be captured as one graph, draws random numbers, has no second derivative, or is not
            reached by any inner variable.
        ConfigError: The objective is more than a loss (it holds best responses of problems below).
        NonFiniteError: The loss is NaN or infinite.
    """

    def __init__(
        self, objective: Objective, evaluate: Evaluate, inner: Tensors, outer: Tensors, compiler: str = DEFAULT_COMPILER
    ) -> None:
        self._objective = objective
        self._outer = outer
        request = _Request(objective.name, inner, outer, compiler)
        _capture(objective, request)
        assert request.derivatives is not None
        self._graphs: _Derivatives = request.derivatives
        self._kept = request.kept
        self.report = request.report
        self.active = self._graphs.active
        self._inner = self.select(inner)
        self.value = request.value
        self.gradient = request.gradient
        objective.passes.forward += 1
        objective.passes.backward += 1
        require_finite(self.value, objective.name)
        if not any(self.active):
            raise independent(objective.name)

    @property
    def message(self) -> str:  # type: ignore[override]
        """That products are compiled, and what had to be compiled on the way."""
        return str(self.report)

    def hessian(self, q: Tensors) -> Tensors:
        """Returns ``(∂g/∂w)ᵀ q`` over the active variables."""
        return self._product("hessian", q)

    def mixed(self, q: Tensors) -> Tensors:
        """Returns ``(∂g/∂λ)ᵀ q``."""
        return self._product("mixed", q)

    def mixed_again(self, q: Tensors) -> Tensors:
        """Returns ``(∂g/∂λ)ᵀ q``."""
        return self._product("mixed", q)

    def hessian_and_mixed(self, q: Tensors, *, last: bool = True) -> tuple[Tensors, Tensors]:
        """Returns both products from one graph."""
        both = self._product("both", q)
        return both[: len(self._inner)], both[len(self._inner) :]

    def iteration(self, name: str, body: Callable[..., Tensors]) -> Iteration | None:
        """Returns one iteration of a solver as a compiled graph, or None where products must be reduced over ranks.

        Args:
            name: By which it is kept; another body needs another name.
            body: Takes the product and the solver's tensors, and returns new ones; without a look at their values.
        """
        if distributed.size() > 1:
            return None

        def step(*tensors: Tensor) -> Tensors:
            with torch.no_grad():
                found = self._graphs.iteration(name, body, self._kept, tensors, self.report)
            self._objective.passes.backward += 1
            self._objective.reduce(tuple(found[:1]))  # a limit of time looks at its clock here
            return found

        return step

    def _product(self, kind: str, q: Tensors) -> Tensors:
        parts = tuple(part.to(g.dtype) for part, g in zip(q, self.gradient, strict=True))
        with torch.no_grad():
            found = self._graphs.product(kind, self._kept, parts, self.report)
        self._objective.passes.backward += 1
        return self._objective.reduce(found)


@dataclass
class _Report:
    """What was compiled in one solve."""

    graphs: int = 0
    seconds: float = 0.0

    @contextmanager
    def compiling(self, name: str) -> Iterator[None]:
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
class _Request:
    """What one evaluation of a captured loss is asked for, and what it answers."""

    name: str
    inner: Tensors
    outer: Tensors
    compiler: str
    report: _Report = field(default_factory=_Report)
    derivatives: _Derivatives | None = None
    outputs: Tensors = ()
    gradient: Tensors = ()
    kept: Tensors = ()

    @property
    def value(self) -> Tensor:
        return self.outputs[0].detach().reshape(())


_REQUEST: ContextVar[_Request] = ContextVar("request")
_CAPTURES: WeakKeyDictionary[Any, Callable[..., Tensor]] = WeakKeyDictionary()
"""By owner of a loss: a function that ``torch.compile`` knows it by, and counts its captures by."""


def _capture(objective: Objective, request: _Request) -> None:
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


_NO_LOOKS = (
    "It must be made of tensor operations, without looking at their values (.item(), an if on a tensor, NumPy). "
    "Rewrite it, or leave compile out"
)


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
    return LossError(f"compile: the loss of {name} cannot be captured as one graph ({_first_line(error)}). {_NO_LOOKS}")


class _CapturedLoss:
    """A loss as a graph, as ``torch.compile`` gives it to a back end and calls it: with all tensors that it reads."""

    def __init__(self, module: fx.GraphModule, example: Sequence[Tensor]) -> None:
        self._module = module
        self._derivatives: dict[tuple[Any, ...], _Derivatives] = {}

    def __call__(self, *inputs: Tensor) -> Tensors:
        request = _REQUEST.get()
        place = {id(part): number for number, part in enumerate(inputs)}
        inner = tuple(place.get(id(part)) for part in request.inner)
        outer = tuple(place.get(id(part)) for part in request.outer)
        key = (inner, outer, request.compiler)
        with torch.no_grad():
            if key not in self._derivatives:
                with request.report.compiling(request.name):
                    _refuse_wrapped(self._module, request.name)
                    self._derivatives[key] = _Derivatives(self._module, inputs, request, inner, outer)
            found = self._derivatives[key]
            request.derivatives = found
            request.outputs, request.gradient, request.kept = found.set_up(inputs)
        return request.outputs


class _Derivatives:
    """The graphs of one captured loss and one choice of variables."""

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: Tensors,
        request: _Request,
        inner: tuple[int | None, ...],
        outer: tuple[int | None, ...],
    ) -> None:
        self._name = request.name
        self._compiler = _compiler(request.compiler)
        self._dtypes: list[torch.dtype] = []
        self._iterations: dict[str, Compiled] = {}
        self._products: dict[str, Compiled] = {}
        joint, shape = _trace(module, inputs, request, inner, outer)
        self.active = shape.active
        self._num_outputs, self._num_active = shape.outputs, sum(shape.active)
        setup, self._product_module, self._from_inputs = _split(joint, len(inputs), shape)
        self._setup = self._compiler(setup, list(inputs))

    def set_up(self, inputs: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """Returns the captured loss's outputs, ``g``, and what products need."""
        results = iter(self._setup(*inputs))
        outputs = tuple(next(results) for _ in range(self._num_outputs))
        gradient = tuple(next(results) for _ in range(self._num_active))
        kept = tuple(inputs[place] if place is not None else next(results) for place in self._from_inputs)
        self._dtypes = [part.dtype for part in gradient]
        return outputs, gradient, tuple(part.detach() for part in kept)

    def product(self, kind: str, kept: Tensors, q: Tensors, report: _Report) -> Tensors:
        """Returns ``"hessian"``, ``"mixed"``, or ``"both"`` products with q."""
        compiled = self._products.get(kind)
        if compiled is None:
            with report.compiling(self._name):
                module = _restricted(self._product_module, kind, self._num_active)
                compiled = self._products[kind] = self._compiler(module, [*kept, *q])
        return tuple(compiled(*kept, *q))

    def iteration(
        self, name: str, body: Callable[..., Tensors], kept: Tensors, tensors: Tensors, report: _Report
    ) -> Tensors:
        """Returns a solver's tensors after one more iteration."""
        compiled = self._iterations.get(name)
        if compiled is None:
            with report.compiling(self._name):
                compiled = self._iterations[name] = self._compile_iteration(body, kept, tensors)
        return tuple(compiled(*kept, *tensors))

    def _compile_iteration(self, body: Callable[..., Tensors], kept: Tensors, tensors: Tensors) -> Compiled:
        module = _restricted(self._product_module, "hessian", self._num_active)

        def whole(*given: Tensor) -> Tensors:
            known, state = given[: len(kept)], given[len(kept) :]

            def operator(q: Tensors) -> Tensors:
                parts = [part.to(dtype) for part, dtype in zip(q, self._dtypes, strict=True)]
                return promote(module(*known, *parts))

            return body(operator, *state)

        # Separate tensors: what is one tensor twice would be taken for one for ever.
        example = [*kept, *(part.clone() for part in tensors)]
        return self._compiler(_make_fx(whole, example), example)


@dataclass(frozen=True)
class _Shape:
    """What tracing found out.

    Attributes:
        outputs: How many outputs the captured loss has.
        active: Which inner variables reach the loss.
    """

    outputs: int
    active: tuple[bool, ...]


def _trace(
    module: fx.GraphModule,
    inputs: Tensors,
    request: _Request,
    inner: tuple[int | None, ...],
    outer: tuple[int | None, ...],
) -> tuple[fx.GraphModule, _Shape]:
    """Returns the graph of ``inputs, q ↦ outputs, g, (∂g/∂w)ᵀ q, (∂g/∂λ)ᵀ q`` in elementary operations."""
    found: list[_Shape] = []

    def joint(*given: Tensor) -> list[Tensor]:
        values, q = list(given[: len(inputs)]), given[len(inputs) :]
        for place in {place for place in (*inner, *outer) if place is not None}:
            values[place] = values[place].detach().requires_grad_()
        with torch.enable_grad():
            outputs = module(*values)
            loss = outputs[0].reshape(())
            known = [values[place] for place in inner if place is not None]
            first: Sequence[Tensor | None] = (None,) * len(known)
            if loss.requires_grad and known:
                first = torch.autograd.grad(loss, known, create_graph=True, allow_unused=True)
            rest = iter(first)
            grads = [None if place is None else next(rest) for place in inner]
            active = tuple(grad is not None for grad in grads)
            found.append(_Shape(len(outputs), active))
            gradient = [grad for grad in grads if grad is not None]
            cotangents = [part for part, on in zip(q, active, strict=True) if on]
            own = [values[place] for place, on in zip(inner, active, strict=True) if place is not None and on]
            above = [
                part.detach() if place is None else values[place]
                for place, part in zip(outer, request.outer, strict=True)
            ]
            products = _pulled(gradient, cotangents, own, above)
        return [part.detach() for part in (*outputs, *gradient, *products)]

    example = [*inputs, *(torch.empty_like(part) for part in request.inner)]
    with second_derivative_errors(request.name):
        traced = _make_fx(joint, example)
    _refuse_operations(traced, request.name)
    return traced, found[-1]


def _pulled(gradient: list[Tensor], q: list[Tensor], inner: list[Tensor], outer: list[Tensor]) -> Tensors:
    pairs = [(g, part) for g, part in zip(gradient, q, strict=True) if g.requires_grad]
    variables = (*inner, *outer)
    wanted = tuple(part for part in variables if part.requires_grad)
    if not pairs or not wanted:
        return tuple(torch.zeros_like(part) for part in variables)
    outputs, cotangents = zip(*pairs, strict=True)
    grads = iter(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True))
    return dense_gradient([next(grads) if part.requires_grad else None for part in variables], variables)


def _split(joint: fx.GraphModule, count: int, shape: _Shape) -> tuple[fx.GraphModule, fx.GraphModule, list[int | None]]:
    """Splits a graph of (inputs, q) into what does not depend on q, and what does.

    Returns:
        The set-up, ``inputs ↦ outputs, g, kept``; the products, ``kept, q ↦ both``; and for each tensor that the
        products take its place among the inputs, or None where the set-up makes it. Views are made again from what
        they are views of, which costs nothing.
    """
    nodes = list(joint.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    results = list(nodes[-1].args[0])
    first = shape.outputs + sum(shape.active)
    moving = set(inputs[count:])
    for node in nodes:
        if node.op == "call_function" and any(source in moving for source in node.all_input_nodes):
            moving.add(node)
    needed: set[fx.Node] = set()  # by the products, from the set-up
    inside: set[fx.Node] = set()
    stack = [node for node in results[first:] if isinstance(node, fx.Node)]
    while stack:
        node = stack.pop()
        if node in inside or node in needed:
            continue
        if node in inputs:
            needed.add(node)
        elif node in moving or _is_free(node):
            inside.add(node)
            stack.extend(node.all_input_nodes)
        else:
            needed.add(node)
    vectors = [node for node, on in zip(inputs[count:], shape.active, strict=True) if on]
    kept = [node for node in nodes if node in needed and node not in inputs[count:]]
    product = _graph(joint, [*kept, *vectors], [node for node in nodes if node in inside], results[first:])
    made = [node for node in kept if node.op != "placeholder"]
    fixed = [node for node in nodes if node.op not in ("placeholder", "output") and node not in moving]
    setup = _graph(joint, inputs[:count], fixed, [*results[:first], *made])
    return setup, product, [inputs.index(node) if node.op == "placeholder" else None for node in kept]


def _graph(
    module: fx.GraphModule, inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[Any]
) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(tuple(copies[node] for node in outputs))
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)


def _restricted(module: fx.GraphModule, kind: str, num_inner: int) -> fx.GraphModule:
    """Returns the graph of one of the two products, or of both."""
    if kind == "both":
        return module
    nodes = list(module.graph.nodes)
    results = nodes[-1].args[0]
    chosen = results[:num_inner] if kind == "hessian" else results[num_inner:]
    inputs = [node for node in nodes if node.op == "placeholder"]
    return _graph(module, inputs, [node for node in nodes if node.op not in ("placeholder", "output")], chosen)


def _is_free(node: fx.Node) -> bool:
    """Whether a node computes nothing: a view, or a constant of the graph."""
    if node.op == "get_attr":
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    aliases = [argument.alias_info for argument in schema.arguments if argument.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def _make_fx(function: Callable[..., Any], example: Sequence[Tensor]) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    traced: fx.GraphModule = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(
        *(part.detach() for part in example)
    )
    # A write through a view is a node that nothing uses: as an operation of its own it is not taken for dead.
    pure = torch.func.functionalize(traced, remove="mutations")
    traced = make_fx(pure, tracing_mode="fake", _allow_non_fake_inputs=True)(*(part.detach() for part in example))
    traced.graph.eliminate_dead_code()
    return traced


def _compiler(name: str) -> Callable[[fx.GraphModule, list[Tensor]], Compiled]:
    from torch._dynamo.backends.registry import lookup_backend

    backend = lookup_backend(name)

    def compiled(module: fx.GraphModule, example: list[Tensor]) -> Compiled:
        module.recompile()
        with torch.no_grad():
            made: Compiled = backend(module, [part.detach() for part in example])
        return made

    return compiled


def _refuse_wrapped(module: fx.GraphModule, name: str) -> None:
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise LossError(
                f"compile: the loss of {name} contains {str(node.target)!r}, which hides operations (a custom "
                "autograd function, activation checkpointing, control flow). Take it out, or leave compile out"
            )


def _refuse_operations(module: fx.GraphModule, name: str) -> None:
    for node in module.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.data_dependent_output in tags:
            raise LossError(f"compile: the loss of {name} looks at the value of a tensor ({node.target}). {_NO_LOOKS}")
        if torch.Tag.nondeterministic_seeded in tags:
            raise LossError(
                f"compile: the loss of {name} draws random numbers ({node.target}), and the products of one solve must "
                "see the same ones. Draw them outside of the loss and pass them in the batch, turn dropout off "
                "(module.eval()), or leave compile out"
            )
