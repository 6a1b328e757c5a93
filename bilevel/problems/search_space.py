"""What an architecture search chooses from: mixtures of candidate operations, and cells of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from bilevel.errors import ConfigError, unknown_name
from bilevel.problems.supervised import module_dict
from bilevel.validation import check_choice, check_integer, check_number

__all__ = [
    "Candidates",
    "Cell",
    "CellGenotype",
    "DiscreteCell",
    "MixedOperation",
    "Operations",
    "image_operations",
    "tabular_operations",
]

Factory = Callable[[], nn.Module]
Candidates = Mapping[str, nn.Module | Factory]
Operations = Candidates | Callable[[int, int], Candidates]
"""Candidates for every edge of a cell, or a function of the edge (source, node) that returns them."""
CellGenotype = dict[str, dict[str, str]]
"""Node → source → operation."""

NONE = "none"
"""The candidate that stands for no connection: part of the mixture, never chosen."""
COMBINE = ("concat", "sum", "last")


class MixedOperation(nn.Module):
    """A mixture of operations: ``Σₒ πₒ o(x)`` with ``π = softmax(λ / τ)``.

    Args:
        candidates: Modules, or functions that make them, by name; at least two. All must return the same shape. The
            name ``"none"`` stands for no connection: it takes part in the mixture and is never chosen.
        temperature: τ. Lower is closer to a choice.
        logits: λ of another mixture, to share it; zeros of its own by default, under which all candidates count alike.

    Raises:
        ConfigError: A single candidate or none to choose from; a name that torch has no place for; a temperature that
            is not above 0; logits of another size; at a call, candidates whose outputs differ in shape.

    Cost: every candidate's forward pass.
    """

    def __init__(self, candidates: Candidates, *, temperature: float = 1.0, logits: nn.Parameter | None = None) -> None:
        super().__init__()
        if sum(name != NONE for name in candidates) < 2:
            raise ConfigError(
                f"a search needs at least two candidates that can be chosen ({NONE!r} cannot), not {list(candidates)}"
            )
        self.candidates = module_dict("candidate", {name: _made(name, each) for name, each in candidates.items()})
        if logits is not None and logits.shape != (len(candidates),):
            raise ConfigError(f"logits of shape {tuple(logits.shape)} cannot weigh {len(candidates)} candidates")
        self.logits = nn.Parameter(torch.zeros(len(candidates))) if logits is None else logits
        self.temperature = temperature

    @property
    def temperature(self) -> float:
        """τ; it may be changed between steps. A setting: no checkpoint holds it, so that a schedule sets it anew."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        check_number("MixedOperation", "temperature", value, minimum=0.0, exclusive=True)
        self._temperature = value

    def weights(self) -> Tensor:
        """Returns π, one weight a candidate."""
        return torch.softmax(self.logits / self.temperature, 0)

    def log_weights(self) -> Tensor:
        """Returns log π, which is finite where π is rounded to 0."""
        return torch.log_softmax(self.logits / self.temperature, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the mixture."""
        outputs: dict[str, Tensor] = {name: candidate(x) for name, candidate in self.candidates.items()}
        shapes = {name: tuple(output.shape) for name, output in outputs.items()}
        if len(set(shapes.values())) > 1:
            raise ConfigError(f"candidates of one mixture must return one shape, not {shapes}, for {tuple(x.shape)}")
        weights = self.weights()
        total = weights[0] * next(iter(outputs.values()))
        for weight, output in zip(weights[1:], list(outputs.values())[1:], strict=True):
            total = total + weight * output
        return total

    def choice(self) -> tuple[str, float]:
        """Returns the strongest candidate other than ``"none"``, and ``log π`` of it.

        Raises:
            ConfigError: Several are equally strong, as before a search.
        """
        # The logarithm in float64 tells candidates apart whose weights are rounded to 0 or 1.
        found = torch.log_softmax(self.logits.detach().double() / self.temperature, 0).tolist()
        strength = {name: value for name, value in zip(self.candidates, found, strict=True) if name != NONE}
        best = max(strength, key=lambda name: strength[name])
        ties = [name for name, value in strength.items() if value == strength[best]]
        if len(ties) > 1:
            raise ConfigError(f"candidates {ties} are equally strong: there is no choice to read before a search")
        return best, strength[best]


class Cell(nn.Module):
    """A directed acyclic graph of mixtures: ``xⱼ = Σ_{i<j} mixtureᵢⱼ(xᵢ)`` over the inputs and all earlier nodes.

    Args:
        operations: The candidates of every edge, as functions that make them; or a function of the edge
            ``(source, node)`` that returns its candidates, as for strides in a reduction cell. Sources and nodes are
            counted together, the inputs first.
        num_inputs: States that the cell is called with.
        num_nodes: Nodes of its own.
        combine: The output: all nodes, concatenated along dimension 1 (``"concat"``), their ``"sum"``, or the
            ``"last"`` one.
        temperature: τ of every mixture.
        share: A cell of the same graph and candidates whose λ this one shares, as DARTS' cells of one kind do.

    Raises:
        ConfigError: A value out of range, a module that several edges would share, or what :class:`MixedOperation`
            raises.

    Source: Liu, Simonyan, Yang, ICLR 2019 (DARTS, arXiv 1806.09055), section 2.1.
    """

    def __init__(
        self,
        operations: Operations,
        *,
        num_inputs: int = 2,
        num_nodes: int = 4,
        combine: str = "concat",
        temperature: float = 1.0,
        share: Cell | None = None,
    ) -> None:
        super().__init__()
        _check_cell(num_inputs, num_nodes, combine)
        self.num_inputs, self.num_nodes, self.combine = num_inputs, num_nodes, combine
        edges = [(source, node) for node in range(num_inputs, num_inputs + num_nodes) for source in range(node)]
        if share is not None and list(share.edges) != [f"{source}_{node}" for source, node in edges]:
            raise ConfigError(f"a cell with edges {list(share.edges)} cannot share its weights with another graph")
        self.edges: nn.ModuleDict = nn.ModuleDict()
        for source, node in edges:
            key = f"{source}_{node}"
            found = _candidates(operations, source, node)
            logits = None if share is None else share.mixture(source, node).logits
            self.edges[key] = MixedOperation(found, temperature=temperature, logits=logits)

    def mixture(self, source: int, node: int) -> MixedOperation:
        """Returns the mixture of an edge."""
        found = self.edges[f"{source}_{node}"]
        assert isinstance(found, MixedOperation)
        return found

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns the cell's output."""
        into = {node: list(range(node)) for node in range(self.num_inputs, self.num_inputs + self.num_nodes)}
        return _graph(inputs, self.num_inputs, into, self.edges, self.combine)

    def genotype(self, *, num_edges: int = 2) -> CellGenotype:
        """Returns what the mixtures have chosen, as ``{"2": {"0": "sep_conv_3x3", "1": "skip_connect"}, …}``.

        DARTS' rule: of each node's incoming edges the ``num_edges`` strongest stay, where an edge is as strong as its
        strongest candidate other than ``"none"``; on each of them that candidate. JSON knows all of it.

        Raises:
            ConfigError: Candidates or edges are equally strong, as before a search.
        """
        check_integer("Cell.genotype", "num_edges", num_edges, minimum=1)
        found: CellGenotype = {}
        for node in range(self.num_inputs, self.num_inputs + self.num_nodes):
            choices = {source: self.mixture(source, node).choice() for source in range(node)}
            order = sorted(choices, key=lambda source, choices=choices: -choices[source][1])  # type: ignore[misc]
            kept, left = order[:num_edges], order[num_edges:]
            if left and choices[left[0]][1] == choices[kept[-1]][1]:
                raise ConfigError(f"edges {kept[-1]} and {left[0]} into node {node} are equally strong: search first")
            found[str(node)] = {str(source): choices[source][0] for source in sorted(kept)}
        return found


class DiscreteCell(nn.Module):
    """A cell with one operation on each of the edges that a genotype names.

    Args:
        genotype: Node → source → operation, as :meth:`Cell.genotype` returns it.
        operations: As for :class:`Cell`; other channels, or batch normalisation with parameters, are welcome.
        num_inputs: As for :class:`Cell`.
        combine: Likewise.

    Raises:
        ConfigError: Nodes that are not numbered from ``num_inputs``, or an edge from a later node.
        UnknownNameError: An operation that there is none of.
    """

    def __init__(
        self,
        genotype: Mapping[str, Mapping[str, str]],
        operations: Operations,
        *,
        num_inputs: int = 2,
        combine: str = "concat",
    ) -> None:
        super().__init__()
        _check_cell(num_inputs, len(genotype), combine)
        self.num_inputs, self.combine = num_inputs, combine
        self._into: dict[int, list[int]] = {}
        self.edges = nn.ModuleDict()
        for node, (key, chosen) in enumerate(genotype.items(), num_inputs):
            sources = [str(source) for source in range(node)]
            if key != str(node) or not chosen or not set(chosen) <= set(sources):
                raise ConfigError(
                    f"node {node} of a genotype with {num_inputs} inputs must be {str(node)!r}: "
                    f"{{source: operation}} with sources of {sources}, not {key!r}: {dict(chosen)}"
                )
            self._into[node] = [int(source) for source in chosen]
            for source, name in chosen.items():
                found = _candidates(operations, int(source), node)
                if name not in found:
                    raise unknown_name(f"operation of edge {source} → {node}", name, found)
                self.edges[f"{source}_{node}"] = _made(name, found[name])

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns the cell's output."""
        return _graph(inputs, self.num_inputs, self._into, self.edges, self.combine)


def image_operations(
    channels: int, names: Sequence[str] | None = None, *, stride: int = 1, affine: bool = False
) -> dict[str, Factory]:
    """Returns DARTS' candidates for images ``(N, channels, height, width)``.

    ``none``, ``skip_connect``, ``max_pool_3x3``, ``avg_pool_3x3``, ``sep_conv_3x3`` and ``sep_conv_5x5`` (depthwise
    separable, applied twice), ``dil_conv_3x3`` and ``dil_conv_5x5`` (depthwise separable, dilation 2); each of them is
    ReLU, convolution, batch normalisation, and pools are normalised. With a stride, ``skip_connect`` is a strided 1 × 1
    convolution, where DARTS shifts and concatenates two.

    Args:
        channels: In and out.
        names: Those to return; all by default.
        stride: 2 halves height and width.
        affine: Whether batch normalisation has parameters. In a search it should not: they would rescale the mixture.

    Raises:
        UnknownNameError: A name that is none of these.
    """

    def norm() -> nn.Module:
        return nn.BatchNorm2d(channels, affine=affine)

    def pointwise(step: int) -> nn.Module:
        return nn.Conv2d(channels, channels, 1, step, bias=False)

    def separable(size: int, step: int, dilation: int = 1) -> list[nn.Module]:
        padding = dilation * (size // 2)
        depth = nn.Conv2d(channels, channels, size, step, padding, dilation, groups=channels, bias=False)
        return [nn.ReLU(), depth, pointwise(1), norm()]

    def skip() -> nn.Module:
        return nn.Identity() if stride == 1 else nn.Sequential(nn.ReLU(), pointwise(stride), norm())

    made: dict[str, Factory] = {
        NONE: lambda: _Zero(stride),
        "skip_connect": skip,
        "max_pool_3x3": lambda: nn.Sequential(nn.MaxPool2d(3, stride, 1), norm()),
        "avg_pool_3x3": lambda: nn.Sequential(nn.AvgPool2d(3, stride, 1, count_include_pad=False), norm()),
        "sep_conv_3x3": lambda: nn.Sequential(*separable(3, stride), *separable(3, 1)),
        "sep_conv_5x5": lambda: nn.Sequential(*separable(5, stride), *separable(5, 1)),
        "dil_conv_3x3": lambda: nn.Sequential(*separable(3, stride, 2)),
        "dil_conv_5x5": lambda: nn.Sequential(*separable(5, stride, 2)),
    }
    return _named(made, names)


def tabular_operations(width: int, names: Sequence[str] | None = None) -> dict[str, Factory]:
    """Returns candidates for features ``(N, width)``.

    ``none``, ``skip_connect``, and ``linear``, ``relu``, ``tanh``, ``glu``: a linear layer and what the name says.

    Args:
        width: Features, in and out.
        names: Those to return; all by default.

    Raises:
        UnknownNameError: A name that is none of these.
    """
    made: dict[str, Factory] = {
        NONE: lambda: _Zero(1),
        "skip_connect": nn.Identity,
        "linear": lambda: nn.Linear(width, width),
        "relu": lambda: nn.Sequential(nn.Linear(width, width), nn.ReLU()),
        "tanh": lambda: nn.Sequential(nn.Linear(width, width), nn.Tanh()),
        "glu": lambda: nn.Sequential(nn.Linear(width, 2 * width), nn.GLU()),
    }
    return _named(made, names)


class _Zero(nn.Module):
    """No connection: zeros of the shape that the other candidates return."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x if self.stride == 1 else x[..., :: self.stride, :: self.stride])


def _named(made: dict[str, Factory], names: Sequence[str] | None) -> dict[str, Factory]:
    for name in names or ():
        check_choice("operations", "names", name, tuple(made))
    return made if names is None else {name: made[name] for name in names}


def _made(name: str, candidate: nn.Module | Factory) -> nn.Module:
    found: object = candidate
    if not isinstance(candidate, nn.Module) and callable(candidate):
        found = candidate()
    if not isinstance(found, nn.Module):
        raise ConfigError(f"candidate {name!r} must be a module or a function that makes one, not {candidate!r}")
    return found


def _candidates(operations: Operations, source: int, node: int) -> Candidates:
    if not isinstance(operations, Mapping):
        return operations(source, node)
    ready = [name for name, candidate in operations.items() if isinstance(candidate, nn.Module)]
    if ready:
        raise ConfigError(f"every edge of a cell needs modules of its own: give functions that make {ready}")
    return operations


def _check_cell(num_inputs: int, num_nodes: int, combine: str) -> None:
    check_integer("Cell", "num_inputs", num_inputs, minimum=1)
    check_integer("Cell", "num_nodes", num_nodes, minimum=1)
    check_choice("Cell", "combine", combine, COMBINE)


def _graph(
    inputs: Sequence[Tensor], expected: int, into: Mapping[int, Sequence[int]], edges: nn.ModuleDict, combine: str
) -> Tensor:
    if len(inputs) != expected:
        raise ConfigError(f"a cell of {expected} inputs was called with {len(inputs)}")
    states = list(inputs)
    for node, sources in into.items():
        parts = [edges[f"{source}_{node}"](states[source]) for source in sources]
        states.append(torch.stack(parts).sum(0) if len(parts) > 1 else parts[0])
    nodes = states[expected:]
    if combine == "last":
        return nodes[-1]
    return torch.cat(nodes, 1) if combine == "concat" else torch.stack(nodes).sum(0)
