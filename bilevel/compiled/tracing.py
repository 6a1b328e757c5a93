"""The graph of a captured loss's derivatives in elementary operations, split into set-up and product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from bilevel.double_backward import second_derivative_errors
from bilevel.errors import LossError
from bilevel.functional import dense_gradient
from bilevel.vector import Tensors

__all__ = [
    "NO_LOOKS",
    "Compiled",
    "Shape",
    "compiler_of",
    "refuse_wrapped",
    "restricted",
    "split",
    "trace",
    "traced_graph",
]

Compiled = Callable[..., Sequence[Tensor]]

NO_LOOKS = (
    "It must be made of tensor operations, without looking at their values (.item(), an if on a tensor, NumPy). "
    "Rewrite it, or leave compile out"
)


@dataclass(frozen=True)
class Shape:
    """What tracing found out.

    Attributes:
        outputs: How many outputs the captured loss has.
        active: Which inner variables reach the loss.
    """

    outputs: int
    active: tuple[bool, ...]


def trace(
    module: fx.GraphModule,
    inputs: Tensors,
    name: str,
    variables: tuple[Tensors, Tensors],
    inner: tuple[int | None, ...],
    outer: tuple[int | None, ...],
) -> tuple[fx.GraphModule, Shape]:
    """Returns the graph of ``inputs, q ↦ outputs, g, (∂g/∂w)ᵀ q, (∂g/∂λ)ᵀ q`` in elementary operations.

    Args:
        module: The captured loss.
        inputs: All tensors that it reads.
        name: Of the loss, for messages.
        variables: w and λ.
        inner: Where each of w is among the inputs; None where the loss does not read it.
        outer: Likewise λ.
    """
    found: list[Shape] = []

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
            found.append(Shape(len(outputs), active))
            gradient = [grad for grad in grads if grad is not None]
            cotangents = [part for part, on in zip(q, active, strict=True) if on]
            own = [values[place] for place, on in zip(inner, active, strict=True) if place is not None and on]
            above = [
                part.detach() if place is None else values[place]
                for place, part in zip(outer, variables[1], strict=True)
            ]
            products = _pulled(gradient, cotangents, own, above)
        return [part.detach() for part in (*outputs, *gradient, *products)]

    example = [*inputs, *(torch.empty_like(part) for part in variables[0])]
    with second_derivative_errors(name):
        traced = traced_graph(joint, example)
    _refuse_operations(traced, name)
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


def split(joint: fx.GraphModule, count: int, shape: Shape) -> tuple[fx.GraphModule, fx.GraphModule, list[int | None]]:
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


def restricted(module: fx.GraphModule, kind: str, num_inner: int) -> fx.GraphModule:
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


def traced_graph(function: Callable[..., Any], example: Sequence[Tensor]) -> fx.GraphModule:
    """Returns a function of tensors as a graph of elementary operations that change nothing in place."""
    from torch.fx.experimental.proxy_tensor import make_fx

    traced: fx.GraphModule = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(
        *(part.detach() for part in example)
    )
    # A write through a view is a node that nothing uses: as an operation of its own it is not taken for dead.
    pure = torch.func.functionalize(traced, remove="mutations")
    traced = make_fx(pure, tracing_mode="fake", _allow_non_fake_inputs=True)(*(part.detach() for part in example))
    traced.graph.eliminate_dead_code()
    return traced


def compiler_of(name: str) -> Callable[[fx.GraphModule, list[Tensor]], Compiled]:
    """Returns what compiles a graph, given tensors like its inputs, by a back end of ``torch.compile``."""
    from torch._dynamo.backends.registry import lookup_backend

    backend = lookup_backend(name)

    def compiled(module: fx.GraphModule, example: list[Tensor]) -> Compiled:
        module.recompile()
        with torch.no_grad():
            made: Compiled = backend(module, [part.detach() for part in example])
        return made

    return compiled


def refuse_wrapped(module: fx.GraphModule, name: str) -> None:
    """Raises where a captured loss holds operations in a box that tracing does not open."""
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
            raise LossError(f"compile: the loss of {name} looks at the value of a tensor ({node.target}). {NO_LOOKS}")
        if torch.Tag.nondeterministic_seeded in tags:
            raise LossError(
                f"compile: the loss of {name} draws random numbers ({node.target}), and the products of one solve must "
                "see the same ones. Draw them outside of the loss and pass them in the batch, turn dropout off "
                "(module.eval()), or leave compile out"
            )
