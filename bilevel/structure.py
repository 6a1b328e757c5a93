"""Parameters as users hold them (a tensor, sequences, mappings) and as solvers want them (a flat tuple)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bilevel.errors import ParameterError
from bilevel.vector import Tensors

__all__ = ["Structure", "flatten"]


@dataclass(frozen=True)
class Structure:
    """The shape of a collection of parameters, to rebuild it with other tensors.

    Attributes:
        template: The user's collection; its tensors stand for their places.
        index: Place of each distinct variable tensor in the flat tuple, by ``id``.
        names: A name for each variable: ``"weight"``, ``"[0]"``, ``"layer.bias"``.
    """

    template: Any
    index: Mapping[int, int]
    names: tuple[str, ...]

    def rebuild(self, leaves: Sequence[Tensor]) -> Any:
        """Returns the collection with ``leaves`` in the places of its variables; constants stay."""
        return self._map(self.template, leaves, constants=True)

    def rebuild_gradient(self, leaves: Sequence[Tensor]) -> Any:
        """Like :meth:`rebuild`, with None in the places of constants."""
        return self._map(self.template, leaves, constants=False)

    def _map(self, node: Any, leaves: Sequence[Tensor], *, constants: bool) -> Any:
        if isinstance(node, Tensor):
            place = self.index.get(id(node))
            if place is None:
                return node if constants else None
            return leaves[place]
        if isinstance(node, Mapping):
            return {key: self._map(child, leaves, constants=constants) for key, child in node.items()}
        children = [self._map(child, leaves, constants=constants) for child in node]
        if isinstance(node, tuple):
            return type(node)(*children) if hasattr(node, "_fields") else tuple(children)
        return children


def flatten(params: Any, role: str) -> tuple[Tensors, Structure]:
    """Collects the distinct variable tensors of a collection, in order.

    A tensor that stands in several places is one variable. An ``nn.Parameter`` with ``requires_grad=False`` is
    frozen: a constant, neither differentiated nor perturbed. Any other tensor is a variable, whether it requires
        gradients or not.

    Args:
        params: A tensor, or a sequence or mapping (possibly nested) of tensors; an iterator or an
            ``nn.ParameterList`` is read into a tuple, an ``nn.ParameterDict`` into a dict.
        role: ``"inner"`` or ``"outer"``, for messages.

    Raises:
        ParameterError: No tensor at all, something that is no tensor, or a tensor that is not real floating point.
    """
    if isinstance(params, (Iterator, nn.ParameterList)):
        params = tuple(params)
    elif isinstance(params, nn.ParameterDict):
        params = dict(params.items())
    leaves: list[Tensor] = []
    names: list[str] = []
    index: dict[int, int] = {}
    for name, leaf in _walk(params, "", role):
        frozen = isinstance(leaf, nn.Parameter) and not leaf.requires_grad
        if frozen or id(leaf) in index:
            continue
        if not leaf.dtype.is_floating_point:
            raise ParameterError(
                f"{role} parameter {name or 'given'!r} has dtype {leaf.dtype}; real floating point is needed. "
                "Convert it, or pass it to the loss by a closure if it is data."
            )
        index[id(leaf)] = len(leaves)
        leaves.append(leaf)
        names.append(name or role)
    if not leaves:
        raise ParameterError(
            f"{role} parameters hold no tensor to differentiate: pass at least one tensor that is not a frozen "
            "nn.Parameter"
        )
    return tuple(leaves), Structure(params, index, tuple(names))


def _walk(node: Any, name: str, role: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield name, node
    elif isinstance(node, Mapping):
        for key, child in node.items():
            yield from _walk(child, f"{name}.{key}" if name else str(key), role)
    elif isinstance(node, Sequence) and not isinstance(node, (str, bytes)):
        for place, child in enumerate(node):
            yield from _walk(child, f"{name}[{place}]", role)
    else:
        raise ParameterError(
            f"{role} parameters must be a tensor, or a sequence or mapping of tensors; "
            f"{name or 'the argument'} is a {type(node).__name__}"
        )
