"""What cannot be differentiated twice, and the error that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C._autograd import _get_sequence_nr
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.autograd.graph import Node

from bilevel.errors import LossError
from bilevel.vector import Tensors

__all__ = [
    "NoSecondDerivativeError",
    "Obstacle",
    "made_since",
    "obstacles",
    "operations_made",
    "raise_explained",
    "refuse_obstacles",
    "refuse_once_differentiable",
    "second_derivative_errors",
]


_CUSTOM: type = BackwardCFunction  # what the nodes of custom functions derive from; the stubs know no such node


class NoSecondDerivativeError(LossError):
    """A loss that cannot be differentiated twice.

    Attributes:
        reason: Which operation stands in the way.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Obstacle:
    """An operation that has no second derivative.

    Attributes:
        node: Name of its node in the graph.
        operation: What a user calls it.
        remedy: What does the same and has one.
    """

    node: str
    operation: str
    remedy: str


def second_derivative_errors(name: str) -> AbstractContextManager[None]:
    """Names the operation that has no second derivative, and the way out."""
    return _Explained(name)


class _Explained(AbstractContextManager[None]):
    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise_explained(error, self._name)


def raise_explained(error: RuntimeError, name: str) -> None:
    """Raises what a failed derivative means for the loss of ``name``, where that is known.

    Raises:
        LossError: The loss has no such derivative.
    """
    text = str(error)
    if any(sign in text for sign in _REENTRANT):
        raise LossError(
            f"the loss of {name} cannot be differentiated: reentrant activation checkpointing works with "
            ".backward() only. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False) "
            f"({text.splitlines()[0]})"
        ) from error
    for sign, reason in _NO_SECOND_DERIVATIVE.items():
        if sign in text:
            raise _no_second_derivative(name, f"{reason} ({text.splitlines()[0]})") from error


def _no_second_derivative(
    name: str,
    reason: str,
    remedy: str = "replace the operation (for attention: the math back end, "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or eager attention)",
) -> NoSecondDerivativeError:
    return NoSecondDerivativeError(
        f"the loss of {name} cannot be differentiated twice: {reason}. Give the method products='finite_difference', "
        f"or use method 'finite_difference': both need first derivatives only. Or {remedy}.",
        reason,
    )


def obstacles(value: Tensor, inputs: Sequence[Tensor]) -> list[Obstacle]:
    """Returns the operations without a second derivative that lie between a loss and any of its inputs, each once.

    Looks at the forward graph, so that nothing is computed: about a microsecond a node. An operation whose gradient is
    constant (an embedding bag under a linear loss) is no obstacle in the end; :func:`refuse_obstacles` makes sure.
    """
    found: dict[str, Obstacle] = {}
    wanted = {id(part) for part in inputs}
    for node in _reachable(value.grad_fn):
        name = type(node).name(node)  # a custom function's context is its node, and may have any attribute
        known = _OBSTACLES.get(name)
        if known is None and _is_once_differentiable(node):
            function = type(node).__name__.removesuffix("Backward")
            known = (f"the custom function {function}, which is marked once_differentiable", _DROP_MARK)
        if known is not None and name not in found and _leads_to(node, wanted):
            found[name] = Obstacle(name, *known)
    return sorted(found.values(), key=lambda obstacle: obstacle.node)


def refuse_obstacles(value: Tensor, inputs: Tensors, name: str) -> None:
    """Raises where a loss cannot be differentiated twice, naming the operation and what to do.

    For use once, before the first product. Where the graph holds a suspect other than fused attention, a second
    derivative is tried: 2 backward passes. The graph is kept.

    Args:
        value: The loss.
        inputs: What it is to be differentiated by: leaves.
        name: Whose loss it is, for the message.

    Raises:
        LossError: It cannot.
    """
    found = obstacles(value, inputs)
    if not found:
        return
    first = found[0]
    error = _no_second_derivative(name, f"{first.operation} ({first.node}) has no second derivative", first.remedy)
    if any(obstacle.remedy == _DROP_MARK for obstacle in found):  # passes over in silence
        raise error
    if any(obstacle.operation == _FUSED_ATTENTION[0] for obstacle in found):
        raise error  # a gradient's graph of a large model, to find out what is known: its size is gigabytes
    try:
        grads: Sequence[Tensor | None] = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
        curved = [grad for grad in grads if grad is not None and grad.requires_grad]
        if curved:
            torch.autograd.grad(curved, inputs, [torch.zeros_like(g) for g in curved], allow_unused=True)
    except RuntimeError as cause:
        if any(sign in str(cause) for sign in _NO_SECOND_DERIVATIVE):
            raise error from cause
        raise


def refuse_once_differentiable(value: Tensor, inputs: Tensors, name: str) -> list[Node]:
    """Raises for a custom function marked ``once_differentiable`` on the way to an input.

    Asked for particular inputs, autograd finds no path through what such a function returns and leaves its part of the
    second derivative out, without a word. Walks the forward graph: a third of a microsecond a node.

    Returns:
        The nodes of the forward graph.
    """
    nodes = _reachable(value.grad_fn)
    custom = [node for node in nodes if isinstance(node, _CUSTOM)]
    if custom:
        wanted = {id(part) for part in inputs}
        for node in custom:
            if _is_once_differentiable(node) and _leads_to(node, wanted):
                function = type(node).__name__.removesuffix("Backward")
                raise _no_second_derivative(name, f"the custom function {function} is marked once_differentiable")
    return nodes


def operations_made() -> int:
    """Returns autograd's count of the operations that this thread has made."""
    return _get_sequence_nr()


def made_since(nodes: Sequence[Node], number: int) -> bool:
    """Whether all operations of a graph were made since :func:`operations_made` returned ``number``.

    Others belong to somebody else too: a loss that reads what was computed once for several steps. What frees this
    graph would free theirs.

    Args:
        nodes: The graph's.
        number: See above.
    """
    return min([type(node)._sequence_nr(node) for node in nodes], default=number) >= number


def _leads_to(node: Node, wanted: set[int]) -> bool:
    """Whether a node's inputs come from any of the tensors with these ids."""
    return any(id(getattr(below, "variable", None)) in wanted for below in _reachable(node))


def _is_once_differentiable(node: Node) -> bool:
    backward = getattr(getattr(type(node), "_forward_cls", None), "backward", None)
    # The decorator's wrapper carries the user's name; its globals are those of the module that defines the decorator.
    module = getattr(backward, "__globals__", {}).get("__name__")
    return hasattr(backward, "__wrapped__") and module == once_differentiable.__module__


def _reachable(root: Node | None) -> list[Node]:
    """Returns a node and all that come before it, each once."""
    if root is None:
        return []
    found, seen = [root], {root}
    for node in found:  # which grows meanwhile
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


_REENTRANT = (
    "Checkpointing is not compatible with .grad()",
    "When use_reentrant=True, torch.utils.checkpoint is incompatible",
)

_NO_SECOND_DERIVATIVE: Mapping[str, str] = {
    "derivative for aten::": "an operation has no second derivative",
    "derivative for '": "an operation has no second derivative",
    "does not currently support double backward": "compiled graphs have no second derivative",
    "compiled with non-empty donated buffers": "compiled graphs have no second derivative",
}

_DROP_MARK = "drop the mark, and write its backward in differentiable operations"
_FUSED_ATTENTION = (
    "fused attention",
    "run it under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or load the model with eager attention "
    "(attn_implementation='eager' in transformers)",
)
_CTC = ("CTC loss", "keep the CTC loss to problems that nothing is differentiated through")
_CUDNN = ("a cuDNN RNN", "run it under torch.backends.cudnn.flags(enabled=False)")
_COMPILED = (
    "a module or function compiled by torch.compile",
    "give the problem the module as it was before torch.compile; torch.compile(…, backend='eager') has one too",
)
_GRID = (
    "grid_sample",
    "interpolate with gather and elementary operations (some versions of torch differentiate it twice)",
)
_DISTANCES = "write the distances in elementary operations: (a[:, None] - b[None]).square().sum(-1).sqrt()"

# Found by differentiating every operation of torch's own test table twice, on the CPU and on CUDA.
_OBSTACLES: Mapping[str, tuple[str, str]] = {
    "ScaledDotProductFlashAttentionForCpuBackward0": _FUSED_ATTENTION,
    "ScaledDotProductFlashAttentionBackward0": _FUSED_ATTENTION,
    "ScaledDotProductEfficientAttentionBackward0": _FUSED_ATTENTION,
    "ScaledDotProductCudnnAttentionBackward0": _FUSED_ATTENTION,
    "ScaledDotProductFusedAttentionOverrideableBackward0": _FUSED_ATTENTION,
    "FlashAttentionBackward0": _FUSED_ATTENTION,
    "EfficientAttentionBackward0": _FUSED_ATTENTION,
    "CompiledFunctionBackward": _COMPILED,
    "CudnnRnnBackward0": _CUDNN,
    "MiopenRnnBackward0": _CUDNN,
    "CtcLossBackward0": _CTC,
    "CtcLossBackward1": _CTC,
    "CudnnCtcLossBackward0": _CTC,
    "GridSampler2DBackward0": _GRID,
    "GridSampler3DBackward0": _GRID,
    "CudnnGridSamplerBackward0": _GRID,
    "CdistBackward0": ("torch.cdist", _DISTANCES),
    "PdistBackward0": ("torch.nn.functional.pdist", _DISTANCES),
    "EmbeddingBagBackward0": ("nn.EmbeddingBag", "use nn.Embedding and sum or average what it returns"),
    "HardsigmoidBackward0": ("hardsigmoid", "write it as torch.nn.functional.relu6(x + 3) / 6"),
    "MultiMarginLossBackward0": ("multi_margin_loss", "write it with relu"),
    "MultilabelMarginLossBackward0": ("multilabel_margin_loss", "write it with relu"),
    "SegmentReduceBackward0": ("torch.segment_reduce", "use index_add or scatter_reduce"),
    "SparseMmReduceImplBackward0": ("torch.sparse.mm with reduce", "use torch.sparse.mm without it"),
}
